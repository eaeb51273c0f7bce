"""Parquet inputs: every way to hold a picture, row groups, types."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guardalign.config import InputConfig
from guardalign.errors import InputError
from guardalign.sources import files, make_source, pictures
from guardalign.sources.damage import StoreError


def _write(path: Path, columns: dict[str, Any], row_group_size: int = 1000) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def _config(path: Path | str, **options: Any) -> InputConfig:
    return InputConfig(format="parquet", path=str(path), **options)


def _struct(cells: list[tuple[bytes | None, str | None] | None]) -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([None if cell is None else dict(zip(("bytes", "path"), cell, strict=True)) for cell in cells], kind)


def test_bytes_structs_and_paths_give_the_same_pictures(tmp_path, png, read_all):
    encoded = [png(i) for i in range(5)]
    for i, picture in enumerate(encoded):
        (tmp_path / f"{i}.png").write_bytes(picture)
    names = [f"{i}.png" for i in range(5)]
    forms = {
        "binary": pa.array(encoded, pa.binary()),
        "large": pa.array(encoded, pa.large_binary()),
        "struct": _struct([(picture, None) for picture in encoded]),
        "mixed": _struct([(picture if i % 2 else None, names[i]) for i, picture in enumerate(encoded)]),
        "path": pa.array(names),
        "large_path": pa.array(names, pa.large_string()),
    }
    for name, images in forms.items():
        path = _write(tmp_path / f"{name}.parquet", {"prompt": ["p"] * 5, "image": images}, 2)
        plan, rows = read_all(_config(path))
        assert [row["image"] for row in rows] == encoded, name
        assert [row["source"] for row in rows] == [f"{name}.parquet#{i}" for i in range(5)]
        refers = {"mixed": names[::2], "path": names, "large_path": names}.get(name, [])
        assert {file.path for file in plan.files} == {path.name, *refers}


def test_a_missing_picture_a_null_picture_and_a_null_prompt(tmp_path, png, read_all):
    images = _struct([(None, "gone.png"), None, (None, None), (png(1), "gone.png"), (None, "../up.png")])
    path = _write(tmp_path / "a.parquet", {"prompt": ["a", None, "c", "d", "e"], "image": images})
    _, rows = read_all(_config(path))
    assert [row["error_kind"] for row in rows] == ["image_missing", None, None, None, "image_missing"]
    assert [row["image"] for row in rows] == [None, None, None, png(1), None]
    assert [row["prompt"] for row in rows] == ["a", None, "c", "d", "e"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    row_group_size=st.integers(1, 5),
    shard_rows=st.integers(1, 12),
    limit=st.integers(1, 30),
)
def test_shards_of_any_size_give_the_same_rows(tmp_path_factory, read_all, lengths, row_group_size, shard_rows, limit):
    folder = tmp_path_factory.mktemp("parquet")
    for number, length in enumerate(lengths):
        texts = pa.array([f"{number}-{i}" for i in range(length)], pa.string())
        _write(folder / f"{number}.parquet", {"prompt": texts, "image": texts.cast(pa.binary())}, row_group_size)
    expected = [f"{number}-{i}" for number, length in enumerate(lengths) for i in range(length)]
    plan, rows = read_all(_config(folder), shard_rows, limit)
    assert [row["prompt"] for row in rows] == expected[:limit]
    assert [row["image"].decode() for row in rows] == expected[:limit]
    assert len(plan.shards) == -(-len(rows) // shard_rows)
    assert len(plan.files) == len(lengths)


def test_passed_through_columns_keep_their_types(tmp_path, read_all):
    columns = {
        "prompt": ["a", "b"],
        "n": pa.array([1, None], pa.int16()),
        "tags": pa.array([["x"], []], pa.list_(pa.string())),
        "when": pa.array([0, 1], pa.timestamp("us", "UTC")),
    }
    path = _write(tmp_path / "a.parquet", columns)
    names = ["tags", "n", "when"]
    plan, _ = read_all(_config(path, passthrough=names))
    assert [field.type for field in plan.passthrough_fields] == [columns[name].type for name in names]
    source = make_source(_config(path, passthrough=names))
    table = source.read(source.plan(9, None).shards[0])
    assert all(table[name].combine_chunks().equals(columns[name]) for name in names)


def test_ids_and_labels_become_text(tmp_path, read_all):
    columns = {"prompt": ["a", "b"], "sample_id": pa.array([7, None]), "label": [True, False]}
    path = _write(tmp_path / "a.parquet", {**columns, "category": pa.array(["x", "y"]).dictionary_encode()})
    _, rows = read_all(_config(path))
    assert [row["sample_id"] for row in rows] == ["7", "a.parquet#1"]
    assert [row["label"] for row in rows] == ["true", "false"]
    assert [row["sample_category"] for row in rows] == ["x", "y"]


def test_duplicates_are_named_across_files(tmp_path):
    _write(tmp_path / "a.parquet", {"prompt": ["a", "b"], "sample_id": ["x", "y"]})
    _write(tmp_path / "b.parquet", {"prompt": ["a", "b"], "sample_id": ["z", "y"]})
    with pytest.raises(InputError, match=r"sample id 'y' stands twice: a\.parquet#1 and b\.parquet#1"):
        make_source(_config(tmp_path)).plan(2, None)


def test_text_that_is_no_utf8_is_an_error_row(tmp_path, read_all):
    broken = pa.array([b"ok", b"\xff", b"ok"]).cast(pa.binary())
    as_text = pa.Array.from_buffers(pa.string(), 3, broken.buffers())
    path = _write(tmp_path / "a.parquet", {"prompt": as_text, "extra": pa.array(["1", "2", "3"])})
    assert [row["error_kind"] for row in read_all(_config(path))[1]] == [None, "row_unreadable", None]
    path = _write(tmp_path / "b.parquet", {"prompt": ["1", "2", "3"], "extra": as_text})
    _, rows = read_all(_config(path, passthrough=["extra"]))
    assert [row["error_kind"] for row in rows] == [None, "row_unreadable", None]
    assert [row["extra"] for row in rows] == ["ok", None, "ok"]


def test_files_that_cannot_be_planned_are_named(tmp_path):
    whole = _write(tmp_path / "whole.parquet", {"prompt": ["a"] * 100}).read_bytes()
    (tmp_path / "z_cut.parquet").write_bytes(whole[:-20])
    with pytest.raises(InputError, match=r"z_cut\.parquet is no complete Parquet file"):
        make_source(_config(tmp_path)).plan(2, None)
    (tmp_path / "z_cut.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"z_cut\.parquet is no complete Parquet file"):
        make_source(_config(tmp_path)).plan(2, None)
    (tmp_path / "z_cut.parquet").unlink()
    _write(tmp_path / "other.parquet", {"question": ["a"]})
    with pytest.raises(InputError, match=r"names the column prompt, which other\.parquet lacks; its columns: question"):
        make_source(_config(tmp_path)).plan(2, None)


def test_an_id_column_stands_in_all_files_or_in_none(tmp_path):
    _write(tmp_path / "a.parquet", {"prompt": ["a"], "sample_id": ["1"]})
    _write(tmp_path / "b.parquet", {"prompt": ["b"]})
    with pytest.raises(InputError, match=r"of a\.parquet and b\.parquet only one has the id column sample_id"):
        make_source(_config(tmp_path)).plan(2, None)


@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ("image", pa.array([[b"x"]], pa.list_(pa.binary())), "pictures are bytes"),
        ("image", pa.array([1]), "pictures are bytes"),
        ("prompt", pa.array([["x"]]), "is no text"),
        ("sample_id", pa.array([b"x"]), "is no text"),
    ],
)
def test_columns_of_a_wrong_type_are_named(tmp_path, column, values, sentence):
    path = _write(tmp_path / "a.parquet", {"prompt": ["a"], column: values})
    with pytest.raises(InputError, match=f"column {column} of a.parquet is of type .*{sentence}"):
        make_source(_config(path)).plan(2, None)


@pytest.mark.parametrize("nullable", [True, False])
@pytest.mark.parametrize("kind", [pa.string(), pa.string_view()])
def test_a_passed_through_cell_that_is_no_utf8_costs_its_row_alone(kind, nullable, tmp_path, read_all):
    cells = pa.array([b"ok", b"\xff", b"fine"], pa.binary_view() if kind == pa.string_view() else pa.binary()).view(
        kind
    )
    schema = pa.schema([pa.field("prompt", pa.string()), pa.field("extra", kind, nullable=nullable)])
    pq.write_table(pa.table([pa.array(["p", "q", "r"]), cells], schema=schema), tmp_path / "a.parquet")
    _, rows = read_all(_config(tmp_path, passthrough=["extra"]))
    assert [row["extra"] for row in rows] == ["ok", None, "fine"]
    assert [row["error_kind"] for row in rows] == [None, "row_unreadable", None]


def test_passed_through_types_that_differ_between_files_are_named(tmp_path):
    _write(tmp_path / "a.parquet", {"prompt": ["a"], "n": [1]})
    _write(tmp_path / "b.parquet", {"prompt": ["a"], "n": ["1"]})
    with pytest.raises(InputError, match=r"column n is of type string in b\.parquet and of type int64 before"):
        make_source(_config(tmp_path, passthrough=["n"])).plan(2, None)


def test_what_writers_leave_beside_the_data_is_no_input_and_links_are(tmp_path, read_all):
    real = tmp_path / "blobs"
    real.mkdir()
    _write(real / "blob.parquet", {"prompt": ["linked"]})
    folder = tmp_path / "data"
    (folder / "_temporary").mkdir(parents=True)
    (folder / "_temporary" / "x.parquet").write_bytes(b"half")
    (folder / ".hidden.parquet").write_bytes(b"half")
    (folder / "_SUCCESS").write_bytes(b"")
    (folder / "part.parquet").symlink_to(real / "blob.parquet")
    plan, [row] = read_all(_config(folder))
    assert (row["prompt"], row["source"]) == ("linked", "part.parquet#0")
    assert plan.files[0].size == (real / "blob.parquet").stat().st_size


def test_a_list_keeps_its_order_and_names_no_file_twice(tmp_path, read_all):
    paths = [str(_write(tmp_path / f"{name}.parquet", {"prompt": [name]})) for name in ("b", "a")]
    assert [row["prompt"] for row in read_all(InputConfig(format="parquet", path=paths))[1]] == ["b", "a"]
    with pytest.raises(InputError, match=r"names the file a\.parquet twice"):
        make_source(InputConfig(format="parquet", path=[*paths, str(tmp_path / "a*.parquet")])).plan(2, None)


def test_a_column_that_some_files_lack_is_said_to_be_absent_in_those_only(tmp_path):
    _write(tmp_path / "a.parquet", {"prompt": ["x"], "image": [b"p"]})
    for name in ("b", "c"):
        _write(tmp_path / f"{name}.parquet", {"prompt": ["x"]})
    notes = make_source(_config(tmp_path)).plan(10, None).notes
    assert "column image is absent in 2 of 3 files: their rows are text-only prompts" in notes
    assert "column label is absent: rows have no label" in notes
    assert (
        "column image is absent: every row is a text-only prompt"
        in make_source(_config(tmp_path / "b.parquet")).plan(10, None).notes
    )


def test_row_groups_far_larger_than_a_shard_are_noted(tmp_path):
    path = _write(tmp_path / "a.parquet", {"prompt": ["x"] * 1000})
    assert any("row groups of 1,000 rows" in note for note in make_source(_config(path)).plan(10, None).notes)
    assert not any("row groups" in note for note in make_source(_config(path)).plan(200, None).notes)


def test_a_plan_reads_no_picture_and_a_shard_only_its_row_groups(counting, read_all):
    images = [bytes([i]) * 200_000 for i in range(20)]
    table = pa.table({"prompt": ["x"] * 20, "image": images, "unused": images})
    raw = pa.BufferOutputStream()
    pq.write_table(table, raw, row_group_size=5, compression="none", use_dictionary=False)
    counting().pipe({"/in/a.parquet": raw.getvalue().to_pybytes()})
    source = make_source(_config("counting://in/a.parquet"))
    plan = source.plan(5, None)
    assert 0 < counting.num_bytes_read < 150_000
    table = source.read(plan.shards[2])
    assert table["image"].to_pylist() == images[10:15]
    assert 1_000_000 < counting.num_bytes_read < 1_500_000  # five pictures of 200 kB
    assert [row["image"] for row in read_all(_config("counting://in"))[1]] == images


def test_memory_uris(memory, tmp_path, png, read_all):
    path = _write(tmp_path / "a.parquet", {"prompt": ["x", "y"], "image": ["1.png", "pics/2.png"]})
    memory.pipe({"/in/a.parquet": path.read_bytes(), "/in/1.png": png(1), "/in/pics/2.png": png(2)})
    for typed in ("memory://in/a.parquet", "memory:///in", "memory://in/*.parquet", "memory://"):
        plan, rows = read_all(_config(typed))
        assert [row["image"] for row in rows] == [png(1), png(2)]
        assert [file.path.split("/")[-1] for file in plan.files] == ["a.parquet", "1.png", "2.png"]


# Stores that fail, and damage


class Failing(io.BytesIO):
    """A file of which bytes at and after `sound` cannot be had: an error without errno, or fewer bytes."""

    def __init__(self, content: bytes, sound: int, gives_less: bool) -> None:
        super().__init__(content)
        self._sound, self._gives_less = sound, gives_less

    def read(self, size: int | None = -1, /) -> bytes:
        first = self.tell()
        content = super().read(size)
        if first + len(content) <= self._sound:
            return content
        if self._gives_less:
            return content[: max(0, self._sound - first)]
        raise OSError("Forbidden: the token expired")


@pytest.mark.parametrize("gives_less", [False, True])
def test_a_store_that_fails_within_a_file_is_no_damage_of_it(tmp_path, monkeypatch, gives_less):
    texts = [hashlib.sha512(str(i).encode()).hexdigest() * 8 for i in range(5000)]
    path = _write(tmp_path / "a.parquet", {"sample_id": texts, "prompt": texts}, 1000)
    source = make_source(_config(path))
    [shard] = source.plan(5000, None).shards
    content = path.read_bytes()
    for sound in (0, len(content) // 2, len(content) - 1):
        monkeypatch.setattr(files, "open_file", lambda uri, sound=sound: Failing(content, sound, gives_less))
        for step in (lambda: source.read(shard), lambda: source.plan(5000, None)):
            with pytest.raises(StoreError, match=r"^a\.parquet cannot be read: ") as found:
                step()
            assert isinstance(found.value, OSError) and "\n" not in str(found.value)


def test_a_store_that_fails_over_a_picture_stops_the_read_and_costs_no_row(tmp_path, png, monkeypatch):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    path = _write(tmp_path / "a.parquet", {"prompt": ["p"] * 6, "image": [f"{i}.png" for i in range(6)]})
    source = make_source(_config(path))
    [shard] = source.plan(6, None).shards
    opened = pictures.open_file

    def fails(uri: str) -> Any:
        if uri.endswith("3.png"):
            raise OSError("Forbidden: the token expired")
        return opened(uri)

    monkeypatch.setattr(pictures, "open_file", fails)
    with pytest.raises(OSError, match="Forbidden"):
        source.read(shard)


def test_want_of_memory_is_no_damage(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.parquet", {"prompt": ["p"] * 6, "image": ["0.png"] * 6})
    source = make_source(_config(path))
    [shard] = source.plan(6, None).shards

    def starved(*_: Any, **__: Any) -> Any:
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", starved)
    for step in (lambda: source.read(shard), lambda: source.plan(6, None)):
        with pytest.raises(MemoryError):
            step()


# Which pictures are files


def _big(number: int) -> bytes:
    return bytes([number]) * 100_000


def test_paths_beside_embedded_pictures_name_no_file(tmp_path, png):
    (tmp_path / "near.png").write_bytes(png(1))
    for size in (1, 300_000):  # a row group that is read whole, and one of which the first rows are looked at
        images = _struct([(png(i) * size, "near.png") for i in range(20)])
        path = _write(tmp_path / "a.parquet", {"prompt": ["p"] * 20, "image": images}, 10)
        assert [file.path for file in make_source(_config(path)).plan(5, None).files] == ["a.parquet"]


def test_rows_without_bytes_name_files_in_every_row_group_where_one_stands_at_the_beginning(tmp_path, png):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(png(1))
    embeds = [(_big(i), "c.png") for i in range(30)]
    groups = [embeds, [*embeds[:5], (None, "a.png"), *embeds[:23], (None, "b.png")], embeds]
    images = _struct([cell for group in groups for cell in group])
    path = _write(tmp_path / "x.parquet", {"prompt": ["p"] * 90, "image": images}, 30)
    plan = make_source(_config(path)).plan(5, None)
    assert [file.path for file in plan.files] == ["x.parquet", "a.png", "b.png"]


def test_a_plan_looks_only_at_the_first_of_many_embedded_pictures(counting):
    images = _struct([(bytes([i % 251]) * 200_000, "x.png") for i in range(60)])
    raw = pa.BufferOutputStream()
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 1, "data_page_size": 1}
    pq.write_table(pa.table({"prompt": ["x"] * 60, "image": images}), raw, row_group_size=30, **options)
    counting().pipe({"/in/a.parquet": raw.getvalue().to_pybytes()})
    make_source(_config("counting://in/a.parquet")).plan(5, None)
    assert counting.num_bytes_read < 2 * (8 * 200_000 + 2**20 + 200_000) + 150_000  # of 12 MB


def test_damaged_picture_bytes_beside_paths_cost_their_rows_and_not_the_plan(tmp_path, read_all):
    images = _struct([(bytes([i]) * 9, "x.png") for i in range(6)])
    path = _write(tmp_path / "a.parquet", {"prompt": ["p"] * 6, "image": images}, 2)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(1)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    whole = path.read_bytes()
    path.write_bytes(
        whole[:start] + b"\xff" * chunk.total_compressed_size + whole[start + chunk.total_compressed_size :]
    )
    plan, rows = read_all(_config(path))
    assert [row["error_kind"] for row in rows] == [None, None, "row_unreadable", "row_unreadable", None, None]
    assert [file.path for file in plan.files] == ["a.parquet"]
