"""A shard's working table as the stages handle it: rows still alive, micro-batches made ahead, what is written back.

Knows nothing of what a stage computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeVar

import pyarrow as pa

from guardalign.core.images import Decoded
from guardalign.guard import Failure
from guardalign.schema import IMAGE, trace_of, with_columns, with_trace

A = TypeVar("A")
B = TypeVar("B")
Size = tuple[int, int, int]
"""width, height [px] of the upright picture, and the frames in its file"""

DECODE_THREADS = 2
"""Pictures decoded at once, ahead of the model; Pillow releases the interpreter's lock while it decodes."""

NOTHING_SEEN: tuple[dict[str, int], tuple[str, ...]] = ({}, ())
"""Counters and notes of a stage without a model."""


def ahead(batches: Sequence[list[int]], work: Callable[[int], B]) -> Iterator[list[tuple[int, B]]]:
    """The batches with `work` done on every index, one batch ahead of the consumer."""
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        waiting = [pool.submit(work, index) for index in batches[0]] if batches else []
        for position, batch in enumerate(batches):
            done = [(index, future.result()) for index, future in zip(batch, waiting, strict=True)]
            following = batches[position + 1] if position + 1 < len(batches) else []
            waiting = [pool.submit(work, index) for index in following]
            yield done


def at_once(work: Callable[[A], B], items: Sequence[A], num_parallel: int) -> list[B]:
    """`work` on every item, in order, on several at once; the first error drops what has not begun."""
    if num_parallel == 1:
        return [work(item) for item in items]
    pool = ThreadPoolExecutor(num_parallel)
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)


def chunks(items: Sequence[A], size: int) -> list[list[A]]:
    """The items in runs of `size`; the last may be short."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def rows_alive(table: pa.Table, columns: Sequence[str], with_image: bool) -> dict[int, dict[str, Any]]:
    """Rows still alive (no error), by position; `with_image` leaves the text-only ones out."""
    wanted = [name for name in dict.fromkeys((*columns, IMAGE)) if name in table.column_names]
    alive = [error is None for error in table["error"].to_pylist()]
    pylist = table.select(wanted).to_pylist()
    absent = dict.fromkeys(set(columns) - set(wanted))
    return {
        index: row | absent
        for index, row in enumerate(pylist)
        if alive[index] and not (with_image and row[IMAGE] is None)
    }


def by_row(table: pa.Table, results: Mapping[int, Any]) -> list[Any]:
    """One result a row of the table; None for failures and for rows that were passed by."""
    values = (results.get(index) for index in range(table.num_rows))
    return [None if isinstance(value, Failure) else value for value in values]


def give_up(table: pa.Table, stage: str, failures: Mapping[int, Failure]) -> pa.Table:
    """The table with the error cells of these rows filled in."""
    if not failures:
        return table
    cells = {name: table[name].to_pylist() for name in ("error", "error_stage", "error_kind")}
    for index, failure in failures.items():
        for name, value in zip(cells, (failure.message, stage, failure.kind), strict=True):
            cells[name][index] = value
    return with_columns(table, cells)


def closed(
    table: pa.Table,
    stage: str,
    results: Mapping[int, Any],
    started: float,
    seen: tuple[dict[str, int], tuple[str, ...]],
) -> pa.Table:
    """The table with the stage's failures, seconds, counters and notes written down."""
    failures = {index: value for index, value in results.items() if isinstance(value, Failure)}
    table = give_up(table, stage, failures)
    counters, notes = seen
    before = trace_of(table)
    seconds = {**before.seconds, stage: perf_counter() - started}
    counted = {**before.counters, **counters}
    return with_trace(table, replace(before, seconds=seconds, counters=counted, notes=before.notes + notes))


def size_of(decoded: Decoded) -> Size:
    """The facts of a picture that its row keeps."""
    return decoded.width, decoded.height, decoded.num_frames


def with_sizes(table: pa.Table, sizes: Mapping[int, Size]) -> pa.Table:
    """Fills width, height and num_frames where they are not known yet (the sanitized copy has one frame)."""
    names = ("width", "height", "num_frames")
    known: dict[str, list[Any]] = {
        n: table[n].to_pylist() if n in table.column_names else [None] * table.num_rows for n in names
    }
    for index, facts in sizes.items():
        for name, value in zip(names, facts, strict=True):
            if known[name][index] is None:
                known[name][index] = value
    return with_columns(table, known)


class Counted:
    """What a model counted and noted since it was last asked."""

    def __init__(self, model: object, prefix: str) -> None:
        self.model, self.prefix = model, prefix
        self.before = {"num_loads": 0, "num_forward_calls": 0}
        self.told: tuple[str, ...] = ()

    def since_last(self) -> tuple[dict[str, int], tuple[str, ...]]:
        """Loads and forward calls since the last call, and the model's notes, each told once; some come late."""
        now = {name: int(getattr(self.model, name)) for name in self.before}
        change = {f"{self.prefix}_{name.removeprefix('num_')}": now[name] - self.before[name] for name in now}
        notes = tuple(note for note in getattr(self.model, "notes", ()) if note not in self.told)
        self.told, self.before = self.told + notes, now
        return change, notes
