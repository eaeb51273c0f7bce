"""Seals: a file tells of itself that it is whole, and no byte of it is left out."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from guardalign.seals import SEAL, is_whole_json, is_whole_parquet, sealed_json, sealed_parquet

SCHEMA = pa.schema([("sample_id", pa.string()), ("score", pa.float64())], metadata={"note": "kept"})
TABLE = pa.table({"sample_id": ["a", "b", None], "score": [0.5, 0.25, 1.0]}, schema=SCHEMA)


@pytest.mark.parametrize("table", [TABLE, TABLE.slice(0, 0)], ids=["rows", "none"])
def test_a_sealed_file_is_whole_and_an_ordinary_parquet_file(table: pa.Table) -> None:
    content = sealed_parquet(table)
    assert is_whole_parquet(content)
    found = pq.read_table(io.BytesIO(content))
    assert found.equals(table) and found.schema.metadata == {b"note": b"kept"}
    assert len(pq.ParquetFile(io.BytesIO(content)).metadata.metadata[SEAL.encode()]) == 64


def test_every_flipped_bit_of_a_file_breaks_its_seal() -> None:
    content = sealed_parquet(TABLE)
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        assert not is_whole_parquet(bytes(damaged)), at


def test_a_file_that_was_cut_grown_or_written_again_has_no_seal() -> None:
    content = sealed_parquet(TABLE)
    again = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(content)), again)
    for damaged in (b"", content[:-1], content[len(content) // 2 :], content + b"\0", again.getvalue()):
        assert not is_whole_parquet(damaged)


def test_a_cell_that_looks_like_a_seal_breaks_none() -> None:
    """The last one counts, and it stands behind all cells."""
    fake = f"{SEAL}\x18@" + "0" * 64
    content = sealed_parquet(pa.table({fake: [fake, fake + "!"]}).replace_schema_metadata({"a": fake, SEAL: "0" * 64}))
    assert is_whole_parquet(content)
    assert not is_whole_parquet(content.replace(b"!", b"?"))


def test_a_json_file_is_whole_as_it_was_written_only() -> None:
    content = {"x": 1, "y": [0.1, "é", None]}
    file = sealed_json(content)
    assert is_whole_json(file, json.loads(file))
    other = file.replace(b"0.1", b"0.2")
    assert not is_whole_json(other, json.loads(other))
    assert not is_whole_json(file + b"\n", json.loads(file))
