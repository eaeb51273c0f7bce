"""Parquet files: pictures as bytes, as a struct of bytes and path (as Hugging Face writes them), or as paths.

The plan reads footers, ids, paths, and of pictures what tells whether their paths count (`_references`); a read opens
only the row groups and columns that it needs and streams them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from guardalign.config import InputConfig
from guardalign.errors import InputError
from guardalign.sources import arrow
from guardalign.sources.contract import Outline, Plan, Shard, Span
from guardalign.sources.damage import is_damage
from guardalign.sources.files import ListedFile, absolute, folder_of, list_files
from guardalign.sources.left_out import LeftOut, note_of_left_out
from guardalign.sources.parquet_files import PICTURE_ROWS, Piece, batches_of, names_of, opened, pieces_of, planning
from guardalign.sources.pictures import ImageRoot, PictureCensus, web_limits
from guardalign.sources.planning import Columns, IdLedger, ShardCutter, find_columns, notes_of_absent, refuse_empty
from guardalign.sources.rows import InputRow, bare, checked, location, whole

_SUFFIXES = (".parquet", ".parq", ".pq")
_TEXT_ROWS = 10_000
"""Rows without pictures that are decoded at a time."""
_SMALL = 2**20
"""A row group of at most so many bytes is read whole to learn which of its pictures are files. [bytes]"""
_LOOK = 8
"""Rows at the beginning of a larger row group that tell whether its pictures are files."""
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
        left_out: list[LeftOut] = []
        listed = list_files(self.config.path, _SUFFIXES, left_out)
        survey = _Survey(self.config, shard_rows)
        for file in listed:
            left = None if limit is None else limit - survey.cutter.num_rows
            if left == 0:
                break
            with opened(file.uri, file.name) as parquet:
                survey.add(file, parquet, left)
        refuse_empty(self.config, survey.cutter.num_rows)
        survey.ledger.refuse_duplicates(lambda: self._ids(listed, limit))
        pictures, _ = survey.census.close()
        files = (*(file.as_input for file in listed), *pictures)
        fields = tuple(survey.fields[name] for name in self.config.passthrough)
        notes = survey.notes() + note_of_left_out(left_out, _SUFFIXES, {picture.path for picture in pictures})
        return Plan(survey.cutter.shards(), survey.cutter.num_rows, files, fields, notes)

    def _ids(self, listed: Sequence[ListedFile], limit: int | None) -> Iterator[tuple[str, str]]:
        return islice((pair for file in listed for pair in _ids_of(self.config, file)), limit)

    def read(self, shard: Shard) -> pa.Table:
        """See `Source.read`."""
        tables = [table for span in shard.spans for table in self._read_span(span)]
        return whole(pa.concat_tables(tables, promote_options="permissive").combine_chunks(), shard)

    def _read_span(self, span: Span) -> Iterator[pa.Table]:
        with opened(span.uri, span.name) as parquet:
            for piece in pieces_of(parquet.metadata, span):
                yield from self._read_piece(parquet, piece, span)

    def _read_piece(self, parquet: pq.ParquetFile, piece: Piece, span: Span) -> Iterator[pa.Table]:
        """The piece's rows; those that cannot be decoded are error rows, their neighbours in other groups are not."""
        root = image_root(self.config, span.uri, span.name)
        columns = find_columns(self.config, parquet.schema_arrow.names, span.name)
        done = piece.first
        for cells in self._decoded(parquet, piece, columns, span.name):
            yield arrow.with_pictures_read(cells, root)
            done += len(cells.rows)
        if done < piece.stop:
            rest = dataclasses.replace(piece, first=done)
            yield self._lost(parquet, rest, columns.sample_id, span.name)

    def _decoded(self, parquet: pq.ParquetFile, piece: Piece, columns: Columns, name: str) -> Iterator[arrow.Cells]:
        """The piece's rows up to the first ones that cannot be decoded; no picture file is read here."""
        batches = batches_of(parquet, piece, _needed(self.config, columns))
        done = piece.first
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                places = [location(name, done + i) for i in range(batch.num_rows)]
                cells = arrow.decoded(batch, batch.select(self.config.passthrough), columns, places)
            except (pa.ArrowException, OSError) as error:
                if not is_damage(error):
                    raise
                return
            yield cells
            done += batch.num_rows

    def _lost(self, parquet: pq.ParquetFile, piece: Piece, id_column: str | None, name: str) -> pa.Table:
        """Error rows under the ids that the plan knows."""
        fields = arrow.passthrough_fields(parquet.schema_arrow, self.config.passthrough)
        return arrow.lost_table(*names_of(parquet, piece, id_column, name), fields)

    def outline(self, shard: Shard) -> Outline:
        """See `Source.outline`."""
        tables = [table for span in shard.spans for table in self._outline_of(span)]
        each = [dataclasses.replace(span, first=number, num_rows=1) for span in shard.spans for number in span.rows]
        return Outline(whole(pa.concat_tables(tables, promote_options="permissive"), shard), tuple(each))

    def _outline_of(self, span: Span) -> Iterator[pa.Table]:
        with opened(span.uri, span.name) as parquet:
            id_column = find_columns(self.config, parquet.schema_arrow.names, span.name).sample_id
            fields = arrow.passthrough_fields(parquet.schema_arrow, self.config.passthrough)
            for piece in pieces_of(parquet.metadata, span):
                pairs = zip(*names_of(parquet, piece, id_column, span.name), strict=True)
                yield bare([InputRow(*pair) for pair in pairs], fields)


