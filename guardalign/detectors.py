"""Detectors: does a picture show something unsafe, and where? One class a method, a table of names at the end.

    ot      optimal transport between patches and concept texts: a score a patch (GuardAlign)
    clip    similarity of the whole picture with the texts: one score a picture, the baseline

One orientation everywhere: a lower score is less safe; flagged means strictly below the threshold.
Knows nothing of files, image decoding or Arrow.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import groupby
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from guardalign.core.images import Decoded
from guardalign.core.joint_transport import SHARE_SCORES
from guardalign.core.patches import Fit
from guardalign.core.transport import (
    PATCH_SCORES,
    EntropySign,
    patch_weights,
    single_variant_cost,
    text_weights,
    transport,
    transport_cost,
)
from guardalign.errors import ConfigError, require
from guardalign.models.clip import Embedded, PatchEncoder, PatchKind, View
from guardalign.taxonomy import Taxonomy
from guardalign.types import Detection

log = logging.getLogger(__name__)

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

LARGEST_COST_TENSOR = 16_000_000
"""Costs held at a time (64 MB in fp32): more pictures than that are solved one after the other."""


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


@dataclass(frozen=True)
class Concepts:
    """A taxonomy as unit vectors; legend: K categories, V variants (ragged: see the mask), A anchors, D width."""

    variants: Tensor
    """[K, V, D] text variants z; rows of zeros where a category has fewer than V"""
    means: Tensor
    """[K, D] zbar, the normalised mean text of each category"""
    anchors: Tensor
    """[A, D] benign anchors"""
    mask: Tensor
    """[K, V] which variants there are"""

    @classmethod
    def embed(cls, encoder: PatchEncoder, taxonomy: Taxonomy) -> Concepts:
        """The encoder keeps every text's vector, so this costs a forward call only once."""
        texts = [category.texts for category in taxonomy.categories]
        vectors = encoder.encode_texts([*(text for group in texts for text in group), *taxonomy.benign_anchors])
        *groups, anchors_AD = vectors.split([*(len(group) for group in texts), len(taxonomy.benign_anchors)])
        z_KVD = torch.nn.utils.rnn.pad_sequence(groups, batch_first=True)
        mask_KV = torch.tensor([[v < len(group) for v in range(z_KVD.shape[1])] for group in texts])
        zbar_KD = normalize(torch.stack([group.mean(0) for group in groups]), dim=-1)
        return cls(z_KVD, zbar_KD, anchors_AD, mask_KV.to(vectors.device))


