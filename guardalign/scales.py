"""A score's scale, and the threshold on it that holds unless another is given.

Knows nothing of pictures, models or how a score comes about, and imports none of what does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Protocol

from guardalign.errors import ConfigError, require

log = logging.getLogger("guardalign.detectors")  # users meet the name in front of the warning

SCALES: dict[str, tuple[float, float]] = {
    "margin": (-2.0, 2.0),
    "min_cost": (0.0, 2.0),
    "mean_cost": (0.0, 2.0),
    "printed": (0.0, math.inf),
    "safe_probability": (0.0, 1.0),
    "joint": (0.0, 1.0),
    "similarity": (-1.0, 0.0),
}
"""Thresholds that can tell pictures apart, by score: above the first number, up to the second (a picture whose cosine
with every unsafe text is negative is not met)."""

THRESHOLDS: dict[str, dict[str, float]] = {
    "ot": {"margin": 0.0, "safe_probability": 0.9, "joint": 0.9},
    "clip": {"safe_probability": 0.5},
}
"""Thresholds that hold unless another is given, by detector and score; scores left out have none. Patches: nearer to
something unsafe than to anything benign; more than a tenth of the probability on unsafe texts (a miss costs more than a
mask). Whole pictures: unsafe more likely than not. Not calibrated to a false-alarm rate; on the micro world's
validation scenes 0.9 flags 92 % of unsafe and 1 % of benign scenes."""


class _Thresholded(Protocol):
    """A frozen detector's settings, as far as they are known here."""

    @property
    def score(self) -> str: ...

    @property
    def threshold(self) -> float | None: ...


def resolve_threshold(detector: _Thresholded, own: Mapping[str, float]) -> None:
    """The score's own threshold where none is given, if it has one."""
    if detector.threshold is None:
        object.__setattr__(detector, "threshold", own.get(detector.score))
    given = detector.threshold
    require(given is None or math.isfinite(given), f"detector.threshold must be a finite number, not {given}")


def require_threshold(score: str, threshold: float | None) -> None:
    """A threshold belongs to its score; left from another one it flags all pictures, or none."""
    if threshold is None:
        sentence = f"detector.score={score} has no threshold of its own: give detector.threshold"
        raise ConfigError(f"{sentence}; guardalign calibrate finds one")
    said = off_scale(score, threshold)
    if said is not None:
        log.warning("detector.threshold %s", said)


def off_scale(score: str, threshold: float) -> str | None:
    """What a threshold does that cannot tell pictures apart under this score; None where it can."""
    low, high = SCALES[score]
    if low < threshold <= high:
        return None
    many = "no" if threshold <= low else "every"
    return f"{threshold:g} flags {many} picture: it is not on the scale of detector.score={score}"
