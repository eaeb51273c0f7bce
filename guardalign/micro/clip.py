"""The embedded CLIP: a small open_clip vision transformer with RANDOM weights, until trained ones take its place.

Its embeddings mean nothing. It lets every recipe run offline, in seconds, through the very code that a real model
takes: the folder has open_clip's own format and its tokenizer ships inside open_clip.
Knows nothing of data sets or detectors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardalign.models.clip_weights import write_random_model

MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 96, "patch_size": 12, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
"""8 x 8 patches of 12 px. The vocabulary is that of open_clip's own tokenizer."""


def build_clip(folder: Path, seed: int) -> None:
    """Write the model to `folder`, which `clip.model=local-dir:FOLDER` loads; the same bytes for the same seed."""
    write_random_model(folder, MODEL_CONFIG, seed)
