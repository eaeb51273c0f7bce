"""Where a checkpoint lies and where it goes: the checks around `from_pretrained` that every guard shares.

Weights come from safetensors only, no code of a checkpoint is run. Knows nothing of what a model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from guardalign.config import Dtype
from guardalign.errors import ConfigError, ModelError, require

ADAPTER: Final = "adapter_config.json"
"""makes transformers load another model, of another place, in the folder's stead"""


@dataclass(frozen=True)
class Checkpoint:
    """A model by name, and how it is to be held."""

    model: str
    """folder or hub name"""
    revision: str | None = None
    """hub commit, tag or branch"""
    dtype: Dtype = "float32"
    """number format of weights and activations"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA when there is one"""

    @property
    def is_local(self) -> bool:
        """A folder of this machine: such a name never asks the hub, even when there is nothing there."""
        return self.model.startswith((".", "~", "/")) or Path(self.model).exists()

    @property
    def location(self) -> str:
        """What `from_pretrained` takes."""
        return str(Path(self.model).expanduser()) if self.is_local else self.model

    @property
    def source(self) -> dict[str, Any]:
        """Its further arguments: no code of the checkpoint runs, and a folder never asks the hub."""
        return {"revision": self.revision, "local_files_only": self.is_local, "trust_remote_code": False}

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def placed(self) -> torch.device:
        """The device; `ConfigError` where there is none of that name."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ConfigError(f"judge.device: there is no device {self.device}; cpu, cuda, cuda:1, ... are") from error
        absent = device.type == "cuda" and not torch.cuda.is_available()
        require(not absent, f"judge.device: {self.device} is set, but CUDA is absent")
        return device

    def require_files(self) -> None:
        """`ModelError` where a local folder is missing or holds no safetensors."""
        folder = Path(self.location)
        if self.is_local and not folder.is_dir():
            raise ModelError(f"judge.model: there is no folder {self.model}")
        if self.is_local and not any(folder.glob("*.safetensors")):
            raise ModelError(f"judge.model: {self.model} holds no *.safetensors; save it with save_pretrained")
        if self.is_local and (folder / ADAPTER).exists():
            raise ModelError(f"judge.model: {self.model} holds {ADAPTER}, which names another model; merge the adapter")

    def require_complete(self, report: Mapping[str, Any]) -> None:
        """transformers draws missing weights at random and goes on: not here."""
        if missing := sorted(report["missing_keys"]):
            raise ModelError(f"judge.model {self.model} lacks {len(missing)} weights, the first is {missing[0]}")

    def failed(self, error: BaseException) -> ModelError:
        """A library's error as one sentence."""
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return ModelError(f"judge.model {self.model} cannot be loaded: {first}")
