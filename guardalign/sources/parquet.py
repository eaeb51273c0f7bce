"""Parquet files: pictures as bytes, as a struct of bytes and path (as Hugging Face writes them), or as paths.

The plan reads footers, ids and paths; a read opens only the row groups and columns that it needs and streams them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from guardalign.config import InputConfig
from guardalign.errors import InputError
from guardalign.sources import arrow
from guardalign.sources.contract import Plan, Shard, Span
from guardalign.sources.files import ListedFile, absolute, folder_of, list_files, open_input
from guardalign.sources.pictures import ImageRoot, PictureCensus, web_limits
from guardalign.sources.planning import Columns, IdLedger, ShardCutter, find_columns, refuse_empty
from guardalign.sources.rows import InputRow, checked, location, whole

_PICTURE_ROWS = 32
"""Rows with pictures that are decoded at a time."""
_TEXT_ROWS = 10_000
"""Rows without pictures that are decoded at a time."""
_BUFFER = 2**20
"""Compressed bytes held of each column, instead of its whole chunk. [bytes]"""
_REREAD = 20
"""A row group of more shards than this is worth a note: each shard decodes its group from the start."""


_MOST_ROWS_A_BYTE = 2**14
"""Repeated values pack tightly, but not so tightly."""


@dataclass(frozen=True)
class ParquetSource:
    """A file, a folder, a glob or a list of them."""

    config: InputConfig
    meaningless: ClassVar[tuple[str, ...]] = ("split", "revision", "subset")

    def __post_init__(self) -> None:
        root = self.config.image_root
        here = dataclasses.replace(self.config, image_root=absolute(root) if root else None)
        object.__setattr__(self, "config", here)  # a worker's current folder is another one

    def plan(self, shard_rows: int, limit: int | None) -> Plan:
        """See `Source.plan`."""
        listed = list_files(self.config.path, (".parquet", ".parq", ".pq"))
        survey = _Survey(self.config, shard_rows)
        for file in listed:
            left = None if limit is None else limit - survey.cutter.num_rows
            if left == 0:
                break
            with _opened(file.uri, file.name) as parquet:
                survey.add(file, parquet, left)
        refuse_empty(self.config, survey.cutter.num_rows)
        survey.ledger.refuse_duplicates(lambda: self._ids(listed, limit))
        pictures, _ = survey.census.close()
        files = (*(file.as_input for file in listed), *pictures)
        fields = tuple(survey.fields[name] for name in self.config.passthrough)
        return Plan(survey.cutter.shards(), survey.cutter.num_rows, files, fields, tuple(survey.notes))

    def _ids(self, listed: Sequence[ListedFile], limit: int | None) -> Iterator[tuple[str, str]]:
        return islice((pair for file in listed for pair in _ids_of(self.config, file)), limit)

    def read(self, shard: Shard) -> pa.Table:
        """See `Source.read`."""
        tables = [table for span in shard.spans for table in self._read_span(span)]
        return whole(pa.concat_tables(tables, promote_options="permissive").combine_chunks(), shard)

    def _read_span(self, span: Span) -> Iterator[pa.Table]:
        with _opened(span.uri, span.name) as parquet:
            for piece in _pieces(parquet.metadata, span):
                yield from self._read_piece(parquet, piece, span)

    def _read_piece(self, parquet: pq.ParquetFile, piece: _Piece, span: Span) -> Iterator[pa.Table]:
        """The piece's rows; those that cannot be decoded are error rows, their neighbours in other groups are not."""
        root = image_root(self.config, span.uri, span.name)
        columns = find_columns(self.config, parquet.schema_arrow.names, span.name)
        done = piece.first
        try:
            for batch in _batches(parquet, piece, _needed(self.config, columns)):
                places = [location(span.name, done + i) for i in range(batch.num_rows)]
                yield arrow.input_table(batch, batch.select(self.config.passthrough), columns, places, root)
                done += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            if not _is_damage(error):
                raise
        if done < piece.stop:
            rest = dataclasses.replace(piece, first=done)
            yield self._lost(parquet, rest, columns.sample_id, span.name)

    def _lost(self, parquet: pq.ParquetFile, piece: _Piece, id_column: str | None, name: str) -> pa.Table:
        """Error rows under the ids that the plan knows."""
        places = [location(name, number) for number in range(piece.first, piece.stop)]
        fields = arrow.passthrough_fields(parquet.schema_arrow, self.config.passthrough)
        if id_column is None:
            return arrow.lost_table(places, places, fields)
        with _planning(name, "ids"):
            cells = pa.concat_tables(_batches(parquet, piece, [id_column]))
            if cells.num_rows < len(places):
                raise pa.ArrowInvalid("too few ids")
            return arrow.lost_table(list(arrow.ids(cells, id_column, places)), places, fields)


