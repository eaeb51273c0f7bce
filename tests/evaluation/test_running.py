"""Whole evaluations with the embedded models: complete, the audit's own rows, resumed, nothing done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from guardalign.cli import main
from guardalign.results import ShardWriter
from guardalign.schema import VOLATILE
from guardalign.settings import RECIPES as RECIPE_FOLDER

RECIPES = ("none", "guardalign", "guardalign-detect-only", "ecso")
QUICK = (
    "--cluster.isolated",
    "false",
    "--generation.max_new_tokens",
    "6",
    "--engine",
    "local",
    "--shard_rows",
    "4",
    "--limit",
    "10",
)
ZERO = {"clip_loads": 0, "clip_forward_calls": 0, "lvlm_loads": 0, "lvlm_forward_calls": 0}


def evaluate(out: Path, *flags: object, recipes: tuple[str, ...] = RECIPES) -> int:
    """The exit code of a small evaluation into this folder."""
    words = ["evaluate", "--suite", "micro", "--defenses", ",".join(recipes), *QUICK, "--output", out, *flags]
    return main([str(word) for word in words])


def rows(out: Path) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """Result rows by benchmark, model, recipe and sample, without what may differ between two runs."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted((out / "results").glob("*.parquet")))
    kept = table.drop_columns([*VOLATILE, "detection_seconds"]).to_pylist()
    by_key = {(row["benchmark"], row["model"], row["recipe"], row["sample_id"]): row for row in kept}
    assert len(by_key) == len(kept)
    return by_key


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("evaluation") / "out"
    assert evaluate(out) == 0
    yield out


def test_every_sample_stands_once_for_every_recipe(finished: Path) -> None:
    found = rows(finished)
    assert len(found) == 10 * len(RECIPES)
    assert {key[2] for key in found} == set(RECIPES)
    assert not any(row["error"] for row in found.values())
    assert all(row["response"] is not None for row in found.values())
    cut = {key for key, row in found.items() if row["unsafe"] is None}
    assert cut == {key for key, row in found.items() if row["verdict_problem"] == "unparsed"}
    assert all(found[key]["stop_reason"] == "length" and "here is" in found[key]["response"] for key in cut)


@pytest.mark.parametrize("recipe", ["none", "guardalign", "guardalign-detect-only"])
def test_a_recipes_rows_are_those_of_its_audit(recipe: str, finished: Path, tmp_path: Path) -> None:
    flags = ("--recipe", recipe, "--input.format", "micro", "--input.split", "plain", "--output", tmp_path)
    assert main(["audit", *map(str, (*flags, *QUICK))]) == 0
    table = pa.concat_tables(pq.read_table(path) for path in (tmp_path / "results").glob("*.parquet"))
    audited = {row["sample_id"]: row for row in table.to_pylist()}
    own = {key[3]: row for key, row in rows(finished).items() if key[2] == recipe}
    assert set(own) == set(audited)
    exact = ("response", "flagged", "unsafe_patches", "masked_fraction", "num_tokens", "refused", "width", "defense")
    for name, row in own.items():
        assert [row[cell] for cell in exact] == [audited[name][cell] for cell in exact]
        assert row["image_score"] == pytest.approx(audited[name]["image_score"], abs=1e-5)


def test_the_undefended_answer_and_the_detection_are_done_once(finished: Path, tmp_path: Path) -> None:
    """Twice the same recipe under two names takes no forward call more."""
    for name in ("again", "once-more"):
        (tmp_path / f"{name}.yaml").write_text((RECIPE_FOLDER / "guardalign.yaml").read_text())
    twice = (*RECIPES, *(str(tmp_path / f"{name}.yaml") for name in ("again", "once-more")))
    assert evaluate(tmp_path / "out", recipes=twice) == 0
    assert manifest(tmp_path / "out")["counters"] == manifest(finished)["counters"]


