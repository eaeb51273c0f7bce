"""CSV and JSON Lines: a row a record, pictures as files named by path.

The plan makes one pass and notes where each shard starts; a read seeks there. A record that cannot be read is an error
row. In CSV an empty cell is null (passed-through ones are copied as they are). Knows nothing of what a picture holds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import pyarrow as pa

from guardalign.config import InputConfig
from guardalign.errors import RowError
from guardalign.sources.contract import Outline, Plan, Shard, Span
from guardalign.sources.files import ListedFile, absolute, folder_of, list_files
from guardalign.sources.left_out import LeftOut, note_of_left_out
from guardalign.sources.pictures import ImageRoot, PictureCensus, note_of_unnamed, web_limits, with_pictures
from guardalign.sources.planning import IdLedger, ShardCutter, find_columns, notes_of_absent, refuse_empty, text_fields
from guardalign.sources.records import Record, csv_records, jsonl_records
from guardalign.sources.rows import InputRow, bare, checked, failed, location, to_table, whole


@dataclass(frozen=True)
class TableSource:
    """A table of text. Subclasses say how its records are found."""

    config: InputConfig
    suffixes: ClassVar[tuple[str, ...]] = ()
    """of its tables; none where it names them one by one"""
    meaningless: ClassVar[tuple[str, ...]] = ("split", "revision", "subset")

    def __post_init__(self) -> None:
        root = self.config.image_root
        here = dataclasses.replace(self.config, image_root=absolute(root) if root else None)
        object.__setattr__(self, "config", here)  # a worker's current folder is another one

    def records(self, uri: str, name: str, first: int = 0, offset: int | None = None) -> Iterator[Record]:
        """The records of a file from number `first`, which starts at `offset` [bytes]."""
        raise NotImplementedError

    def list_files(self, left_out: list[LeftOut] | None = None) -> tuple[ListedFile, ...]:
        """The tables; what their folders hold beside them goes to `left_out`."""
        return list_files(self.config.path, self.suffixes, left_out)

    def check_columns(self, present: Mapping[str, Mapping[str, None]]) -> tuple[str, ...]:
        """Notes on the columns, given those of each file; raises `InputError` for ones that no file has."""
        find_columns(self.config, union(present))
        return notes_of_absent(self.config, list(present.values()))

    def row(self, record: Record) -> InputRow:
        """The row of a record, its picture still a reference."""
        place = location(record.file_name, record.number)
        num_passed = len(self.config.passthrough)
        if record.fields is None:
            blank = InputRow(place, place, passthrough=(None,) * num_passed)
            return failed(blank, RowError("row_unreadable", f"the row of sample {place} {record.fault}"))
        return checked(self.interpret(record.fields, place))

    def interpret(self, fields: Mapping[str, Any], place: str) -> InputRow:
        """The row of a record's fields."""
        config = self.config
        return InputRow(
            sample_id=self.cell(fields, config.id_column) or place,
            source=place,
            prompt=self.cell(fields, config.prompt_column),
            image_reference=self.cell(fields, config.image_column) or None,
            category=self.cell(fields, config.category_column),
            label=self.cell(fields, config.label_column),
            passthrough=tuple(as_text(fields.get(name)) for name in config.passthrough),
        )

    def cell(self, fields: Mapping[str, Any], column: str | None) -> str | None:
        """One cell as text."""
        return None if column is None else as_text(fields.get(column))

    def image_root(self, uri: str, name: str) -> ImageRoot:
        """Where the pictures of the table `name` lie."""
        if self.config.image_root is not None:
            return ImageRoot(self.config.image_root, "image_root", is_configured=True, web=web_limits(self.config))
        return ImageRoot(folder_of(uri), name.rpartition("/")[0], web=web_limits(self.config))

    def plan(self, shard_rows: int, limit: int | None) -> Plan:
        """See `Source.plan`."""
        left_out: list[LeftOut] = []
        listed = self.list_files(left_out)
        cutter, ledger, census = ShardCutter(shard_rows), IdLedger(), PictureCensus()
        present: dict[str, dict[str, None]] = {}
        roots = {file.name: self.image_root(file.uri, file.name) for file in listed}
        for root in roots.values():
            census.open(root)
        for file, record in islice(self._walk(listed), limit):
            row = self.row(record)
            present.setdefault(file.name, {}).update(dict.fromkeys(record.fields or ()))
            ledger.add(row.sample_id)
            census.add(roots[file.name], row)
            cutter.add(file.uri, file.name, record.number, offset=record.offset)
        refuse_empty(self.config, cutter.num_rows)
        notes = self.check_columns(present) + census.note_of_idle_root(self.config.image_root)
        ledger.refuse_duplicates(lambda: self._ids(listed, limit))
        pictures, unnamed = census.close()
        is_cut = limit is not None and cutter.num_rows == limit  # later lines may name the rest
        notes += () if is_cut else note_of_unnamed(unnamed, tuple(file.name for file in listed))
        notes += note_of_left_out(left_out, self.suffixes, {picture.path for picture in pictures})
        files = (*(file.as_input for file in listed), *pictures)
        return Plan(cutter.shards(), cutter.num_rows, files, text_fields(self.config), notes)

    def _walk(self, listed: tuple[ListedFile, ...]) -> Iterator[tuple[ListedFile, Record]]:
        for file in listed:
            for record in self.records(file.uri, file.name):
                yield file, record

    def _ids(self, listed: tuple[ListedFile, ...], limit: int | None) -> Iterator[tuple[str, str]]:
        for _, record in islice(self._walk(listed), limit):
            row = self.row(record)
            yield row.sample_id, row.source

    def read(self, shard: Shard) -> pa.Table:
        """See `Source.read`."""
        rows = []
        for span in shard.spans:
            root = self.image_root(span.uri, span.name)
            records = self.records(span.uri, span.name, span.first, span.offset)
            rows += with_pictures([self.row(record) for record in islice(records, span.num_rows)], root)
        return whole(to_table(rows, text_fields(self.config)), shard)

    def outline(self, shard: Shard) -> Outline:
        """See `Source.outline`."""
        rows, spans = [], []
        for span in shard.spans:
            for record in islice(self.records(span.uri, span.name, span.first, span.offset), span.num_rows):
                row = self.row(record)
                rows.append(InputRow(row.sample_id, row.source))
                spans.append(Span(span.uri, span.name, record.number, 1, record.offset))
        return Outline(whole(bare(rows, text_fields(self.config)), shard), tuple(spans))


