"""Similarity of the whole picture with the concepts' texts: one score a picture, the baseline without patches.

Knows nothing of patches, files, image decoding or Arrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from guardalign.core.images import Decoded
from guardalign.detectors.concepts import Concepts, require_anchors
from guardalign.models.clip import PatchEncoder, View
from guardalign.scales import THRESHOLDS, require_threshold, resolve_threshold
from guardalign.taxonomy import Taxonomy
from guardalign.types import Detection


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
        resolve_threshold(self, THRESHOLDS["clip"])

    @property
    def limit(self) -> float:
        """The threshold in use; without one, minus infinity: nothing is flagged."""
        return -math.inf if self.threshold is None else self.threshold

    def require_threshold(self) -> None:
        """Raise ConfigError where there is no threshold to flag by; warn where it is off the score's scale."""
        require_threshold(self.score, self.threshold)

    def check(self, encoder: PatchEncoder, taxonomy: Taxonomy) -> None:
        """Raise ConfigError when the taxonomy cannot do what the settings ask for."""
        if self.score == "safe_probability":
            require_anchors(taxonomy, "safe_probability")

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
