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
import os
import pickle
import selectors
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, Final

import pyarrow as pa

from guardalign.config import ClusterConfig
from guardalign.errors import ErrorKind, ModelError, UserError
from guardalign.guard import Failure
from guardalign.results import Receipt, ShardWriter
from guardalign.schema import PLANNED, trace_of, with_columns, with_trace
from guardalign.worker import HEADER, Frame, Order, decoded, encoded, loaded, reach_pool
from guardalign.working import give_up

FROM_OUTSIDE: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGIO)
"""signals that anybody may have sent"""
MOST_UNEXPLAINED: Final = 3
"""deaths of a shard that no row explains, before its rows are done one by one; also deaths while models are loaded"""
GLANCE: Final = 0.2
"""between two looks at a worker's memory [s]"""
DEATHS: Final = "worker_deaths"
"""counter in receipts and run.json"""


@dataclass
class DiedError(Exception):
    """A worker is gone."""

    kind: ErrorKind
    """killed_worker, timed_out, out_of_memory"""
    how: str
    """such as "segmentation fault" """
    is_own_doing: bool
    """what it worked on did it; False: perhaps somebody from outside"""
    stage: str
    """the stage that it was in"""
    in_hand: tuple[str, ...]
    """ids of the rows that it worked on"""


class Worker:
    """The process, as its parent holds it; begun when it is first needed, and again after it has died."""

    def __init__(self, order: Order, shard_seconds: float | None, worker_gib: float | None) -> None:
        self.order, self.shard_seconds, self.worker_gib = order, shard_seconds, worker_gib
        self.process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._stage = order.pool
        self._in_hand: Counter[str] = Counter()
        self._buffer = bytearray()

    def start(self) -> None:
        """Begins the process, which loads its models meanwhile."""
        inlet, self._inlet = os.pipe()
        self._outlet, outlet = os.pipe()
        lifeline, self._lifeline = os.pipe()
        command = [sys.executable, "-P", "-m", "guardalign.worker", str(inlet), str(outlet), str(lifeline)]
        paths = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            command,
            pass_fds=(inlet, outlet, lifeline),
            stdin=subprocess.DEVNULL,
            stdout=2,
            env=os.environ | {"PYTHONPATH": paths, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            process_group=0,  # an interruption at the terminal is the parent's to deal with
        )
        for descriptor in (inlet, outlet, lifeline):
            os.close(descriptor)
        self._is_ready, self._buffer, self._in_hand = False, bytearray(), Counter()
        self._send(pickle.dumps(self.order))

    def stop(self) -> None:
        """Ends the process; what it had in hand is forgotten."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        self.process, self._is_ready = None, False
        for descriptor in (self._inlet, self._outlet, self._lifeline):
            os.close(descriptor)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table through the worker's stages. Raises `DiedError`, or the `UserError` that the worker met."""
        self._await_ready()
        self._in_hand = Counter()
        deadline = None if self.shard_seconds is None else monotonic() + self.shard_seconds
        self._send(encoded(table))
        for kind, content in self._frames(deadline):
            if kind == Frame.TABLE:
                return decoded(pa.py_buffer(bytes(content)))
        raise AssertionError("frames end with a table or an error")

    def _await_ready(self) -> None:
        """Waits until the models are loaded; tries again a few times where the worker dies of it."""
        for left in reversed(range(MOST_UNEXPLAINED)):
            if self._is_ready:
                return
            if self.process is None:
                self.start()
            try:
                self._is_ready = any(kind == Frame.READY for kind, _ in self._frames(None, Frame.READY))
            except DiedError as death:
                if not left:
                    sentence = f"the worker of pool {self.order.pool} died {MOST_UNEXPLAINED} times ({death.how}) while"
                    raise ModelError(f"{sentence} it loaded its models") from None

    def _send(self, content: Any) -> None:
        """One message; a worker that is dead is noticed by whoever reads next."""
        try:
            for part in (memoryview(HEADER.pack(0, memoryview(content).nbytes)), memoryview(content)):
                while part.nbytes:
                    part = part[os.write(self._inlet, part) :]
        except BrokenPipeError:
            pass

    def _frames(self, deadline: float | None, last: Frame = Frame.TABLE) -> Iterator[tuple[Frame, bytes]]:
        """What the worker says, up to the frame that is waited for; ends with an error otherwise."""
        while True:
            while (frame := self._next_in_buffer()) is not None:
                kind, content = frame
                self._note(kind, content)
                yield frame
                if kind == last:
                    return
            self._read_on(deadline)

    def _next_in_buffer(self) -> tuple[Frame, bytes] | None:
        if len(self._buffer) < HEADER.size:
            return None
        kind, length = HEADER.unpack_from(self._buffer)
        end = HEADER.size + length
        if len(self._buffer) < end:
            return None
        content = bytes(memoryview(self._buffer)[HEADER.size : end])
        del self._buffer[:end]
        return Frame(kind), content

    def _note(self, kind: Frame, content: bytes) -> None:
        """Keeps what must be known should the worker die; raises what it could not work with."""
        if kind == Frame.TAKEN:
            self._in_hand.update(json.loads(content))
        elif kind == Frame.LAID:
            self._in_hand.subtract(json.loads(content))
        elif kind == Frame.STAGE:
            self._stage = content.decode()
        elif kind == Frame.PROBLEM:
            name, sentence = json.loads(content)
            raise problem_of(name, sentence)
        elif kind == Frame.BUG:
            self.stop()
            raise RuntimeError(f"a worker of pool {self.order.pool} failed, a fault of ours:\n{content.decode()}")

    def _read_on(self, deadline: float | None) -> None:
        """Waits for more; stops the worker where it has reached a limit."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._outlet, selectors.EVENT_READ)
            while not selector.select(self._patience(deadline)):
                if deadline is not None and monotonic() >= deadline:
                    raise self._ended("timed_out", f"longer than cluster.shard_seconds ({self.shard_seconds:g} s)")
                self._refuse_too_much_memory()
        if self.worker_gib is not None:
            self._refuse_too_much_memory()
        content = os.read(self._outlet, 1 << 20)
        if not content:
            raise self._dead()
        self._buffer += content

    def _patience(self, deadline: float | None) -> float | None:
        """How long to wait before the next look at the limits [s]."""
        left = None if deadline is None else max(0.0, deadline - monotonic())
        if self.worker_gib is None:
            return left
        return GLANCE if left is None else min(GLANCE, left)

    def _refuse_too_much_memory(self) -> None:
        assert self.process is not None
        if self.worker_gib is not None and resident_gib(self.process.pid) > self.worker_gib:
            raise self._ended("out_of_memory", f"more than cluster.worker_gib ({self.worker_gib:g} GiB)")

    def _ended(self, kind: ErrorKind, how: str) -> DiedError:
        """Stops a worker that has reached a limit."""
        self.stop()
        return DiedError(kind, how, True, self._stage, self._suspects())

    def _dead(self) -> DiedError:
        """What became of a worker that has closed its end."""
        assert self.process is not None
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL  # closed, but alive: stopped below
        self.stop()
        is_own = code >= 0 or -code not in FROM_OUTSIDE
        return DiedError("killed_worker", _cause(code), is_own, self._stage, self._suspects())

    def _suspects(self) -> tuple[str, ...]:
        return tuple(sample_id for sample_id, times in self._in_hand.items() if times > 0)


def resident_gib(pid: int) -> float:
    """Resident memory of a process [GiB]; 0 for one that is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def _cause(code: int) -> str:
    if code >= 0:
        return f"it ended with exit code {code}"
    return f"{(signal.strsignal(-code) or 'signal').lower()}, {signal.Signals(-code).name}"


