"""A model as the decoding loop sees it: what it reads and what a call gives. Knows nothing of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from guardalign.models.cached_rows import CachedRows
from guardalign.models.memory import Room
from guardalign.models.prompts import Prompt


@dataclass(frozen=True)
class Read:
    """What a forward call gave."""

    rows: CachedRows
    """caches after it"""
    logits: Tensor
    """[B, V] fp32 of the tokens that come next"""
    hidden: Tensor | None = None
    """[B, W, D] last hidden states, where asked for"""


class Forward(Protocol):
    """A model as the loop sees it."""

    model: Any
    """transformers' model"""
    pad_id: int
    """fills the left of shorter prompts"""
    eos_ids: tuple[int, ...]
    """tokens that end an answer"""
    max_tokens: int | None
    """most tokens of prompt and answer; None: not known"""
    room: Room
    """how many rows its memory takes, as far as is known"""

    def prefill(self, tensors: dict[str, Tensor], hidden: bool) -> Read:
        """Reads left-padded prompts."""
        ...

    def step(self, rows: CachedRows, tokens: Sequence[int]) -> Read:
        """Feeds every row one token."""
        ...

    def kind(self, prompt: Prompt) -> bool:
        """Rows of different kinds cannot share a batch."""
        ...
