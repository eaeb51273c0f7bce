"""A row's answer depends on nothing but the row: not on the batch's size, the order, or the length of its neighbours.

fp32: the same tokens, for every defense and family. bf16: rounding may move a token; the share of answers that differ
is bounded on the embedded LVLM. Alone and all mixed in batches of 5: `tests/defenses/test_matrix.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guardalign.bench.batches import MOST_IN_HALF, changed_answers, num_different
from guardalign.bench.ratios import measure
from guardalign.config import Dtype, GenerationConfig
from guardalign.core.statistics import wilson_interval
from guardalign.defenses import Defense
from guardalign.models.lvlm import Lvlm
from guardalign.types import Case, Cost, Reply, Sample
from tests.defenses.test_matrix import CASES, every_defense
from tests.small_lvlms import FAMILIES, small_lvlm

DECODING = GenerationConfig(max_new_tokens=5)
LONG = Case(Sample("long", "Count the dogs, then the cats, then say why. " * 4, None, "here"), None)
"""a neighbour for which all others are padded"""
SLOW = pytest.mark.slow
ONE_OF_EACH = ("none", "guardalign", "safecode", "casa", "eta", "ecso")
DEFAULT = ("qwen2_5_vl",)
BY_TURNS: list[Any] = [each if each in DEFAULT else pytest.param(each, marks=SLOW) for each in FAMILIES]
"""mrope by default; the slow suite asks all families"""


def replies(lvlm: Lvlm, defenses: Sequence[Defense], cases: Sequence[Case], size: int) -> list[Reply]:
    """Every case under every defense, at most `size` rows in a batch; what may differ in the last bits is taken out."""
    askings = (defense.answer(lvlm, case, DECODING) for defense in defenses for case in cases)
    return [replace(each, cost=Cost(), defense_score=None) for each in lvlm.answered(askings, size)]


@pytest.mark.parametrize("family", BY_TURNS)
def test_no_answer_depends_on_its_batch(family: str, tmp_path: Path) -> None:
    lvlm = small_lvlm(family)
    every = every_defense(lvlm, tmp_path)
    defenses = [every[name] for name in every if name.partition(",")[0] in ONE_OF_EACH and "," not in name]
    alone = replies(lvlm, defenses, CASES, 1)
    assert replies(lvlm, defenses, CASES, 2) == alone
    beside = replies(lvlm, defenses[::-1], [*CASES[::-1], LONG], 8)[::-1]
    assert [reply for place, reply in enumerate(beside) if place % 4] == alone


def test_in_fp32_a_batch_changes_no_answer_of_the_embedded_model() -> None:
    outcome = measure(changed_answers("float32", rows=24, batch_size=7, num_tokens=12))
    assert outcome.ratio == 0 and not outcome.short


@SLOW
def test_in_bf16_a_batch_changes_few_answers_of_the_embedded_model() -> None:
    """Measured on one CPU thread: 0 of 200."""
    different = num_different("bfloat16", rows=200, batch_size=16, num_tokens=32)
    assert different <= MOST_IN_HALF * 200, wilson_interval(different, 200)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_gpu_a_batch_changes_no_answer_in_fp32_and_few_in_halves(dtype: Dtype) -> None:
    different = num_different(dtype, rows=200, batch_size=16, num_tokens=32)
    assert different <= (0 if dtype == "float32" else MOST_IN_HALF * 200), wilson_interval(different, 200)
