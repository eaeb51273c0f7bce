"""What this machine (or its container) has of memory, and what of it is taken. Linux; elsewhere nothing is known.

Knows nothing of workers or rows.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Final

GIB: Final = 2**30
_CGROUP: Final = Path("/sys/fs/cgroup")
_V2: Final = ("memory.max", "memory.current", "memory.stat", "inactive_file")
_V1: Final = (
    "memory/memory.limit_in_bytes",
    "memory/memory.usage_in_bytes",
    "memory/memory.stat",
    "total_inactive_file",
)


def resident_gib(pid: int) -> float:
    """Resident memory of a process [GiB]; 0 for one that is gone, or where that cannot be told."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


@cache
def memory_gib() -> float:
    """The machine's memory, or the container's limit where that is less [GiB]; infinite where it cannot be told."""
    return min(_of_machine()[0], *(_limit(names[0]) for names in (_V2, _V1))) / GIB


def used_memory() -> float:
    """Share of that memory in use, in [0, 1]; the cache of files, which the kernel gives up, counts as free."""
    total, used = _of_machine()
    shares = [used / total] if total < float("inf") else []
    for limit_name, used_name, stat_name, cache_name in (_V2, _V1):
        limit = _limit(limit_name)
        if limit < total:
            shares.append((_number(used_name) - _statistic(stat_name, cache_name)) / limit)
    return max([0.0, *shares])


def _of_machine() -> tuple[float, float]:
    """Memory and what of it is in use [bytes]."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        known = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return float(known["MemTotal"]), float(known["MemTotal"] - known["MemAvailable"])
    except (OSError, KeyError, ValueError, IndexError):
        return float("inf"), 0.0


def _limit(name: str) -> float:
    return _number(name) or float("inf")


def _number(name: str) -> float:
    try:
        return float((_CGROUP / name).read_text())
    except (OSError, ValueError):  # "max" is no limit
        return 0.0


def _statistic(name: str, key: str) -> float:
    try:
        lines = (_CGROUP / name).read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.split()[0] == key))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0.0
