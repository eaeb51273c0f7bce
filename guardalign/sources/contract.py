"""What every source promises: a plan of shards on the driver, one shard as an Arrow table on a worker.

Knows nothing of Ray, models or results, and nothing of any one format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

INPUT_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt", pa.large_string()),
        pa.field("image", pa.large_binary()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("sample_category", pa.string()),
        pa.field("label", pa.string()),
        pa.field("error", pa.string()),
        pa.field("error_kind", pa.string()),
    ]
)
"""The columns of `Source.read`, before the passed-through ones.

`image` holds encoded bytes; a null `prompt` is a row without a prompt, a null `image` a text-only prompt; `error` and
`error_kind` (one of `errors.ERROR_KINDS`) come together. `source` is FILE#ROW or, for tars, FILE#KEY: FILE relative to
the input's root, ROW counted from 0, without the header and blank lines."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file whose change would change a row."""

    path: str
    """relative to the input's root, so that a moved mount is the same input"""
    size: int
    """[bytes]"""
    etag: str
    """local files: mtime in ns (the package's own: SHA-256); remote ones: the store's etag, checksum or time"""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one file that follow each other."""

    uri: str
    """opens the file, on every machine"""
    name: str
    """the file relative to the input's root"""
    first: int
    """number of the first row in its file, from 0"""
    num_rows: int
    """rows of the span"""
    offset: int = 0
    """where the first row starts [bytes]; 0 for formats that find rows by their number"""

    @property
    def rows(self) -> range:
        """The numbers of its rows."""
        return range(self.first, self.first + self.num_rows)


@dataclass(frozen=True, slots=True)
class Shard:
    """What one call of `Source.read` returns."""

    index: int
    """position in the plan, from 0"""
    num_rows: int
    """rows of all spans"""
    spans: tuple[Span, ...]
    """where the rows stand"""


@dataclass(frozen=True)
class Outline:
    """What can be said of a shard's rows without reading them."""

    rows: pa.Table
    """the columns of `Source.read`: ids and places as they are there, everything else null"""
    spans: tuple[Span, ...]
    """of one row each, in their order"""


@dataclass(frozen=True)
class Plan:
    """All shards of an input, and what they rest on."""

    shards: tuple[Shard, ...]
    """in row order; deterministic for the same listing and `shard_rows`"""
    num_rows: int
    """rows of all shards"""
    files: tuple[InputFile, ...]
    """tables, tars, and the picture files that rows name"""
    passthrough_fields: tuple[pa.Field, ...] = ()
    """the passed-through columns: of their own types (parquet, huggingface), else text"""
    notes: tuple[str, ...] = ()
    """sentences for the summary: what is absent, what is left over"""


class Source(Protocol):
    """A data set. Picklable: planned on the driver, read on workers."""

    def plan(self, shard_rows: int, limit: int | None) -> Plan:
        """Cut the first `limit` rows into shards of `shard_rows`; reads listings, ids and paths, never a picture.

        Raises `InputError` when the data set cannot be planned, `ConfigError` when a setting does not fit it.
        """
        ...

    def read(self, shard: Shard) -> pa.Table:
        """The shard's rows, in order: `INPUT_SCHEMA` and the passed-through columns.

        A row that cannot be read is a row with an error; `InputError` only when a file changed since it was planned.
        """
        ...

    def outline(self, shard: Shard) -> Outline:
        """The shard's rows without prompts and pictures, and where each stands: for rows that are not to be read.

        Reads no more than `plan` does. `read` of a shard of one of the places is that row.
        """
        ...
