"""Faults on purpose, for proving what survives them: crash points by name, and rows that harm whoever works on them.

Nothing happens unless the variable GUARDALIGN_FAULTS names a folder. There stand

    POINT       a file called like one of `POINTS`, holding a number n: the n-th process to come by is killed, once
    rows.json   {"generate": {sample id: segfault | exit | hang | memory}}: what a row does to that stage's worker
    visits      where it is there, everybody who comes by a point adds a line: seconds since 1970, process, point

A point that has struck leaves the file POINT.hit, with the id of the process that died. Knows nothing of shards,
stages or Ray.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

VARIABLE: Final = "GUARDALIGN_FAULTS"
"""environment variable with the folder of faults"""
VISITS: Final = "visits"
"""file in the folder of faults"""
POINTS: Final[Mapping[str, str]] = {
    "read.shard": "a reader, before it reads a shard",
    "detect.shard": "a worker of the first pool, before a shard",
    "generate.shard": "a worker of the second pool, before a shard",
    "judge.shard": "a worker of the third pool, before a shard",
    "commit.begin": "whoever commits a shard, before the write",
    "write.half": "any file of the run, half of it written under its temporary name",
    "write.whole": "any file of the run, all of it written, before the rename",
    "write.renamed": "any file of the run, after the rename",
    "manifest.begin": "the driver, all shards committed, before run.json",
}
"""Crash points: name -> who dies, and where."""


def reach(point: str) -> None:
    """Comes by a crash point; the process dies there when the folder of faults says so."""
    assert point in POINTS, f"no crash point is called {point}"
    folder = os.environ.get(VARIABLE)
    if folder:
        _tell(Path(folder), point)
        if _is_due(Path(folder), point):
            os.kill(os.getpid(), signal.SIGKILL)


def _tell(folder: Path, point: str) -> None:
    """Adds this visit to the list of visits, where there is one; one write, so that lines stay whole."""
    with suppress(FileNotFoundError):
        descriptor = os.open(folder / VISITS, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, f"{time.time():.6f} {os.getpid()} {point}\n".encode())
        os.close(descriptor)


def _is_due(folder: Path, point: str) -> bool:
    """Counts this visit; True for the one that the number in the file stands for."""
    try:
        with (folder / point).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            left = int(file.read() or 0) - 1
            file.seek(0)
            file.write(f"{left} ")
            if left != 0:
                return False
            (folder / point).rename(folder / f"{point}.hit")
    except FileNotFoundError:
        return False
    (folder / f"{point}.hit").write_text(str(os.getpid()))
    return True


def strike(stage: str, sample_id: str) -> None:
    """Does to this process what the folder of faults holds for the row in the stage; mostly nothing."""
    folder = os.environ.get(VARIABLE)
    if folder and (rows := Path(folder) / "rows.json").exists():
        kind = json.loads(rows.read_text()).get(stage, {}).get(sample_id)
        if kind is not None:
            HARMS[kind]()


def _segfault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _exit() -> None:
    os._exit(17)


def _hang() -> None:
    while True:
        time.sleep(60)


def _memory() -> None:
    """Takes memory until somebody puts an end to it."""
    kept = []
    while True:
        kept.append(bytearray(os.urandom(1) * 2**24))
        time.sleep(0.001)


HARMS: Final[Mapping[str, Callable[[], None]]] = {
    "segfault": _segfault,
    "exit": _exit,
    "hang": _hang,
    "memory": _memory,
}
"""What a row can do to its worker."""
