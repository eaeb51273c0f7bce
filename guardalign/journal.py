"""Shards that were begun and not ended, on disk: how a row is found that takes its worker's watcher with it.

    OUT/.journal/generate-000017.json   begun and not ended; gone when the pool is through with the shard

Most rows that kill are found by the watcher (`supervision.py`), whom they do not reach. Some do: a row that fills a
machine makes Ray stop the watcher, or the whole node; without `cluster.isolated` a row kills the very process that
works on it. After three such deaths each row of the shard is tried alone, its name written down before; one that was
written down at two deaths is given up. So deaths from outside cost work and no row, unless five of them hit one shard,
two of these one row tried alone. Where the driver outlives its workers only deaths of one run count: whoever kills the
driver, or interrupts it, says nothing of rows. Whoever raises is not dead.

Knows nothing of workers, models or Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import pyarrow as pa

from guardalign.errors import ResumeError
from guardalign.guard import Failure
from guardalign.results import RunFolder
from guardalign.working import give_up

FOLDER: Final = ".journal"
"""in OUT; removed when the run is complete"""
MOST_DEATHS: Final = 3
"""deaths over a shard before its rows are tried alone"""
MOST_ALONE: Final = 2
"""deaths over a row that is tried alone before it is given up"""


@dataclass
class Entry:
    """A shard at work."""

    run: str | None = None
    """the run whose deaths are counted; None: of all runs"""
    begun: int = 0
    """times that it was begun"""
    row: str | None = None
    """the row that is being tried alone"""
    deaths: dict[str, int] = field(default_factory=dict)
    """by row: deaths while it was tried alone"""
    passed: list[str] = field(default_factory=list)
    """rows that were tried alone and did no harm"""


class Journal:
    """What one pool writes down of its shards; with a `run`, deaths in other runs do not count."""

    def __init__(self, out: str, pool: str, run: str | None) -> None:
        self.folder, self.pool, self.run = RunFolder(out), pool, run
        self._open: str | None = None

    def through(self, work: Callable[[pa.Table], pa.Table], table: pa.Table) -> pa.Table:
        """`work(table)`, written down while it lasts; rows that have ended whoever worked on them are given up."""
        name = f"{FOLDER}/{self.pool}-{table['shard'][0].as_py():06d}.json"
        try:
            entry = self._begun(name)
            if entry.begun > MOST_DEATHS:
                self._try_rows(work, table, name, entry)
            return work(_without(table, entry, self.pool.split("+")[0]))
        finally:
            self.close()

    def close(self) -> None:
        """The shard at hand has ended, or was put down in good order."""
        if self._open is not None:
            self.folder.remove(self._open)
            self._open = None

    def _begun(self, name: str) -> Entry:
        self._open = name
        entry = self._read(name)
        if entry.run != self.run:
            entry = Entry(self.run)
        entry.begun += 1
        if entry.row is not None:
            entry.deaths[entry.row] = entry.deaths.get(entry.row, 0) + 1
            entry.row = None
        self._write(name, entry)
        return entry

    def _try_rows(self, work: Callable[[pa.Table], pa.Table], table: pa.Table, name: str, entry: Entry) -> None:
        """Every row alone, for what becomes of us; what becomes of the row is thrown away."""
        for at, (sample_id, error) in enumerate(zip(*_cells(table, "sample_id", "error"), strict=True)):
            if error is None and sample_id not in entry.passed and entry.deaths.get(sample_id, 0) < MOST_ALONE:
                entry.row = sample_id
                self._write(name, entry)
                work(table.slice(at, 1))
                entry.passed.append(sample_id)
        entry.row = None
        self._write(name, entry)

    def _read(self, name: str) -> Entry:
        try:
            return Entry(**self.folder.read_json(name)) if self.folder.exists(name) else Entry()
        except (ResumeError, TypeError):  # half a death's note is none
            return Entry()

    def _write(self, name: str, entry: Entry) -> None:
        self.folder.write_json(name, asdict(entry))


def _cells(table: pa.Table, *names: str) -> list[Sequence[Any]]:
    return [table[name].to_pylist() for name in names]


def _without(table: pa.Table, entry: Entry, stage: str) -> pa.Table:
    """The table with the rows that were given up."""
    failures = {
        at: Failure("killed_worker", f"sample {sample_id} killed the worker and its watcher {times} times")
        for at, sample_id in enumerate(table["sample_id"].to_pylist())
        if (times := entry.deaths.get(sample_id, 0)) >= MOST_ALONE
    }
    return give_up(table, stage, failures)
