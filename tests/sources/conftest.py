"""What the source tests share: real little pictures, and reading a whole input the way a run does."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from guardalign.config import InputConfig
from guardalign.errors import ERROR_KINDS
from guardalign.sources import INPUT_SCHEMA, Plan, Shard, Source, make_source

Rows = list[dict[str, Any]]
ReadAll = Callable[..., tuple[Plan, Rows]]


@pytest.fixture(scope="session")
def png() -> Callable[[int], bytes]:
    """A small encoded picture, another one for each number."""

    def encode(number: int) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (4, 3), (number * 37 % 256, number % 256, 7)).save(out, "PNG")
        return out.getvalue()

    return encode


@pytest.fixture(scope="session")
def read_all() -> ReadAll:
    """Plan an input and read every shard from pickled copies, as workers do."""

    def read(config: InputConfig, shard_rows: int = 3, limit: int | None = None) -> tuple[Plan, Rows]:
        source = make_source(config)
        plan = source.plan(shard_rows, limit)
        worker, shards = pickle.loads(pickle.dumps((source, plan.shards)))
        rows: Rows = []
        for index, shard in enumerate(shards):
            table = worker.read(shard)
            assert table.schema.names == [*INPUT_SCHEMA.names, *(field.name for field in plan.passthrough_fields)]
            assert table.schema.types == [*INPUT_SCHEMA.types, *(field.type for field in plan.passthrough_fields)]
            assert (shard.index, shard.num_rows) == (index, table.num_rows)
            rows += table.to_pylist()
            if not config.allow_urls:  # whom it asks is counted
                assert_outlined(worker, shard, table)
        assert len(rows) == plan.num_rows
        assert all(row["error_kind"] in (None, *ERROR_KINDS) for row in rows)
        assert all((row["error"] is None) == (row["error_kind"] is None) for row in rows)
        return plan, rows

    return read


def assert_outlined(source: Source, shard: Shard, table: pa.Table) -> None:
    """Every row has its name and place unread, and can be read alone: of a large shard the first ones and the last."""
    outline = source.outline(shard)
    assert outline.rows.schema.equals(table.schema)
    known, nothing = outline.rows.select(["sample_id", "source"]), outline.rows.drop_columns(["sample_id", "source"])
    assert known.equals(table.select(["sample_id", "source"]))
    assert all(column.null_count == table.num_rows for column in nothing.columns)
    some = range(table.num_rows) if table.num_rows < 9 else (0, 1, table.num_rows - 1)
    for at in some:
        assert source.read(Shard(shard.index, 1, (outline.spans[at],))).equals(table.slice(at, 1))


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """The in-memory file system behind memory:// URIs, empty."""
    file_system = fsspec.filesystem("memory")
    yield file_system
    file_system.store.clear()
    file_system.pseudo_dirs[:] = [""]


class CountingFileSystem(MemoryFileSystem):
    """memory:// under the name counting://, which notes what is read."""

    protocol = "counting"
    store: dict[str, Any] = {}  # noqa: RUF012 - as its parent has it
    num_bytes_read = 0

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        opened = super()._open(path, mode, **options)
        return opened if mode != "rb" else _Counting(opened.getvalue())

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("counting://", "memory://")))


class _Counting(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        CountingFileSystem.num_bytes_read += len(content)
        return content

    def readline(self, size: int | None = -1, /) -> bytes:
        content = super().readline(size)
        CountingFileSystem.num_bytes_read += len(content)
        return content


fsspec.register_implementation("counting", CountingFileSystem, clobber=True)


@pytest.fixture
def counting() -> Iterator[type[CountingFileSystem]]:
    """The file system behind counting:// URIs, empty, nothing read."""
    CountingFileSystem.store.clear()
    CountingFileSystem.num_bytes_read = 0
    yield CountingFileSystem
    CountingFileSystem.store.clear()