def test_a_second_run_does_no_model_work(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = [(finished / f"tables.{kind}").read_text() for kind in ("txt", "md", "json")]
    first = manifest(finished)["counters"]
    assert first["lvlm_loads"] == 1 and first["clip_loads"] == 1 and first["lvlm_forward_calls"] > 0
    assert evaluate(finished) == 0
    assert "nothing to do" in capsys.readouterr().out
    again = manifest(finished)
    assert again["this_run"]["counters"] == ZERO and again["this_run"]["rows"] == 0
    assert again["counters"] == first
    assert [(finished / f"tables.{kind}").read_text() for kind in ("txt", "md", "json")] == tables


@pytest.mark.parametrize("commits", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_run_that_was_interrupted_goes_on_where_it_stopped(
    commits: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one commit in the detector's pass, or after one in the model's: three shards come before it."""
    done: list[int] = []
    commit = ShardWriter.commit

    def some(self: ShardWriter, table: pa.Table) -> Any:
        if len(done) == commits:
            raise KeyboardInterrupt
        done.append(1)
        return commit(self, table)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "commit", some)
        assert evaluate(tmp_path) == 130
    assert not (tmp_path / "run.json").exists()
    assert evaluate(tmp_path) == 0
    assert rows(tmp_path) == rows(finished)
    whole, rest = manifest(tmp_path)["counters"], manifest(tmp_path)["this_run"]["counters"]
    assert 0 < rest["lvlm_forward_calls"] <= whole["lvlm_forward_calls"]
    assert rest["clip_forward_calls"] < whole["clip_forward_calls"]
    assert rest["clip_loads"] == (commits < 3)


@pytest.mark.parametrize("folder", ["", "detections/"])
def test_a_damaged_shard_is_named_when_the_evaluation_is_run_again(
    folder: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "run.json").unlink()
    shard = out / f"{folder}results/shard-000001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    assert evaluate(out) == 2
    assert f"{folder}results/shard-000001.parquet is missing or damaged" in capsys.readouterr().err
    assert not (out / "run.json").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(finished: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--suite", "micro", "--defenses", ",".join(RECIPES), *QUICK, "--output", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "guardalign.cli", *words], start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("results/shard-*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = 3 - len(list(tmp_path.glob("results/shard-*.parquet")))
    assert evaluate(tmp_path) == 0
    assert rows(tmp_path) == rows(finished)
    mine = manifest(tmp_path)["this_run"]
    assert mine["rows"] <= 4 * len(RECIPES) * left and mine["counters"]["clip_loads"] == 0


def test_another_comparison_does_not_go_into_the_same_folder(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(finished, recipes=("none", "prefix")) == 2
    assert "would mix with" in capsys.readouterr().err
    assert evaluate(finished, "--generation.max_new_tokens", "7") == 2


@pytest.mark.slow
def test_two_models_and_two_benchmarks_share_detection(finished: Path, tmp_path: Path) -> None:
    from guardalign.micro import WEIGHTS

    models = f"embedded,{WEIGHTS / 'lvlm'}"
    flags = ("--models", models, "--benchmarks", "micro:shifted")
    assert evaluate(tmp_path, *flags, recipes=("none", "guardalign")) == 0
    found = rows(tmp_path)
    assert len(found) == 2 * 2 * 10 * 2
    plain = {key[2:]: row["response"] for key, row in found.items() if key[:2] == ("micro", "lvlm")}
    assert plain == {key[2:]: row["response"] for key, row in rows(finished).items() if key[2:] in plain}
    assert manifest(tmp_path)["counters"]["lvlm_loads"] == 2
    assert manifest(tmp_path)["counters"]["clip_loads"] == 1
    assert len(list((tmp_path / "detections" / "results").glob("*.parquet"))) == 6


@pytest.mark.slow
def test_ray_and_the_loop_give_the_same_rows(finished: Path, tmp_path: Path, ray_cluster: None) -> None:
    assert evaluate(tmp_path, "--engine", "ray") == 0
    assert rows(tmp_path) == rows(finished)
    assert evaluate(tmp_path, "--engine", "ray") == 0
    assert manifest(tmp_path)["this_run"]["counters"] == ZERO
