"""What must hold of every result row, whatever its run: who is answered, who has an error, and what then stays empty.

Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from guardalign.errors import ERROR_KINDS
from guardalign.schema import DETECTION, REPLY, RESULT, SCHEMA_VERSION, VERDICT

Rows: TypeAlias = NDArray[np.bool_]
"""for every row of a table whether something holds"""
_REPLY = tuple(column.name for column in REPLY if column.name != "defense")
_VERDICT = tuple(column.name for column in VERDICT)
_DETECTION = tuple(column.name for column in DETECTION)
EMPTY_AFTER: Final[dict[str, Sequence[str]]] = {
    "read": (*_DETECTION, *_REPLY, *_VERDICT),
    "detect": (*_DETECTION, *_REPLY, *_VERDICT),
    "sanitize": (*_REPLY, *_VERDICT),
    "generate": (*_REPLY, *_VERDICT),
    "judge": _VERDICT,
}
"""Stages that may give a row up, and the columns that then hold nothing."""


def schema_problem(schema: pa.Schema, first: pa.Schema | None) -> str | None:
    """How a file's schema departs from the contract, or from the run's first file."""
    if (schema.metadata or {}).get(b"guardalign.schema_version") != str(SCHEMA_VERSION).encode():
        return f"it is not of schema version {SCHEMA_VERSION}"
    if schema.names[: len(RESULT)] != [column.name for column in RESULT]:
        return "its columns are not those of the contract"
    for column in RESULT:
        if schema.field(column.name).type != column.type:
            return f"column {column.name} is of type {schema.field(column.name).type}, and not {column.type}"
    if first is not None and not schema.equals(first):
        return "its passed-through columns are not those of the first file"
    return None


def row_problems(table: pa.Table, shard: int, run_id: str, attempts: int, judged: bool) -> Iterator[str]:
    """One sentence for each claim that rows of a shard break; `judged` where every answer must have a verdict."""
    error, stage, kind = (_there(table, name) for name in ("error", "error_stage", "error_kind"))
    claims: list[tuple[str, Rows]] = [
        ("have no sample_id", ~_there(table, "sample_id")),
        ("have some but not all of error, error_stage and error_kind", (error != stage) | (error != kind)),
        ("gave up at no known stage", stage & ~_among(table, "error_stage", tuple(EMPTY_AFTER))),
        ("have an error of no known kind", kind & ~_among(table, "error_kind", ERROR_KINDS)),
        ("have neither an answer nor an error", ~error & ~_there(table, "response")),
        ("belong to another shard", ~_among(table, "shard", (shard,))),
        ("are of another run than their file", ~_among(table, "run_id", (run_id,))),
        ("have a number of attempts that no run had", ~_among(table, "attempts", range(1, attempts + 1))),
    ]
    if judged:
        claims.append(("have neither a verdict nor an error", ~error & ~_there(table, "judge")))
    for name, columns in EMPTY_AFTER.items():
        gone = _among(table, "error_stage", (name,))
        claims += [(f"gave up at stage {name}, yet hold {each}", gone & _there(table, each)) for each in columns]
    for claim, broken in claims:
        if broken.any():
            first = table["sample_id"][int(np.flatnonzero(broken)[0])].as_py()
            yield f"{int(broken.sum()):,} rows {claim}; the first is {first}"


def _there(table: pa.Table, name: str) -> Rows:
    """Where a column holds something."""
    return np.asarray(table[name].is_valid().to_numpy(), dtype=bool)


def _among(table: pa.Table, name: str, values: Sequence[object]) -> Rows:
    """Where a column holds one of these."""
    return np.array([value in values for value in table[name].to_pylist()], dtype=bool)
