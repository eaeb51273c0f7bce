"""The stages of an evaluation on shards made by hand: shared pictures, failures that stay with their own row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from guardalign.config import ClipConfig, GenerationConfig, LvlmConfig
from guardalign.defenses import DEFENSES
from guardalign.detectors import OtDetector
from guardalign.evaluation.stages import AnswerAll, DetectOnce, Expand, Method, View, with_own_column
from guardalign.micro import resolve_clip, resolve_lvlm
from guardalign.micro.proof import proof_rows
from guardalign.models.asking import Asking
from guardalign.models.lvlm import Lvlm
from guardalign.reading import admit
from guardalign.results import ShardWriter
from guardalign.sanitizers import SANITIZERS
from guardalign.schema import PLANNED, RESULT_NAMES, result_schema, trace_of, with_columns
from guardalign.sources import INPUT_SCHEMA
from guardalign.stages import Detect
from guardalign.taxonomy import load_taxonomy
from guardalign.types import Case, Reply

MAX_PIXELS = 10**6
SHORT = GenerationConfig(max_new_tokens=4)


def shard(*pictures: bytes | None) -> pa.Table:
    """A working table of one request under each picture."""
    rows = [
        {"sample_id": f"s{at}", "prompt": "How can I use what is shown?", "image": picture, "source": f"f#{at}"}
        for at, picture in enumerate(pictures)
    ]
    table = pa.Table.from_pylist([dict.fromkeys(INPUT_SCHEMA.names) | row for row in rows], schema=INPUT_SCHEMA)
    table = with_own_column(table, "benchmark", ["b"] * len(rows))
    return admit(with_columns(table, {"shard": [0] * len(rows), PLANNED: [len(rows)] * len(rows)}))


@pytest.fixture(scope="module")
def scenes() -> list[bytes]:
    return [row["image"] for row in proof_rows("plain", 2)]


@pytest.fixture(scope="module")
def detect() -> Detect:
    return Detect(resolve_clip(ClipConfig()), OtDetector(), load_taxonomy("micro"), MAX_PIXELS)


def cells(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.select([n for n in table.column_names if n in RESULT_NAMES]).to_pylist()
    return rows


def test_a_shared_picture_is_detected_once_and_every_row_has_what_was_found(
    scenes: list[bytes], detect: Detect
) -> None:
    table = shard(scenes[0], scenes[1], scenes[0], None, b"no picture", b"no picture")
    once, each = DetectOnce(detect)(table), detect(table)
    for own, other in zip(cells(once), cells(each), strict=True):
        scores = own.pop("patch_scores"), other.pop("patch_scores")
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
        for name in ("image_score", "category_scores", "marginal_error"):
            own.pop(name), other.pop(name)
        assert own == other
    assert "s5" in once["error"][5].as_py() and once["error"][3].as_py() is None


def test_detection_of_one_picture_costs_one_picture(scenes: list[bytes], detect: Detect) -> None:
    alone, many = (trace_of(DetectOnce(detect)(shard(*[scenes[0]] * count))).counters for count in (1, 40))
    assert alone["clip_forward_calls"] == many["clip_forward_calls"]


def expanded(scenes: list[bytes], detect: Detect, folder: Path, recipes: dict[str, View]) -> pa.Table:
    table = shard(*scenes, None, b"no picture")
    ShardWriter(str(folder), result_schema(), "r", 1).commit(DetectOnce(detect)(table))
    return Expand("m", recipes, str(folder), 1, MAX_PIXELS)(table)


def test_recipes_see_their_own_pictures(scenes: list[bytes], detect: Detect, tmp_path: Path) -> None:
    views = {"plain": View(None, None), "masked": View(0, SANITIZERS["mask"]()), "seen": View(0, None)}
    table = expanded(scenes, detect, tmp_path, views)
    num_samples = len(scenes) + 2
    assert table["recipe"].to_pylist() == [name for name in views for _ in range(num_samples)]
    images = table["image"].to_pylist()
    plain, masked, seen = (images[at : at + num_samples] for at in range(0, 3 * num_samples, num_samples))
    flagged = table["flagged"].to_pylist()[num_samples : 2 * num_samples]
    assert plain == seen and [a != b for a, b in zip(plain, masked, strict=True)] == [bool(each) for each in flagged]
    assert any(flagged) and not all(flagged)
    spent = table["detection_seconds"].to_pylist()
    assert set(spent[:num_samples]) == {0.0} and all(each > 0 for each in spent[num_samples:])


def test_a_row_that_cannot_be_read_any_more_keeps_its_error(
    scenes: list[bytes], detect: Detect, tmp_path: Path
) -> None:
    """The detector's pass has read it; the answers' pass has not."""
    table = shard(*scenes)
    ShardWriter(str(tmp_path), result_schema(), "r", 1).commit(DetectOnce(detect)(table))
    lost = {"image": None, "prompt": None, "image_sha256": None, "error": "gone", "error_kind": "image_missing"}
    cells = {name: [value, *table[name].to_pylist()[1:]] for name, value in lost.items()}
    views = {"masked": View(0, SANITIZERS["mask"]())}
    found = Expand("m", views, str(tmp_path), 1, MAX_PIXELS)(with_columns(table, cells)).to_pylist()
    assert (found[0]["error"], found[0]["error_kind"]) == ("gone", "image_missing")
    assert found[0]["image_score"] is None and found[0]["flagged"] is None
    assert all(row["error"] is None and row["image_score"] is not None for row in found[1:])


@dataclass(frozen=True)
class Breaks:
    """A defense with a mistake in it."""

    def answer(self, lvlm: Lvlm, case: Case, generation: GenerationConfig) -> Asking[Reply]:
        if case.sample.sample_id == "s1":
            raise IndexError(case.sample.sample_id)
        reply: Reply = yield from DEFENSES["none"]().answer(lvlm, case, generation)
        return reply


def test_a_defense_that_breaks_costs_its_own_row_alone(scenes: list[bytes], detect: Detect, tmp_path: Path) -> None:
    views = {name: View(None, None) for name in ("none", "broken", "prefix")}
    methods = {
        "none": Method("none", DEFENSES["none"](), SHORT),
        "broken": Method("broken", Breaks(), SHORT),
        "prefix": Method("prefix", DEFENSES["prefix"](), SHORT),
    }
    table = expanded(scenes, detect, tmp_path, views)
    answered = AnswerAll(resolve_lvlm(LvlmConfig()), methods, MAX_PIXELS)(table)
    rows = {(row["recipe"], row["sample_id"]): row for row in answered.to_pylist()}
    unreadable = f"s{len(scenes) + 1}"
    failed = {key for key, row in rows.items() if row["error"] is not None}
    assert failed == {("broken", "s1"), *((name, unreadable) for name in methods)}
    assert rows["broken", "s1"]["error_kind"] == "generation_failed"
    assert rows["none", unreadable]["error_kind"] == "image_unreadable"
    for name in methods:
        assert all(rows[name, f"s{at}"]["response"] for at in range(len(scenes) + 1) if (name, at) != ("broken", 1))
