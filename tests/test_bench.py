"""Every benchmark prepares both its sides and runs each once, at a toy size; its own checks can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from guardalign.bench import detection, generation
from guardalign.bench.inputs import photo, prompts_of_mixed_lengths, require_answered, working_table
from guardalign.bench.lvlm import LvlmSizes, word_tokenizer
from guardalign.bench.ratios import Benchmark, Outcome, as_json, measure, table
from guardalign.core.images import decode
from guardalign.defenses.plain import PREFIX

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TINY_LVLM = LvlmSizes(image_size=28, vision_width=32, vision_layers=2, width=32, layers=4, heads=4, key_heads=2)
TINY = generation.Load(num_rows=4, batch_size=2, num_tokens=3, sizes=TINY_LVLM, clip=TINY_CLIP)

TOYS: dict[str, Benchmark] = {
    "detect_stage": detection.detect_stage(1, TINY_CLIP, num_pictures=3, batch_size=2),
    "transport": detection.transport(1, shape=(2, 3, 20, 4)),
    "calibrated_decoding": generation.calibrated_decoding(1, TINY),
    "generate_stage": generation.generate_stage(1, TINY),
    "defended_audit": generation.defended_audit(1, TINY),
}


@pytest.mark.parametrize("name", TOYS)
def test_both_sides_are_built_and_run(name: str) -> None:
    outcome = measure(TOYS[name])
    assert outcome.ratio > 0
    assert len(outcome.costs) == 1
    assert outcome.title in table([outcome])
    assert outcome.title in as_json([outcome])


def test_a_bound_missed_is_marked_whichever_way_it_points() -> None:
    speed_up = Outcome("faster", 4.0, 4.0, 4.0, must_be=5.0, goal=6.0, at_least=True, costs=((4.0, 1.0),))
    assert speed_up.short and table([speed_up]).endswith("SHORT")
    assert not replace(speed_up, ratio=5.0).short
    cost = replace(speed_up, ratio=1.2, must_be=1.15, at_least=False)
    assert cost.short
    assert not replace(cost, ratio=1.1).short


def test_plans_that_differ_are_no_benchmark() -> None:
    C, a, b = detection.random_problems((1, 1, 6, 3))
    other = [(a[0].double()[:, None] * b[0, 0].double()).numpy()]  # the plan that ignores the costs
    plan = detection.solve(C, a, b, detection.EPSILON).plan(C, detection.EPSILON).double()
    with pytest.raises(AssertionError, match="plans differ"):
        detection._require_equal(plan, other, a.double(), b.double())


def test_problems_look_like_clip() -> None:
    cosines = 1 - detection.random_problems((2, 3, 50, 4))[0]
    assert 0.1 < float(cosines.mean()) < 0.3
    assert 0.02 < float(cosines.std()) < 0.1


def test_rows_that_fail_are_no_work_done() -> None:
    rows = working_table(["what is it?"], [b"no picture"])
    failed = rows.set_column(rows.schema.get_field_index("error"), "error", [["it failed"]])
    with pytest.raises(AssertionError, match="1 rows failed"):
        require_answered(failed)
    assert require_answered(rows) is rows


def test_pictures_are_jpegs_of_a_photo_size_and_drawn_by_seed() -> None:
    decoded = decode(photo(1), 10**6, "a")
    assert (decoded.width, decoded.height) == (640, 480)
    assert photo(1) == photo(1) != photo(2)
    assert 40_000 < len(photo(1)) < 200_000


def test_words_of_the_prompts_are_whole_tokens_and_nothing_ends_an_answer() -> None:
    prompts = prompts_of_mixed_lengths(6)
    tokenizer = word_tokenizer([PREFIX, *prompts])
    assert tokenizer.eos_token_id is None
    num_tokens = len(tokenizer(PREFIX, add_special_tokens=False)["input_ids"])
    assert len(PREFIX.split()) <= num_tokens <= len(PREFIX.split()) + 5
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert len(set(lengths)) == 3 and max(lengths) > 3 * min(lengths)


def test_the_random_state_of_the_caller_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    TOYS["calibrated_decoding"].prepare()
    assert torch.equal(before, torch.get_rng_state())
