"""Tiny open_clip models of every supported kind, written and loaded like real ones; knows nothing of detectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from guardalign.config import ClipConfig
from guardalign.models.clip import PatchEncoder
from guardalign.models.clip_weights import write_random_model

VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
TEXT: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}

TOWERS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average": {"pool_type": "avg"},
    "average, norm after pooling": {"pool_type": "avg", "final_ln_after_pool": True},
    "layer scale": {"ls_init_value": 0.1},
    "custom blocks": {"qk_norm": True, "scale_heads": True, "scale_attn": True},
    "remainder": {"image_size": 37},
    "oblong": {"image_size": [24, 40]},
}
"""Vision settings of the towers whose patch tokens can be had."""


def small_config(**vision: Any) -> dict[str, Any]:
    """A model configuration: 4 x 4 patches of 8 px, 24 dimensions, unless `vision` says otherwise."""
    return {"embed_dim": 24, "vision_cfg": VISION | vision, "text_cfg": TEXT}


def small_encoder(folder: Path, dtype: Any = "float32", batch_size: int = 4, **vision: Any) -> PatchEncoder:
    """Write such a model with random weights, and load it."""
    write_random_model(folder, small_config(**vision), seed=0)
    return PatchEncoder.load(ClipConfig(model=f"local-dir:{folder}", dtype=dtype, device="cpu", batch_size=batch_size))


@dataclass(frozen=True)
class Look:
    """A decoded picture: what `guardalign.core.images.Decoded` holds."""

    picture: Image.Image
    width: int
    height: int
    num_frames: int = 1


def picture(width: int, height: int, seed: int = 0) -> Look:
    """Noise of that size, at full resolution."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Look(Image.fromarray(pixels), width, height)
