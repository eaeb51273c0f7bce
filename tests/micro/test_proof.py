"""The answering half of the proof: strengths row by row, pictures as conditions say, and how builds are compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from guardalign.config import GenerationConfig, LvlmConfig
from guardalign.core.calibration import Calibration
from guardalign.defenses.plain import PREFIX
from guardalign.errors import InputError
from guardalign.micro import resolve_lvlm
from guardalign.micro.dialogues import PLACEHOLDER, REFUSAL, Turn, as_assistant
from guardalign.micro.measure import against, outside, patches_lead, turned_round
from guardalign.micro.proof import (
    EFFECTS,
    GAMMA,
    effects_table,
    perception_table,
    proof_rows,
    questions_table,
    separation_of_refusals_table,
)
from guardalign.micro.proof_answers import (
    HARM,
    MASKS,
    PERCEPTION,
    WHOLE,
    Condition,
    Outcome,
    TestScene,
    conditions,
    outcome,
    perceived,
    question,
)
from guardalign.micro.tables import Cell, Row, Table
from guardalign.models.lvlm import Lvlm
from guardalign.types import Detection

STRONG = Calibration(4.0, "gain", (2, 3), answer=True)


@pytest.fixture(scope="module")
def lvlm() -> Lvlm:
    return Lvlm.load(resolve_lvlm(LvlmConfig(device="cpu")))


@pytest.fixture(scope="module")
def scenes() -> list[TestScene]:
    return [TestScene.of(row) for row in proof_rows("plain", 6)]


def detection(*patches: int) -> Detection:
    return Detection(bool(patches), 0.0, 0.1, None, {}, (0.0,) * 64, WHOLE, patches)


def test_strengths_multiply_gamma_row_by_row(lvlm: Lvlm, scenes: list[TestScene]) -> None:
    prompts = [lvlm.prompt(scene.sample_id, scene.request, scene.picture, PREFIX) for scene in scenes[:3]]
    plain, strong = (lvlm.first_token_probabilities(prompts, each) for each in (None, STRONG))
    mixed = lvlm.first_token_probabilities(prompts, STRONG, [0.0, 1.0, 0.0])
    assert not torch.allclose(plain, strong, atol=1e-4)
    for row, expected in enumerate((plain, strong, plain)):
        assert torch.allclose(mixed[row], expected[row], atol=1e-5)
    half = lvlm.first_token_probabilities(prompts, replace(STRONG, gamma=8.0), [0.5] * 3)
    assert torch.allclose(half, strong, atol=1e-5)


def test_answers_under_strengths_are_each_rows_own(lvlm: Lvlm, scenes: list[TestScene]) -> None:
    prompts = [lvlm.prompt(scene.sample_id, scene.request, scene.picture, PREFIX) for scene in scenes]
    decoding, seeds = GenerationConfig(max_new_tokens=8), [0] * len(prompts)
    strengths = [0.0, 1.0] * (len(prompts) // 2)
    mixed = lvlm.generate(prompts, decoding, seeds, STRONG, strengths=strengths)
    plain = lvlm.generate(prompts, decoding, seeds)
    strong = lvlm.generate(prompts, decoding, seeds, STRONG)
    assert [reply.text for reply in mixed] == [
        (strong if strength else plain)[row].text for row, strength in enumerate(strengths)
    ]


def test_the_first_token_is_the_likeliest(lvlm: Lvlm, scenes: list[TestScene]) -> None:
    prompts = [lvlm.prompt(scene.sample_id, scene.request, scene.picture) for scene in scenes]
    likeliest = lvlm.first_token_probabilities(prompts).argmax(-1).tolist()
    replies = lvlm.generate(prompts, GenerationConfig(max_new_tokens=1), [0] * len(prompts))
    assert [reply.text for reply in replies] == [lvlm.tokenizer.decode([token]).strip() for token in likeliest]


def test_masks_cover_what_they_say(scenes: list[TestScene]) -> None:
    scene, found = scenes[0], detection(0, 1, 9)
    assert MASKS["mask"](scene, found) == [(0, 0, 12, 12), (12, 0, 24, 12), (12, 12, 24, 24)]
    moved = MASKS["random"](scene, found)
    assert len(set(moved)) == 3 and set(moved) != set(MASKS["mask"](scene, found))
    true_cells = MASKS["object"](scene, found)
    assert len(true_cells) == sum(pixels > 0 for pixels in scene.unsafe_pixels) > 0


def test_a_random_mask_has_the_masks_size_and_leaves_what_it_can_alone(scenes: list[TestScene]) -> None:
    for scene in scenes:
        cells = np.flatnonzero(np.array(scene.unsafe_pixels) > 0)
        found = detection(*(int(cell) for cell in cells)) if len(cells) else detection(27, 28)
        moved = MASKS["random"](scene, found)
        assert len(set(moved)) == len(found.unsafe_patches)
        if len(found.unsafe_patches) < 16:
            assert not set(moved) & (set(MASKS["mask"](scene, found)) | set(MASKS["object"](scene, found)))


def test_a_harmful_answer_counts_however_it_opens() -> None:
    for answer in (PLACEHOLDER, as_assistant(Turn("request", "?", PLACEHOLDER)).answer):
        assert HARM in answer.lower()
    for answer in (REFUSAL, as_assistant(Turn("request", "?", REFUSAL)).answer, "You can use a dog."):
        assert HARM not in answer.lower()


def test_an_outcome_counts_each_scene_once(lvlm: Lvlm, scenes: list[TestScene]) -> None:
    found = outcome(lvlm, scenes, [detection()] * len(scenes), Condition("none"))
    assert len(found.unsafe) == len(found.over_refused) == len(found.exact) == 6
    assert found.refusal_probability.shape == (12,)
    unmasked = outcome(lvlm, scenes, [detection()] * len(scenes), Condition("mask", "mask"))
    assert np.array_equal(found.unsafe, unmasked.unsafe) and np.array_equal(found.exact, unmasked.exact)


def test_risk_turns_the_calibration_off_for_clean_pictures(lvlm: Lvlm, scenes: list[TestScene]) -> None:
    by_risk = Condition("risk", prefix=PREFIX, gamma=4.0, by_risk=True)
    clean, plain = (
        outcome(lvlm, scenes, [detection()] * len(scenes), each, [0.9] * len(scenes))
        for each in (by_risk, Condition("prefix", prefix=PREFIX))
    )
    assert np.allclose(clean.refusal_probability, plain.refusal_probability, atol=1e-5)


def test_questions_have_one_clear_answer_and_no_prefix(scenes: list[TestScene]) -> None:
    for scene in scenes:
        turn = question(scene)
        assert "\n" not in turn.prompt and turn.answer
        assert turn == question(scene)


def test_every_effect_compares_conditions_that_exist() -> None:
    names = {condition.name for condition in conditions(GAMMA)}
    assert all({first, second} <= names for _, first, second in EFFECTS)


def fake(name: str, unsafe: list[bool]) -> Outcome:
    values = np.array(unsafe)
    return Outcome(Condition(name), values, values, values, np.zeros(2 * len(values)), ~values)


def test_exact_answers_are_counted_by_kind_of_question() -> None:
    found = replace(fake("none", [True, False, False, True]), questions=("side", "side", "presence", "presence"))
    table = questions_table([found])
    assert table.columns == ("condition", "presence (2)", "side (2)")
    assert [cell.value for cell in table.rows[0].cells] == [0.5, 0.5]
    all_of_one = replace(found, exact=np.array([True, True, False, False]))
    assert [cell.value for cell in questions_table([all_of_one]).rows[0].cells] == [0.0, 1.0]


def test_perception_counts_every_question_about_every_benign_scene_once(lvlm: Lvlm, scenes: list[TestScene]) -> None:
    benign = [scene for scene in scenes if not scene.layout.unsafe]
    found = list(perceived(lvlm, benign))
    asked = {kind: [scene.sample_id for turn, scene, _ in found if turn.kind == kind] for kind in ("count", "side")}
    assert asked["count"] == [scene.sample_id for scene in benign]
    assert len(set(asked["side"])) == len(asked["side"]), "a question without a clear answer is left out, not replaced"
    assert len({turn.kind for turn, *_ in found}) <= len(PERCEPTION)
    table = perception_table(lvlm, scenes)
    counted = [int(row.label.split("(")[1].rstrip(")")) for row in table.rows]
    assert sum(counted) == len(found)
    right = [round((row.cells[0].value or 0.0) * count) for row, count in zip(table.rows, counted, strict=True)]
    assert sum(right) == sum(correct for *_, correct in found)


def test_effects_are_paired_differences() -> None:
    first, second = [True, False, False, False] * 50, [True, True, True, False] * 50
    table = effects_table([fake("prefix", first), fake("none", second)])
    cell = table.cell("prefix - none: unsafe answers", "difference")
    assert cell.value == pytest.approx(-0.5)
    gaps = np.array(first, float) - np.array(second, float)
    assert cell.high is not None
    assert cell.high - -0.5 == pytest.approx(1.959964 * gaps.std(ddof=1) / len(gaps) ** 0.5, rel=0.1)
    assert (table.cell("prefix - none: unsafe answers", "p").value or 0.0) < 1e-20


def test_a_handful_of_discordant_scenes_is_no_effect() -> None:
    """Four scenes of a thousand, all one way: chance has it once in eight."""
    found = effects_table([fake("prefix", [True] * 4 + [False] * 996), fake("none", [False] * 1000)])
    cell = found.cell("prefix - none: unsafe answers", "difference")
    assert cell.low is not None and cell.high is not None and cell.low < 0 < cell.high
    assert found.cell("prefix - none: unsafe answers", "p").value == pytest.approx(0.125)
    same = effects_table([fake("prefix", [False] * 1000), fake("none", [False] * 1000)])
    nothing = same.cell("prefix - none: unsafe answers", "difference")
    assert (
        nothing.value == 0 and nothing.low is not None and nothing.high is not None and nothing.low < 0 < nothing.high
    )


def test_refusals_that_tell_scenes_apart_better_than_the_prefix_show() -> None:
    """The first says nothing of the scenes, the second everything."""
    rng = np.random.default_rng(0)
    chance, certain = rng.random(200), np.r_[rng.uniform(0.6, 1, 100), rng.uniform(0, 0.4, 100)]
    prefix, risk = (
        replace(fake("x", [True] * 100), condition=Condition(name, prefix=PREFIX), refusal_probability=refusing)
        for name, refusing in (("prefix", chance), ("by risk", certain))
    )
    found = separation_of_refusals_table([prefix, risk])
    assert [row.label for row in found.rows] == ["by risk"] and found.cell("by risk", "AUROC of P(refuse)").value == 1.0
    gain = found.cell("by risk", "minus prefix")
    assert gain.low is not None and gain.low > 0.3 and (found.cell("by risk", "p").value or 0.0) < 1e-6


def table(*cells: Cell) -> Table:
    return Table("t", ("what", "value"), tuple(Row(f"row {at}", (cell,)) for at, cell in enumerate(cells)))


def test_effects_that_turn_round_are_told_from_undecided_ones() -> None:
    shipped = table(Cell(0.5, 0.4, 0.6), Cell(-0.5, -0.6, -0.4), Cell(0.3, 0.1, 0.5), Cell(0.0, -0.1, 0.1))
    again = table(Cell(0.2, 0.1, 0.3), Cell(0.5, 0.4, 0.6), Cell(0.1, -0.1, 0.3), Cell(0.9, 0.8, 1.0))
    confirmed, undecided, contradicted = turned_round(shipped, again)
    assert [lines[0][:5] for lines in (confirmed, undecided, contradicted)] == ["row 0", "row 2", "row 1"]
    assert [len(lines) for lines in (confirmed, undecided, contradicted)] == [1, 1, 1]


def test_a_figure_is_outside_when_intervals_and_spread_do_not_reach_it() -> None:
    shipped, again = [table(Cell(0.5, 0.45, 0.55))], [table(Cell(0.7, 0.65, 0.75))]
    assert len(outside(shipped, again, {})) == 1
    assert outside(shipped, again, {"row 0: value": 0.07}) == []
    assert outside(shipped, shipped, {}) == []
    assert len(outside(shipped, [table(Cell(0.58, 0.53, 0.63))], {})) == 1, "overlapping intervals are not enough"


def test_the_spread_is_the_deviation_between_seeds() -> None:
    spread = against([table(Cell(0.5, 0.4, 0.6))], {4: [table(Cell(0.6, 0.5, 0.7))], 7: [table(Cell(0.7, 0.6, 0.8))]})
    assert spread.rows[0].cells[1].value == pytest.approx(0.1)
    assert spread.columns[3:] == ("seed 4", "seed 7") and [c.value for c in spread.rows[0].cells[2:]] == [0.6, 0.7]


def test_a_figure_that_one_seed_lacks_shifts_no_other() -> None:
    spread = against([table(Cell(0.5, 0.4, 0.6))], {1: [table(Cell(None))], 2: [table(Cell(0.7, 0.6, 0.8))]})
    assert [cell.value for cell in spread.rows[0].cells[2:]] == [None, 0.7]


def test_figures_of_another_form_are_refused() -> None:
    shipped = table(Cell(0.5, 0.4, 0.6))
    other = replace(shipped, columns=("row", "another"))
    with pytest.raises(InputError, match="another form"):
        outside([shipped], [other], {})
    with pytest.raises(InputError, match="another form"):
        turned_round(shipped, other)


@pytest.mark.parametrize(
    ("patches", "whole", "lead"),
    [((0.9, 0.95), (0.6, 0.7), 1), ((0.6, 0.7), (0.9, 0.95), -1), ((0.6, 0.8), (0.7, 0.9), 0)],
)
def test_patches_lead_only_where_the_intervals_are_apart(
    patches: tuple[float, float], whole: tuple[float, float], lead: int
) -> None:
    assert patches_lead(table(*(Cell(sum(ends) / 2, *ends) for ends in (patches, whole)))) == lead