def image_root(config: InputConfig, uri: str, name: str) -> ImageRoot:
    """Where the pictures lie that the file `name` refers to."""
    if config.image_root is not None:
        return ImageRoot(config.image_root, "image_root", is_configured=True, web=web_limits(config))
    return ImageRoot(folder_of(uri), name.rpartition("/")[0], web=web_limits(config))


@contextmanager
def _opened(uri: str, name: str) -> Iterator[pq.ParquetFile]:
    with open_input(uri, name) as file:
        try:
            parquet = pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
        except UnicodeDecodeError:
            raise InputError(f"{name} is damaged: the name of a column is no UTF-8") from None
        except (pa.ArrowException, OSError) as error:
            reason = "it may be only partly written" if "Parquet" in str(error) else str(error).splitlines()[0]
            raise InputError(f"{name} is no complete Parquet file: {reason}") from error
        _refuse_senseless(parquet.metadata, name)
        yield parquet


def _refuse_senseless(metadata: pq.FileMetaData, name: str) -> None:
    """Rows that are in no row group, or in one that has fewer than none, cannot be planned."""
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        raise InputError(f"{name} is damaged: its row groups do not add up to its rows")


def _needed(config: InputConfig, columns: Columns) -> list[str]:
    wanted = (columns.prompt, columns.image, columns.sample_id, columns.category, columns.label, *config.passthrough)
    return list(dict.fromkeys(column for column in wanted if column is not None))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows `first` .. `stop - 1` of a file, which stand in one row group."""

    group: int
    offset: int
    """number of the group's first row in the file"""
    first: int
    stop: int


def _pieces(metadata: pq.FileMetaData, span: Span) -> Iterator[_Piece]:
    """The row groups that hold the span, each with the rows wanted of it."""
    offset = 0
    for group in range(metadata.num_row_groups):
        after = offset + metadata.row_group(group).num_rows
        first, stop = max(span.first, offset), min(span.first + span.num_rows, after)
        if first < stop:
            yield _Piece(group, offset, first, stop)
        offset = after


def _batches(parquet: pq.ParquetFile, piece: _Piece, names: Sequence[str]) -> Iterator[pa.Table]:
    """The piece's rows in order; other row groups are not touched."""
    position = piece.offset
    for batch in parquet.iter_batches(_PICTURE_ROWS, row_groups=[piece.group], columns=list(names), use_threads=False):
        start, stop = max(piece.first, position), min(piece.stop, position + batch.num_rows)
        if start < stop:
            yield pa.table(batch.slice(start - position, stop - start)).select(list(names))
        position += batch.num_rows
        if position >= piece.stop:
            return


def _is_damage(error: Exception) -> bool:
    """Whether Arrow cannot decode what it read; an error of the file system is no damage."""
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


