"""Whether bytes are damaged or could not be had.

File systems raise `OSError` without an errno, and so does Arrow over bytes that it cannot decode; here the two part.
Knows nothing of what files hold.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pyarrow as pa

from guardalign.errors import InputError


class StoreError(InputError, OSError):
    """A file's bytes could not be read, or fewer came than were asked for: nothing is said of what they hold."""


class FromStore(io.RawIOBase):
    """A file as Arrow is given it."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name
        with self._telling():
            self._size = file.seek(0, os.SEEK_END)
            file.seek(0)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self._name} cannot be read: {error}") from error

    def read(self, size: int = -1, /) -> bytes:
        with self._telling():
            first = self._file.tell()
            content = self._file.read(size)
            there = max(0, self._size - first)
            if len(content) < (there if size < 0 else min(size, there)):
                raise OSError("its store gave fewer bytes than it had said")
            return content

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        with self._telling():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def is_damage(error: Exception) -> bool:
    """Whether Arrow cannot decode what it read; want of memory is no damage, nor is an error of the file system."""
    if isinstance(error, (MemoryError, StoreError)):
        return False
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)