@dataclass(frozen=True)
class OtDetector:
    """A score a patch, and optimal transport between the patches and each category's texts (GuardAlign, sec. 3.2)."""

    score: Literal["margin", "min_cost", "mean_cost", "printed", "safe_probability", "joint"] = "safe_probability"
    """a patch's score from all texts at once: 1 - p(unsafe), a softmax over mean texts and benign anchors without
    transport; or the same under one joint plan, both in [0, 1]. Or from its transport costs: least unsafe minus least
    benign-anchor cost, in [-2, 2]; least or mean unsafe cost, in [0, 2]; or GuardAlign's eq. 9 as printed"""
    threshold: float | None = None
    """patches that score below it are unsafe, and the picture is flagged; in the units of the score. None: the
    score's own, 0.9 for safe_probability and joint (a tenth of the probability is unsafe), 0 for margin; the others
    have none, and audits need one"""
    entropy_sign: EntropySign = "negative"
    """patch weights softmax(-H/T), confident patches weigh more; or softmax(+H/T), eq. 7 as printed"""
    patches: PatchKind = "tokens"
    """the vision transformer's patch tokens; the value path of its last block; or a grid of crops, each encoded"""
    fit: Fit = "pad"
    """how the picture meets the model's square: padded right and below, squashed, or (large ones) cut into tiles"""
    grid_rows: int = 4
    """crops from top to bottom, in 1..64; patches=grid only"""
    grid_columns: int = 4
    """crops from left to right, in 1..64; patches=grid only"""
    epsilon: float = 0.1
    """strength of the entropic regularisation, above 0; costs lie in [0, 2]"""
    patch_temperature: float = 0.5
    """temperature T_v of the patch weights [nats], above 0"""
    text_temperature: float = 0.5
    """temperature T_t of the text weights [nats], above 0"""
    max_iterations: int = 100
    """most Sinkhorn iterations of a plan"""
    tolerance: float = 0.01
    """a plan is done when the L1 error of its patch marginal is below this, in (0, 1); fp32 reaches about 1e-6"""
    softmax_temperature: float = 1.0
    """divides the model's logit scale, above 0; score=safe_probability and joint only"""
    marginal_strength: float = 0.2
    """how strongly the joint plan wants equal mass for every text, in [0, 1); at 0 it is safe_probability; score=joint
    only"""

    def __post_init__(self) -> None:
        _resolve_threshold(self, THRESHOLDS["ot"])
        for name in ("epsilon", "patch_temperature", "text_temperature", "softmax_temperature"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"detector.{name} must be above 0, not {value}")
        for name in ("grid_rows", "grid_columns"):
            require(1 <= getattr(self, name) <= 64, f"detector.{name} must lie in 1..64, not {getattr(self, name)}")
            _require_default(self, name, self.patches == "grid", f"patches={self.patches} has no grid of crops")
        require(self.max_iterations > 0, f"detector.max_iterations must be positive, not {self.max_iterations}")
        require(0 < self.tolerance < 1, f"detector.tolerance must lie in (0, 1), not {self.tolerance}")
        strength = self.marginal_strength
        require(0 <= strength < 1, f"detector.marginal_strength must lie in [0, 1), not {strength}")
        _require_default(self, "softmax_temperature", self.score in SHARE_SCORES, f"score={self.score} has no softmax")
        _require_default(self, "marginal_strength", self.score == "joint", f"score={self.score} has no joint plan")
        tiles = self.fit == "tiles" and self.patches == "grid"
        require(not tiles, "detector.fit=tiles has no effect on patches=grid, whose crops are cut anyway; use pad")

    @property
    def limit(self) -> float:
        """The threshold in use; without one, minus infinity: nothing is flagged."""
        return -math.inf if self.threshold is None else self.threshold

    def require_threshold(self) -> None:
        """Raise ConfigError where there is no threshold to flag by; warn where it is off the score's scale."""
        _require_threshold(self.score, self.threshold)

    def check(self, encoder: PatchEncoder, taxonomy: Taxonomy) -> None:
        """Raise ModelError or ConfigError when the model or the taxonomy cannot do what the settings ask for."""
        encoder.require_patches(self.patches)
        if self.score == "margin" or self.score in SHARE_SCORES:
            _require_anchors(taxonomy, self.score)

    def at_least(self, encoder: PatchEncoder) -> int | None:
        """The model's input side, for each row or column of crops; tiles want every pixel."""
        encoder.require_patches(self.patches)
        if self.fit == "tiles":
            return None
        parts = max(self.grid_rows, self.grid_columns) if self.patches == "grid" else 1
        return parts * max(encoder.image_size)

    def view(self, encoder: PatchEncoder, decoded: Decoded) -> View:
        """Lay the picture out for the model."""
        return encoder.view(decoded, self.patches, self.fit, (self.grid_rows, self.grid_columns))

    def __call__(self, encoder: PatchEncoder, taxonomy: Taxonomy, views: Sequence[View]) -> list[Detection]:
        """One detection a view, in order."""
        self.check(encoder, taxonomy)
        concepts = Concepts.embed(encoder, taxonomy)
        found: list[Detection] = []
        for batch in encoder.batches(views):
            embedded = encoder.encode(batch)
            for few in _alike(batch, embedded, concepts.mask.numel()):
                found += self._detect([view for view, _ in few], [seen for _, seen in few], concepts, encoder, taxonomy)
        return found

    @torch.inference_mode()
    def _detect(
        self,
        views: Sequence[View],
        embedded: Sequence[Embedded],
        concepts: Concepts,
        encoder: PatchEncoder,
        taxonomy: Taxonomy,
    ) -> list[Detection]:
        """Score pictures of equally many cells; legend as in core/transport.py."""
        x_BPD = torch.stack([seen.patches for seen in embedded])
        valid_BP = torch.stack([seen.valid for seen in embedded])
        g_BD = torch.stack([seen.image for seen in embedded])
        s, z_KVD, zbar_KD = encoder.logit_scale, concepts.variants, concepts.means
        a_BP = patch_weights(x_BPD, zbar_KD, s, self.patch_temperature, self.entropy_sign, valid_BP)
        b_BKV = text_weights(g_BD, z_KVD, zbar_KD, s, self.text_temperature, concepts.mask)
        cost_BKVP = transport_cost(x_BPD, z_KVD)
        solved = transport(cost_BKVP, a_BP, b_BKV, self.epsilon, self.max_iterations, self.tolerance)
        score_BP = self._scores(x_BPD, a_BP, solved.conditional_cost, concepts, s)
        nearest_BP = solved.conditional_cost.argmin(1)
        return [
            self._detection(
                view,
                score_BP[row][valid_BP[row]].tolist(),
                nearest_BP[row][valid_BP[row]].tolist(),
                solved.distance[row].tolist(),
                int(solved.iterations[row].max()),
                float(solved.marginal_error[row].max()),
                taxonomy,
            )
            for row, view in enumerate(views)
        ]

    def _scores(self, x_BPD: Tensor, a_BP: Tensor, cost_BKP: Tensor, concepts: Concepts, logit_scale: float) -> Tensor:
        """The patches' scores [B, P], from each category's own plan or from all texts at once."""
        if self.score in PATCH_SCORES:
            return PATCH_SCORES[self.score](cost_BKP, a_BP, single_variant_cost(x_BPD, concepts.anchors))
        texts_ND = torch.cat([concepts.means, concepts.anchors])
        logits_BPN = logit_scale / self.softmax_temperature * x_BPD @ texts_ND.T
        return SHARE_SCORES[self.score](logits_BPN, len(concepts.means), a_BP, self.marginal_strength)

    def _detection(
        self,
        view: View,
        scores: list[float],
        nearest: list[int],
        distances: list[float],
        iterations: int,
        marginal_error: float,
        taxonomy: Taxonomy,
    ) -> Detection:
        names = [category.name for category in taxonomy.categories]
        lowest = min(range(len(scores)), key=scores.__getitem__)
        return Detection(
            flagged=scores[lowest] < self.limit,
            image_score=scores[lowest],
            threshold=self.limit,
            unsafe_category=names[nearest[lowest]],
            category_scores=dict(zip(names, distances, strict=True)),
            patch_scores=tuple(scores),
            patch_grid=view.grid,
            unsafe_patches=tuple(index for index, score in enumerate(scores) if score < self.limit),
            sinkhorn_iterations=iterations,
            marginal_error=marginal_error,
        )


