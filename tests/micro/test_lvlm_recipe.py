"""A packed row is what the model sees turn by turn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image

from guardalign.config import LvlmConfig
from guardalign.micro.clip_recipe import ClipRecipe, clip_config
from guardalign.micro.corpus import Corpus
from guardalign.micro.dialogues import MIXTURE, Turn, as_assistant
from guardalign.micro.lvlm import Shape
from guardalign.micro.lvlm_recipe import IGNORED, LvlmRecipe, LvlmTrainer, stacked
from guardalign.micro.world import KINDS, MOST_OBJECTS, SIDE, Layout, Object
from guardalign.models.lvlm import Lvlm

SMALL = Shape(vision_width=32, vision_layers=2, width=32, layers=2, heads=4, key_heads=2)


def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    kinds = np.full((2, MOST_OBJECTS), -1, np.int8)
    kinds[:, 0] = (0, 20)
    boxes = np.zeros((2, MOST_OBJECTS, 4), np.int16)
    boxes[:, 0] = (10, 10, 40, 40)
    return Corpus(pixels, kinds, boxes, np.zeros((2, MOST_OBJECTS, 64), np.uint8))


@pytest.fixture(scope="module")
def trainer() -> LvlmTrainer:
    config = clip_config(ClipRecipe(width=32, layers=2), 300)
    fields = {key: value for key, value in config["text_cfg"].items() if key != "hf_tokenizer_name"}
    torch.manual_seed(1)
    visual = CLIP(128, config["vision_cfg"], fields).visual
    return LvlmTrainer(LvlmRecipe(shape=SMALL, steps=2), visual, corpus(), seed=3)


@pytest.fixture(scope="module")
def lvlm(trainer: LvlmTrainer, tmp_path_factory: pytest.TempPathFactory) -> Lvlm:
    folder = tmp_path_factory.mktemp("lvlm")
    trainer.save(folder)
    trainer.model.load_state_dict({name: x.half().float() for name, x in trainer.model.state_dict().items()})
    return Lvlm.load(LvlmConfig(model=str(folder)))


TURNS = [
    Turn("largest", "What is the largest thing in the picture?", "It is a dog."),
    Turn("text_request", "How can I use a pencil?", "You can use a pencil.", sees_picture=False),
    Turn("request", "I answer safely.\nHow can I use what is shown?", "I'm sorry, but I can't help with that."),
]


def test_packed_prompts_are_the_processors_own(trainer: LvlmTrainer, lvlm: Lvlm) -> None:
    picture = Image.fromarray(trainer.corpus.pixels[0])
    for turn in TURNS:
        alone = lvlm.prompt("a", turn.prompt, picture if turn.sees_picture else None).tensors["input_ids"][0].tolist()
        row = trainer.packer.row([turn])
        prompt = [token for token, target in zip(row.ids, row.targets, strict=True)][: len(alone)]
        expected = prompt if turn.sees_picture else row.ids[-(len(row.ids) - row.segments.index(1)) :][: len(alone)]
        assert alone == expected


def test_packed_loss_is_the_loss_of_each_turn_alone(trainer: LvlmTrainer) -> None:
    pixels = trainer.corpus.pixels[:1]
    with torch.no_grad():
        packed = trainer.loss(trainer._image_features(pixels), [trainer.packer.row(TURNS)])
        alone = [trainer.loss(trainer._image_features(pixels), [trainer.packer.row([turn])]) for turn in TURNS]
    shares = torch.tensor([sum(1 for t in trainer.packer.row([turn]).targets if t != IGNORED) ** 0.5 for turn in TURNS])
    assert torch.allclose(packed, (torch.stack(alone) * shares).sum() / shares.sum(), atol=1e-5)


def test_padding_changes_no_loss(trainer: LvlmTrainer) -> None:
    pixels = trainer.corpus.pixels[:1]
    with torch.no_grad():
        alone = trainer.loss(trainer._image_features(pixels), [trainer.packer.row(TURNS[:1])])
        twice = trainer.loss(
            trainer._image_features(pixels.repeat(2, 0)),
            [trainer.packer.row(TURNS[:1]), trainer.packer.row(TURNS[:1] * 3)],
        )
    assert torch.allclose(alone, twice, atol=1e-5)


def test_the_saved_model_answers_with_the_trainers_logits(trainer: LvlmTrainer, lvlm: Lvlm) -> None:
    turn = TURNS[0]
    picture = Image.fromarray(trainer.corpus.pixels[0])
    prompt = lvlm.prompt("a", turn.prompt, picture)
    with torch.no_grad():
        logits = lvlm.model(**lvlm._placed(prompt.tensors)).logits[0, -1]
    first = trainer.packer.row([turn])
    at = next(i for i, target in enumerate(first.targets) if target != IGNORED)
    ids, _, _, mask, positions = stacked([first], trainer.tokenizer.pad_token_id)
    assert int(ids[0, at]) == int(prompt.tensors["input_ids"][0, -1])
    one = replace(first, targets=[t if i == at else IGNORED for i, t in enumerate(first.targets)])
    with torch.no_grad():
        loss = trainer.loss(trainer._image_features(trainer.corpus.pixels[:1]), [one])
    assert torch.allclose(loss, -logits.log_softmax(-1)[first.targets[at]], atol=1e-4)
    assert mask.shape[-1] == len(first.ids) and positions.max() == len(first.ids) - 1


def test_every_word_of_the_world_is_one_token(trainer: LvlmTrainer) -> None:
    backend = trainer.tokenizer.backend_tokenizer
    rng = np.random.default_rng(1)
    layout = Layout((Object(3, (0, 0, 30, 30), 1.0), Object(len(KINDS) - 1, (50, 50, 80, 90), 1.0)))
    turns = [draw(layout, rng) for draw, _ in MIXTURE for _ in range(100)]
    for turn in [*turns, *map(as_assistant, turns)]:
        for text in (f"\n{turn.prompt} ASSISTANT:", f" {turn.answer}"):
            for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text):
                assert piece in trainer.tokenizer.get_vocab(), (text, piece)


def test_turns_of_a_scene_never_depend_on_pixels() -> None:
    layout = Layout((Object(3, (0, 0, 30, 30), 1.0), Object(len(KINDS) - 1, (50, 50, 80, 90), 1.0)))
    for draw, _ in MIXTURE:
        assert draw(layout, np.random.default_rng(5)) == draw(layout, np.random.default_rng(5))
