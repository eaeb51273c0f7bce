"""Broken and odd tables, all made by code: what each is called, its bytes, and how an audit of it must end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SECRET = "Zxcontentzx"
"""Stands in the rows' cells, so that a sentence that quotes one can be told."""
Rows = dict[str, str | None]


@dataclass(frozen=True)
class TableCase:
    """A table file."""

    suffix: str
    """of its name; tells the format"""
    content: bytes
    """the file"""
    rows: Rows | None
    """by id, the error kind that each row must end with (None: answered); None where the table must be refused"""
    says: str = ""
    """what the line of a refusal holds"""


def parquet(table: pa.Table, **options: Any) -> bytes:
    """The table as a Parquet file."""
    out = BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def answered(*ids: str) -> Rows:
    """All of these rows get an answer."""
    return dict.fromkeys(ids)


def two(**more: Any) -> pa.Table:
    """Two sound rows, with columns over or beside their own."""
    return pa.table({"sample_id": ["a", "b"], "prompt": ["What is shown?", f"Why {SECRET}?"]} | more)


def parquets() -> dict[str, TableCase]:
    """Parquet files."""
    sound, ids = parquet(two()), answered("a", "b")
    empty_groups, sink = BytesIO(), two()
    with pq.ParquetWriter(empty_groups, sink.schema) as writer:
        for part in (sink.slice(0, 0), sink.slice(0, 1), sink.slice(0, 0), sink.slice(1, 1), sink.slice(0, 0)):
            writer.write_table(part)
    coded = {name: sink[name].dictionary_encode() for name in sink.column_names} | {
        "label": pa.array(["x", None]).dictionary_encode()
    }
    nested = pa.array([{"text": SECRET}, {"text": "b"}])
    wide = pa.table({f"column_{number}": ["x"] for number in range(3000)})
    cases = {
        "sound": (sound, ids),
        "cut-in-half": (sound[: len(sound) // 2], None, "partly written"),
        "without-footer": (sound[:-8], None, "partly written"),
        "only-magic": (b"PAR1", None, ""),
        "only-both-magics": (b"PAR1\x00\x00\x00\x00PAR1", None, ""),
        "zero-bytes": (b"", None, ""),
        "no-rows": (parquet(two().slice(0, 0)), None, "nothing to audit"),
        "no-columns": (parquet(pa.table({})), None, "prompt"),
        "row-groups-without-rows": (empty_groups.getvalue(), ids),
        "dictionary-columns": (parquet(pa.table(coded)), ids),
        "missing-prompt": (parquet(two().drop_columns(["prompt"])), None, "prompt"),
        "missing-prompt-of-3000": (parquet(wide), None, "prompt"),
        "ids-null": (parquet(two(sample_id=pa.array([None, "b"]))), answered("{name}#0", "b")),
        "ids-all-null": (parquet(two(sample_id=pa.nulls(2))), answered("{name}#0", "{name}#1")),
        "ids-blank": (parquet(two(sample_id=["", "b"])), answered("{name}#0", "b")),
        "ids-twice": (parquet(two(sample_id=["a", "a"])), None, "'a' stands twice"),
        "ids-numbers": (parquet(two(sample_id=[2**62, -1])), answered(str(2**62), "-1")),
        "ids-with-control-characters": (
            parquet(two(sample_id=["a\x1b[2J\n", "\u202eb"])),
            answered("a\x1b[2J\n", "\u202eb"),
        ),
        "ids-long": (parquet(two(sample_id=["a" * 100_000, "b"])), answered("a" * 100_000, "b")),
        "prompt-null": (parquet(two(prompt=pa.array([None, "hi"]))), {"a": "prompt_missing", "b": None}),
        "prompt-all-null": (parquet(two(prompt=pa.nulls(2))), {"a": "prompt_missing", "b": "prompt_missing"}),
        "prompt-nested": (parquet(two(prompt=nested)), None, "no text"),
        "prompt-list": (parquet(two(prompt=[[SECRET], []])), None, "no text"),
        "prompt-bytes": (parquet(two(prompt=[b"\xff", b"x"])), None, "no text"),
        "prompt-numbers": (parquet(two(prompt=[1.5, 2.5])), ids),
        "image-numbers": (parquet(two(image=[1, 2])), None, "pictures are"),
        "image-list": (parquet(two(image=[[b"x"], None])), None, "pictures are"),
        "image-bytes": (parquet(two(image=[b"no picture", None])), {"a": "image_unreadable", "b": None}),
        "image-paths-away": (
            parquet(two(image=["../../etc/passwd", "/dev/zero"])),
            dict.fromkeys("ab", "image_missing"),
        ),
        "image-path-with-nul": (parquet(two(image=["a\x00b", "x" * 5000])), dict.fromkeys("ab", "image_missing")),
    }
    return {f"parquet-{name}": TableCase(".parquet", *case) for name, case in cases.items()}


def damaged_page(column: str) -> bytes:
    """Three row groups of two rows; the second one's pages of the column are overwritten, the footer is sound."""
    ids, prompts = [f"s{number}" for number in range(6)], [f"What is {number} {SECRET}?" for number in range(6)]
    images = [f"{SECRET}{number}".encode() for number in range(6)]
    table = pa.table({"sample_id": ids, "prompt": prompts, "image": pa.array(images, pa.binary())})
    whole = parquet(table, row_group_size=2, compression="snappy", use_dictionary=False)
    metadata = pq.ParquetFile(BytesIO(whole)).metadata
    chunk = metadata.row_group(1).column(table.column_names.index(column))
    start, size = chunk.data_page_offset, chunk.total_compressed_size
    return whole[:start] + b"\xff" * size + whole[start + size :]


def damaged() -> dict[str, TableCase]:
    """Parquet files whose footer is sound and whose pages are not: rows are lost, their neighbours are not."""
    lost = {f"s{number}": "row_unreadable" if number in (2, 3) else "image_unreadable" for number in range(6)}
    return {
        "parquet-damaged-prompts": TableCase(".parquet", damaged_page("prompt"), lost),
        "parquet-damaged-pictures": TableCase(".parquet", damaged_page("image"), lost),
        "parquet-damaged-ids": TableCase(".parquet", damaged_page("sample_id"), None, "damaged"),
    }


def csvs() -> dict[str, TableCase]:
    """CSV files."""
    sound = f"sample_id,prompt\na,What is shown?\nb,Why {SECRET}?\n"
    accents = "sample_id,prompt\na,What is shown?\nb,Où est le café?\n"
    unreadable = "row_unreadable"
    deep = '"' + '""' * 50_000 + '"'
    cases = {
        "sound": (sound.encode(), answered("a", "b")),
        "byte-order-mark": (sound.encode("utf-8-sig"), answered("a", "b")),
        "latin-1": (accents.encode("latin-1"), {"a": None, "b": unreadable}),
        "latin-1-header": ("sample_id,prompt,café\na,hi,x\n".encode("latin-1"), None, "UTF-8"),
        "utf-16": (sound.encode("utf-16"), None, "UTF-8"),
        "utf-16-without-mark": (sound.encode("utf-16-le"), None, ""),
        "utf-32": (sound.encode("utf-32"), None, ""),
        "open-quote": (f'sample_id,prompt\na,"What {SECRET}\nb,x\n'.encode(), None, "never closed"),
        "open-quote-in-header": (b'sample_id,"prompt\na,x\n', None, "header"),
        "quote-within": (f'sample_id,prompt\na,"x"y {SECRET}\nb,hi\n'.encode(), {"{name}#0": unreadable, "b": None}),
        "too-many-cells": (f"sample_id,prompt\na,x,{SECRET}\nb,hi\n".encode(), {"{name}#0": unreadable, "b": None}),
        "too-few-cells": (b"sample_id,prompt\na\nb,hi\n", {"{name}#0": unreadable, "b": None}),
        "nul": (b"sample_id,prompt\na,x\x00y\nb,hi\n", answered("a", "b")),
        "missing-prompt": (b"sample_id,question\na,x\n", None, "prompt"),
        "header-only": (b"sample_id,prompt\n", None, "nothing to audit"),
        "zero-bytes": (b"", None, ""),
        "blank-lines": (b"\n\n\n", None, ""),
        "column-twice": (b"prompt,prompt\na,b\n", None, "twice"),
        "ids-twice": (b"sample_id,prompt\na,x\na,y\n", None, "'a' stands twice"),
        "ids-absent": (b"sample_id,prompt\n,x\n,y\n", answered("{name}#0", "{name}#1")),
        "a-long-cell": (f"sample_id,prompt\na,{deep}\nb,hi\n".encode(), {"a": "prompt_too_long", "b": None}),
        "carriage-returns-alone": (b"sample_id,prompt\ra,x\rb,y\r", None, "header"),
        "a-formula": (b"sample_id,prompt\na,=cmd|'/c calc'!A1\n", answered("a")),
        "parquet-inside": (parquet(two()), None, ""),
    }
    return {f"csv-{name}": TableCase(".csv", *case) for name, case in cases.items()}


def lines(*values: Any) -> bytes:
    """JSON Lines; bytes stand as they are."""
    return b"\n".join(each if isinstance(each, bytes) else json.dumps(each).encode() for each in values) + b"\n"


def jsonls() -> dict[str, TableCase]:
    """JSON Lines files."""
    good, unreadable = {"sample_id": "b", "prompt": "hi"}, "row_unreadable"
    first_lost = {"{name}#0": unreadable, "b": None}

    def beside(line: Any) -> tuple[bytes, Rows]:
        return lines(line, good), first_lost

    def of_prompt(prompt: Any) -> tuple[bytes, Rows]:
        return lines({"sample_id": "a", "prompt": prompt}, good), {"a": unreadable, "b": None}

    nested: Any = "x"
    for _ in range(400):
        nested = [nested]
    cases = {
        "sound": (lines({"sample_id": "a", "prompt": SECRET}, good), answered("a", "b")),
        "broken-line": beside(f'{{"sample_id": "a", "prompt": "{SECRET}'.encode()),
        "array": beside([SECRET]),
        "array-of-all": (json.dumps([good, good]).encode(), None, "is a JSON array, not JSON Lines"),
        "array-of-objects": beside([{"prompt": SECRET}]),
        "number": beside(17),
        "null": beside(None),
        "deep": beside(b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "deep-objects": beside(b'{"a": ' * 5_000 + b"1" + b"}" * 5_000),
        "deep-label": beside({"sample_id": "a", "prompt": "x", "label": nested}),
        "latin-1": beside('{"sample_id": "a", "prompt": "café"}'.encode("latin-1")),
        "utf-16": (lines(good).decode().encode("utf-16"), None, ""),
        "nul-bytes": beside(bytes(64)),
        "number-of-10000-digits": beside(b'{"sample_id": ' + b"9" * 10_000 + b', "prompt": "x"}'),
        "lone-surrogate": (lines(b'{"sample_id": "a", "prompt": "x\\ud800"}', good), {"a": unreadable, "b": None}),
        "lone-surrogate-in-id": beside(b'{"sample_id": "\\udfff", "prompt": "x"}'),
        "lone-surrogate-in-key": (lines(b'{"sample_id": "a", "prompt": "x", "\\ud800": 1}', good), answered("a", "b")),
        "prompt-object": of_prompt({"text": SECRET}),
        "prompt-list": of_prompt([SECRET]),
        "prompt-number": of_prompt(3),
        "prompt-null": (lines({"sample_id": "a", "prompt": None}, good), {"a": "prompt_missing", "b": None}),
        "image-object": (
            lines({**good, "sample_id": "a", "image": {"path": SECRET}}, good),
            {"a": unreadable, "b": None},
        ),
        "not-a-number-as-id": (lines({"sample_id": float("nan"), "prompt": "x"}, good), answered("NaN", "b")),
        "id-object": (lines({"sample_id": {"n": 1}, "prompt": "x"}, good), answered('{"n": 1}', "b")),
        "key-twice": (lines(b'{"sample_id": "a", "prompt": "x", "prompt": "y"}', good), answered("a", "b")),
        "ids-twice": (lines(good, good), None, "'b' stands twice"),
        "ids-absent": (lines({"prompt": "x"}, {"prompt": "y"}), answered("{name}#0", "{name}#1")),
        "missing-prompt": (lines({"sample_id": "a", "question": SECRET}), None, "prompt"),
        "missing-prompt-of-3000": (lines({f"key{number}": 1 for number in range(3000)}), None, "prompt"),
        "zero-bytes": (b"", None, ""),
        "without-last-line-end": (lines(good)[:-1], answered("b")),
        "carriage-returns": (lines(good).replace(b"\n", b"\r\n"), answered("b")),
    }
    return {f"jsonl-{name}": TableCase(".jsonl", *case) for name, case in cases.items()}


def tables() -> dict[str, TableCase]:
    """All of them."""
    return parquets() | damaged() | csvs() | jsonls()
