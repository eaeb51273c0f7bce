"""Sampling a row by its own seed: what it draws depends on nothing but its seed, its step and its own logits.

`generate` itself stays greedy; the sampler leaves one token a row finite. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from guardalign.config import GenerationConfig


def row_seed(seed: int, sample_id: str) -> int:
    """A row's own seed, in [0, 2^63): a hash of the run's seed and the sample's id."""
    digest = hashlib.blake2b(f"{seed}\0{sample_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class RowSampler(LogitsProcessor):
    """Draws each row's token by inverse transform, in the order of the vocabulary.

    One uniform number a row and step, drawn ahead on the CPU, so that device and batch do not matter.
    """

    def __init__(self, generation: GenerationConfig, seeds: Sequence[int], num_prompt_columns: int) -> None:
        self.generation, self.num_prompt_columns = generation, num_prompt_columns
        draws = [
            torch.rand(generation.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
        self.uniform = torch.stack(draws)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that are 0 at the drawn token and -inf elsewhere."""
        step = input_ids.shape[1] - self.num_prompt_columns
        cumulative = kept_probabilities(scores, self.generation).cumsum(-1)
        threshold = self.uniform[:, step, None].to(scores.device) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def kept_probabilities(scores: Tensor, generation: GenerationConfig) -> Tensor:
    """softmax(scores / temperature) in fp64, zero outside the top_k likeliest and the smallest set that reaches top_p.

    Not renormalised; the likeliest token always stays.
    """
    probabilities = (scores.double() / generation.temperature).softmax(-1)
    if generation.top_k == 0 and generation.top_p == 1:
        return probabilities
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    if generation.top_k:
        ordered[:, generation.top_k :] = 0
    ahead = (ordered / ordered.sum(-1, keepdim=True)).cumsum(-1).roll(1, -1)
    ahead[:, 0] = 0
    ordered = ordered.where(ahead < generation.top_p, 0.0)
    return torch.zeros_like(probabilities).scatter_(1, index, ordered)


class FiniteRows(LogitsProcessor):
    """Watches for rows whose logits are no numbers: fp16 overflows and broken weights answer nonsense otherwise."""

    def __init__(self) -> None:
        self.finite: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are."""
        now = scores.isfinite().all(-1)
        self.finite = now if self.finite is None else self.finite & now
        return scores