@contextmanager
def _planning(name: str, what: str) -> Iterator[None]:
    """`InputError` where pages that the plan rests on cannot be decoded; Arrow's own words may quote them."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if not _is_damage(error):
            raise
        raise InputError(f"{name} is damaged: its {what} cannot be decoded") from error


def _refuse_too_many(num_rows: int, file: ListedFile) -> None:
    """A footer that counts rows which cannot be there would be planned for ever."""
    if num_rows > _MOST_ROWS_A_BYTE * file.size:
        raise InputError(f"{file.name} claims {num_rows:,} rows in {file.size:,} bytes: it is damaged")


class _Survey:
    """What the plan gathers, file by file."""

    def __init__(self, config: InputConfig, shard_rows: int) -> None:
        self._config = config
        self._shard_rows = shard_rows
        self.cutter, self.ledger, self.census = ShardCutter(shard_rows), IdLedger(), PictureCensus()
        self.fields: dict[str, pa.Field] = {}
        self._first: tuple[Columns, str] | None = None
        self.notes: dict[str, None] = {}

    def add(self, file: ListedFile, parquet: pq.ParquetFile, limit: int | None) -> None:
        """Take the first `limit` rows of a file."""
        schema = parquet.schema_arrow
        columns = find_columns(self._config, schema.names, file.name)
        arrow.check_types(schema, columns, file.name)
        self._check_fields(schema, file.name)
        _refuse_too_many(parquet.metadata.num_rows, file)
        num_rows = parquet.metadata.num_rows if limit is None else min(limit, parquet.metadata.num_rows)
        self.cutter.add(file.uri, file.name, 0, num_rows)
        self.notes |= dict.fromkeys((*columns.notes, *self._note_of_groups(parquet.metadata, file.name)))
        self._check_ids(columns, file.name)
        if columns.sample_id is not None:
            with _planning(file.name, "ids"):
                for sample_id, _ in islice(_ids_of(self._config, file), num_rows):
                    self.ledger.add(sample_id)
        root = image_root(self._config, file.uri, file.name)
        with _planning(file.name, "picture paths"):
            for reference in islice(_references(parquet, columns.image), num_rows):
                self.census.add(root, checked(InputRow("", "", image_reference=reference)))

    def _check_ids(self, columns: Columns, name: str) -> None:
        """An id column stands in all files or in none: derived ids beside own ones are a file that went wrong."""
        self._first = self._first or (columns, name)
        if (columns.sample_id is None) != (self._first[0].sample_id is None):
            pair = f"{self._first[1]} and {name}"
            raise InputError(f"of {pair} only one has the id column {self._config.id_column}")

    def _check_fields(self, schema: pa.Schema, name: str) -> None:
        for field in arrow.passthrough_fields(schema, self._config.passthrough):
            first = self.fields.setdefault(field.name, field)
            if first.type != field.type:
                raise InputError(
                    f"the passed-through column {field.name} is of type {field.type} in {name} and of type "
                    f"{first.type} before; one type must hold in all files"
                )

    def _note_of_groups(self, metadata: pq.FileMetaData, name: str) -> tuple[str, ...]:
        largest = max((metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)), default=0)
        if largest <= _REREAD * self._shard_rows:
            return ()
        return (
            f"{name} has row groups of {largest:,} rows, and every shard of {self._shard_rows} decodes its group from "
            "the start: smaller row groups or larger shards read faster",
        )


def _ids_of(config: InputConfig, file: ListedFile) -> Iterator[tuple[str, str]]:
    """Id and place of each row, where the file has an id column."""
    with _opened(file.uri, file.name) as parquet:
        column = find_columns(config, parquet.schema_arrow.names, file.name).sample_id
        if column is None:
            return
        first = 0
        for batch in parquet.iter_batches(_TEXT_ROWS, columns=[column], use_threads=False):
            places = [location(file.name, first + i) for i in range(batch.num_rows)]
            yield from zip(arrow.ids(pa.table(batch), column, places), places, strict=True)
            first += batch.num_rows


def _references(parquet: pq.ParquetFile, image: str | None) -> Iterator[str | None]:
    """The picture paths of all rows that may name a file; bytes are not read to learn whether a row does.

    Nor are their statistics: `ColumnChunkMetaData` of pyarrow ends the whole process over a damaged footer (26.0).
    """
    kind = pa.null() if image is None else parquet.schema_arrow.field(image).type
    if arrow.is_path(kind):
        for batch in parquet.iter_batches(_TEXT_ROWS, columns=[image], use_threads=False):
            yield from arrow.texts(pa.table(batch)[image])
    elif pa.types.is_struct(kind) and "path" in [field.name for field in kind]:
        for batch in parquet.iter_batches(_TEXT_ROWS, columns=[f"{image}.path"], use_threads=False):
            yield from arrow.pictures(pa.table(batch)[image])[1]
