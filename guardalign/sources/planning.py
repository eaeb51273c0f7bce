"""What planning has in common for all formats: cutting shards, finding duplicate ids, checking columns and settings.

Knows nothing of any one format, and holds 8 bytes a row besides the shards themselves.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from guardalign.config import InputConfig
from guardalign.errors import InputError, require
from guardalign.sources.contract import INPUT_SCHEMA, Shard, Span

URLS = ("allow_urls", "url_seconds", "url_bytes")
"""Settings without a meaning where no row names its picture."""
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(InputConfig)}


class ShardCutter:
    """Cuts rows into shards as they come."""

    def __init__(self, shard_rows: int) -> None:
        self._shard_rows = shard_rows
        self._shards: list[Shard] = []
        self._spans: list[Span] = []
        self.num_rows = 0

    def add(self, uri: str, name: str, first: int, num_rows: int = 1, offset: int = 0) -> None:
        """Take rows `first` .. `first + num_rows - 1` of a file; `offset` [bytes] holds for the first of them."""
        while num_rows:
            taken = min(num_rows, self._shard_rows - self.num_rows % self._shard_rows)
            self._extend(uri, name, first, taken, offset)
            self.num_rows += taken
            first, num_rows = first + taken, num_rows - taken
            if self.num_rows % self._shard_rows == 0:
                self._close()

    def _extend(self, uri: str, name: str, first: int, num_rows: int, offset: int) -> None:
        last = self._spans[-1] if self._spans else None
        if last is None or last.uri != uri or last.first + last.num_rows != first:
            self._spans.append(Span(uri, name, first, num_rows, offset))
        else:
            self._spans[-1] = Span(uri, name, last.first, last.num_rows + num_rows, last.offset)

    def _close(self) -> None:
        num_rows = sum(span.num_rows for span in self._spans)
        self._shards.append(Shard(len(self._shards), num_rows, tuple(self._spans)))
        self._spans = []

    def shards(self) -> tuple[Shard, ...]:
        """All shards; the last may be short."""
        if self._spans:
            self._close()
        return tuple(self._shards)


class IdLedger:
    """Finds the first id that stands twice, in 8 bytes a row.

    It keeps 64-bit hashes. Equal hashes are only a suspicion: a second look at the ids themselves decides.
    """

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, sample_id: str) -> None:
        """Note an id."""
        self._hashes.append(hash(sample_id))

    def refuse_duplicates(self, again: Callable[[], Iterable[tuple[str, str]]]) -> None:
        """Raise `InputError` for the first id that stands twice; `again` walks (id, place) a second time."""
        hashes = np.sort(np.frombuffer(self._hashes, dtype=np.int64))
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        first_places: dict[str, str] = {}
        for sample_id, place in again() if suspects else ():
            if hash(sample_id) not in suspects:
                continue
            if sample_id in first_places:
                raise InputError(f"sample id '{sample_id}' stands twice: {first_places[sample_id]} and {place}")
            first_places[sample_id] = place


@dataclass(frozen=True)
class Columns:
    """The configured columns that the data set has."""

    prompt: str
    image: str | None
    sample_id: str | None
    category: str | None
    label: str | None
    notes: tuple[str, ...]
    """which optional ones are absent"""


_WITHOUT = {
    "image_column": ("every row is a text-only prompt", "their rows are text-only prompts"),
    "id_column": ("ids derive from the rows' places", "the ids of their rows derive from places"),
    "category_column": ("rows have no category", "their rows have no category"),
    "label_column": ("rows have no label", "their rows have no label"),
}
"""What follows from an absent column: everywhere, or in some files."""


def find_columns(config: InputConfig, present: Collection[str], where: str = "the data set") -> Columns:
    """The columns that `config` names among those `present` in `where`.

    Raises `InputError` for an absent prompt, an absent passed-through column, and any absent column that was asked for
    by name; a default name may be absent.
    """
    for setting in ("prompt_column", *_WITHOUT):
        _check_asked_for(config, setting, present, where)
    for column in config.passthrough:
        _check_present("passthrough", column, present, where)
    _refuse_ambiguous(config, list(present), where)
    found: dict[str, str | None] = {name: _if_in(present, getattr(config, name)) for name in _WITHOUT}
    image, sample_id, category, label = (found[name] for name in _WITHOUT)
    return Columns(config.prompt_column, image, sample_id, category, label, notes_of_absent(config, [present]))


def notes_of_absent(config: InputConfig, present: Sequence[Collection[str]]) -> tuple[str, ...]:
    """Sentences on the configured columns that some or all files lack; `present` are the columns of each file."""
    notes = []
    for name, (everywhere, there) in _WITHOUT.items():
        column = getattr(config, name)
        lacking = sum(column not in columns for columns in present)
        if column is not None and lacking == len(present):
            notes.append(f"column {column} is absent: {everywhere}")
        elif column is not None and lacking:
            notes.append(f"column {column} is absent in {lacking:,} of {len(present):,} files: {there}")
    return tuple(notes)


def _refuse_ambiguous(config: InputConfig, present: Sequence[str], where: str) -> None:
    for column in (config.prompt_column, *(getattr(config, name) for name in _WITHOUT), *config.passthrough):
        if present.count(column) > 1:
            raise InputError(f"{where} has the column {column} twice")


def _if_in(present: Collection[str], column: str | None) -> str | None:
    return column if column in present else None


def _check_asked_for(config: InputConfig, setting: str, present: Collection[str], where: str) -> None:
    column = getattr(config, setting)
    if setting == "prompt_column" or (column is not None and column != _DEFAULTS[setting]):
        _check_present(setting, column, present, where)


def _check_present(setting: str, column: str, present: Collection[str], where: str) -> None:
    if column not in present:
        raise InputError(
            f"input.{setting} names the column {column}, which {where} lacks; its columns: {_all(present)}"
        )


def _all(columns: Iterable[str]) -> str:
    """Columns for a sentence."""
    return named(columns) or "none"


def find_present(present: Collection[str], needed: Iterable[str]) -> None:
    """Raise `InputError` for a column that the format prescribes and the data set lacks."""
    for column in needed:
        if column not in present:
            raise InputError(f"the data set lacks the column {column}; its columns: {_all(present)}")


def check_settings(config: InputConfig, meaningless: Collection[str], reserved: Collection[str]) -> None:
    """Raise `ConfigError` for a setting that the format ignores and for passed-through names that are taken."""
    for setting in meaningless:
        is_default = getattr(config, setting) == _DEFAULTS[setting]
        require(is_default, f"input.{setting} has no meaning for format {config.format}")
    names = config.passthrough
    require(len(set(names)) == len(names), "input.passthrough names a column twice")
    for name in names:
        taken = name in reserved or name in INPUT_SCHEMA.names
        require(not taken, f"input.passthrough: {name} is a column of the results already; rename it in the data set")


def text_fields(config: InputConfig) -> tuple[pa.Field, ...]:
    """The passed-through columns of a format that holds text."""
    return tuple(pa.field(name, pa.string()) for name in config.passthrough)


def refuse_empty(config: InputConfig, num_rows: int) -> None:
    """Raise `InputError` for an input without rows."""
    if num_rows == 0:
        typed = config.path if isinstance(config.path, str) else ", ".join(config.path)
        raise InputError(f"nothing to audit: {typed} holds no rows")


def named(names: Iterable[str], most: int = 10) -> str:
    """Names for a sentence: up to ten, then a count; in quotes where blanks or line ends would not show otherwise."""
    ordered = list(names)
    shown = (name if name.isprintable() and name == name.strip() else repr(name) for name in ordered[:most])
    more = f" and {len(ordered) - most:,} more" if len(ordered) > most else ""
    return ", ".join(shown) + more
