"""Where a CLIP model's weights come from: an open_clip name, a hub repository or a folder; and a random one, written.

Only safetensors are read, never a pickle, no code of a checkpoint is run, and nothing is fetched for a local path. What
cannot be loaded is a `ModelError` of one line. Knows nothing of pictures or patches.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME
from open_clip.pretrained import download_pretrained_from_hf, get_pretrained_cfg
from safetensors import SafetensorError
from safetensors.torch import save_file

from guardalign.config import ClipConfig
from guardalign.errors import ModelError
from guardalign.models.provenance import weights_fingerprint

LOCAL, HUB = "local-dir:", "hf-hub:"
CONFIG_NAME = "open_clip_config.json"
PREFERRED_NAMES = (HF_SAFE_WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", "model.safetensors")
"""The order in which open_clip chooses among several weight files of one folder."""
PRECISIONS = {"float32": "fp32", "bfloat16": "pure_bf16", "float16": "pure_fp16"}


def weights_file(config: ClipConfig) -> Path:
    """The safetensors file that `load_model` reads (fetched first, where the model is named and not cached)."""
    if config.model.startswith(LOCAL):
        return _folder_weights(Path(config.model.removeprefix(LOCAL)))
    if config.model.startswith(HUB):
        return _hub_file(config.model.removeprefix(HUB), HF_SAFE_WEIGHTS_NAME)
    if config.model not in open_clip.list_models():
        raise ModelError(f"clip.model {config.model} is not known to open_clip{_nearest(config.model)}")
    if config.pretrained is None:
        raise ModelError(f"clip.pretrained is missing: {config.model} needs a tag or a safetensors file{_tags(config)}")
    return _tagged_weights(config, config.pretrained)


def clip_fingerprint(config: ClipConfig) -> dict[str, str]:
    """What tells this CLIP from another: its folder's files by hash, or its architecture and its weights by hash."""
    if config.model.startswith(LOCAL):
        _folder_weights(Path(config.model.removeprefix(LOCAL)))
        return weights_fingerprint(config.model.removeprefix(LOCAL))
    return {"architecture": config.model, **weights_fingerprint(str(weights_file(config)))}


def load_model(config: ClipConfig, device: torch.device) -> tuple[Any, Any]:
    """The model in eval mode on its device, and its tokenizer."""
    weights_file(config)
    tag = {} if config.pretrained is None else get_pretrained_cfg(config.model, config.pretrained)
    try:
        model = open_clip.create_model(
            config.model,
            pretrained=config.pretrained,
            precision=PRECISIONS[config.dtype],
            device=device,
            force_quick_gelu=bool(tag.get("quick_gelu", False)),
            require_pretrained=True,
        )
        tokenizer = open_clip.get_tokenizer(config.model, **_without_code(config.model))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"clip.model {config.model} cannot be loaded: {_first_line(error)}") from error
    return model.eval().requires_grad_(False), tokenizer


def write_random_model(folder: Path, architecture: str | Mapping[str, Any], seed: int) -> None:
    """Write a CLIP with random weights as a folder that `local-dir:` loads; the same bytes for the same seed.

    `architecture` is an open_clip name or a model configuration of its form. The global random state is left alone.
    """
    model_config = open_clip.get_model_config(architecture) if isinstance(architecture, str) else dict(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**model_config)
    folder.mkdir(parents=True, exist_ok=True)
    description = {"model_cfg": model_config, "preprocess_cfg": {"interpolation": "bicubic"}}
    (folder / CONFIG_NAME).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    save_file(model.state_dict(), folder / HF_SAFE_WEIGHTS_NAME)


def _folder_weights(folder: Path) -> Path:
    if not folder.is_dir():
        raise ModelError(f"clip.model: there is no folder {folder}")
    if not (folder / CONFIG_NAME).is_file():
        raise ModelError(f"clip.model: {folder} has no {CONFIG_NAME}; open_clip's folder format is needed")
    _refuse_foreign_towers(folder / CONFIG_NAME)
    found = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    if not found:
        raise ModelError(f"clip.model: {folder} has no .safetensors file; .bin and .pt files are not read")
    return next((found[name] for name in PREFERRED_NAMES if name in found), next(iter(found.values())))


def _without_code(model: str) -> dict[str, Any]:
    """What a transformers tokenizer must be told: a configuration can ask for the checkpoint's own code to be run."""
    if model.startswith(LOCAL):
        text_config = _towers(Path(model.removeprefix(LOCAL)) / CONFIG_NAME)["text_cfg"]
    elif model.startswith(HUB):
        text_config = _towers(_hub_file(model.removeprefix(HUB), CONFIG_NAME))["text_cfg"]
    else:
        text_config = open_clip.get_model_config(model)["text_cfg"]
    return {"trust_remote_code": False} if text_config.get("hf_tokenizer_name") else {}


def _towers(path: Path) -> dict[str, Any]:
    try:
        towers: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        return {"vision_cfg": {**towers["vision_cfg"]}, "text_cfg": {**towers["text_cfg"]}}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"clip.model: {path} is no open_clip configuration ({_first_line(error)})") from error


def _refuse_foreign_towers(path: Path) -> None:
    """A tower that lies elsewhere would be fetched; one with code of its own would be asked about."""
    towers = _towers(path)
    text, vision = str(towers["text_cfg"].get("hf_model_name") or ""), str(towers["vision_cfg"].get("timm_model_name"))
    if text and not Path(text).is_dir():
        raise ModelError(f"clip.model: {path} names the text tower {text}, which would be fetched; put it in a folder")
    if ":" in vision:
        raise ModelError(f"clip.model: {path} names the picture tower {vision}, which would be fetched")
    own = Path(text) / "config.json"
    if text and own.is_file() and "auto_map" in own.read_text(encoding="utf-8", errors="replace"):
        raise ModelError(f"clip.model: {path} names the text tower {text} with code of its own, which is never run")


def _tagged_weights(config: ClipConfig, pretrained: str) -> Path:
    tag = get_pretrained_cfg(config.model, pretrained)
    if not tag:
        return _single_file(config, Path(pretrained))
    repository, _, name = tag.get("hf_hub", "").rpartition("/")
    if not repository:
        raise ModelError(f"clip.pretrained {pretrained} of {config.model} is not offered as safetensors{_tags(config)}")
    return _hub_file(repository, str(Path(name).with_suffix(".safetensors")) if name else HF_SAFE_WEIGHTS_NAME)


def _single_file(config: ClipConfig, path: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"clip.pretrained {path} is neither a tag of {config.model} nor a file{_tags(config)}")
    if path.suffix != ".safetensors":
        raise ModelError(f"clip.pretrained {path} is no .safetensors file; .bin and .pt files are not read")
    return path


def _hub_file(repository: str, name: str) -> Path:
    try:
        path = download_pretrained_from_hf(repository, filename=name)
    except (OSError, ValueError) as error:
        raise ModelError(f"clip.model: {name} of {repository} cannot be had: {_first_line(error)}") from error
    return Path(path)


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
    return f"; did you mean {', '.join(near)}?" if near else f"; a folder is written {LOCAL}FOLDER"


def _tags(config: ClipConfig) -> str:
    tags = open_clip.list_pretrained_tags_by_model(config.model)
    return f" (tags: {', '.join(tags)})" if tags else ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
