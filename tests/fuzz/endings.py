"""How an audit must end, whatever it is given: a row each, or one line; knows nothing of what was given."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from runs import run, table

from guardalign.errors import ERROR_KINDS
from tests.fuzz.corpus_tables import SECRET, TableCase

AT_LENGTH = int(os.environ.get("GUARDALIGN_FUZZ", "500"))
"""examples of the long property tests; whoever sets the variable gets others each time"""
FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".tar": "webdataset"}
LONGEST_LINE = 1_000
"""of a refusal [characters]: whoever reads it has a terminal"""


def flags(path: Path, out: Path) -> tuple[object, ...]:
    """An audit of the file that takes as little time as one can."""
    words: tuple[object, ...] = ("--recipe", "none", "--input.format", FORMATS[path.suffix], "--input.path", path)
    return (*words, "--output", out, "--generation.max_new_tokens", 2, "--shard_rows", 2, "--self_check", "false")


def must_end(case: TableCase, name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Audits the file: each row as it must end, or exit code 2 and one line; no cell in any sentence."""
    path = folder / f"{name}{case.suffix}"
    path.write_bytes(case.content)
    code, said = run(*flags(path, folder / "out")), capsys.readouterr().err
    assert SECRET not in said
    if case.rows is None:
        assert code == 2
        (line,) = said.splitlines()
        assert line.startswith("guardalign: ") and case.says in line and len(line) <= LONGEST_LINE
        return
    assert (code, said) == (0, "")
    rows_must_be(folder / "out", {id_.replace("{name}", path.name): kind for id_, kind in case.rows.items()})


def rows_must_be(out: Path, kinds: Mapping[str, str | None]) -> None:
    """Every id once, each with its kind of error or an answer; sentences name the id, and no cell."""
    found = table(out).select(["sample_id", "error", "error_kind", "response"]).to_pylist()
    assert {row["sample_id"]: row["error_kind"] for row in found} == dict(kinds)
    assert len(found) == len(kinds), "an id stands twice"
    for row in found:
        assert (row["error"] is None) == (row["response"] is not None) == (row["error_kind"] is None)
        assert row["error_kind"] in (None, *ERROR_KINDS)
        assert row["error"] is None or (row["sample_id"] in row["error"] and SECRET not in row["error"])
