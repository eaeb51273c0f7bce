"""The processes of an audit, found in /proc, and what each of them is to the audit. Linux only.

A process belongs to whoever began it when it has its session or carries its mark in its environment: Ray's processes
and their children keep both when their parents are dead. Knows nothing of why somebody looks for them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MARK: Final = "GUARDALIGN_SOAK"
"""environment variable that all processes of a soak carry"""
WORKER: Final = "guardalign.worker"
AGENTS: Final = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own; where raylet and head are both dead they try for a minute to tell the head of it, and go then"""
AGENTS_SHARE: Final = 5.0
"""they get this multiple of the others' time to go"""


@dataclass(frozen=True)
class Process:
    """A process that is alive."""

    pid: int
    """its id"""
    parent: int
    """its parent's id"""
    session: int
    """its session's id"""
    words: tuple[str, ...]
    """its command line, or the title that it gave itself"""

    @property
    def program(self) -> str:
        """The first word, without its folder."""
        return self.words[0].rsplit("/", 1)[-1] if self.words else ""

    @property
    def pool(self) -> str | None:
        """Of a pool's worker process: the pool."""
        return self.words[-1] if WORKER in self.words else None


def living(mark: str, sessions: Collection[int] = ()) -> dict[int, Process]:
    """All processes with the mark (an empty one is nobody's), or of one of the sessions.

    Those that are dead and not yet buried are left out.
    """
    setting = f"{MARK}={mark}".encode()
    found = (_look(Path(entry.path), setting, sessions) for entry in os.scandir("/proc") if entry.name.isdigit())
    return {process.pid: process for process in found if process is not None and process.pid != os.getpid()}


def _look(folder: Path, setting: bytes, sessions: Collection[int]) -> Process | None:
    try:
        state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        if state in "ZX":
            return None
        if int(session) not in sessions and setting not in (folder / "environ").read_bytes().split(b"\0"):
            return None
        words = (folder / "cmdline").read_bytes().rstrip(b"\0 ").split(b"\0")
    except OSError:
        return None
    return Process(int(folder.name), int(parent), int(session), tuple(word.decode(errors="replace") for word in words))


def strike(pid: int, by: signal.Signals = signal.SIGKILL, *, group: bool = False) -> None:
    """Sends a signal to a process, or to its whole group; nothing happens to one that is gone."""
    with suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(pid, by)


def left_behind(mark: str, sessions: Collection[int], patience: float) -> list[Process]:
    """The processes that are still there after so many seconds, `AGENTS` after a multiple; these are killed."""
    began = time.monotonic()
    while left := living(mark, sessions):
        share = (time.monotonic() - began) / patience if patience else AGENTS_SHARE
        if share >= AGENTS_SHARE or (share >= 1 and any(each.program not in AGENTS for each in left.values())):
            break
        time.sleep(0.2)
    for pid in left:
        strike(pid)
    return list(left.values())


@dataclass(frozen=True)
class Scene:
    """An audit's processes at one moment."""

    driver: int
    """the driver's id"""
    processes: Mapping[int, Process]
    """all that belong to the audit and its cluster"""

    def workers(self, pool: str) -> list[int]:
        """Worker processes of a pool."""
        return [each.pid for each in self.processes.values() if each.pool and pool in each.pool.split("+")]

    def actors(self, pool: str) -> list[int]:
        """Ray actors of a pool: the workers' parents."""
        parents = {self.processes[pid].parent for pid in self.workers(pool)}
        return sorted(parents & set(self.processes) - {self.driver})

    def readers(self) -> list[int]:
        """Ray's processes for tasks, such as reading, at work or waiting for it."""
        return [
            each.pid for each in self.processes.values() if each.program.startswith(("ray::MapBatches", "ray::IDLE"))
        ]

    def called(self, program: str, *, of_driver: bool | None = None) -> list[int]:
        """Processes of a program; of the node that the driver lives on, or of the others."""
        found = [each for each in self.processes.values() if each.program == program]
        return [each.pid for each in found if of_driver is None or self._is_drivers(each) is of_driver]

    def _is_drivers(self, process: Process) -> bool:
        """The driver's own cluster is its child; of a cluster that was there before, it joins the head's node."""
        return process.parent == self.driver or "--head" in process.words


@dataclass(frozen=True)
class Place:
    """Where a kill can hit."""

    find: Callable[[Scene], Sequence[int]]
    """ids of the processes that it can be dealt to; empty: not there now"""
    by: signal.Signals = signal.SIGKILL
    """the signal"""
    group: bool = False
    """the process's whole group gets it"""
    is_fatal: bool = False
    """the driver cannot survive it"""


PLACES: Final[Mapping[str, Place]] = {
    "driver": Place(lambda scene: [scene.driver], is_fatal=True),
    "driver's group": Place(lambda scene: [scene.driver], group=True, is_fatal=True),
    "driver, SIGTERM": Place(lambda scene: [scene.driver], by=signal.SIGTERM, is_fatal=True),
    "reader": Place(Scene.readers),
    "actor of detect": Place(lambda scene: scene.actors("detect")),
    "actor of generate": Place(lambda scene: scene.actors("generate")),
    "worker of detect": Place(lambda scene: scene.workers("detect")),
    "worker of generate": Place(lambda scene: scene.workers("generate")),
    "raylet, driver's": Place(lambda scene: scene.called("raylet", of_driver=True), is_fatal=True),
    "raylet, another's": Place(lambda scene: scene.called("raylet", of_driver=False)),
    "gcs_server": Place(lambda scene: scene.called("gcs_server"), is_fatal=True),
}
"""Name -> where a random kill can hit; crash points (`faults.POINTS`) come on top."""
