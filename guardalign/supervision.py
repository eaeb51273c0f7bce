"""A pool as Ray's actor, or the local engine, holds it: watches its worker process, and finds the rows that kill it.

    a shard goes to the worker
    the worker dies, hangs or takes too much memory:
        every row that it had in hand is tried alone, in a fresh worker
        one that ends the worker again is an error row, "killed the worker 2 times"
        the shard is done again, these rows passed by

So a row that kills its worker costs itself, some neighbours' work, and two starts of a worker; all other rows end as if
it had not been there. A worker that is killed from outside costs its shard's work and no row: what a signal that
anybody may have sent (SIGKILL, SIGTERM) did while a row was tried is believed the second time only. After three deaths
that no row explains the shard's rows are done one by one.

Knows nothing of Ray, of models or of what stages compute. Imports no torch: only the worker does.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Final

import pyarrow as pa

from guardalign.config import ClusterConfig
from guardalign.errors import ModelError, UserError
from guardalign.guard import Failure
from guardalign.journal import Journal
from guardalign.receipts import Receipt
from guardalign.results import ShardWriter
from guardalign.schema import PLANNED, Trace, trace_of, with_columns, with_trace
from guardalign.sight import Sight, require_sight
from guardalign.watching import DiedError, Worker, problem_of
from guardalign.worker import Order, loaded, reach_pool
from guardalign.working import give_up

MOST_UNEXPLAINED: Final = 3
"""deaths of a shard that no row explains, before its rows are done one by one"""
DEATHS: Final = "worker_deaths"
"""counter in receipts and run.json"""


class Isolated:
    """Stages in a worker process, as one stage: no row can take more with it than itself."""

    def __init__(self, order: Order, cluster: ClusterConfig) -> None:
        self.worker = Worker(order, cluster.shard_seconds, cluster.worker_gib)
        self.worker.start()
        self._deaths = 0
        self._notes: tuple[str, ...] = ()
        self._trials: list[Trace] = []

    def ready(self) -> None:
        """Waits until the models are loaded."""
        self.worker.await_ready()

    def __call__(self, table: pa.Table) -> pa.Table:
        """The shard through all stages; rows that end the worker are error rows."""
        self._deaths, self._notes, self._trials, unexplained = 0, (), [], 0
        while unexplained < MOST_UNEXPLAINED:
            try:
                return self._with_deaths(self.worker(table))
            except DiedError as death:
                self._deaths += 1
                culprits = self._culprits(table, death)
                table = _condemned(table, culprits)
                unexplained += not culprits
                if not culprits and death.kind != "killed_worker":
                    self._notes = (_advice(death, self.worker.order.pool),)
        return self._with_deaths(self._one_by_one(table))

    def stop(self) -> None:
        """Ends the worker."""
        self.worker.stop()

    def _culprits(self, table: pa.Table, death: DiedError) -> dict[int, tuple[str, Failure]]:
        """Of the rows that were in hand, those that end the worker alone, too: position -> stage, failure."""
        suspects = set(death.in_hand)
        alive = [error is None for error in table["error"].to_pylist()]
        rows = [at for at, name in enumerate(table["sample_id"].to_pylist()) if name in suspects and alive[at]]
        found = {at: self._tried(table.slice(at, 1), death) for at in rows}
        self._trials += [trace_of(each) for each in found.values() if isinstance(each, pa.Table)]
        return {at: each for at, each in found.items() if isinstance(each, tuple)}

    def _tried(self, row: pa.Table, first: DiedError | None) -> tuple[str, Failure] | pa.Table:
        """The row alone: its table, or why it was given up."""
        times, alone = int(first is not None), 0
        while True:
            try:
                return self.worker(row)
            except DiedError as death:
                self._deaths += 1
                times, alone = times + 1, alone + 1
                if (death.is_own_doing and times > 1) or alone > 1:
                    return death.stage, _failure(row["sample_id"][0].as_py(), death, times)

    def _one_by_one(self, table: pa.Table) -> pa.Table:
        """Every row alone, for what it is worth: the shard together ends the worker, and no row of it does."""
        done = [self._tried(table.slice(at, 1), None) for at in range(table.num_rows)]
        for at, each in enumerate(done):
            if isinstance(each, tuple):
                done[at] = self._passed_by(_condemned(table.slice(at, 1), {0: each}))
        return _joined([each for each in done if isinstance(each, pa.Table)], table)

    def _passed_by(self, row: pa.Table) -> pa.Table:
        """A row that was given up, through stages that have nothing to do with it."""
        for left in reversed(range(MOST_UNEXPLAINED)):
            try:
                return self.worker(row)
            except DiedError as death:
                self._deaths += 1
                if not left:
                    pool = self.worker.order.pool
                    raise ModelError(f"the worker of pool {pool} dies even of rows passed by ({death.how})") from None
        raise AssertionError("the last try returns or raises")

    def _with_deaths(self, table: pa.Table) -> pa.Table:
        """The table with the worker's deaths in its trace, and what was counted and noted while rows were tried."""
        if not self._deaths:
            return table
        trace = trace_of(table)
        counters = Counter(trace.counters) + Counter({DEATHS: self._deaths})
        for trial in self._trials:
            counters.update(trial.counters)
        notes = [*trace.notes, *(note for trial in self._trials for note in trial.notes), *self._notes]
        return with_trace(table, replace(trace, counters=dict(counters), notes=tuple(dict.fromkeys(notes))))


