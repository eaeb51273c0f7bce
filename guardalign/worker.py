"""A pool's stages in a process of their own: loads them, then works on shards until its parent is gone.

    python -P -m guardalign.worker INLET OUTLET LIFELINE POOL

Three file descriptors, and the pool's name for whoever lists processes. By INLET come the order (what to load) and
then one Arrow table at a time; by OUTLET go frames (`Frame`): READY once, TAKEN and LAID as rows are taken up and laid
down, STAGE, and for every table a TABLE or a PROBLEM. LIFELINE says nothing: when the parent dies, however that is, the
kernel closes it and stops this process, even one that hangs. Knows nothing of what is made of its death
(`supervision.py`).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pickle
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any, Final

import pyarrow as pa

from guardalign.errors import UserError
from guardalign.faults import reach
from guardalign.in_hand import listen
from guardalign.schema import IMAGE

HEADER: Final = struct.Struct("!BQ")
"""a frame's kind, and the length of what follows [bytes]"""


class Frame(IntEnum):
    """What a message holds."""

    READY = 1
    """the stages are loaded"""
    TAKEN = 2
    """JSON list of the ids of rows that are taken up"""
    LAID = 3
    """the same of rows that are laid down"""
    STAGE = 4
    """name of the stage that begins"""
    TABLE = 5
    """the shard, through all stages (Arrow stream)"""
    PROBLEM = 6
    """JSON of class name and sentence of a `UserError`"""
    BUG = 7
    """traceback of anything else: ours to mend, and no row's fault"""


@dataclass(frozen=True)
class Order:
    """What a worker is to be."""

    pool: str
    """name of the actor pool"""
    steps: Any
    """list of `pipeline.Step`, or the same pickled: whoever passes the order on need not import what the steps do"""
    threads: int
    """torch CPU threads"""
    is_last: bool
    """what it gives is written: the pictures may stay behind"""


def encoded(table: pa.Table) -> pa.Buffer:
    """A table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def decoded(content: Any) -> pa.Table:
    """The table of an Arrow stream."""
    return pa.ipc.open_stream(content).read_all()


def loaded(order: Order) -> list[Callable[[pa.Table], pa.Table]]:
    """The order's stages, ready to work in this process; a `UserError` where one cannot be loaded."""
    listed = pickle.loads(order.steps) if isinstance(order.steps, bytes) else order.steps
    torch = sys.modules.get("torch")  # steps that compute have brought it with them
    if torch is not None:
        torch.set_num_threads(order.threads)
    return [step.make() for step in listed]


class Outlet:
    """Frames to the parent, from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._lock = threading.Lock()

    def send(self, kind: Frame, content: Any = b"") -> None:
        """One frame, whole."""
        view = memoryview(content)
        with self._lock:
            self._write(memoryview(HEADER.pack(kind, view.nbytes)))
            self._write(view)

    def _write(self, view: memoryview) -> None:
        while view.nbytes:
            view = view[self._file.write(view) :]

    def told(self, taken: bool, sample_ids: Sequence[str]) -> None:
        """Rows taken up or laid down."""
        self.send(Frame.TAKEN if taken else Frame.LAID, json.dumps(list(sample_ids)).encode())

    def problem(self, problem: UserError) -> None:
        """What the user can mend."""
        self.send(Frame.PROBLEM, json.dumps([type(problem).__name__, str(problem)]).encode())

    def bug(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """An excepthook."""
        self.send(Frame.BUG, "".join(traceback.format_exception(kind, error, trace)).encode())


def main(words: Sequence[str]) -> None:
    """Runs until the parent closes the inlet or dies."""
    inlet, outlet, lifeline = (int(word) for word in words[:3])
    _die_with_parent(lifeline)
    _go_first_when_memory_is_short()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    to_parent = Outlet(outlet)
    sys.excepthook = to_parent.bug
    with os.fdopen(inlet, "rb") as from_parent:
        order: Order = pickle.loads(_received(from_parent) or b"")
        try:
            stages = loaded(order)
        except UserError as problem:
            to_parent.problem(problem)
            return
        listen(to_parent.told)
        to_parent.send(Frame.READY)
        while (content := _received(from_parent)) is not None:
            _work(order, stages, decoded(content), to_parent)


def _work(order: Order, stages: Sequence[Any], table: pa.Table, to_parent: Outlet) -> None:
    """One shard through all stages."""
    try:
        reach_pool(order.pool)
        for stage in stages:
            to_parent.send(Frame.STAGE, getattr(stage, "name", order.pool).encode())
            table = stage(table)
    except UserError as problem:
        to_parent.problem(problem)
    else:
        spare = [IMAGE] if order.is_last and IMAGE in table.column_names else []
        to_parent.send(Frame.TABLE, encoded(table.drop_columns(spare)))


def reach_pool(pool: str) -> None:
    """Comes by the crash points of the pool; `+` joins the names of pools that work in one process."""
    for name in pool.split("+"):
        reach(f"{name}.shard")


def _received(file: Any) -> bytes | None:
    """One message; None when the parent has closed."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    _, length = HEADER.unpack(header)
    content = file.read(length)
    return content if len(content) == length else None


def _die_with_parent(lifeline: int) -> None:
    """Nothing is ever written to the lifeline; when its other end closes, the kernel sends SIGIO, which ends us.

    Unlike PR_SET_PDEATHSIG it follows the parent's process, not the thread that began us; unlike a thread that waits
    for the end of the file it needs no lock of the interpreter, which a row that hangs may hold for ever.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if os.getppid() == 1:  # it was gone before we listened; a container's first process adopts, too: nothing is lost
        os.set_blocking(lifeline, False)
        with suppress(BlockingIOError):
            if os.read(lifeline, 1) == b"":
                os._exit(1)


def _go_first_when_memory_is_short() -> None:
    """The kernel shall stop this process and not its parent, who can tell what it had in hand."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


if __name__ == "__main__":
    main(sys.argv[1:])
