"""Shards that were begun and not ended, on disk: how a row is found that takes its worker's watcher with it.

    OUT/.journal/generate-000017.json   begun and not ended; gone when the pool is through with the shard

Most rows that kill are found by the watcher (`supervision.py`), whom they do not reach. Some do: a row that fills a
machine makes Ray stop the watcher, or the whole node; without `cluster.isolated` a row kills the very process that
works on it; nobody watches whoever reads. After three such deaths each row of the shard is tried alone, its name
written down before; one that was written down at two deaths is given up. So deaths from outside cost work and no row,
unless five of them hit one shard, two of these one row tried alone. Where the driver outlives its workers only deaths
of one run count: whoever kills the driver, or interrupts it, says nothing of rows. Whoever raises is not dead.

Knows nothing of workers, models or Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

    @property
    def is_to_be_tried(self) -> bool:
        """Whether its rows are to be tried alone, after so many deaths."""
        return self.begun > MOST_DEATHS

    @property
    def unexplained(self) -> int:
        """Deaths since its rows were to be tried alone that happened over none of them."""
        return max(0, self.begun - 1 - MOST_DEATHS - sum(self.deaths.values()))

    def gives_up(self, sample_id: str) -> bool:
        """Whether the row has ended whoever tried it alone, often enough."""
        return self.deaths.get(sample_id, 0) >= MOST_ALONE


class Journal:
    """What one pool writes down of its shards; with a `run`, deaths in other runs do not count."""

    def __init__(self, out: str, pool: str, run: str | None) -> None:
        self.folder, self.pool, self.run = RunFolder(out), pool, run
        self._name = ""
        """file of the shard at hand"""

    def through(self, work: Callable[[pa.Table], pa.Table], table: pa.Table) -> pa.Table:
        """`work(table)`, written down while it lasts; rows that have ended whoever worked on them are given up."""
        with self.begun(table["shard"][0].as_py()) as entry:
            if entry.is_to_be_tried:
                sample_ids, errors = _cells(table, "sample_id", "error")
                self.try_rows(entry, sample_ids, errors, lambda at: work(table.slice(at, 1)))
            return work(_without(table, entry, self.pool.split("+")[0]))

    @contextmanager
    def begun(self, shard: int) -> Iterator[Entry]:
        """What is known of the shard, once more begun; forgotten when it has ended. Who raises has not begun it."""
        self._name = f"{FOLDER}/{self.pool}-{shard:06d}.json"
        entry = self._known()
        entry.begun += 1
        has_ended = False
        try:
            self._write(entry)
            yield entry
            has_ended = True
        finally:
            if has_ended:
                self.folder.remove(self._name)
            else:
                self._put_back(entry)

    def _put_back(self, entry: Entry) -> None:
        """As it was before: deaths are not forgotten."""
        entry.begun, entry.row = entry.begun - 1, None
        if entry.begun:
            self._write(entry)
        else:
            self.folder.remove(self._name)

    def _known(self) -> Entry:
        """The shard's entry; whoever wrote a row down and did not take it back has died over it."""
        entry = self._read()
        if entry.run != self.run:
            return Entry(self.run)
        if entry.row is not None:
            entry.deaths[entry.row] = entry.deaths.get(entry.row, 0) + 1
            entry.row = None
        return entry

    def try_rows(
        self, entry: Entry, sample_ids: Sequence[str], errors: Sequence[str | None], work: Callable[[int], object]
    ) -> None:
        """`work` on the place of every row alone, for what becomes of us; what becomes of the row is thrown away."""
        for at, (sample_id, error) in enumerate(zip(sample_ids, errors, strict=True)):
            if error is None and sample_id not in entry.passed and not entry.gives_up(sample_id):
                entry.row = sample_id
                self._write(entry)
                work(at)
                entry.passed.append(sample_id)
        entry.row = None
        self._write(entry)

    def _read(self) -> Entry:
        try:
            return Entry(**self.folder.read_json(self._name)) if self.folder.exists(self._name) else Entry()
        except (ResumeError, TypeError):  # half a death's note is none
            return Entry()

    def _write(self, entry: Entry) -> None:
        self.folder.write_json(self._name, asdict(entry))


def _cells(table: pa.Table, *names: str) -> list[Sequence[Any]]:
    return [table[name].to_pylist() for name in names]


def _without(table: pa.Table, entry: Entry, stage: str) -> pa.Table:
    """The table with the rows that were given up."""
    failures = {
        at: Failure(
            "killed_worker", f"sample {sample_id} killed the worker and its watcher {entry.deaths[sample_id]} times"
        )
        for at, sample_id in enumerate(table["sample_id"].to_pylist())
        if entry.gives_up(sample_id)
    }
    return give_up(table, stage, failures)