def problem_of(name: str, sentence: str) -> UserError:
    """A `UserError` that travelled as the name of its class and its words."""
    kinds: dict[str, type[UserError]] = {kind.__name__: kind for kind in UserError.__subclasses__()}
    return kinds.get(name, UserError)(sentence)


class Isolated:
    """Stages in a worker process, as one stage: no row can take more with it than itself."""

    def __init__(self, order: Order, cluster: ClusterConfig) -> None:
        self.worker = Worker(order, cluster.shard_seconds, cluster.worker_gib)
        self.worker.start()
        self._deaths = 0

    def __call__(self, table: pa.Table) -> pa.Table:
        """The shard through all stages; rows that end the worker are error rows."""
        self._deaths, unexplained = 0, 0
        while unexplained < MOST_UNEXPLAINED:
            try:
                return self._with_deaths(self.worker(table))
            except DiedError as death:
                self._deaths += 1
                culprits = self._culprits(table, death)
                table = _condemned(table, culprits)
                unexplained += not culprits
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
                done[at] = self.worker(_condemned(table.slice(at, 1), {0: each}))
        return _joined([each for each in done if isinstance(each, pa.Table)], table)

    def _with_deaths(self, table: pa.Table) -> pa.Table:
        """The table with the worker's deaths in its trace."""
        if not self._deaths:
            return table
        trace = trace_of(table)
        counters = {**trace.counters, DEATHS: trace.counters.get(DEATHS, 0) + self._deaths}
        return with_trace(table, replace(trace, counters=counters))


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
    if whole.num_rows != table.num_rows:  # a stage that makes several rows of one plans anew
        whole = with_columns(whole, {PLANNED: [whole.num_rows] * whole.num_rows})
    return with_trace(whole, replace(traces[0], seconds=dict(seconds), counters=dict(counters), notes=notes))


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

    def __init__(self, order: Order, cluster: ClusterConfig, writer: ShardWriter | None) -> None:
        self.writer = writer
        self.work: Isolated | InProcess | None = None
        self.problem: UserError | None = None
        try:
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
            table = self.work(table)
            if self.writer is None:
                return table
            return pa.table({"receipt": [json.dumps(asdict(self.writer.commit(table)))]})
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
