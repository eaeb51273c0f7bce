"""Detectors: does a picture show something unsafe, and where? One file a method, a table of names at the end.

    ot.py      optimal transport between patches and concept texts: a score a patch (GuardAlign)
    clip.py    similarity of the whole picture with the texts: one score a picture, the baseline

One orientation everywhere: a lower score is less safe; flagged means strictly below the threshold.
Knows nothing of files, image decoding or Arrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from guardalign.core.images import Decoded
from guardalign.detectors.clip import ClipDetector
from guardalign.detectors.concepts import Concepts
from guardalign.detectors.ot import OtDetector
from guardalign.models.clip import PatchEncoder, View
from guardalign.taxonomy import Taxonomy
from guardalign.types import Detection

__all__ = ["DETECTORS", "ClipDetector", "Concepts", "Detector", "OtDetector"]


class Detector(Protocol):
    """Finds what is unsafe in pictures."""

    def require_threshold(self) -> None:
        """Raise ConfigError where there is no threshold to flag by; a calibration only scores, and needs none."""

    def check(self, encoder: PatchEncoder, taxonomy: Taxonomy) -> None:
        """Raise ModelError or ConfigError when the model or the taxonomy cannot do what the settings ask for."""

    def at_least(self, encoder: PatchEncoder) -> int | None:
        """The smallest side [px] that a picture may be decoded at; None means full resolution."""

    def view(self, encoder: PatchEncoder, decoded: Decoded) -> View:
        """The part of the work that needs no model; safe in threads."""

    def __call__(self, encoder: PatchEncoder, taxonomy: Taxonomy, views: Sequence[View]) -> list[Detection]:
        """One detection a view, in order."""


DETECTORS: dict[str, type[OtDetector] | type[ClipDetector]] = {"ot": OtDetector, "clip": ClipDetector}
