"""Rows beside the same rows computed again, column by column, and the table that says how far they agree.

Texts, flags, hashes, lists and errors are equal or not; numbers with a point agree within the tolerance of their group,
which is relative above 1 and absolute below: |a - b| <= t · max(1, |a|, |b|). What may differ between any two runs
(`schema.VOLATILE`) is not looked at. Knows nothing of files or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from guardalign.schema import DETECTION, ERROR, REPLY, RESULT_NAMES, SAMPLE, VERDICT, VOLATILE
from guardalign.summary import rate

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "sample": (*(column.name for column in SAMPLE), "shard"),
    "detection": (*(column.name for column in DETECTION), "thumbnail"),
    "reply": tuple(column.name for column in REPLY),
    "verdict": tuple(column.name for column in VERDICT),
    "error": tuple(column.name for column in ERROR),
}
"""The contract's columns by what they tell; passed-through ones belong to the sample."""
NAMED: Final = 5
"""Rows that differ and are named."""


@dataclass(frozen=True)
class GroupAgreement:
    """One group of columns over all rows."""

    name: str
    """key of `GROUPS`"""
    rows: int = 0
    """rows in which either side holds something"""
    equal: int = 0
    """of these, rows whose columns all agree"""
    largest: float = 0.0
    """largest difference between numbers, |a - b| / max(1, |a|, |b|)"""


@dataclass(frozen=True)
class Agreement:
    """All groups."""

    groups: tuple[GroupAgreement, ...]
    """in the order of `GROUPS`"""
    num_rows: int
    """rows compared"""
    differing: Mapping[str, tuple[str, ...]]
    """sample id -> columns that differ"""
    num_strange: int
    """of these, rows whose sample differs: they are not the same row at all"""

    @classmethod
    def between(cls, pairs: Iterable[tuple[pa.Table, pa.Table]], tolerances: Mapping[str, float]) -> Agreement:
        """Compares tables of stored rows with tables of the same rows computed again."""
        groups = {name: GroupAgreement(name) for name in tolerances}
        differing: dict[str, tuple[str, ...]] = {}
        num_rows = num_strange = 0
        for stored, fresh in pairs:
            ids = stored["sample_id"].to_pylist()
            num_rows += len(ids)
            for name, tolerance in tolerances.items():
                groups[name], wrong = _grouped(groups[name], stored, fresh, tolerance)
                num_strange += len(wrong) if name == "sample" else 0
                for row, columns in wrong.items():
                    differing[ids[row]] = (*differing.get(ids[row], ()), *columns)
        return cls(tuple(groups.values()), num_rows, differing, num_strange)


def _grouped(
    before: GroupAgreement, stored: pa.Table, fresh: pa.Table, tolerance: float
) -> tuple[GroupAgreement, dict[int, list[str]]]:
    """The group with these rows, too, and the columns of those that differ."""
    wrong: dict[int, list[str]] = {}
    held: set[int] = set()
    largest = before.largest
    for column in columns_of(before.name, stored.column_names):
        theirs, ours = stored[column], fresh[column]
        held |= {row for row, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a.is_valid or b.is_valid}
        for row, difference in enumerate(differences(theirs, ours)):
            largest = max(largest, difference) if math.isfinite(difference) else largest
            if difference > tolerance:
                wrong.setdefault(row, []).append(column)
    equal = len(held - set(wrong))
    return GroupAgreement(before.name, before.rows + len(held), before.equal + equal, largest), wrong


def columns_of(group: str, present: Sequence[str]) -> tuple[str, ...]:
    """The columns of a group among those that are present."""
    own = [name for name in present if name not in RESULT_NAMES] if group == "sample" else []
    return (*(name for name in GROUPS[group] if name not in VOLATILE), *own)


def differences(theirs: pa.ChunkedArray, ours: pa.ChunkedArray) -> Iterator[float]:
    """By row: 0 for equal cells, infinity for unequal ones, between numbers their difference."""
    for a, b in zip(theirs, ours, strict=True):
        if _holds_floats(theirs.type):
            yield distance(a.as_py(), b.as_py())
        else:
            yield 0.0 if a.equals(b) else math.inf


def _holds_floats(kind: pa.DataType) -> bool:
    """Plain numbers, lists and maps of them."""
    if pa.types.is_map(kind):
        return _holds_floats(kind.item_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_floats(kind.value_type)
    return bool(pa.types.is_floating(kind))


def distance(a: Any, b: Any) -> float:
    """|a - b| / max(1, |a|, |b|), the largest of a list; infinity where they differ otherwise."""
    if isinstance(a, float) and isinstance(b, float):
        if a == b or (math.isnan(a) and math.isnan(b)):
            return 0.0
        found = abs(a - b) / max(1.0, abs(a), abs(b))
        return found if math.isfinite(found) else math.inf
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return max((distance(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    return 0.0 if a == b else math.inf


def agreement_lines(found: Agreement, most_differing: float) -> list[str]:
    """The table, the first rows that differ, and the share of them."""
    lines = [f"{'columns':10} {'rows':>7} {'equal':>7}  largest difference between numbers"]
    for each in found.groups:
        largest = f"{each.largest:.1e}" if each.largest else "0"
        lines.append(f"{each.name:10} {each.rows:7,} {each.equal:7,}  {largest}")
    named = list(found.differing.items())
    lines += [f"differs    {sample_id}: {', '.join(columns)}" for sample_id, columns in named[:NAMED]]
    if len(named) > NAMED:
        lines.append(f"differs    and {len(named) - NAMED:,} rows more")
    bound = f"; at most {most_differing:.1%} may" if most_differing or named else ""
    return [*lines, f"differing  {rate(len(named), found.num_rows)}{bound}"]
