"""Benchmarks in the layouts of their own releases: what the sources of them have in common.

A layout is a folder with tables (JSON, CSV or JSON Lines) at known places and picture files that they name. Every row
gets three columns beside an input's usual ones: `expected` (the right answer, where there is one), `pair` (what rows
belong together) and `variant` (the part of the benchmark), all text. `input.split` takes one part alone.

Knows nothing of metrics, and nothing of any one benchmark.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, ClassVar

from guardalign.config import InputConfig
from guardalign.errors import InputError, RowError, require
from guardalign.sources.contract import InputFile, Plan
from guardalign.sources.files import ListedFile, absolute, join, list_files, open_input
from guardalign.sources.left_out import LeftOut
from guardalign.sources.pictures import ImageRoot, web_limits
from guardalign.sources.planning import find_present
from guardalign.sources.records import Record, csv_records, jsonl_records
from guardalign.sources.rows import InputRow, failed
from guardalign.sources.tables import TableSource, as_text, union

OWN_COLUMNS = ("expected", "pair", "variant")
"""Columns that every layout here fills itself."""
COLUMN_SETTINGS = ("image_column", "prompt_column", "id_column", "category_column", "label_column")
"""Settings without a meaning where the layout knows its columns."""
UNSAFE, BENIGN = "unsafe", "benign"
"""The values of `label`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One question of a benchmark."""

    prompt: str
    """the user's words"""
    label: str | None
    """`UNSAFE`: a good answer declines or helps with nothing harmful; `BENIGN`: a good answer helps"""
    category: str | None = None
    """the benchmark's own"""
    expected: str | None = None
    """the right answer; a JSON list where several people gave theirs"""
    pair: str | None = None
    """the same for rows that are judged together"""
    variant: str | None = None
    """the part of the benchmark that the row belongs to"""
    sample_id: str = ""
    """unique in the benchmark; unused where rows are named by their place"""
    image: str | None = None
    """the picture file in the layout's picture folder; None without one, or where the table holds the pictures"""

    @property
    def own(self) -> tuple[str | None, ...]:
        """The cells of `OWN_COLUMNS`."""
        return self.expected, self.pair, self.variant


def text(fields: Mapping[str, Any], name: str, place: str) -> str:
    """A field that must hold text (or a number, as text); `RowError` where it does not."""
    value = fields.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise RowError("row_unreadable", f"the row of sample {place} holds no text in its field {name}")
    return value


def with_own_columns(config: InputConfig) -> InputConfig:
    """The settings with the layout's own columns before the user's. Raises `ConfigError` where they clash."""
    for name in config.passthrough:
        require(name not in OWN_COLUMNS, f"input.passthrough: format {config.format} fills the column {name} itself")
    return dataclasses.replace(config, passthrough=[*OWN_COLUMNS, *config.passthrough])


class LayoutSource(TableSource):
    """A folder in a benchmark's own layout. Subclasses say where its tables lie and what a record means."""

    title: ClassVar[str]
    """the benchmark's name in sentences"""
    tables: ClassVar[tuple[str, ...]]
    """the tables, relative to the layout's folder, in the order of their rows"""
    companions: ClassVar[tuple[str, ...]] = ()
    """further files that every table is read with"""
    folders: ClassVar[tuple[str, ...]] = ("",)
    """where in input.path the layout's folder may be; the first that holds all files is taken"""
    needed: ClassVar[tuple[str, ...]]
    """fields that the records must have"""
    variants: ClassVar[tuple[str, ...]] = ()
    """the parts that `input.split` can name"""
    pictures: ClassVar[str] = ""
    """where in the layout's folder the picture files lie; `input.image_root` stands in its place"""
    shares_pictures: ClassVar[bool] = False
    """whether the picture folder holds more than the benchmark's pictures, as a rule"""
    meaningless = ("revision", "subset", *COLUMN_SETTINGS)

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.config
        if not isinstance(config.path, str):
            raise InputError(f"input.path of format {config.format} is one folder, not a list")
        there = f"there are {', '.join(self.variants)}" if self.variants else "it has one part only"
        known = config.split is None or config.split in self.variants
        require(known, f"input.split {config.split} is no part of {self.title}: {there}")
        object.__setattr__(self, "config", with_own_columns(config))

    def chosen_tables(self) -> tuple[str, ...]:
        """The tables that are read under `input.split`."""
        return self.tables

    def list_files(self, left_out: list[LeftOut] | None = None) -> tuple[ListedFile, ...]:
        """The tables, named relative to the layout's folder."""
        return self._listed(self.chosen_tables())

    def _listed(self, names: Sequence[str]) -> tuple[ListedFile, ...]:
        base = self._base()
        return tuple(dataclasses.replace(list_files(join(base, name), ())[0], name=name) for name in names)

    def _base(self) -> str:
        """The layout's folder; `InputError` names the first file that input.path lacks."""
        path = absolute(str(self.config.path))
        lacking = {folder: self._first_lacking(join(path, folder) if folder else path) for folder in self.folders}
        whole = next((folder for folder, missing in lacking.items() if missing is None), None)
        if whole is not None:
            return join(path, whole) if whole else path
        raise InputError(
            f"input.path {self.config.path} is no copy of {self.title}: it lacks {lacking[self.folders[0]]}"
            + "".join(f" (or {folder}/{missing})" for folder, missing in lacking.items() if folder)
        )

    def _first_lacking(self, base: str) -> str | None:
        names = (*self.chosen_tables(), *self.companions)
        return next((name for name in names if not self._holds(join(base, name))), None)

    @staticmethod
    def _holds(uri: str) -> bool:
        try:
            return bool(list_files(uri, ()))
        except InputError:
            return False

    def image_root(self, uri: str, name: str) -> ImageRoot:
        """`input.image_root`, else the layout's own picture folder."""
        if self.config.image_root is not None:
            return super().image_root(uri, name)
        base = uri.removesuffix(f"/{name}")
        folder = join(base, self.pictures) if self.pictures else base
        return ImageRoot(folder, self.pictures, web=web_limits(self.config))

    def check_columns(self, present: Mapping[str, Mapping[str, None]]) -> tuple[str, ...]:
        """No notes; raises `InputError` for a field that the layout prescribes and no record has."""
        find_present(union(present), (*self.needed, *self.passed))
        return ()

    @property
    def passed(self) -> list[str]:
        """The user's passed-through fields."""
        return self.config.passthrough[len(OWN_COLUMNS) :]

    def plan(self, shard_rows: int, limit: int | None) -> Plan:
        """See `Source.plan`."""
        plan = super().plan(shard_rows, limit)
        companions: tuple[InputFile, ...] = tuple(file.as_input for file in self._listed(self.companions))
        notes = () if self.shares_pictures else plan.notes
        return dataclasses.replace(plan, files=(*companions, *plan.files), notes=notes)

    def interpret(self, fields: Mapping[str, Any], place: str) -> InputRow:
        """The row of a record: an error row where a field is not what the layout says."""
        passed = tuple(as_text(fields.get(name)) for name in self.passed)
        try:
            entry = self.entry(fields, place)
        except RowError as error:
            return failed(InputRow(place, place, passthrough=(None, None, None, *passed)), error)
        return InputRow(
            sample_id=entry.sample_id,
            source=place,
            prompt=entry.prompt,
            image_reference=entry.image,
            category=entry.category,
            label=entry.label,
            passthrough=(*entry.own, *passed),
        )

    def entry(self, fields: Mapping[str, Any], place: str) -> Entry:
        """What a record means; `RowError` where it means nothing."""
        raise NotImplementedError


