"""On what kind of device the run's models computed, on what they compute now, and how far numbers may then be apart.

Kinds of devices sum in other orders and round otherwise, and fp32 on CUDA may be TF32 (`canaries.expecting.precision`).
Knows nothing of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from guardalign.canaries.expecting import precision
from guardalign.config import AuditConfig, Dtype, to_plain
from guardalign.fingerprint import flat

POOLS: Final[Mapping[str, str]] = {"clip": "detect", "lvlm": "generate", "judge": "judge"}
"""the pool in which a section's model works"""
AUTO: Final = "auto"


def dtypes(config: AuditConfig) -> dict[str, Dtype]:
    """The number formats of the models that take part, by setting."""
    found = {name: value for name, value in flat(to_plain(config)) if name.rpartition(".")[2].endswith("dtype")}
    return {name: value for name, value in found.items() if name != "clip.dtype" or config.detector.name != "none"}


def section_of(setting: str, config: AuditConfig) -> str:
    """Whose device a model of this number format computes on: a defense's own stands beside the LVLM, and so does the
    judge that is the LVLM."""
    section = setting.partition(".")[0]
    shares = section == "judge" and config.judge.options.get("model") == "target"
    return section if section in POOLS and not shares else "lvlm"


def present(section: str, config: AuditConfig) -> str:
    """The kind of device that a section's model gets here: cpu, cuda, ..."""
    device = _stated(section, config)
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == AUTO else device.partition(":")[0]


def recorded(section: str, manifest: Mapping[str, Any], config: AuditConfig) -> str | None:
    """The kind that it had in the run whose settings these are; None where run.json does not tell.

    `auto` is CUDA where an actor held a GPU, and else what there was on the machine that began the run."""
    device = _stated(section, config)
    if device != AUTO:
        return device.partition(":")[0]
    if config.engine == "ray" and getattr(config.cluster, f"{POOLS[section]}_gpus") > 0:
        return "cuda"
    return {True: "cuda", False: "cpu"}.get(manifest.get("cuda"))  # type: ignore[arg-type]


def _stated(section: str, config: AuditConfig) -> str:
    if section == "judge":
        return str(config.judge.options.get("device", AUTO))
    return str(getattr(config, section).device)


def bounds(manifest: Mapping[str, Any], own: AuditConfig, now: AuditConfig) -> tuple[dict[str, Dtype], tuple[str, ...]]:
    """By number-format setting, the format whose rounding bounds what may differ, and sentences on those that are
    looser than their name.

    `own` are the run's settings, `now` those of this computation."""
    found: dict[str, Dtype] = {}
    told: dict[str, None] = {}
    for setting, dtype in dtypes(now).items():
        section = section_of(setting, now)
        here, there = present(section, now), recorded(section, manifest, own)
        found[setting] = precision(dtype, here) if here == there or dtype != "float32" else "float16"
        if here != there:
            was = there or "a device that it did not record"
            told[f"in the run {section} computed on {was}, now on {here}: the looser tolerances hold"] = None
        elif found[setting] != dtype:
            told[f"{section} computes on {here}, where fp32 may be TF32: the looser tolerances hold"] = None
    return found, tuple(told)
