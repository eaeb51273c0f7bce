"""Optimal transport between a picture's patches and the concepts' texts: a score a patch (GuardAlign, sec. 3.2).

Knows nothing of files, image decoding or Arrow; the mathematics stands in core/transport.py and
core/joint_transport.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

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
from guardalign.detectors.concepts import Concepts, require_anchors
from guardalign.errors import require
from guardalign.models.clip import Embedded, PatchEncoder, PatchKind, View
from guardalign.scales import THRESHOLDS, require_threshold, resolve_threshold
from guardalign.taxonomy import Taxonomy
from guardalign.types import Detection

LARGEST_COST_TENSOR = 16_000_000
"""Costs held at a time (64 MB in fp32): more pictures than that are solved one after the other."""


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
        resolve_threshold(self, THRESHOLDS["ot"])
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
        require_threshold(self.score, self.threshold)

    def check(self, encoder: PatchEncoder, taxonomy: Taxonomy) -> None:
        """Raise ModelError or ConfigError when the model or the taxonomy cannot do what the settings ask for."""
        encoder.require_patches(self.patches)
        if self.score == "margin" or self.score in SHARE_SCORES:
            require_anchors(taxonomy, self.score)

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


def _alike(
    views: Sequence[View], embedded: Sequence[Embedded], num_texts: int
) -> Iterator[list[tuple[View, Embedded]]]:
    """Neighbours of equally many cells, in runs whose costs fit the memory set aside for them."""
    for cells, run in groupby(zip(views, embedded, strict=True), key=lambda pair: len(pair[1].patches)):
        pairs = list(run)
        most = max(1, LARGEST_COST_TENSOR // (cells * num_texts))
        for start in range(0, len(pairs), most):
            yield pairs[start : start + most]


def _require_default(detector: Any, name: str, used: bool, reason: str) -> None:
    """A setting that would be ignored must stand at its default."""
    default = next(field.default for field in fields(detector) if field.name == name)
    assert default is not MISSING
    sentence = f"detector.{name} has no effect: {reason}; leave it out"
    require(used or getattr(detector, name) == default, sentence)
