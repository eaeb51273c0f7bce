"""A packed row is what the model sees turn by turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image

from guardalign.config import LvlmConfig
from guardalign.micro.clip_recipe import ClipRecipe, clip_config
from guardalign.micro.corpus import Corpus
from guardalign.micro.dialogues import (
    HELD_OUT_SAFETY_PREFIX,
    MIXTURE,
    SAFETY_PREFIXES,
    Turn,
    as_assistant,
    held_out_form,
)
from guardalign.micro.lvlm import Shape
from guardalign.micro.lvlm_recipe import (
    IGNORED,
    PLACES,
    POSITIONS,
    LvlmRecipe,
    LvlmTrainer,
    search_for_likes,
    stacked,
    tower_weights,
    with_ramps,
)
from guardalign.micro.proof_answers import PERCEPTION
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
    return LvlmTrainer(LvlmRecipe(shape=SMALL, steps=2), tower(), corpus(), seed=3)


def tower() -> Any:
    config = clip_config(ClipRecipe(width=32, layers=2), 300)
    fields = {key: value for key, value in config["text_cfg"].items() if key != "hf_tokenizer_name"}
    torch.manual_seed(1)
    return CLIP(128, config["vision_cfg"], fields).visual


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


@pytest.mark.slow
def test_every_word_of_the_world_is_one_token(trainer: LvlmTrainer) -> None:
    backend = trainer.tokenizer.backend_tokenizer
    rng = np.random.default_rng(1)
    layout = Layout((Object(3, (0, 0, 30, 30), 1.0), Object(len(KINDS) - 1, (50, 50, 80, 90), 1.0)))
    turns = [draw(layout, rng) for draw, _ in MIXTURE for _ in range(100)]
    for turn in [*turns, *map(as_assistant, turns)]:
        for text in (f"\n{turn.prompt} ASSISTANT:", f" {turn.answer}"):
            for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text):
                assert piece in trainer.tokenizer.get_vocab(), (text, piece)


def test_attention_starts_as_a_search_for_likes(trainer: LvlmTrainer) -> None:
    """Unrotated, a token's own key is its query's best match, in every head; drawn weights alone give no such order."""
    x = torch.randn(40, SMALL.width, generator=torch.Generator().manual_seed(0))
    language = LvlmTrainer(LvlmRecipe(shape=SMALL), tower(), corpus(), seed=5).model.model.language_model
    attention = language.layers[0].self_attn

    def own_is_best() -> float:
        q, k = (each(x).view(len(x), -1, attention.head_dim) for each in (attention.q_proj, attention.k_proj))
        logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
        return float((logits.argmax(-1) == torch.arange(len(x))).float().mean())

    assert own_is_best() > 0.5
    for projection in (attention.q_proj, attention.k_proj):
        torch.nn.init.normal_(projection.weight, std=0.02)
    assert own_is_best() < 0.2
    search_for_likes(language.layers)
    assert own_is_best() > 0.5


def test_ramps_leave_everything_but_the_cells_positions() -> None:
    torch.manual_seed(2)
    plain = tower_weights(tower().state_dict())
    ramped = with_ramps(plain)
    assert all(ramped[name] is plain[name] for name in plain if name != POSITIONS)
    added = (ramped[POSITIONS] - plain[POSITIONS]).view(65, -1)
    assert not added[0].any()
    grid = added[1:].view(8, 8, -1)
    torch.testing.assert_close(grid[3, 5] - grid[3, 4], grid[6, 1] - grid[6, 0])
    torch.testing.assert_close(grid[5, 3] - grid[4, 3], grid[1, 6] - grid[0, 6])
    torch.testing.assert_close(grid[0, 0], -grid[7, 7])
    assert (grid[0, 0] - grid[0, 7]).norm() > 1 < (grid[0, 0] - grid[7, 0]).norm()


def test_words_for_places_are_shares_of_a_cell() -> None:
    """Columns run left to right, rows top to bottom; the middle knows no side."""
    torch.testing.assert_close(PLACES.sum(-1), torch.ones(64))
    left, right, top, bottom = PLACES.view(8, 8, 4).unbind(-1)
    assert left[0, 0] == 0.5 == right[0, 7] == top[0, 3] == bottom[7, 3] and left[0, 7] == 0 == bottom[0, 0]


def test_losses_of_picture_tokens_are_least_where_they_lie_at_their_words(trainer: LvlmTrainer) -> None:
    words = trainer.model.model.language_model.embed_tokens
    shown = torch.zeros(1, 64, len(KINDS) + 1)
    shown[0, :32, 3], shown[0, 32:, -1] = 1, 1
    with torch.no_grad():
        named = words(trainer._name_ids)[torch.tensor([3] * 32 + [-1] * 32)][None]
        placed = (torch.cat([PLACES[:32], torch.full((32, 4), 0.25)]) @ words(trainer._place_ids))[None]
        noise = torch.randn(named.shape, generator=torch.Generator().manual_seed(0))
        assert trainer.naming_loss(named, shown) < 0.1 < 2 < trainer.naming_loss(noise, shown)
        assert trainer.placing_loss(placed, shown) < trainer.placing_loss(named, shown)
        assert trainer.placing_loss(placed, shown) < trainer.placing_loss(placed.flip(1), shown)


def test_held_out_questions_are_new_orders_of_known_words(trainer: LvlmTrainer) -> None:
    encode = trainer.tokenizer.backend_tokenizer.encode
    scene, rng = Layout((Object(0, (0, 0, 20, 20), 1.0), Object(9, (50, 40, 90, 80), 1.0))), np.random.default_rng(0)
    asked = {draw(scene, rng).prompt.rpartition("\n")[2] for draw in PERCEPTION for _ in range(200)}
    for prompt in asked:
        form = held_out_form(prompt)
        assert form not in asked
        assert len(encode(f" {form}", add_special_tokens=False).ids) <= len(form.split()) + 3
    with pytest.raises(ValueError, match="no other form"):
        held_out_form("How are you?")
    known = len(encode(f" {HELD_OUT_SAFETY_PREFIX}", add_special_tokens=False).ids)
    assert HELD_OUT_SAFETY_PREFIX not in SAFETY_PREFIXES and known <= len(HELD_OUT_SAFETY_PREFIX.split()) + 4


def test_turns_of_a_scene_never_depend_on_pixels() -> None:
    layout = Layout((Object(3, (0, 0, 30, 30), 1.0), Object(len(KINDS) - 1, (50, 50, 80, 90), 1.0)))
    for draw, _ in MIXTURE:
        assert draw(layout, np.random.default_rng(5)) == draw(layout, np.random.default_rng(5))
