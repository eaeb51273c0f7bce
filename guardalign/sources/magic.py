"""Files that are something else than their format says, told by their first bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from guardalign.errors import InputError

LONGEST: Final = 6
"""So many first bytes tell. [bytes]"""
_COMPRESSIONS: Final[Mapping[bytes, str]] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "zip",
}
_PARQUET: Final = b"PAR1\x15"
"""With the byte that follows in every Parquet file: a column may be called PAR1."""


def refuse_compressed(start: bytes, name: str) -> None:
    """Raise `InputError` for the file `name` if it is compressed, whatever it is called."""
    for magic, kind in _COMPRESSIONS.items():
        if start.startswith(magic):
            raise InputError(f"{name} is compressed ({kind}); decompress it first")


def refuse_no_text(start: bytes, name: str) -> None:
    """Raise `InputError` for the file `name` if it is compressed, or a Parquet file."""
    refuse_compressed(start, name)
    if start.startswith(_PARQUET):
        raise InputError(f"{name} is a Parquet file; input.format parquet reads it")