def union(present: Mapping[str, Mapping[str, None]]) -> Mapping[str, None]:
    """The columns that any file has."""
    return {column: None for columns in present.values() for column in columns}


def as_text(value: Any) -> str | None:
    """A JSON value as a cell: text as it is, anything else as JSON text."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class CsvSource(TableSource):
    """Comma-separated values with a header, UTF-8; quoted cells may span lines."""

    suffixes = (".csv",)

    def records(self, uri: str, name: str, first: int = 0, offset: int | None = None) -> Iterator[Record]:
        """See `TableSource.records`."""
        return csv_records(uri, name, first, offset)

    def cell(self, fields: Mapping[str, Any], column: str | None) -> str | None:
        """One cell; an empty one is null."""
        return None if column is None else fields.get(column) or None


class JsonlSource(TableSource):
    """One JSON object a line, UTF-8. The prompt and the picture's path must be text; the rest may be anything."""

    suffixes = (".jsonl", ".ndjson")

    def records(self, uri: str, name: str, first: int = 0, offset: int | None = None) -> Iterator[Record]:
        """See `TableSource.records`."""
        return jsonl_records(uri, name, first, offset)

    def interpret(self, fields: Mapping[str, Any], place: str) -> InputRow:
        """The row of a record's fields."""
        row = super().interpret(fields, place)
        for column in (self.config.prompt_column, self.config.image_column):
            if not isinstance(fields.get(column), str | None):
                sentence = f"the column {column} of sample {row.sample_id} holds no text"
                return failed(dataclasses.replace(row, prompt=None), RowError("row_unreadable", sentence))
        return row