def _advice(death: DiedError, pool: str) -> str:
    """A note on a limit that a shard reaches, but none of its rows."""
    did = "held" if death.kind == "timed_out" else "filled"
    mend = "raise that limit, or lower shard_rows"
    return f"a shard {did} a worker of pool {pool} ({death.how}), and no row of it alone did: {mend}"


def _failure(sample_id: str, death: DiedError, times: int) -> Failure:
    said = {"killed_worker": "killed the worker", "timed_out": "held the worker", "out_of_memory": "took memory"}
    return Failure(death.kind, f"sample {sample_id} {said[death.kind]} {times} times ({death.how})")


def _condemned(table: pa.Table, culprits: dict[int, tuple[str, Failure]]) -> pa.Table:
    """The table with these rows given up."""
    for at, (stage, failure) in culprits.items():
        table = give_up(table, stage, {at: failure})
    return table


def _joined(parts: Sequence[pa.Table], table: pa.Table) -> pa.Table:
    """One shard of what its rows became one by one."""
    traces = [trace_of(part) for part in parts]
    seconds, counters = Counter[str](), Counter[str]()
    for trace in traces:
        seconds.update(trace.seconds)
        counters.update(trace.counters)
    notes = tuple(dict.fromkeys(note for trace in traces for note in trace.notes))
    whole = pa.concat_tables(parts, promote_options="default").combine_chunks()
    planned = table[PLANNED][0].as_py()
    if any(count != planned for part in parts for count in part[PLANNED].to_pylist()):  # a stage has planned anew
        whole = with_columns(whole, {PLANNED: [whole.num_rows] * whole.num_rows})
    return with_trace(whole, Trace(dict(seconds), dict(counters), notes, _last_or_worst(traces)))


def _last_or_worst(traces: Sequence[Trace]) -> dict[str, tuple[float, ...]]:
    """The canaries' numbers as they were at last; those that were none, wherever that was."""
    found: dict[str, tuple[float, ...]] = {}
    for trace in traces:
        lost = {name for name, numbers in found.items() if not all(map(math.isfinite, numbers))}
        found |= {name: numbers for name, numbers in trace.canaries.items() if name not in lost}
    return found


class InProcess:
    """The same stages without a process of their own."""

    def __init__(self, order: Order) -> None:
        self.pool, self.stages = order.pool, loaded(order)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The shard through all stages."""
        reach_pool(self.pool)
        for stage in self.stages:
            table = stage(table)
        return table

    def ready(self) -> None:
        """It is."""

    def stop(self) -> None:
        """Nothing to end."""


def staged(order: Order, cluster: ClusterConfig) -> Isolated | InProcess:
    """A pool's stages as one, in a process of their own or here."""
    return Isolated(order, cluster) if cluster.isolated else InProcess(order)


PROBLEM: Final = "_problem"
"""Column of a table that stands for a shard that could not be worked on because of what the user can mend."""


class Pool:
    """What one Ray actor holds: the stages of its pool, and for the last pool the writer.

    What the user can mend travels back as a value, since an exception that crosses Ray loses its class and its words.
    """

    def __init__(self, order: Order, cluster: ClusterConfig, writer: ShardWriter, is_last: bool, sight: Sight) -> None:
        self.writer = writer if is_last else None
        self.journal = Journal(writer.out, order.pool, writer.run_id)
        self.work: Isolated | InProcess | None = None
        self.problem: UserError | None = None
        try:
            require_sight(sight)
            self.work = staged(order, cluster)
        except UserError as problem:
            self.problem = problem

    def __call__(self, table: pa.Table) -> pa.Table:
        """A shard through this pool's stages; the last pool gives back its receipt."""
        if PROBLEM in table.column_names:
            return table
        try:
            if self.work is None:
                raise self.problem or AssertionError("neither stages nor a problem")
            self.work.ready()
            if self.writer is None:
                return self.journal.through(self.work, table)
            receipt = self.writer.receipt(table) or self.writer.commit(self.journal.through(self.work, table))
            return pa.table({"receipt": [json.dumps(asdict(receipt))]})
        except UserError as problem:
            return as_table(problem)


def as_table(problem: UserError) -> pa.Table:
    """A `UserError` as a table that pools pass on."""
    return pa.table({PROBLEM: [str(problem)], "kind": [type(problem).__name__]})


def receipt_of(batch: pa.Table) -> Receipt:
    """The receipt that came back, or the `UserError` that did."""
    if PROBLEM in batch.column_names:
        raise problem_of(batch["kind"][0].as_py(), batch[PROBLEM][0].as_py())
    return Receipt(**json.loads(batch["receipt"][0].as_py()))
