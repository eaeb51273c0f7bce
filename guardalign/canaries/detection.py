"""Canaries of the detector's model: sound embeddings of every CLIP, and known answers where they can be known.

Known are those of the embedded CLIPs (scenes of the packaged sample), and for every other one the colours of a plain
red and a plain blue picture; a CLIP from a folder of the user's own may have another vocabulary, and is only noted.
Knows nothing of tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from guardalign.canaries.drift import named
from guardalign.canaries.expecting import DIFFERENT, SAME, expect, precision
from guardalign.canaries.pictures import drawn, known_scenes, plain
from guardalign.config import CONTRASTIVE, EMBEDDED, AuditConfig, to_plain
from guardalign.core.images import Decoded
from guardalign.detectors import ClipDetector, Concepts, OtDetector
from guardalign.errors import ErrorKind
from guardalign.models.clip import Embedded
from guardalign.stages import Detect
from guardalign.types import Detection

COLOURS: Final = {"red": (220, 20, 20), "blue": (20, 40, 220)}
SEPARATING: Final = ("margin", "min_cost", "safe_probability", "joint")
"""Scores of patch tokens under which every unsafe canary scene lies below every benign one, for both embedded CLIPs."""


class DetectionCanary:
    """Watches a loaded `Detect`."""

    kind: ErrorKind = "detection_failed"

    def __init__(self, stage: Detect, config: AuditConfig) -> None:
        """`config` names the CLIP as the user did."""
        self.stage, self.config, self.clip = stage, config, config.clip
        self.encoder, self.detector = stage.encoder, stage.detector
        own = {"clip": [config.clip.model, config.clip.pretrained], "taxonomy": config.taxonomy}
        self.name = named("detect", config.clip.dtype, {**own, "detector": to_plain(config.detector)})
        self._watched = self._views([drawn()[0]])

    def check(self) -> tuple[str, ...]:
        """Sound embeddings, known answers, finite scores."""
        embedded = self.clip.model in (EMBEDDED, CONTRASTIVE)
        with self.encoder.apart():
            self._embeddings()
            notes = self._names() if embedded else self._colours()
        Concepts.embed(self.encoder, self.stage.taxonomy)  # the run's own work: kept, and counted
        with self.encoder.apart():
            if embedded and self._separates:
                self._separation()
            self._finite(self._detected(self._watched)[0])
        return notes

    def numbers(self) -> tuple[float, ...]:
        """Lowest and mean patch score of one picture, and the mean of the categories' scores, which never saturates."""
        with self.encoder.apart():
            (found,) = self._detected(self._watched)
        scores, categories = _scores(found), tuple(found.category_scores.values())
        return min(scores), sum(scores) / len(scores), sum(categories) / len(categories)

    def _views(self, pictures: Sequence[Decoded]) -> list[Any]:
        return [self.detector.view(self.encoder, picture) for picture in pictures]

    def _detected(self, views: Sequence[Any]) -> list[Detection]:
        return self.detector(self.encoder, self.stage.taxonomy, views)

    def _embeddings(self) -> None:
        """Unit vectors; two pictures differ; one alone and in a batch is the same."""
        first, second = self.encoder.encode(self._views(drawn()))
        (alone,) = self.encoder.encode(self._views(drawn()[:1]))
        length = float(torch.cat([alone.image[None], alone.patches]).norm(dim=-1).sub(1).abs().max())
        expect(length < 1e-3, "unit length", "embeddings of length 1", f"one that is {length:.2g} off")
        apart = _distance(first, second)
        expect(apart > DIFFERENT, "two pictures", "different embeddings of different pictures", "equal ones")
        off, most = _distance(first, alone), SAME[precision(self.clip.dtype, alone.image.device.type)]
        expect(off <= most, "alone and in a batch", f"the same embedding within {most:g}", f"one that is {off:.2g} off")

    def _names(self) -> tuple[str, ...]:
        """The embedded CLIPs name what they see."""
        pictures, kinds = [scene.decoded for scene in known_scenes()], [scene.kind for scene in known_scenes()]
        found = [kinds[at] for at in self._nearest(pictures, [f"a picture of a {kind}" for kind in kinds])]
        listed = ", ".join
        expect(found == kinds, "packaged scenes", f"the objects {listed(kinds)}", listed(found))
        return ()

    def _separation(self) -> None:
        """The run's detector tells unsafe from benign scenes."""
        scenes = known_scenes()
        detected = self._detected(self._views([scene.decoded for scene in scenes]))
        unsafe = max(each.image_score for each, scene in zip(detected, scenes, strict=True) if scene.unsafe)
        benign = min(each.image_score for each, scene in zip(detected, scenes, strict=True) if not scene.unsafe)
        came = f"an unsafe one at {unsafe:.3g} and a benign one at {benign:.3g}"
        expect(unsafe < benign, "unsafe and benign scenes", "every unsafe scene below every benign one", came)

    @property
    def _separates(self) -> bool:
        """It promises to."""
        if self.config.taxonomy not in ("auto", "micro"):
            return False
        how = self.detector
        tokens = isinstance(how, OtDetector) and how.patches == "tokens" and how.score in SEPARATING
        return tokens or isinstance(how, ClipDetector)

    def _colours(self) -> tuple[str, ...]:
        """A red and a blue picture find their captions; a note where a CLIP of the user's own does not."""
        found = self._nearest([plain(rgb) for rgb in COLOURS.values()], [f"a {name} picture" for name in COLOURS])
        if found == [0, 1]:
            return ()
        names = list(COLOURS)
        came = " and ".join(f"'a {names[at]} picture'" for at in found)
        if self._is_own:
            why = "it knows no colours, or no English"
            return (f"clip.model {self.clip.model} calls a red and a blue picture {came}: {why}",)
        expect(False, "red and blue", "'a red picture' and 'a blue picture'", came)
        return ()

    @property
    def _is_own(self) -> bool:
        """The weights come from a folder or a file, not under a published name."""
        return self.clip.model.startswith("local-dir:") or Path(self.clip.pretrained or "").suffix == ".safetensors"

    def _nearest(self, pictures: Sequence[Decoded], captions: Sequence[str]) -> list[int]:
        """The number of each picture's nearest caption."""
        views = [self.encoder.view(picture, None) for picture in pictures]
        images_ND = torch.stack([seen.image for seen in self.encoder.encode(views)])
        return (images_ND @ self.encoder.encode_sentences(captions).T).argmax(-1).tolist()

    def _finite(self, found: Detection) -> None:
        wrong = [score for score in _scores(found) if not math.isfinite(score)]
        expect(not wrong, "finite scores", "numbers", str(wrong[0]) if wrong else "")


def _scores(found: Detection) -> tuple[float, ...]:
    return (found.image_score,) if found.patch_scores is None else found.patch_scores


def _distance(one: Embedded, other: Embedded) -> float:
    """Largest difference of any number."""
    return float(_all(one).sub(_all(other)).abs().max())


def _all(seen: Embedded) -> Tensor:
    return torch.cat([seen.image[None], seen.patches[seen.valid]])
