"""A row that takes its worker's watcher with it, too, is found by what was written down before."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from runs import assert_only_killer, audited, committed, forked, run

from guardalign.errors import ModelError
from guardalign.journal import FOLDER, MOST_DEATHS, Entry, Journal
from guardalign.schema import with_columns

IDS = ("a", "b", "c", "d")


class DeathError(BaseException):
    """Stands for the end of the process: nothing after it is run but what finds the folder later."""


def shard() -> pa.Table:
    rows = len(IDS)
    nothing = {name: [None] * rows for name in ("error", "error_stage", "error_kind")}
    return with_columns(pa.table({"sample_id": list(IDS)}), {**nothing, "shard": [7] * rows})


def lives(out: Path, deadly: frozenset[str], outside: int = 0, runs: list[str] | None = None) -> tuple[pa.Table, int]:
    """Begins the shard in new lives until one is through; the table, and the deaths. `outside` deaths hit anybody."""
    deaths = 0

    class Mortal(Journal):
        """A process that dies puts nothing back."""

        def _put_back(self, entry: Entry) -> None:
            if not isinstance(sys.exc_info()[1], DeathError):
                super()._put_back(entry)

    def work(table: pa.Table) -> pa.Table:
        nonlocal outside
        alive = {
            name
            for name, error in zip(*(table[n].to_pylist() for n in ("sample_id", "error")), strict=True)
            if not error
        }
        if alive & deadly or outside > 0:
            outside -= 1
            raise DeathError
        return table

    while True:
        try:
            return Mortal(str(out), "generate", runs and runs.pop(0)).through(work, shard()), deaths
        except DeathError:
            deaths += 1
            assert deaths < 30, "it never ends"


@pytest.mark.parametrize("deadly", ["a", "c", "ad", "abcd"])
def test_rows_that_end_everything_are_given_up(tmp_path: Path, deadly: str) -> None:
    table, deaths = lives(tmp_path, frozenset(deadly))
    errors = dict(zip(IDS, table["error_kind"].to_pylist(), strict=True))
    assert errors == {each: "killed_worker" if each in deadly else None for each in IDS}
    assert deaths == MOST_DEATHS + 2 * len(deadly)
    assert "killed the worker and its watcher 2 times" in table["error"][IDS.index(deadly[0])].as_py()
    assert not list((tmp_path / FOLDER).iterdir()), "what is done is forgotten"


@pytest.mark.parametrize("outside", [1, 2, 3, 4, 5])
def test_deaths_from_outside_cost_no_row_before_the_fifth_over_one_shard(tmp_path: Path, outside: int) -> None:
    table, deaths = lives(tmp_path, frozenset(), outside)
    given_up = [name for name, error in zip(IDS, table["error"].to_pylist(), strict=True) if error]
    assert deaths == outside
    assert len(given_up) == max(0, outside - MOST_DEATHS) // 2, (
        "two deaths in succession over the same row alone blame it"
    )


def test_deaths_in_other_runs_do_not_count_where_the_driver_outlives_its_workers(tmp_path: Path) -> None:
    table, deaths = lives(tmp_path, frozenset(), 12, [f"run-{number}" for number in range(13)])
    assert deaths == 12
    assert table["error"].null_count == len(IDS)


def test_whoever_raises_is_not_dead(tmp_path: Path) -> None:
    def unmendable(table: pa.Table) -> pa.Table:
        raise ModelError("the weights are missing")

    for _ in range(9):
        with pytest.raises(ModelError):
            Journal(str(tmp_path), "generate", None).through(unmendable, shard())
    assert not list((tmp_path / FOLDER).iterdir())
    table, _ = lives(tmp_path, frozenset())
    assert table["error"].null_count == len(IDS)


def test_whoever_is_interrupted_forgets_no_death(tmp_path: Path) -> None:
    """Ctrl-C while a row is tried for the second time: it is tried once more, and given up when that ends it, too."""

    def interrupted(table: pa.Table) -> pa.Table:
        raise KeyboardInterrupt

    name = tmp_path / FOLDER / "generate-000007.json"
    name.parent.mkdir()
    name.write_text(json.dumps({"begun": 4, "row": "c", "passed": ["a", "b"]}))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            Journal(str(tmp_path), "generate", None).through(interrupted, shard())
    assert json.loads(name.read_text())["deaths"] == {"c": 1}
    table, deaths = lives(tmp_path, frozenset("c"))
    assert (deaths, table["error"].null_count) == (1, len(IDS) - 1)


def test_a_note_that_death_has_cut_off_is_none(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "generate-000007.json").write_text('{"begun": 9, "ro')
    table, deaths = lives(tmp_path, frozenset())
    assert deaths == 0
    assert table["error"].null_count == len(IDS)


@pytest.mark.slow
def test_a_row_that_kills_the_whole_process_ends_as_an_error_after_some_resumes(tmp_path: Path) -> None:
    faults, out = tmp_path / "faults", tmp_path / "out"
    faults.mkdir()
    (faults / "rows.json").write_text(json.dumps({"generate": {"scene-005": "segfault"}}))
    flags = ("--recipe", "none", "--shard_rows", 4, "--limit", 8, "--self_check", "false")
    codes = [forked(audited, faults, *flags, "--output", out) for _ in range(6)]
    assert codes == [-signal.SIGSEGV] * 5 + [0]
    assert committed(out) == 2
    assert run(*flags, "--output", tmp_path / "whole") == 0
    assert_only_killer("scene-005", out, tmp_path / "whole")
    assert not (out / FOLDER).exists()
