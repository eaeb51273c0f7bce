"""A row that ends whoever reads it costs itself alone, here and on Ray; what no row explains is one line."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import assert_only_killer, audited, forked, run

from guardalign.audit import prepare
from guardalign.cli import main
from guardalign.config import AuditConfig, InputConfig
from guardalign.errors import InputError
from guardalign.faults import VARIABLE
from guardalign.journal import FOLDER, MOST_DEATHS
from guardalign.pipeline import run_on_ray
from guardalign.reading import MOST_GIVEN_UP, read_shard, read_task
from guardalign.results import RunFolder, ShardWriter
from guardalign.schema import result_schema
from guardalign.settings import load_settings
from guardalign.sources import Outline, Plan, Shard, Source, make_source
from guardalign.supervision import receipt_of


@dataclass
class Deadly:
    """A source that kills its reader over some rows, over some number of rows at once, or some times."""

    source: Source
    rows: frozenset[int] = frozenset()
    together: int = 99
    times: Path | None = None
    """holds how often whoever comes is killed"""

    def plan(self, shard_rows: int, limit: int | None) -> Plan:
        return self.source.plan(shard_rows, limit)

    def outline(self, shard: Shard) -> Outline:
        return self.source.outline(shard)

    def read(self, shard: Shard) -> pa.Table:
        left = int(self.times.read_text()) if self.times else 0
        if self.times:
            self.times.write_text(str(left - 1))
        if left > 0 or shard.num_rows >= self.together or any(self.rows & set(span.rows) for span in shard.spans):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.read(shard)


def read_into(path: Path, source: Source, out: Path, batch: pa.Table, run: str = "run") -> None:
    path.write_bytes(pickle.dumps(read_task(source, str(out), run, batch)))


def lives(source: Source, out: Path, shard: Shard) -> tuple[pa.Table, int]:
    """Readers are begun, as Ray would, until one is through: what it read, and how many died."""
    batch, path, deaths = pa.table({"shard": [pickle.dumps(shard)]}), out / "read", 0
    while not path.exists():
        child = multiprocessing.get_context("fork").Process(target=read_into, args=(path, source, out, batch))
        child.start()
        child.join()
        deaths += child.exitcode != 0
        assert deaths < 30, "it never ends"
    return pickle.loads(path.read_bytes()), deaths


def verified(faults: Path, out: Path) -> None:
    os.environ[VARIABLE] = str(faults)
    sys.exit(main(["verify", str(out), "--sample", "8"]))


@pytest.fixture(scope="module")
def whole() -> tuple[Source, Shard]:
    """A source, and its second shard: rows 4 to 7."""
    prepared = prepare(AuditConfig(shard_rows=4, limit=8))
    return prepared.source, prepared.plan.shards[1]


@pytest.mark.parametrize("deadly", [{5}, {4, 7}, {5, 6, 7}])
def test_rows_that_end_whoever_reads_them_are_error_rows(
    deadly: set[int], whole: tuple[Source, Shard], tmp_path: Path
) -> None:
    source, shard = whole
    found, deaths = lives(Deadly(source, frozenset(deadly)), tmp_path, shard)
    assert deaths == MOST_DEATHS + 2 * len(deadly)
    undisturbed = read_shard(source, shard)
    assert found.schema.equals(undisturbed.schema)
    for number, row, other in zip(range(4, 8), found.to_pylist(), undisturbed.to_pylist(), strict=True):
        if number not in deadly:
            assert row == other
            continue
        assert (row["sample_id"], row["source"]) == (other["sample_id"], other["source"])
        assert (row["error_kind"], row["error_stage"]) == ("killed_worker", "read")
        assert row["error"] == f"sample {row['sample_id']} ended whoever read it 2 times"
    assert not list((tmp_path / FOLDER).iterdir())


def test_after_four_such_rows_the_rest_is_not_tried(tmp_path: Path) -> None:
    """As behind a page that nobody can decode."""
    prepared = prepare(AuditConfig(shard_rows=16, limit=16))
    (shard,) = prepared.plan.shards
    found, deaths = lives(Deadly(prepared.source, frozenset(range(2, 16))), tmp_path, shard)
    assert deaths == MOST_DEATHS + 2 * MOST_GIVEN_UP
    errors = found["error"].to_pylist()
    assert [error is None for error in errors] == [True] * 2 + [False] * 14
    assert errors[5] == "sample scene-005 ended whoever read it 2 times"
    assert errors[6] == "sample scene-006 was not read: 4 rows before it ended whoever read them"
    assert found.slice(0, 2).to_pylist() == read_shard(prepared.source, shard).slice(0, 2).to_pylist()


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary_view(), pa.list_(pa.int8()), pa.int64()])
def test_columns_of_any_type_pass_by_a_lost_row(kind: pa.DataType, tmp_path: Path) -> None:
    value: Any = [1] if pa.types.is_list(kind) else 1 if pa.types.is_integer(kind) else b"x"
    column = pa.array([value, value, None], kind)
    rows = {"sample_id": ["a", "b", "c"], "prompt": ["p", "q", "r"], "extra": column}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = make_source(InputConfig("parquet", str(tmp_path), passthrough=["extra"]))
    (shard,) = source.plan(3, None).shards
    found = read_shard(source, shard, {1: "lost"})
    assert found["extra"].to_pylist() == [column[0].as_py(), None, None]
    assert (found["sample_id"].to_pylist(), found["error"].to_pylist()) == (["a", "b", "c"], [None, "lost", None])
    assert found.schema.equals(read_shard(source, shard).schema)


def test_deaths_from_outside_cost_no_row(whole: tuple[Source, Shard], tmp_path: Path) -> None:
    times = tmp_path / "times"
    times.write_text("4")
    source, shard = whole
    found, deaths = lives(Deadly(source, times=times), tmp_path, shard)
    assert deaths == 4, "three over the shard, one over a row alone"
    assert found.equals(read_shard(source, shard))


def test_what_no_row_explains_is_one_line(whole: tuple[Source, Shard], tmp_path: Path) -> None:
    """Such as pictures that fill the memory together."""
    source, shard = whole
    found, deaths = lives(Deadly(source, together=4), tmp_path, shard)
    assert deaths == 2 * MOST_DEATHS
    sentence = (
        r"^sample.parquet, its 4 rows from row 4 on, ended whoever read it 6 times, and no row alone did \(shard 1"
    )
    with pytest.raises(InputError, match=sentence):
        receipt_of(found)


def test_deaths_in_other_runs_do_not_count(whole: tuple[Source, Shard], tmp_path: Path) -> None:
    source, shard = whole
    batch = pa.table({"shard": [pickle.dumps(shard)]})
    for number in range(9):
        args = (tmp_path / "read", Deadly(source, frozenset({5})), tmp_path, batch, f"run-{number}")
        child = multiprocessing.get_context("fork").Process(target=read_into, args=args)
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert read_task(source, str(tmp_path), "run", batch).equals(read_shard(source, shard))


@pytest.mark.slow
def test_on_ray_the_run_goes_on(ray_cluster: None, tmp_path: Path) -> None:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests
    config = load_settings("none", [], ["--shard_rows=4", "--limit=8", "--cluster.isolated=false"])
    prepared = prepare(replace(config, self_check=False))
    writer = ShardWriter(str(tmp_path), result_schema(), "run", 1)
    source = Deadly(prepared.source, frozenset({5}))
    receipts = list(run_on_ray(prepared.config, prepared.taxonomy, source, prepared.plan.shards, writer))
    assert sorted(receipt.num_rows for receipt in receipts) == [4, 4]
    found = [row for each in RunFolder(str(tmp_path)).tables(["sample_id", "error_kind"]) for row in each.to_pylist()]
    assert [row["error_kind"] for row in found] == [None] * 5 + ["killed_worker"] + [None] * 2


@pytest.mark.slow
def test_without_ray_the_run_ends_after_some_resumes(tmp_path: Path) -> None:
    """The driver itself reads there."""
    faults, out = tmp_path / "faults", tmp_path / "out"
    faults.mkdir()
    (faults / "rows.json").write_text(json.dumps({"read": {"scene-005": "segfault"}}))
    flags = ("--recipe", "none", "--shard_rows", 4, "--limit", 8, "--self_check", "false")
    codes = [forked(audited, faults, *flags, "--output", out) for _ in range(6)]
    assert codes == [-signal.SIGSEGV] * 5 + [0]
    assert run(*flags, "--output", tmp_path / "whole") == 0
    assert_only_killer("scene-005", out, tmp_path / "whole")
    assert not (out / FOLDER).exists()
    assert forked(verified, faults, out) == 0, "whoever recomputes rows does not touch it, either"
