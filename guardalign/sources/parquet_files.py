"""Parquet files as they are read: opened, in pieces of one row group, a few rows at a time; what damage is said to be.

Knows nothing of prompts and pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from guardalign.errors import InputError
from guardalign.sources import arrow
from guardalign.sources.contract import Span
from guardalign.sources.damage import FromStore, StoreError, is_damage
from guardalign.sources.files import open_input
from guardalign.sources.magic import LONGEST, refuse_compressed
from guardalign.sources.rows import location

PICTURE_ROWS: Final = 32
"""Rows with pictures that are decoded at a time."""
_BUFFER: Final = 2**20
"""Compressed bytes held of each column, instead of its whole chunk. [bytes]"""


@contextmanager
def opened(uri: str, name: str) -> Iterator[pq.ParquetFile]:
    """The file, whose reads raise `StoreError` where its store fails, and nothing else does."""
    with open_input(uri, name) as file:
        try:
            parquet = pq.ParquetFile(FromStore(file, name), buffer_size=_BUFFER, pre_buffer=False)
        except UnicodeDecodeError:
            raise InputError(f"{name} is damaged: the name of a column is no UTF-8") from None
        except StoreError:
            raise
        except (pa.ArrowException, OSError) as error:
            file.seek(0)
            refuse_compressed(file.read(LONGEST), name)
            reason = "it may be only partly written" if "Parquet" in str(error) else str(error).splitlines()[0]
            raise InputError(f"{name} is no complete Parquet file: {reason}") from error
        _refuse_senseless(parquet.metadata, name)
        yield parquet


def _refuse_senseless(metadata: pq.FileMetaData, name: str) -> None:
    """Rows that are in no row group, or in one that has fewer than none, cannot be planned."""
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        raise InputError(f"{name} is damaged: its row groups do not add up to its rows")


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `first` .. `stop - 1` of a file, which stand in one row group."""

    group: int
    offset: int
    """number of the group's first row in the file"""
    first: int
    stop: int


def pieces_of(metadata: pq.FileMetaData, span: Span) -> Iterator[Piece]:
    """The row groups that hold the span, each with the rows wanted of it."""
    offset = 0
    for group in range(metadata.num_row_groups):
        after = offset + metadata.row_group(group).num_rows
        first, stop = max(span.first, offset), min(span.first + span.num_rows, after)
        if first < stop:
            yield Piece(group, offset, first, stop)
        offset = after


def batches_of(parquet: pq.ParquetFile, piece: Piece, names: Sequence[str]) -> Iterator[pa.Table]:
    """The piece's rows in order; other row groups are not touched."""
    position = piece.offset
    for batch in parquet.iter_batches(PICTURE_ROWS, row_groups=[piece.group], columns=list(names), use_threads=False):
        start, stop = max(piece.first, position), min(piece.stop, position + batch.num_rows)
        if start < stop:
            yield pa.table(batch.slice(start - position, stop - start)).select(list(names))
        position += batch.num_rows
        if position >= piece.stop:
            return


def names_of(
    parquet: pq.ParquetFile, piece: Piece, id_column: str | None, name: str
) -> tuple[Sequence[str], Sequence[str]]:
    """Ids and places of the piece's rows."""
    places = [location(name, number) for number in range(piece.first, piece.stop)]
    if id_column is None:
        return places, places
    with planning(name, "ids"):
        cells = pa.concat_tables(batches_of(parquet, piece, [id_column]))
        if cells.num_rows < len(places):
            raise pa.ArrowInvalid("too few ids")
        return list(arrow.ids(cells, id_column, places)), places


@contextmanager
def planning(name: str, what: str) -> Iterator[None]:
    """`InputError` where pages that the plan rests on cannot be decoded; Arrow's own words may quote them."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        raise InputError(f"{name} is damaged: its {what} cannot be decoded") from error
