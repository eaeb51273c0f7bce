"""The taxonomy's texts as vectors, which both methods compare pictures with.

Knows nothing of pictures, thresholds or how a score comes about.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from guardalign.errors import require
from guardalign.models.clip import PatchEncoder
from guardalign.taxonomy import Taxonomy


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


def require_anchors(taxonomy: Taxonomy, score: str) -> None:
    """Raise ConfigError where the taxonomy has none; for scores that compare with them."""
    sentence = f"detector.score={score} needs benign anchors, and the taxonomy has none; add benign_anchors to it"
    require(bool(taxonomy.benign_anchors), sentence)
