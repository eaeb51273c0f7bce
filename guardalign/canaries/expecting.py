"""How a canary says that it failed: its name, what was expected, what came. Knows nothing of models."""

from __future__ import annotations

from typing import Final

import torch

from guardalign.config import Dtype
from guardalign.errors import ModelError

SAME: Final[dict[Dtype, float]] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest difference of unit vectors' numbers (CLIP) between batches of different shapes, by number format."""
SAME_LOGITS: Final[dict[Dtype, float]] = {"float32": 1e-3, "float16": 1e-1, "bfloat16": 5e-1}
"""The same for log-probabilities of the three likeliest tokens [nats]."""
DIFFERENT: Final = 1e-6
"""What is different differs by more than this somewhere."""


def precision(dtype: Dtype, device: str) -> Dtype:
    """The format whose rounding bounds a model's: on CUDA, fp32 convolutions (or products) may run in TF32, which keeps
    as many digits as fp16."""
    short = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return "float16" if dtype == "float32" and device == "cuda" and short else dtype


def expect(holds: bool, canary: str, expected: str, came: str) -> None:
    """Raise `ModelError` unless `holds`."""
    if not holds:
        raise ModelError(f"canary '{canary}' failed: expected {expected}, got {came}")