@dataclass(frozen=True)
class ClipDetector:
    """Similarity of the whole picture with the texts: the baseline without patches."""

    score: Literal["similarity", "safe_probability"] = "safe_probability"
    """1 - p(unsafe), p = softmax over the categories' mean texts and the benign anchors, in [0, 1]; or minus the
    largest cosine with any unsafe text, in [-1, 1]; both negated or complemented so that lower = less safe"""
    threshold: float | None = None
    """pictures that score below it are flagged; in the units of the score. None: the score's own, 0.5 for
    safe_probability; similarity has none, and audits need one"""
    fit: Literal["pad", "squash"] = "pad"
    """how the picture meets the model's square: padded right and below, or squashed"""

    def __post_init__(self) -> None:
        _resolve_threshold(self, THRESHOLDS["clip"])

    @property
    def limit(self) -> float:
        """The threshold in use; without one, minus infinity: nothing is flagged."""
        return -math.inf if self.threshold is None else self.threshold

    def require_threshold(self) -> None:
        """Raise ConfigError where there is no threshold to flag by; warn where it is off the score's scale."""
        _require_threshold(self.score, self.threshold)

    def check(self, encoder: PatchEncoder, taxonomy: Taxonomy) -> None:
        """Raise ConfigError when the taxonomy cannot do what the settings ask for."""
        if self.score == "safe_probability":
            _require_anchors(taxonomy, "safe_probability")

    def at_least(self, encoder: PatchEncoder) -> int | None:
        """The model's input side."""
        return max(encoder.image_size)

    def view(self, encoder: PatchEncoder, decoded: Decoded) -> View:
        """Lay the picture out for the model."""
        return encoder.view(decoded, None, self.fit)

    def __call__(self, encoder: PatchEncoder, taxonomy: Taxonomy, views: Sequence[View]) -> list[Detection]:
        """One detection a view, in order."""
        self.check(encoder, taxonomy)
        if not views:
            return []
        concepts = Concepts.embed(encoder, taxonomy)
        g_BD = torch.stack([seen.image for batch in encoder.batches(views) for seen in encoder.encode(batch)])
        score_B, category_BK = self._scores(g_BD, concepts, encoder.logit_scale)
        names = [category.name for category in taxonomy.categories]
        return [
            Detection(
                flagged=score < self.limit,
                image_score=score,
                threshold=self.limit,
                unsafe_category=names[min(range(len(names)), key=of_category.__getitem__)],
                category_scores=dict(zip(names, of_category, strict=True)),
            )
            for score, of_category in zip(score_B.tolist(), category_BK.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def _scores(self, g_BD: Tensor, concepts: Concepts, logit_scale: float) -> tuple[Tensor, Tensor]:
        """The pictures' scores [B], and minus the largest cosine with each category's texts [B, K]."""
        cosine_BKV = torch.einsum("bd,kvd->bkv", g_BD, concepts.variants)
        category_BK = -cosine_BKV.masked_fill(~concepts.mask, -torch.inf).amax(-1)
        if self.score == "similarity":
            return category_BK.amin(-1), category_BK
        logits_BN = logit_scale * g_BD @ torch.cat([concepts.means, concepts.anchors]).T
        return logits_BN.softmax(-1)[:, len(concepts.means) :].sum(-1), category_BK


def _alike(
    views: Sequence[View], embedded: Sequence[Embedded], num_texts: int
) -> Iterator[list[tuple[View, Embedded]]]:
    """Neighbours of equally many cells, in runs whose costs fit the memory set aside for them."""
    for cells, run in groupby(zip(views, embedded, strict=True), key=lambda pair: len(pair[1].patches)):
        pairs = list(run)
        most = max(1, LARGEST_COST_TENSOR // (cells * num_texts))
        for start in range(0, len(pairs), most):
            yield pairs[start : start + most]


def _require_anchors(taxonomy: Taxonomy, score: str) -> None:
    sentence = f"detector.score={score} needs benign anchors, and the taxonomy has none; add benign_anchors to it"
    require(bool(taxonomy.benign_anchors), sentence)


def _resolve_threshold(detector: OtDetector | ClipDetector, own: Mapping[str, float]) -> None:
    """The score's own threshold where none is given, if it has one."""
    if detector.threshold is None:
        object.__setattr__(detector, "threshold", own.get(detector.score))
    given = detector.threshold
    require(given is None or math.isfinite(given), f"detector.threshold must be a finite number, not {given}")


def _require_threshold(score: str, threshold: float | None) -> None:
    """A threshold belongs to its score; left from another one it flags all pictures, or none."""
    if threshold is None:
        sentence = f"detector.score={score} has no threshold of its own: give detector.threshold"
        raise ConfigError(f"{sentence}; guardalign calibrate finds one")
    low, high = SCALES[score]
    if not low < threshold <= high:
        many = "no" if threshold <= low else "every"
        log.warning(
            "detector.threshold %g flags %s picture: it is not on the scale of detector.score=%s",
            threshold,
            many,
            score,
        )


def _require_default(detector: Any, name: str, used: bool, reason: str) -> None:
    """A setting that would be ignored must stand at its default."""
    default = next(field.default for field in fields(detector) if field.name == name)
    assert default is not MISSING
    sentence = f"detector.{name} has no effect: {reason}; leave it out"
    require(used or getattr(detector, name) == default, sentence)


DETECTORS: dict[str, type[OtDetector] | type[ClipDetector]] = {"ot": OtDetector, "clip": ClipDetector}
