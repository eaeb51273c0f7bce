"""The lock on a run's folder, OUT/.lock: held while a process works in it. Knows nothing of what a run holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from guardalign.errors import ConfigError, ResumeError
from guardalign.results import RunFolder


class Lock:
    """At most one process works in a run's folder; the lock dies with its holder, however that dies.

    Local and mounted file systems only: an object store has no such lock, and there the last writer of a shard wins,
    with equal rows.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        """Takes the lock, or raises `ResumeError` with its holder."""
        if not self.folder.is_local:
            return self
        import fcntl

        try:
            Path(self.folder.root).mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder.path(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"output {self.folder.out} is no folder to write to: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 100).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ResumeError(
                f"another process ({holder}) works in {self.folder.out}; wait for it, or name another --output"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()}".encode())
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        """Lets go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
