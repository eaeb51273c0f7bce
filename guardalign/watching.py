"""A pool's worker process as its parent holds it: begun, given shards, watched, stopped.

A worker ends in one of three ways that its parent tells apart: it dies (`killed_worker`), it takes longer than a shard
may (`timed_out`), or more memory than it may (`out_of_memory`). What it had in hand then comes with the news. Knows
nothing of what is made of it (`supervision.py`).
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
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import pyarrow as pa

from guardalign.errors import ErrorKind, ModelError, UserError
from guardalign.machine import memory_gib, resident_gib, used_memory
from guardalign.schema import TIMED_STAGES
from guardalign.worker import HEADER, Frame, Order, decoded, encoded

FROM_OUTSIDE: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGIO)
"""signals that anybody may have sent"""
MOST_STARTS: Final = 3
"""deaths while models are loaded, before the run is given up"""
GLANCE: Final = 0.2
"""between two looks at a worker's memory [s]"""
NEARLY_FULL: Final = 0.92
"""share of the machine's memory in use from which on a worker that has grown is stopped; Ray stops its own at 0.95"""
GROWN: Final = 0.1
"""share of the machine's memory by which it must have grown over the shard for that"""


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
        self._stage = order.pool.split("+")[0]
        self._in_hand: Counter[str] = Counter()
        self._buffer = bytearray()
        self._at_begin = self._looked = 0.0

    def start(self) -> None:
        """Begins the process, which loads its models meanwhile."""
        inlet, self._inlet = os.pipe()
        self._outlet, outlet = os.pipe()
        lifeline, self._lifeline = os.pipe()
        ends = [str(descriptor) for descriptor in (inlet, outlet, lifeline)]
        command = [sys.executable, "-P", "-m", "guardalign.worker", *ends, self.order.pool]
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
        os.set_blocking(self._inlet, False)
        self._send(pickle.dumps(self.order), None)

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
        self.await_ready()
        assert self.process is not None
        self._in_hand, self._at_begin = Counter(), resident_gib(self.process.pid)
        deadline = None if self.shard_seconds is None else monotonic() + self.shard_seconds
        self._send(encoded(table), deadline)
        for kind, content in self._frames(deadline):
            if kind == Frame.TABLE:
                return decoded(pa.py_buffer(bytes(content)))
        raise AssertionError("frames end with a table or an error")

    def await_ready(self) -> None:
        """Waits until the models are loaded; tries again a few times where the worker dies of it."""
        for left in reversed(range(MOST_STARTS)):
            if self._is_ready:
                return
            if self.process is None:
                self.start()
            try:
                self._is_ready = any(kind == Frame.READY for kind, _ in self._frames(None, Frame.READY))
            except DiedError as death:
                if not left:
                    sentence = f"the worker of pool {self.order.pool} died {MOST_STARTS} times ({death.how}) while"
                    raise ModelError(f"{sentence} it loaded its models") from None

    def _send(self, content: Any, deadline: float | None) -> None:
        """One message; a worker that is dead is noticed by whoever reads next, one that takes nothing by its limit."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._inlet, selectors.EVENT_WRITE)
            for part in (memoryview(HEADER.pack(0, memoryview(content).nbytes)), memoryview(content)):
                while part.nbytes:
                    self._heed_limits(deadline)
                    if selector.select(self._patience(deadline)):
                        try:
                            part = part[os.write(self._inlet, part) :]
                        except BrokenPipeError:
                            return

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
            name = content.decode()
            self._stage = name if name in TIMED_STAGES else self._stage  # `thumbnails` and `expand` are part of others
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
            self._heed_limits(deadline)
            while not selector.select(self._patience(deadline)):
                self._heed_limits(deadline)
        content = os.read(self._outlet, 1 << 20)
        if not content:
            raise self._dead()
        self._buffer += content

    def _heed_limits(self, deadline: float | None) -> None:
        """Stops the worker where it has reached one, however much it talks; looks at its memory now and then."""
        now = monotonic()
        if deadline is not None and now >= deadline:
            raise self._ended("timed_out", f"longer than cluster.shard_seconds ({self.shard_seconds:g} s)")
        if now - self._looked >= GLANCE:
            self._looked = now
            self._refuse_too_much_memory()

    def _patience(self, deadline: float | None) -> float:
        """How long to wait before the next look at the limits [s]."""
        return GLANCE if deadline is None else min(GLANCE, max(0.0, deadline - monotonic()))

    def _refuse_too_much_memory(self) -> None:
        assert self.process is not None
        taken = resident_gib(self.process.pid)
        if self.worker_gib is not None and taken > self.worker_gib:
            raise self._ended("out_of_memory", f"more than cluster.worker_gib ({self.worker_gib:g} GiB)")
        if taken - self._at_begin > GROWN * memory_gib() and used_memory() > NEARLY_FULL:
            raise self._ended("out_of_memory", f"{taken:.1f} GiB, when the machine's memory was nearly full", False)

    def _ended(self, kind: ErrorKind, how: str, is_own_doing: bool = True) -> DiedError:
        """Stops a worker that has reached a limit."""
        self.stop()
        return DiedError(kind, how, is_own_doing, self._stage, self._suspects())

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


def _cause(code: int) -> str:
    if code >= 0:
        return f"it ended with exit code {code}"
    return f"{(signal.strsignal(-code) or 'signal').lower()}, {signal.Signals(-code).name}"


def problem_of(name: str, sentence: str) -> UserError:
    """A `UserError` that travelled as the name of its class and its words."""
    kinds: dict[str, type[UserError]] = {kind.__name__: kind for kind in UserError.__subclasses__()}
    return kinds.get(name, UserError)(sentence)
