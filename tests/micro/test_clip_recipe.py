"""What the micro CLIPs are trained on, and that what is trained is what open_clip loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from guardalign.config import ClipConfig
from guardalign.micro.clip_recipe import WINDOW, ClipRecipe, ClipTrainer
from guardalign.micro.corpus import Corpus
from guardalign.micro.world import CELL, GRID, MOST_OBJECTS, SIDE
from guardalign.models.clip_weights import load_model


def corpus() -> Corpus:
    """Every pixel column holds its own number; the object of scene n fills cell n, so no scene is its own mirror."""
    pixels = np.broadcast_to(np.arange(SIDE, dtype=np.uint8)[None, None, :, None], (8, SIDE, SIDE, 3)).copy()
    kinds = np.full((8, MOST_OBJECTS), -1, np.int8)
    kinds[:, 0] = np.arange(8)
    cells = np.zeros((8, MOST_OBJECTS, GRID * GRID), np.uint8)
    cells[np.arange(8), 0, np.arange(8)] = CELL * CELL
    return Corpus(pixels, kinds, np.zeros((8, MOST_OBJECTS, 4), np.int16), cells)


@pytest.fixture(scope="module", params=[True, False], ids=["taught", "contrastive"])
def trainer(request: pytest.FixtureRequest) -> ClipTrainer:
    recipe = ClipRecipe(width=32, layers=2, batch=12, taught=request.param, pooling="tok" if request.param else "avg")
    return ClipTrainer(recipe, corpus(), seed=1)


def test_half_of_the_scenes_are_mirrored_with_their_cells(trainer: ClipTrainer) -> None:
    mirrored = 0
    for step in range(8):
        for pixels, targets, kinds in zip(*trainer._scenes(np.random.default_rng(step)), strict=True):
            flipped = bool(pixels[0, 0, 0] == SIDE - 1)
            mirrored += flipped
            assert (pixels[0, ::-1] if flipped else pixels[0])[:, 0].tolist() == list(range(SIDE))
            column = GRID - 1 - kinds[0] if flipped else kinds[0]
            assert targets[0, column, kinds[0]] == 1 and targets[..., kinds[0]].sum() == 1
    assert 30 < mirrored < 66
    assert trainer.corpus.pixels[:, 0, 0].max() == 0, "the corpus itself stays as it is"


def test_texts_are_embedded_as_open_clip_does(trainer: ClipTrainer) -> None:
    texts = ["a photo of a bomb", "a cat", "an emoji of a dog and a key"]
    with torch.no_grad():
        theirs = normalize(
            trainer.model.encode_text(
                trainer.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
            ),
            dim=-1,
        )
        torch.testing.assert_close(trainer.encode(texts), theirs, atol=1e-5, rtol=1e-5)


def test_a_window_keeps_its_place_in_the_scene(trainer: ClipTrainer) -> None:
    pixels = torch.rand(1, 3, CELL * WINDOW, CELL * WINDOW)
    with torch.no_grad():
        here, again, there = (
            trainer._window_vectors(pixels, np.array([corner]))[1] for corner in ([0, 0], [0, 0], [3, 2])
        )
    assert torch.equal(here, again) and not torch.allclose(here, there, atol=1e-3)


def test_what_is_saved_is_what_loads(trainer: ClipTrainer, tmp_path: Path) -> None:
    trainer.save(tmp_path)
    model, _ = load_model(ClipConfig(model=f"local-dir:{tmp_path}"), torch.device("cpu"))
    picture = torch.rand(1, 3, SIDE, SIDE)
    with torch.no_grad():
        ours, theirs = (normalize(each.encode_image(picture), dim=-1) for each in (trainer.model.eval(), model))
    torch.testing.assert_close(theirs, ours, atol=2e-3, rtol=0)


def test_both_losses_fall_when_the_very_same_batch_is_seen_again(trainer: ClipTrainer) -> None:
    optimizer = torch.optim.AdamW(trainer.model.parameters(), 1e-3)
    for loss_of in (trainer.window_loss, trainer.scene_loss):
        losses = []
        for _ in range(8):
            loss = loss_of(np.random.default_rng(5))
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]
