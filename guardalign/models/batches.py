"""Prompts of one batch side by side: left-padded tokens, stacked pictures; knows nothing of models or tokenizers.

The rules name no family: what runs over tokens is padded on the left and stacked; everything else (pixels, sizes,
grids) is padded with zeros at its end, where tile counts differ, and concatenated along its first dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from guardalign.models.prompts import Prompt, Span


@dataclass(frozen=True)
class Padded:
    """What `generate` gets, and where each row's parts stand in the padded prompt."""

    tensors: dict[str, Tensor]
    prefixes: tuple[Span | None, ...]
    instructions: tuple[Span, ...]

    @property
    def num_columns(self) -> int:
        """Length of the padded prompt [tokens]."""
        return int(self.tensors["input_ids"].shape[1])


def collate(prompts: Sequence[Prompt], pad_id: int) -> Padded:
    """The prompts as one batch."""
    width = max(prompt.num_tokens for prompt in prompts)
    names = dict.fromkeys(name for prompt in prompts for name in prompt.tensors)
    tensors = {}
    for name in names:
        present = [prompt for prompt in prompts if name in prompt.tensors]
        rows = [_widened(prompt, name, width, pad_id) for prompt in present]
        tensors[name] = torch.cat(_of_like_shape(rows))
    return Padded(
        tensors,
        tuple(shifted(prompt.prefix, width - prompt.num_tokens) for prompt in prompts),
        tuple(
            (prompt.instruction[0] + width - prompt.num_tokens, prompt.instruction[1] + width - prompt.num_tokens)
            for prompt in prompts
        ),
    )


def _widened(prompt: Prompt, name: str, width: int, pad_id: int) -> Tensor:
    """The tensor, left-padded if it runs over tokens."""
    x = prompt.tensors[name]
    if name not in prompt.per_token:
        return x
    trailing = [0, 0] * (x.dim() - 2)
    return pad(x, [*trailing, width - x.shape[1], 0], value=pad_id if name == "input_ids" else 0)


def _of_like_shape(rows: Sequence[Tensor]) -> list[Tensor]:
    """All dimensions but the first padded to the largest, with zeros at the end."""
    largest = [max(sizes) for sizes in zip(*(row.shape[1:] for row in rows), strict=True)]
    return [pad(row, _ends(row.shape[1:], largest)) for row in rows]


def _ends(sizes: Sequence[int], largest: Sequence[int]) -> list[int]:
    """`torch.nn.functional.pad` counts from the last dimension."""
    return [end for size, most in zip(reversed(sizes), reversed(largest), strict=True) for end in (0, most - size)]


def shifted(span: Span | None, by: int) -> Span | None:
    return None if span is None else (span[0] + by, span[1] + by)
