"""The records of CSV and JSON Lines files with the byte where each starts, and where they can be read from again.

Undecodable bytes of CSV arrive as lone surrogates (`rows.checked` turns such a row into an error row), those of JSON as
a fault. Knows nothing of columns' meanings.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from guardalign.errors import InputError
from guardalign.sources.files import open_input
from guardalign.sources.magic import LONGEST, refuse_no_text

_BOM = b"\xef\xbb\xbf"
_LONGEST_CELL = 2**26
"""A quote that is never closed must not swallow a whole file into memory. [characters]"""
LONGEST_LINE = 2**26
"""Nor must a file without line ends, or one text member of a tar. [bytes]"""
_ARRAY = re.compile(rb"\s*\[\s*(\{|$)")
_DEEPEST = 200
"""Levels of lists and objects in a JSON value."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a table."""

    file_name: str
    """the file relative to the input's root"""
    number: int
    """from 0; the header and blank lines are not counted"""
    offset: int
    """where the record starts, or the blank lines before it [bytes]"""
    fields: Mapping[str, Any] | None
    """by column; None when the record cannot be read"""
    fault: str = ""
    """what is wrong with it: "is ...", "has ..." """


class _Lines:
    """A binary file as lines of text; `offset` is the byte after the last line given."""

    def __init__(self, file: IO[bytes], name: str, offset: int) -> None:
        self._file, self._name = file, name
        self.offset = offset
        file.seek(offset)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = _line(self._file, self._name)
        if not line:
            raise StopIteration
        start, self.offset = self.offset, self.offset + len(line)
        return (line.removeprefix(_BOM) if start == 0 else line).decode("utf-8", "surrogateescape")


@contextmanager
def _opened(uri: str, name: str) -> Iterator[IO[bytes]]:
    """The file, unless its first bytes tell that it is no text."""
    with open_input(uri, name) as file:
        start = file.read(LONGEST)
        file.seek(0)
        refuse_no_text(start, name)
        yield file


def _line(file: IO[bytes], name: str) -> bytes:
    """The next line, empty at the end; `InputError` for one that no table has."""
    line = file.readline(LONGEST_LINE + 1)
    if len(line) > LONGEST_LINE:
        raise InputError(f"{name} has a line of more than {LONGEST_LINE:,} bytes: it is no table of records in lines")
    return line


def csv_records(uri: str, name: str, first: int = 0, offset: int | None = None) -> Iterator[Record]:
    """The records of a CSV file from number `first`, which starts at `offset`; from the header on without one.

    Raises `InputError` where the file as a whole is broken: no header, a column twice, a quote that is never closed.
    """
    csv.field_size_limit(_LONGEST_CELL)  # of the whole process; the default of 128 KiB is below an over-long prompt
    with _opened(uri, name) as file:
        lines = _Lines(file, name, 0)
        header = _header(lines, name)
        if offset is not None:
            lines = _Lines(file, name, offset)
        yield from _csv_rows(lines, header, name, first)


def _header(lines: _Lines, name: str) -> Sequence[str]:
    try:
        header: Sequence[str] = next((row for row in csv.reader(lines, strict=True) if row), [])
        "".join(header).encode()
    except (csv.Error, UnicodeEncodeError):
        raise InputError(
            f"{name} has no readable header line; CSV files are UTF-8 with the column names first"
        ) from None
    twice = [column for column in header if header.count(column) > 1]
    if twice:
        raise InputError(f"{name} has the column {twice[0]} twice")
    return header


def _csv_rows(lines: _Lines, header: Sequence[str], name: str, first: int) -> Iterator[Record]:
    # Strict: a lenient reader runs on over a broken quote and merges rows without a word.
    reader, number = csv.reader(lines, strict=True), first
    while True:
        start = lines.offset
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error) or "field larger" in str(error):
                raise InputError(f"{name}: a quote that opens in row {number} is never closed") from None
            yield Record(name, number, start, None, "is no well-formed CSV")
        else:
            if cells is None:
                return
            if not cells:
                continue
            yield _csv_record(cells, header, name, number, start)
        number += 1


def _csv_record(cells: Sequence[str], header: Sequence[str], name: str, number: int, start: int) -> Record:
    if len(cells) != len(header):
        return Record(name, number, start, None, f"has {len(cells)} cells; the header has {len(header)}")
    return Record(name, number, start, dict(zip(header, cells, strict=True)))


def jsonl_records(uri: str, name: str, first: int = 0, offset: int | None = None) -> Iterator[Record]:
    """The records of a JSON Lines file from number `first`, which starts at `offset`.

    Raises `InputError` for a file that is one JSON array of objects.
    """
    with _opened(uri, name) as file:
        start, number = offset or 0, first
        file.seek(start)
        while line := _line(file, name):
            text = line.removeprefix(_BOM) if start == 0 else line
            if number == 0 and _begins_array(text, file, name):
                raise InputError(f"{name} is a JSON array, not JSON Lines: one object a line")
            if text.strip():
                fields = json_object(text)
                fault = "" if fields is not None else "is no JSON object in UTF-8"
                yield Record(name, number, start, fields, fault)
                number += 1
            start += len(line)


def _begins_array(text: bytes, file: IO[bytes], name: str) -> bool:
    """Whether the first line begins an array of objects that is the whole file; an object on the next line says no."""
    if not _ARRAY.match(text):
        return False
    here, following = file.tell(), _line(file, name)
    file.seek(here)
    return text.strip() == b"[" or json_object(following) is None


def json_object(line: bytes) -> Mapping[str, Any] | None:
    """The JSON object that the bytes are; None where they are none, or one that is nested too deeply."""
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError; deep nesting exhausts the stack
        return None
    return value if isinstance(value, dict) and not _is_deep(line, value) else None


def _is_deep(line: bytes, value: Any) -> bool:
    """Nested beyond `_DEEPEST`: whether such a value can be read or written depends on the stack that is left."""
    if line.count(b"[") + line.count(b"{") <= _DEEPEST:
        return False
    level = [value]
    for _ in range(_DEEPEST):
        nested = [each for each in level if isinstance(each, dict | list)]
        level = [child for each in nested for child in (each.values() if isinstance(each, dict) else each)]
    return any(isinstance(each, dict | list) for each in level)
