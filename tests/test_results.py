"""Result files: a commit is whole or absent, a folder has one worker, a receipt counts what the file holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from guardalign.errors import ResumeError
from guardalign.lock import Lock
from guardalign.receipts import Receipt
from guardalign.results import RunFolder, ShardWriter
from guardalign.schema import IMAGE, PLANNED, RESULT_NAMES, Trace, result_schema, with_columns, with_trace

SCHEMA = result_schema([pa.field("extra", pa.int64())])


def working_table(rows: int, shard: int = 3) -> pa.Table:
    table = pa.table({"sample_id": [f"s{i}" for i in range(rows)], "extra": list(range(rows))})
    refused = [i % 2 == 0 for i in range(rows - 1)] + [None]
    kinds = [None] * (rows - 1) + ["image_unreadable"]
    table = with_columns(table, {"shard": [shard] * rows, PLANNED: [rows] * rows, IMAGE: [b"secret"] * rows})
    table = with_columns(table, {"refused": refused, "error_kind": kinds, "num_tokens": [2] * rows})
    return with_trace(table, Trace({"detect": 4.0}, {"clip_loads": 1}, ("a note",)))


def writer(folder: Path) -> ShardWriter:
    return ShardWriter(str(folder), SCHEMA, "run-1", attempts=2)


def test_a_shard_is_one_file_with_the_schema_and_its_receipt(tmp_path: Path) -> None:
    receipt = writer(tmp_path).commit(working_table(4))
    run = RunFolder(str(tmp_path))
    assert run.committed() == {3: "results/shard-000003.parquet"}
    assert run.receipt("results/shard-000003.parquet") == receipt
    assert (receipt.num_rows, receipt.refused, receipt.judged, receipt.errors) == (4, 2, 3, {"image_unreadable": 1})
    result = pq.read_table(tmp_path / "results/shard-000003.parquet")
    assert result.column_names == [*RESULT_NAMES, "extra"]
    assert result["timings"][0].as_py()["detect_seconds"] == 1.0
    assert set(result["attempts"].to_pylist()) == {2}


def test_hidden_pictures_never_reach_the_file(tmp_path: Path) -> None:
    writer(tmp_path).commit(working_table(4))
    assert b"secret" not in (tmp_path / "results/shard-000003.parquet").read_bytes()


def test_every_column_says_what_it_is(tmp_path: Path) -> None:
    writer(tmp_path).commit(working_table(2))
    schema = pq.read_schema(tmp_path / "results/shard-000003.parquet")
    assert all(schema.field(name).metadata[b"doc"] for name in RESULT_NAMES)
    assert schema.metadata[b"guardalign.schema_version"] == b"1"


def test_committing_twice_leaves_one_file(tmp_path: Path) -> None:
    for _ in range(2):
        writer(tmp_path).commit(working_table(4))
    assert sorted(os.listdir(tmp_path / "results")) == ["shard-000003.parquet"]


def test_a_shard_of_the_wrong_size_or_of_two_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="planned"):
        writer(tmp_path).commit(working_table(4).slice(0, 3))
    with pytest.raises(AssertionError, match="one shard"):
        writer(tmp_path).commit(pa.concat_tables([working_table(4), working_table(4, shard=4)]))
    assert RunFolder(str(tmp_path)).committed() == {}


def test_a_worker_that_outlived_its_run_writes_nothing(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    run.write_json("plan.json", {"run_id": "run-2"})
    with pytest.raises(ResumeError, match="taken"):
        writer(tmp_path).commit(working_table(4))
    assert run.committed() == {}
    run.write_json("plan.json", {"run_id": "run-1"})
    writer(tmp_path).commit(working_table(4))


def test_what_a_killed_commit_left_is_no_result_and_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/.shard-000001.parquet.17.tmp").write_bytes(b"half")
    run = RunFolder(str(tmp_path))
    assert run.committed() == {}
    assert run.clear_temporary() == 1
    assert os.listdir(tmp_path / "results") == []


def test_one_process_works_in_a_folder(tmp_path: Path) -> None:
    second = Lock(RunFolder(str(tmp_path)))
    with Lock(RunFolder(str(tmp_path))), pytest.raises(ResumeError, match=f"pid {os.getpid()}"), second:
        pass
    with Lock(RunFolder(str(tmp_path))):
        pass


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom guardalign.lock import Lock\nfrom guardalign.results import RunFolder\n"
        "Lock(RunFolder(sys.argv[1])).__enter__()\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    with Lock(RunFolder(str(tmp_path))):
        pass


def test_an_object_store_takes_the_same_files() -> None:
    run = RunFolder("memory://results-test")
    schema_writer = ShardWriter("memory://results-test", SCHEMA, "run-1", attempts=1)
    receipt = schema_writer.commit(working_table(4))
    assert run.committed() == {3: "results/shard-000003.parquet"}
    assert run.receipt("results/shard-000003.parquet") == receipt
    run.write_json("run.json", {"a": 1})
    assert run.read_json("run.json") == {"a": 1}


def test_a_receipt_without_errors_counts_none() -> None:
    assert Receipt(shard=0, num_rows=2).num_errors == 0
