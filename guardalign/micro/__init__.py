"""The embedded default: two small trained models and a sample that need no network, no hub and no GPU.

They were trained by this package's own recipe (`jobs/build_micro.py`) on a world of emoji scenes and are loaded by the
very same code as real models. What they show is evidence about the methods' mechanics, none about models of
billions of parameters.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

from guardalign.config import CONTRASTIVE, EMBEDDED, AuditConfig, ClipConfig, InputConfig, LvlmConfig

FOLDER: Final = Path(__file__).parent
WEIGHTS: Final = FOLDER / "weights"
NOTICE: Final = (
    "NOTE: the embedded models are tiny and know emoji scenes only: they show how the methods work, and say nothing of "
    "other pictures or of large models. Name real ones with --clip.model and --lvlm.model."
)
CLIPS: Final = {EMBEDDED: "clip", CONTRASTIVE: "clip-contrastive"}
"""names in `clip.model` and their folders"""


def resolve_clip(config: ClipConfig) -> ClipConfig:
    """The settings with an embedded model's name replaced by its folder."""
    folder = CLIPS.get(config.model)
    return config if folder is None else dataclasses.replace(config, model=f"local-dir:{WEIGHTS / folder}")


def resolve_lvlm(config: LvlmConfig) -> LvlmConfig:
    """The settings with `embedded` replaced by the model's folder."""
    return dataclasses.replace(config, model=str(WEIGHTS / "lvlm")) if config.model == EMBEDDED else config


def resolve_input(config: InputConfig) -> InputConfig:
    """The settings with `embedded` replaced by the sample that ships with the package."""
    if config.format != EMBEDDED:
        return config
    return dataclasses.replace(config, format="parquet", path=str(FOLDER / "sample.parquet"))


def resolve_taxonomy(config: AuditConfig) -> str:
    """`auto` is the micro world's own list for the embedded CLIPs, and MLCommons' for every other model."""
    if config.taxonomy != "auto":
        return config.taxonomy
    return "micro" if config.clip.model in CLIPS else "mlcommons"


def is_embedded(config: AuditConfig) -> bool:
    """Whether a model of the run is an embedded one."""
    detects = config.detector.name != "none"
    return config.lvlm.model == EMBEDDED or (detects and config.clip.model in CLIPS)
