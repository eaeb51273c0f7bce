"""What a completed run is held against: an undisturbed one, and the promises of its own files.

Knows nothing of kills or processes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from guardalign.journal import FOLDER as JOURNAL
from guardalign.schema import VOLATILE
from guardalign.seals import CHECKSUM, sha256


@dataclass(frozen=True)
class Findings:
    """What went wrong; every figure should be 0."""

    lost: int = 0
    """ids of the reference without a row"""
    duplicated: int = 0
    """rows beyond the first of an id, or of no id of the reference"""
    different: int = 0
    """rows that differ from the reference's in a column that may not"""
    stray: int = 0
    """temporary files that are left, and notes of work that is done"""
    manifest: int = 0
    """faults of run.json: it is missing, or a shard's row count or checksum is not the file's"""
    redone: int = 0
    """shards that were committed and then written again, or were gone"""
    orphans: int = 0
    """processes left behind"""
    hung: int = 0
    """starts that made no progress until they were ended"""
    failed: int = 0
    """starts that ended in an error although nothing was done to them, or nothing that a run does not survive"""
    tracebacks: int = 0
    """starts that ended in a traceback"""

    def __add__(self, other: Self) -> Findings:
        """The sum, figure by figure."""
        return Findings(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @property
    def total(self) -> int:
        """Faults of all kinds."""
        return sum(getattr(self, each.name) for each in fields(self))


def rows_of(out: Path) -> list[dict[str, Any]]:
    """All result rows of the files that can be read, without the columns that may differ between two runs."""
    tables = [table for path in shard_files(out) if (table := _table(path)) is not None]
    if not tables:
        return []
    kept: list[dict[str, Any]] = pa.concat_tables(tables).drop_columns(list(VOLATILE)).to_pylist()
    return kept


def shard_files(out: Path) -> list[Path]:
    """The result files, in the shards' order."""
    return sorted((out / "results").glob("shard-*.parquet"))


def _table(path: Path) -> pa.Table | None:
    """None for a damaged file."""
    try:
        return pq.ParquetFile(path).read()
    except (pa.ArrowInvalid, OSError):
        return None


def checked(out: Path, reference: Sequence[Mapping[str, Any]], tolerance: float = 0.0) -> Findings:
    """Holds a finished run's folder against the rows of an undisturbed one."""
    wanted, rows = {row["sample_id"]: row for row in reference}, rows_of(out)
    found = {row["sample_id"]: row for row in rows}
    both = set(wanted) & set(found)
    return Findings(
        lost=len(set(wanted) - both),
        duplicated=len(rows) - len(both),
        different=sum(not is_close(wanted[each], found[each], tolerance) for each in both),
        stray=len(strays(out)),
        manifest=manifest_faults(out),
    )


def is_close(one: Any, other: Any, tolerance: float) -> bool:
    """Equal, floats within the tolerance; lists and dictionaries entry by entry."""
    if isinstance(one, float) and isinstance(other, float):
        return one == other or abs(one - other) <= tolerance or (one != one and other != other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(is_close(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(is_close(*pair, tolerance) for pair in zip(one, other, strict=True))
    return bool(one == other)


def strays(out: Path) -> list[Path]:
    """Temporary files anywhere in the folder, and the notes of work at hand."""
    return [*out.rglob("*.tmp"), *out.glob(f"{JOURNAL}/*")]


def manifest_faults(out: Path) -> int:
    """Faults of run.json beside the files that are there."""
    try:
        manifest = json.loads((out / "run.json").read_text())
    except (OSError, ValueError):
        return 1
    files = {f"results/{path.name}": path for path in shard_files(out)}
    listed = Counter(each["name"] for each in manifest["files"])
    wrong = sum(each["name"] in files and not _is_as_listed(files[each["name"]], each) for each in manifest["files"])
    return wrong + (CHECKSUM not in manifest) + (listed != Counter(dict.fromkeys(files, 1)))


def _is_as_listed(path: Path, entry: Mapping[str, Any]) -> bool:
    table = _table(path)
    return table is not None and (sha256(path.read_bytes()), table.num_rows) == (entry["sha256"], entry["rows"])
