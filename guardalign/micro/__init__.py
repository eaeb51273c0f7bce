"""The embedded default: small models and a sample that need no network, no hub and no GPU.

Until trained ones stand in their place, the models are **built by seed with random weights**: they prove that the
job works, not that it finds or refuses anything. They are built once a machine into a cache folder and loaded by the
very same code as real ones.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from guardalign.config import EMBEDDED, ClipConfig, InputConfig, LvlmConfig
from guardalign.version import VERSION

SEED = 20260224
UNTRAINED = (
    "NOTE: the embedded models are UNTRAINED (random weights): every score, flag and answer below is noise. "
    "Name real ones with --clip.model and --lvlm.model."
)


def resolve_clip(config: ClipConfig) -> ClipConfig:
    """The settings with `embedded` replaced by a folder on this machine."""
    if config.model != EMBEDDED:
        return config
    from guardalign.micro.clip import build_clip

    return dataclasses.replace(config, model=f"local-dir:{_built('clip', build_clip)}")


def resolve_lvlm(config: LvlmConfig) -> LvlmConfig:
    """The settings with `embedded` replaced by a folder on this machine."""
    if config.model != EMBEDDED:
        return config
    from guardalign.micro.lvlm import build_lvlm

    return dataclasses.replace(config, model=str(_built("lvlm", build_lvlm)))


def resolve_input(config: InputConfig) -> InputConfig:
    """The settings with `embedded` replaced by the sample that ships with the package."""
    if config.format != EMBEDDED:
        return config
    path = Path(__file__).with_name("sample.parquet")
    return dataclasses.replace(config, format="parquet", path=str(path))


def cache_folder() -> Path:
    """Where built models lie: $GUARDALIGN_CACHE, else the user's cache folder."""
    named = os.environ.get("GUARDALIGN_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "guardalign"
    return Path(named or base).expanduser()


def _built(name: str, build: Callable[[Path, int], None]) -> Path:
    """The folder of a built model; built under a temporary name and renamed, so that it is whole or absent."""
    folder = cache_folder() / f"untrained-{VERSION}-{_recipe_digest(name)}" / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        build(temporary, SEED)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first, with the same weights
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _recipe_digest(name: str) -> str:
    """Changes when the recipe's file or torch does, so that a stale build is never taken for a new one."""
    import hashlib
    import importlib.metadata

    recipe = Path(__file__).with_name(f"{name}.py").read_bytes()
    versions = "".join(importlib.metadata.version(package) for package in ("torch", "transformers", "open_clip_torch"))
    return hashlib.sha256(recipe + versions.encode()).hexdigest()[:12]