def image_root(config: InputConfig, uri: str, name: str) -> ImageRoot:
    """Where the pictures lie that the file `name` refers to."""
    if config.image_root is not None:
        return ImageRoot(config.image_root, "image_root", is_configured=True, web=web_limits(config))
    return ImageRoot(folder_of(uri), name.rpartition("/")[0], web=web_limits(config))


def _needed(config: InputConfig, columns: Columns) -> list[str]:
    wanted = (columns.prompt, columns.image, columns.sample_id, columns.category, columns.label, *config.passthrough)
    return list(dict.fromkeys(column for column in wanted if column is not None))


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
        self._columns: list[list[str]] = []
        self._slow: list[str] = []

    def add(self, file: ListedFile, parquet: pq.ParquetFile, limit: int | None) -> None:
        """Take the first `limit` rows of a file."""
        schema = parquet.schema_arrow
        columns = find_columns(self._config, schema.names, file.name)
        arrow.check_types(schema, columns, file.name)
        self._check_fields(schema, file.name)
        _refuse_too_many(parquet.metadata.num_rows, file)
        num_rows = parquet.metadata.num_rows if limit is None else min(limit, parquet.metadata.num_rows)
        self.cutter.add(file.uri, file.name, 0, num_rows)
        self._columns.append(schema.names)
        self._slow += self._note_of_groups(parquet.metadata, file.name)
        self._check_ids(columns, file.name)
        if columns.sample_id is not None:
            with planning(file.name, "ids"):
                for sample_id, _ in islice(_ids_of(self._config, file), num_rows):
                    self.ledger.add(sample_id)
        if columns.image is not None and arrow.may_refer(schema.field(columns.image).type):
            self.census.expect()
        root = image_root(self._config, file.uri, file.name)
        with planning(file.name, "picture paths"):
            for reference in islice(_references(parquet, columns.image), num_rows):
                self.census.add(root, checked(InputRow("", "", image_reference=reference)))

    def notes(self) -> tuple[str, ...]:
        """Sentences on what was added."""
        idle = self.census.note_of_idle_root(self._config.image_root)
        return (*notes_of_absent(self._config, self._columns), *dict.fromkeys(self._slow), *idle)

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
    with opened(file.uri, file.name) as parquet:
        column = find_columns(config, parquet.schema_arrow.names, file.name).sample_id
        if column is None:
            return
        first = 0
        for batch in parquet.iter_batches(_TEXT_ROWS, columns=[column], use_threads=False):
            places = [location(file.name, first + i) for i in range(batch.num_rows)]
            yield from zip(arrow.ids(pa.table(batch), column, places), places, strict=True)
            first += batch.num_rows


def _references(parquet: pq.ParquetFile, image: str | None) -> Iterator[str | None]:
    """The paths of the rows whose pictures are files, and None for the others, in order.

    A struct's path counts where its bytes are null. Parquet tells nulls only together with the bytes, so a row group is
    read whole only if it is small (at most `_SMALL` bytes), or if one of its first `_LOOK` rows lacks bytes; any other
    group is taken to embed all its pictures, and a file that a later row of it names is missing from the listing. The
    statistics would tell, but `ColumnChunkMetaData` of pyarrow ends the whole process over a damaged footer (26.0).
    """
    kind = pa.null() if image is None else parquet.schema_arrow.field(image).type
    parts = [field.name for field in kind] if pa.types.is_struct(kind) else []
    if arrow.is_path(kind) or ("path" in parts and "bytes" not in parts):
        for batch in parquet.iter_batches(_TEXT_ROWS, columns=[image], use_threads=False):
            yield from arrow.pictures(pa.table(batch)[image])[1]
    elif "path" in parts:
        for group in range(parquet.metadata.num_row_groups):
            yield from _references_of_group(parquet, group, str(image))


def _references_of_group(parquet: pq.ParquetFile, group: int, image: str) -> Iterator[str | None]:
    """See `_references`; rows that cannot be decoded will be error rows, and name no file."""
    rows = parquet.metadata.row_group(group)
    done = 0
    try:
        if rows.total_byte_size <= _SMALL or _lacks_bytes(parquet, group, image):
            names = [f"{image}.bytes", f"{image}.path"]
            for batch in parquet.iter_batches(PICTURE_ROWS, row_groups=[group], columns=names, use_threads=False):
                yield from arrow.pictures(pa.table(batch)[image])[1]
                done += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
    yield from repeat(None, rows.num_rows - done)


def _lacks_bytes(parquet: pq.ParquetFile, group: int, image: str) -> bool:
    """Whether one of the group's first rows does."""
    batches = parquet.iter_batches(_LOOK, row_groups=[group], columns=[f"{image}.bytes"], use_threads=False)
    first = next(batches, None)
    return first is not None and pc.struct_field(pa.table(first)[image], "bytes").null_count > 0
