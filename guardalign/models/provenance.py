"""What was computed with: hashes of the files that decide what a model computes, and one seal over a mapping.

Cheap to import, and knows nothing of torch, open_clip or transformers: it reads files, never weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from guardalign.errors import ModelError

WEIGHTS: Final = frozenset({".safetensors", ".bin", ".pt", ".pth"})
"""Suffixes of files that hold weights."""

SETTINGS: Final = frozenset({".json", ".jinja", ".model", ".txt", ".yaml", ".yml"})
"""Suffixes of configurations, tokenizers, vocabularies, merges and chat templates."""

MARKERS: Final = ("config.json", "open_clip_config.json")
"""Files of which a cached snapshot of a hub model holds at least one."""

COMMIT: Final = "commit"
"""The entry of a hub model's fingerprint that holds its commit."""


def weights_fingerprint(location: str, revision: str | None = None) -> dict[str, str]:
    """What tells one model from another: relative file name -> sha256 (hex), sorted by name.

    `location` is a file, a folder or the name of a hub model (OWNER/NAME). For a folder these are all files with
    weights, settings, tokenizers or templates, sub-folders included, hidden ones not. For a hub model they are the
    snapshot's commit, which pins every file, and the weights as they lie in the local cache, so that a broken download
    is noticed; one that is not there yet is fetched first. Several files are hashed in threads. `ModelError` where
    there is no such model.
    """
    path = Path(location).expanduser()
    if path.is_file():
        return _hashed(path.parent, [path])
    if path.is_dir():
        return _folder(path, WEIGHTS | SETTINGS)
    snapshot = _cached_snapshot(location, revision)
    return {COMMIT: snapshot.name, **_folder(snapshot, WEIGHTS)}


def seal(mapping: Mapping[str, Any]) -> str:
    """One sha256 (hex) over a nested mapping of plain values, whatever the order of its keys.

    Plain: None, booleans, numbers, strings, lists or tuples (alike), mappings with string keys; anything else is our
    own bug (`TypeError`), as is a number that is not finite (`ValueError`).
    """
    canonical = json.dumps(_plain(mapping), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a sealed mapping has string keys only")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _folder(folder: Path, suffixes: frozenset[str]) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.suffix in suffixes and not _hidden(path, folder)]
    files = [path for path in files if path.is_file()]
    if not any(path.suffix in WEIGHTS for path in files):
        raise ModelError(f"{folder} holds no model weights; expected *.safetensors")
    return _hashed(folder, files)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _hashed(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    names = {path.relative_to(folder).as_posix(): path for path in files}
    with ThreadPoolExecutor(max_workers=8) as threads:
        hashes = dict(zip(names, threads.map(_sha256, names.values()), strict=True))
    return dict(sorted(hashes.items()))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"the model file {path} cannot be read: {error.strerror}") from error


def _cached_snapshot(name: str, revision: str | None) -> Path:
    """The folder snapshots/COMMIT of a hub model in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(name, marker, revision=revision) for marker in MARKERS]
    except HFValidationError as error:
        raise ModelError(
            f"no model at {name}: it is neither a file nor a folder nor a hub name (OWNER/NAME)"
        ) from error
    path = next((Path(marker).parent for marker in found if isinstance(marker, str)), None)
    return _fetched(name, revision) if path is None else path


def _fetched(name: str, revision: str | None) -> Path:
    """The folder of a hub model's files, without pickles and code, after they were brought from the hub."""
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in sorted(SETTINGS | {".safetensors"})]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        wanted = f"{name} at revision {revision}" if revision else name
        raise ModelError(
            f"no model {wanted}: no such file or folder, not in the local hub cache, and the hub gave none "
            f"({type(error).__name__})"
        ) from None
