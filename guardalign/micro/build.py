"""Builds the micro world's models from nothing: scenes, two CLIPs, the LVLM over the taught one, the reward scorer.

Every step writes its model under a temporary name and renames it, and keeps a checkpoint while it trains: an
interrupted build that is started again goes on where it stood. The two CLIPs train side by side, one thread each, and
so do the LVLM and the scorer; the same seed and budget give the same models up to the order in which threads add.

    python -m guardalign.micro.build STEP FOLDER SEED BUDGET      one step, as `build` starts it
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from guardalign.config import ClipConfig
from guardalign.errors import RunFailedError
from guardalign.micro.clip_recipe import ClipRecipe, ClipTrainer
from guardalign.micro.corpus import Corpus, draw_corpus
from guardalign.micro.lvlm_recipe import LvlmRecipe, LvlmTrainer
from guardalign.micro.reward_recipe import STEPS, RewardTrainer
from guardalign.micro.sample import seeds
from guardalign.models.clip_weights import load_model

log = logging.getLogger(__name__)

NUM_SCENES: Final = 48_000
TAUGHT: Final = ClipRecipe()
CONTRASTIVE: Final = ClipRecipe(taught=False, pooling="avg", window_steps=700, scene_steps=100)
SMALL_BUDGET: Final = 0.2
QUARTERS: Final = 4
PLAN: Final[Sequence[Sequence[str]]] = (("clip", "clip-contrastive"), ("lvlm", "reward"))
"""Steps that run at the same time, in the order of the stages."""


def build(folder: Path, seed: int, budget: float = 1.0) -> float:
    """All models of one seed into `folder`, with `budget` times the recipes' steps; returns the seconds it took."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    draw_corpus(folder.parent, seeds()["train"], num_scenes(budget))
    for stage in PLAN:
        _run_side_by_side([step for step in stage if not (folder / step).exists()], folder, seed, budget)
    return time.monotonic() - started


def num_scenes(budget: float) -> int:
    """Training scenes; a tenth of the budget still wants variety."""
    return max(8_000, round(NUM_SCENES * min(1.0, budget)))


def _run_side_by_side(names: Sequence[str], folder: Path, seed: int, budget: float) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    words = [str(folder), str(seed), str(budget)]
    running = [
        (name, subprocess.Popen([sys.executable, "-m", "guardalign.micro.build", name, *words], env=environment))
        for name in names
    ]
    failed = [name for name, process in running if process.wait() != 0]
    if failed:
        raise RunFailedError(f"training {failed[0]} failed; start the build again to go on from its checkpoint")


def clip_step(recipe: ClipRecipe, folder: Path, seed: int, budget: float, checkpoint: Path) -> ClipTrainer:
    """One of the two CLIPs."""
    scaled = replace(
        recipe,
        window_steps=_scaled(recipe.window_steps, budget),
        scene_steps=_scaled(recipe.scene_steps, budget),
    )
    trainer = ClipTrainer(scaled, _corpus(folder, budget), seed)
    trainer.run(checkpoint)
    return trainer


def lvlm_step(folder: Path, seed: int, budget: float, checkpoint: Path) -> LvlmTrainer:
    """The LVLM; the taught CLIP must be there."""
    tower, _ = load_model(ClipConfig(model=f"local-dir:{folder / 'clip'}"), torch.device("cpu"))
    trainer = LvlmTrainer(lvlm_recipe(budget), tower.visual, _corpus(folder, budget), seed)
    trainer.run(checkpoint)
    return trainer


def lvlm_recipe(budget: float) -> LvlmRecipe:
    """`budget` times the scenes; a small one in quarter batches: it takes many steps to see at all."""
    recipe = LvlmRecipe()
    parts = QUARTERS if budget <= SMALL_BUDGET else 1
    return replace(recipe, steps=_scaled(recipe.steps * parts, budget), scenes=recipe.scenes // parts)


def reward_step(folder: Path, seed: int, budget: float, checkpoint: Path) -> RewardTrainer:
    """The reward scorer."""
    trainer = RewardTrainer(seed, max(60, _scaled(STEPS, budget)))
    trainer.run(checkpoint)
    return trainer


def _scaled(steps: int, budget: float) -> int:
    return max(1, round(steps * budget))


def _corpus(folder: Path, budget: float) -> Corpus:
    return draw_corpus(folder.parent, seeds()["train"], num_scenes(budget))


STEP: Final[Mapping[str, Callable[[Path, int, float, Path], Any]]] = {
    "clip": lambda *words: clip_step(TAUGHT, *words),
    "clip-contrastive": lambda *words: clip_step(CONTRASTIVE, *words),
    "lvlm": lvlm_step,
    "reward": reward_step,
}


def run_step(name: str, folder: Path, seed: int, budget: float) -> None:
    """Train one model; the folder appears when it is whole."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("guardalign").setLevel(logging.INFO)
    torch.set_num_threads(1)
    checkpoint, temporary = folder / f".{name}.checkpoint", folder / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    STEP[name](folder, seed, budget, checkpoint).save(temporary)
    for path in temporary.iterdir():
        path.chmod(0o644)
    temporary.rename(folder / name)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    run_step(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
