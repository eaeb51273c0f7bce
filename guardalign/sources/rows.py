"""One input row in Python's own types, and rows as an Arrow table.

Knows nothing of files and formats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from guardalign.errors import ErrorKind, InputError, RowError
from guardalign.sources.contract import INPUT_SCHEMA, Shard


@dataclass(frozen=True, slots=True)
class InputRow:
    """A row on its way to the table; its picture may still be a reference."""

    sample_id: str
    source: str
    prompt: str | None = None
    image: bytes | None = None
    """encoded"""
    image_reference: str | None = None
    """names a picture file that is not read yet"""
    category: str | None = None
    label: str | None = None
    passthrough: tuple[str | None, ...] = ()
    """empty where the columns travel as Arrow"""
    error: str | None = None
    error_kind: ErrorKind | None = None


def location(file_name: str, place: int | str) -> str:
    """Where a row stands: the value of `source`, and the id of rows without one."""
    return f"{file_name}#{place}"


def checked(row: InputRow) -> InputRow:
    """`row`, or an error row where a text cell is no valid Unicode (undecodable bytes arrive as lone surrogates)."""
    cells = (row.sample_id, row.prompt, row.image_reference, row.category, row.label, *row.passthrough)
    if all(cell is None or _is_unicode(cell) for cell in cells):
        return row
    sample_id = row.sample_id if _is_unicode(row.sample_id) else row.source
    kept = InputRow(sample_id, row.source, passthrough=(None,) * len(row.passthrough))
    return failed(kept, RowError("row_unreadable", f"the row of sample {sample_id} holds text that is no valid UTF-8"))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def failed(row: InputRow, error: RowError) -> InputRow:
    """`row` as an error row, without its picture."""
    return dataclasses.replace(row, image=None, image_reference=None, error=str(error), error_kind=error.kind)


def to_table(rows: Sequence[InputRow], fields: Sequence[pa.Field]) -> pa.Table:
    """The rows as `INPUT_SCHEMA` and their own passed-through texts as `fields`."""
    columns = {
        "sample_id": [row.sample_id for row in rows],
        "prompt": [row.prompt for row in rows],
        "image": [row.image for row in rows],
        "source": [row.source for row in rows],
        "sample_category": [row.category for row in rows],
        "label": [row.label for row in rows],
        "error": [row.error for row in rows],
        "error_kind": [row.error_kind for row in rows],
    }
    columns |= {field.name: [row.passthrough[i] for row in rows] for i, field in enumerate(fields)}
    return pa.table(columns, schema=pa.schema([*INPUT_SCHEMA, *fields]))


def bare(rows: Sequence[InputRow], fields: Sequence[pa.Field]) -> pa.Table:
    """The rows as `INPUT_SCHEMA`, with nulls in the passed-through columns `fields`, whatever their types."""
    table = to_table(rows, ())
    for field in fields:
        table = table.append_column(field, pa.nulls(len(rows), field.type))
    return table


def picked(table: pa.Table, places: Sequence[int]) -> pa.Table:
    """These rows, in this order, whatever their types: `Table.take` knows no views, and no run-end-encoded columns."""
    return pa.concat_tables([table.slice(0, 0), *(table.slice(at, 1) for at in places)]).combine_chunks()


def whole(table: pa.Table, shard: Shard) -> pa.Table:
    """`table`, once it has the rows that were planned."""
    if table.num_rows != shard.num_rows:
        names = ", ".join(span.name for span in shard.spans)
        raise InputError(
            f"shard {shard.index} has {table.num_rows} rows instead of the {shard.num_rows} planned: "
            f"{names} changed while the run was going"
        )
    return table
