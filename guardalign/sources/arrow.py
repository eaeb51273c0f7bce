"""Input rows from Arrow tables, for the formats that hold them (parquet, huggingface).

A picture is bytes, a struct of bytes and path, or a path. Passed-through columns stay as they are. Knows nothing of
files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from guardalign.errors import InputError, RowError
from guardalign.sources.pictures import ImageRoot, with_pictures
from guardalign.sources.planning import Columns
from guardalign.sources.rows import InputRow, bare, checked, failed, to_table


def is_path(kind: pa.DataType) -> bool:
    """Whether the picture column holds paths."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def may_refer(kind: pa.DataType) -> bool:
    """Whether cells of the picture column can name files."""
    return is_path(kind) or (pa.types.is_struct(kind) and any(part.name == "path" for part in kind))


def _is_bytes(kind: pa.DataType) -> bool:
    views = pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or views


def check_types(schema: pa.Schema, columns: Columns, name: str) -> None:
    """Raise `InputError` for a column that cannot be what it is configured to be."""
    if columns.image is not None and not _holds_pictures(schema.field(columns.image).type):
        kind = schema.field(columns.image).type
        raise InputError(
            f"the column {columns.image} of {name} is of type {kind}; "
            "pictures are bytes, a struct of bytes and path, or paths"
        )
    for column in (columns.prompt, columns.sample_id, columns.category, columns.label):
        if column is not None and not _is_texty(schema.field(column).type):
            raise InputError(f"the column {column} of {name} is of type {schema.field(column).type}, which is no text")


def _holds_pictures(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return is_path(kind) or _is_bytes(kind) or pa.types.is_null(kind)
    parts = {field.name: field.type for field in kind}
    known = {"bytes": _is_bytes, "path": is_path}
    return any(part in parts for part in known) and all(
        known[part](parts[part]) or pa.types.is_null(parts[part]) for part in known if part in parts
    )


def _is_texty(kind: pa.DataType) -> bool:
    if _is_bytes(kind):
        return False
    try:
        pa.nulls(0, kind).cast(pa.large_string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return False
    return True


def texts(column: pa.ChunkedArray) -> list[str | None]:
    """The cells as text; undecodable bytes become lone surrogates, which `rows.checked` finds."""
    as_bytes = column.cast(pa.large_string()).cast(pa.large_binary())
    return [None if cell is None else cell.decode("utf-8", "surrogateescape") for cell in as_bytes.to_pylist()]


def ids(table: pa.Table, column: str | None, places: Sequence[str]) -> Iterator[str]:
    """Each row's id: its own, else its place; one that is no valid Unicode counts as none."""
    cells = texts(table[column]) if column is not None else [None] * len(places)
    for cell, place in zip(cells, places, strict=True):
        yield checked(InputRow(cell or place, place)).sample_id


def pictures(column: pa.ChunkedArray) -> tuple[list[bytes | None], list[str | None]]:
    """Encoded bytes and references of the cells; a cell has at most one of them."""
    kind = column.type
    nothing: list[Any] = [None] * len(column)
    if pa.types.is_null(kind):
        return nothing, nothing
    if is_path(kind):
        return nothing, texts(column)
    if not pa.types.is_struct(kind):
        return column.cast(pa.large_binary()).to_pylist(), nothing
    parts = {part.name: pc.struct_field(column, part.name) for part in kind}
    encoded = parts["bytes"].cast(pa.large_binary()).to_pylist() if "bytes" in parts else nothing
    references = texts(parts["path"]) if "path" in parts else nothing
    return encoded, [path if cell is None else None for cell, path in zip(encoded, references, strict=True)]


def input_table(
    table: pa.Table, passed: pa.Table, columns: Columns, places: Sequence[str], root: ImageRoot
) -> pa.Table:
    """The rows of `table` as `INPUT_SCHEMA`, pictures read, and the columns of `passed` beside them."""
    return with_pictures_read(decoded(table, passed, columns, places), root)


@dataclass(frozen=True, slots=True)
class Cells:
    """Rows whose pictures may still be files."""

    rows: list[InputRow]
    passed: pa.Table
    """the passed-through columns"""


def decoded(table: pa.Table, passed: pa.Table, columns: Columns, places: Sequence[str]) -> Cells:
    """What Arrow has to decode of the rows; opens no file."""
    rows = list(_rows(table, columns, places))
    return Cells(rows, passed) if _is_valid(passed) else Cells(*_without_invalid(rows, passed))


def with_pictures_read(cells: Cells, root: ImageRoot) -> pa.Table:
    """The rows as `INPUT_SCHEMA` and their passed-through columns; I/O errors of picture files pass."""
    core = to_table(with_pictures(cells.rows, root), ())
    for field, column in zip(cells.passed.schema, cells.passed.columns, strict=True):
        core = core.append_column(pa.field(field.name, field.type), column)
    return core


def _rows(table: pa.Table, columns: Columns, places: Sequence[str]) -> Iterator[InputRow]:
    nothing = [None] * table.num_rows
    sample_ids = ids(table, columns.sample_id, places)
    encoded, references = pictures(table[columns.image]) if columns.image is not None else (nothing, nothing)
    categories = texts(table[columns.category]) if columns.category is not None else nothing
    labels = texts(table[columns.label]) if columns.label is not None else nothing
    cells = zip(sample_ids, places, texts(table[columns.prompt]), encoded, references, categories, labels, strict=True)
    for sample_id, place, prompt, image, reference, category, label in cells:
        yield checked(InputRow(sample_id, place, prompt, image, reference or None, category, label))


def _is_valid(table: pa.Table) -> bool:
    try:
        table.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _without_invalid(rows: list[InputRow], passed: pa.Table) -> tuple[list[InputRow], pa.Table]:
    """Rows whose passed-through cells are broken become error rows with nulls there."""
    each = [passed.slice(at, 1) for at in range(passed.num_rows)]
    sound = [_is_valid(cells) for cells in each]
    nothing = pa.table([pa.nulls(1, field.type) for field in passed.schema], schema=passed.schema)
    passed = pa.concat_tables([cells if good else nothing for cells, good in zip(each, sound, strict=True)])
    kept = [row if good else _unreadable(row) for row, good in zip(rows, sound, strict=True)]
    return kept, passed


def _unreadable(row: InputRow) -> InputRow:
    sentence = f"a passed-through column of sample {row.sample_id} holds text that is no valid UTF-8"
    return failed(row, RowError("row_unreadable", sentence))


def lost_table(sample_ids: Sequence[str], places: Sequence[str], passed: Sequence[pa.Field]) -> pa.Table:
    """Rows whose cells cannot be decoded, as error rows with nulls in the columns of `passed`."""
    return bare([_lost(InputRow(*pair)) for pair in zip(sample_ids, places, strict=True)], passed)


def _lost(row: InputRow) -> InputRow:
    sentence = f"the row of sample {row.sample_id} stands in a part of its file that cannot be decoded"
    return failed(row, RowError("row_unreadable", sentence))


def passthrough_fields(schema: pa.Schema, names: Sequence[str]) -> tuple[pa.Field, ...]:
    """The passed-through columns, nullable, without their metadata."""
    return tuple(pa.field(name, schema.field(name).type) for name in names)
