"""Thresholds of the proof's masks, chosen on validation scenes and kept in chosen.yaml, which the proof only reads.

    python -m guardalign.micro.chosen      for the embedded CLIPs, anew after each training (needs the font)

For every CLIP and patch score the threshold with the highest mean IoU between a scene's masked cells (score strictly
below the threshold) and its unsafe cells. The file's other sections belong to others and are left alone.
Legend: N scenes, G cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import yaml

from guardalign.config import CONTRASTIVE, EMBEDDED, ClipConfig
from guardalign.errors import ConfigError
from guardalign.micro import resolve_clip
from guardalign.micro.proof_scenes import Scenes, validation_scenes
from guardalign.micro.proof_scores import SCORES, see
from guardalign.models.clip import PatchEncoder

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHOSEN: Final = Path(__file__).with_name("chosen.yaml")
SECTION: Final = "mask_thresholds"
NUM_CANDIDATES: Final = 400
NUM_SCENES: Final = 500
"""unsafe validation scenes, the first of their series"""

Thresholds = Mapping[str, Mapping[str, float]]
"""CLIP -> score -> threshold"""


def choose_thresholds(clips: Mapping[str, ClipConfig], validation: Scenes) -> dict[str, dict[str, float]]:
    """Every CLIP's thresholds; rounded to six digits."""
    return {name: _thresholds(PatchEncoder.load(resolve_clip(config)), validation) for name, config in clips.items()}


def _thresholds(encoder: PatchEncoder, validation: Scenes) -> dict[str, float]:
    shown = validation.take(np.flatnonzero(validation.shown))
    seen = see(encoder, shown.pictures)
    patches = {name: score(seen).patches for name, score in SCORES.items()}
    return {
        name: best_threshold(score_NG.double().numpy(), shown.unsafe_cells)
        for name, score_NG in patches.items()
        if score_NG is not None
    }


def best_threshold(score_NG: NDArray[np.float64], unsafe_NG: NDArray[np.bool_]) -> float:
    """The lowest of the best among quantiles of all cells' scores."""
    candidates = np.quantile(score_NG, np.linspace(0, 1, NUM_CANDIDATES) ** 2)
    values = [mask_iou(score_NG < threshold, unsafe_NG).mean() for threshold in candidates]
    return float(f"{candidates[int(np.argmax(values))]:.6g}")


def mask_iou(masked_NG: NDArray[np.bool_], unsafe_NG: NDArray[np.bool_]) -> NDArray[np.float64]:
    """|masked and unsafe| / |masked or unsafe| of every scene, [N] in [0, 1]; every scene has an unsafe cell."""
    return (masked_NG & unsafe_NG).sum(1) / (masked_NG | unsafe_NG).sum(1)


def write_thresholds(thresholds: Thresholds, path: Path = CHOSEN) -> None:
    """Set this section of the file, and keep the others."""
    content = {
        **(_content(path) if path.exists() else {}),
        SECTION: {name: dict(each) for name, each in thresholds.items()},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False, width=120), encoding="utf-8")


def read_thresholds(clip: str, path: Path = CHOSEN) -> Mapping[str, float]:
    """The thresholds of one CLIP by score; `ConfigError` where none were chosen."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing: the micro build writes it from validation scenes")
    section = _content(path).get(SECTION)
    chosen = section.get(clip) if isinstance(section, dict) else None
    if not isinstance(chosen, dict):
        raise ConfigError(f"{path} has no {SECTION} of the CLIP {clip!r}: choose them on validation scenes first")
    return {str(name): float(value) for name, value in chosen.items()}


def _content(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


if __name__ == "__main__":
    embedded = {"taught": ClipConfig(model=EMBEDDED), "contrastive": ClipConfig(model=CONTRASTIVE)}
    write_thresholds(choose_thresholds(embedded, validation_scenes(NUM_SCENES)))