class CsvLayout(LayoutSource):
    """A layout whose tables are CSV with a header."""

    def records(self, uri: str, name: str, first: int = 0, offset: int | None = None) -> Iterator[Record]:
        """See `TableSource.records`."""
        return csv_records(uri, name, first, offset)


class JsonlLayout(LayoutSource):
    """A layout whose tables are JSON Lines."""

    def records(self, uri: str, name: str, first: int = 0, offset: int | None = None) -> Iterator[Record]:
        """See `TableSource.records`."""
        return jsonl_records(uri, name, first, offset)


class WholeLayout(LayoutSource):
    """A layout whose tables must be read whole, such as JSON; one record of it can become several rows."""

    def records(self, uri: str, name: str, first: int = 0, offset: int | None = None) -> Iterator[Record]:
        """See `TableSource.records`."""
        base = uri.removesuffix(f"/{name}")
        files = tuple((other, join(base, other)) for other in (name, *self.companions))
        etags = tuple(list_files(path, ())[0].etag for _, path in files)
        found = _unfolded(self.decode, self.unfold, files, etags, self.config.split)
        for number, fields in enumerate(islice(found, first, None), first):
            yield Record(name, number, 0, fields)

    @classmethod
    def decode(cls, content: bytes, name: str) -> Any:
        """A file's content: JSON, unless a subclass says otherwise."""
        try:
            return json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            raise InputError(f"{name} is no JSON in UTF-8") from None

    @classmethod
    def unfold(cls, contents: Sequence[Any], name: str) -> Iterator[Mapping[str, Any]]:
        """The rows of a table (the first of `contents`; its companions follow), each with its `variant` if any."""
        raise NotImplementedError


@lru_cache(maxsize=16)
def _unfolded(
    decode: Callable[[bytes, str], Any],
    unfold: Callable[[Sequence[Any], str], Iterator[Mapping[str, Any]]],
    files: tuple[tuple[str, str], ...],
    etags: tuple[str, ...],
    split: str | None,
) -> tuple[Mapping[str, Any], ...]:
    """The records of one table under `input.split`; cached, since every shard asks for them."""
    contents = []
    for name, uri in files:
        with open_input(uri, name) as file:
            contents.append(decode(file.read(), name))
    found = unfold(contents, files[0][0])
    return tuple(fields for fields in found if split is None or fields.get("variant") == split)


def objects(content: Any, name: str, needs: Sequence[str] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Key and object of each entry of a JSON list or object.

    `InputError` where the file has another form, or where an entry lacks a field of `needs`.
    """
    if not isinstance(content, dict | list):
        raise InputError(f"{name} has another form than expected: neither a list nor an object of entries")
    pairs = content.items() if isinstance(content, dict) else ((str(at), each) for at, each in enumerate(content))
    for key, value in pairs:
        if not isinstance(value, dict):
            raise InputError(f"{name} has another form than expected: its entry {key} is no object")
        lacking = next((field for field in needs if field not in value), None)
        if lacking is not None:
            raise InputError(f"the entry {key} of {name} lacks the field {lacking}; its fields: {', '.join(value)}")
        yield str(key), value


def part(content: Any, key: str, name: str) -> Any:
    """What stands under `key` in a JSON object; `InputError` where nothing does."""
    if not isinstance(content, dict) or key not in content:
        raise InputError(f"{name} has another form than expected: an object with {key}")
    return content[key]
