"""CSV and JSON Lines: what a table's lines become."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guardalign.config import InputConfig
from guardalign.errors import ConfigError, InputError
from guardalign.sources import make_source


def _csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _config(path: Path | str, **options: Any) -> InputConfig:
    suffix = Path(str(path)).suffix.removeprefix(".")
    return InputConfig(format=options.pop("format", suffix), path=str(path), **options)


@pytest.mark.parametrize("write", [_csv, _jsonl])
def test_a_table_comes_back_as_it_was_written(tmp_path, png, read_all, write):
    (tmp_path / "pics").mkdir()
    written = []
    for i in range(7):
        (tmp_path / "pics" / f"{i}.png").write_bytes(png(i))
        written.append(
            {
                "sample_id": f"s{i}",
                "image": f"pics/{i}.png",
                "prompt": f"what, is\n{i}?",
                "category": "c",
                "label": "l",
                "x": "1",
            }
        )
    path = write(tmp_path / f"prompts.{write.__name__[1:]}", written)
    plan, rows = read_all(_config(path, passthrough=["x"]))
    assert [row["sample_id"] for row in rows] == [f"s{i}" for i in range(7)]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in written]
    assert [row["image"] for row in rows] == [png(i) for i in range(7)]
    assert [row["source"] for row in rows] == [f"{path.name}#{i}" for i in range(7)]
    assert {(row["sample_category"], row["label"], row["x"], row["error"]) for row in rows} == {("c", "l", "1", None)}
    assert [file.path for file in plan.files] == [path.name, *(f"pics/{i}.png" for i in range(7))]
    assert [file.size for file in plan.files][1:] == [len(png(i)) for i in range(7)]
    assert plan.notes == ()


_CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.lists(_CELL, min_size=1, max_size=12), shard_rows=st.integers(1, 14), limit=st.integers(1, 14))
def test_shards_of_any_size_give_the_same_rows(tmp_path, read_all, prompts, shard_rows, limit):
    for write in (_csv, _jsonl):
        path = write(
            tmp_path / f"p.{write.__name__[1:]}", [{"prompt": prompt, "n": i} for i, prompt in enumerate(prompts)]
        )
        config = _config(path, passthrough=["n"])
        _, whole = read_all(config, 1000)
        assert [row["prompt"] or "" for row in whole] == prompts
        assert read_all(config, shard_rows)[1] == whole
        assert read_all(config, shard_rows, limit)[1] == whole[:limit]


def test_offsets_hold_for_cells_that_span_lines_with_any_line_end_and_a_byte_order_mark(tmp_path, read_all):
    text = '\ufeffsample_id,prompt\r\na,"one\r\ntwo\n\nthree"\r\n\r\nb,"with ""quotes"", and ü"\nc,5" screen'
    (tmp_path / "p.csv").write_bytes(text.encode())
    for shard_rows in (1, 2, 3):
        plan, rows = read_all(_config(tmp_path / "p.csv"), shard_rows)
        assert plan.num_rows == 3
        assert [row["sample_id"] for row in rows] == ["a", "b", "c"]
        assert [row["prompt"] for row in rows] == ["one\r\ntwo\n\nthree", 'with "quotes", and ü', '5" screen']
        assert [row["source"] for row in rows] == ["p.csv#0", "p.csv#1", "p.csv#2"]


def test_a_line_without_its_file_is_an_error_row_and_the_others_stay(tmp_path, png, read_all):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "empty.png").write_bytes(b"")
    path = _csv(
        tmp_path / "p.csv", [{"prompt": "hi", "image": name} for name in ("a.png", "gone.png", "", "empty.png")]
    )
    _, rows = read_all(_config(path))
    assert [row["error_kind"] for row in rows] == [None, "image_missing", None, None]
    assert rows[1]["error"] == "the picture of sample p.csv#1 does not exist"
    assert rows[1]["prompt"] == "hi"
    assert [row["image"] for row in rows] == [png(1), None, None, b""]


def test_pictures_without_a_line_are_counted_and_named(tmp_path, png, read_all):
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(png(1))
    path = _csv(tmp_path / "p.csv", [{"prompt": "x", "image": "d.png", "sample_id": "", "category": "", "label": ""}])
    plan, _ = read_all(_config(path))
    assert plan.notes == ("3 image files have no line in p.csv: a.png, b.png, c.png",)
    root = tmp_path / "root" / "deep"
    root.mkdir(parents=True)
    for i in range(13):
        (root / f"{i:02}.png").write_bytes(png(1))
    plan, _ = read_all(_config(path, image_root=str(tmp_path / "root")))
    first_ten = ", ".join(f"deep/{i:02}.png" for i in range(10))
    assert plan.notes == (f"13 image files have no line in p.csv: {first_ten} and 3 more",)


def test_references_out_of_the_image_root_are_refused(tmp_path, png, read_all):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(png(1))
    (root / "in.png").write_bytes(png(2))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "good_link.png").symlink_to(root / "in.png")
    (root / "folder").symlink_to(tmp_path)
    os.mkfifo(root / "pipe.png")
    refused = [
        "../secret.png", str(tmp_path / "secret.png"), "link.png", "folder/secret.png", "a/../../secret.png", ".", "..",
        "pipe.png", "http://localhost/x.png", "HTTPS://localhost/x.png", f"file://{tmp_path}/secret.png",
        f"memory://{root}/in.png", "x" * 5000, "nul\0.png", "in.png/x.png", "../root-other/x.png",
    ]  # fmt: skip
    allowed = ["in.png", "./in.png", "a/../in.png", str(root / "in.png"), f"file://{root}/in.png", "good_link.png"]
    path = _jsonl(tmp_path / "p.jsonl", [{"prompt": "x", "image": name} for name in (*refused, *allowed)])
    plan, rows = read_all(_config(path, image_root=str(root)))
    assert [row["error_kind"] for row in rows] == ["image_missing"] * len(refused) + [None] * len(allowed)
    assert all(row["image"] is None for row in rows[: len(refused)])
    assert [row["image"] for row in rows[len(refused) :]] == [png(2)] * len(allowed)
    assert not any("secret" in row["error"] for row in rows[: len(refused)])
    assert "secret.png" not in {Path(file.path).name for file in plan.files}


def test_broken_records_are_error_rows(tmp_path, read_all):
    deep = b"[" * 100_000
    lines = [
        b'{"prompt": "a"}',
        b"{broken",
        b"[1]",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": 5}',
        deep,
    ]
    (tmp_path / "p.jsonl").write_bytes(b"\n".join([*lines, b"", b'{"prompt": "z", "sample_id": 7}']))
    _, rows = read_all(_config(tmp_path / "p.jsonl"), 2)
    assert [row["error_kind"] for row in rows] == [None] + ["row_unreadable"] * 6 + [None]
    assert rows[0]["prompt"] == "a"
    assert [row["sample_id"] for row in rows[1:]] == [*(f"p.jsonl#{i}" for i in range(1, 7)), "7"]
    (tmp_path / "p.csv").write_bytes(b'prompt,label\na,b\n\xff\xfe,b\na,b,c\n"a"x,b\nz,\n')
    _, rows = read_all(_config(tmp_path / "p.csv", passthrough=[]), 2)
    assert [row["error_kind"] for row in rows] == [None, "row_unreadable", "row_unreadable", "row_unreadable", None]
    assert (rows[4]["prompt"], rows[4]["label"]) == ("z", None)


def test_a_quote_that_is_never_closed_stops_the_plan_instead_of_swallowing_rows(tmp_path):
    (tmp_path / "p.csv").write_text('prompt\na\n"b\nc\nd\n')
    with pytest.raises(InputError, match=r"p\.csv: a quote that opens in row 1 is never closed"):
        make_source(_config(tmp_path / "p.csv")).plan(2, None)


def test_duplicate_ids_name_the_first_and_both_places(tmp_path):
    ids = ["a", "b", "a17", "b2", "c", "a17", "b", "a17"]
    path = _csv(tmp_path / "p.csv", [{"prompt": "x", "sample_id": sample_id} for sample_id in ids])
    with pytest.raises(InputError, match=r"sample id 'a17' stands twice: p\.csv#2 and p\.csv#5"):
        make_source(_config(path)).plan(2, None)
    make_source(_config(path)).plan(2, 5)


def test_an_own_id_that_equals_a_derived_one_is_a_duplicate(tmp_path):
    path = _csv(tmp_path / "p.csv", [{"prompt": "x", "sample_id": "p.csv#1"}, {"prompt": "x", "sample_id": ""}])
    with pytest.raises(InputError, match=r"'p\.csv#1' stands twice"):
        make_source(_config(path)).plan(2, None)


def test_ids_stay_when_the_folder_moves_and_differ_between_folders(tmp_path, read_all):
    for name in ("x", "y"):
        (tmp_path / "one" / name).mkdir(parents=True)
        _csv(tmp_path / "one" / name / "p.csv", [{"prompt": "x"}])
    paths = [str(tmp_path / "one" / name / "p.csv") for name in ("y", "x")]
    plan, rows = read_all(InputConfig(format="csv", path=paths))
    assert [row["sample_id"] for row in rows] == ["y/p.csv#0", "x/p.csv#0"]
    (tmp_path / "one").rename(tmp_path / "two")
    moved, again = read_all(InputConfig(format="csv", path=[path.replace("/one/", "/two/") for path in paths]))
    assert again == rows
    assert moved.files == plan.files
    assert read_all(_config(tmp_path / "two", format="csv"))[1] == rows[::-1]


def test_values_that_are_no_text_become_json_text(tmp_path, read_all):
    record = {"prompt": "x", "sample_id": 3, "label": True, "category": ["a"], "extra": {"k": "ü"}, "none": None}
    path = _jsonl(tmp_path / "p.jsonl", [record])
    _, [row] = read_all(_config(path, passthrough=["extra", "none"]))
    assert (row["sample_id"], row["label"], row["sample_category"]) == ("3", "true", '["a"]')
    assert (row["extra"], row["none"]) == ('{"k": "ü"}', None)


def test_absent_columns(tmp_path, read_all):
    path = _csv(tmp_path / "p.csv", [{"prompt": "x", "y": "z"}])
    plan, [row] = read_all(_config(path))
    assert "column category is absent: rows have no category" in plan.notes
    assert row["image"] is None
    assert len(plan.notes) == 4
    assert read_all(_config(path, id_column=None, category_column=None, label_column=None))[0].notes == (
        "column image is absent: every row is a text-only prompt",
    )
    for options in ({"prompt_column": "q"}, {"image_column": "q"}, {"label_column": "q"}, {"passthrough": ["q"]}):
        with pytest.raises(InputError, match=r"names the column q, which the data set lacks; its columns: prompt, y"):
            make_source(_config(path, **options)).plan(2, None)


def test_a_column_that_some_files_lack_is_said_to_be_absent_in_those_only(tmp_path):
    for name, columns in (("a", ["prompt", "image"]), ("b", ["prompt"]), ("c", ["prompt", "label"])):
        _csv(tmp_path / f"{name}.csv", [dict.fromkeys(columns, "x")])
        _jsonl(tmp_path / f"{name}.jsonl", [dict.fromkeys(columns, "x"), {"prompt": "y"}])
    for suffix in ("csv", "jsonl"):
        notes = make_source(_config(str(tmp_path / f"*.{suffix}"), format=suffix)).plan(2, None).notes
        assert "column image is absent in 2 of 3 files: their rows are text-only prompts" in notes
        assert "column label is absent in 2 of 3 files: their rows have no label" in notes
        assert "column category is absent: rows have no category" in notes


def test_a_file_that_is_something_else_is_called_what_it_is(tmp_path):
    zipped = gzip.compress(b'prompt\n{"prompt": "x"}\n')
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "p.parquet")
    parquet = (tmp_path / "p.parquet").read_bytes()
    sentences = {
        "zipped.csv": (zipped, r"zipped\.csv is compressed \(gzip\); decompress it first"),
        "zipped.jsonl": (zipped, r"zipped\.jsonl is compressed \(gzip\)"),
        "zipped.parquet": (zipped, r"zipped\.parquet is compressed \(gzip\)"),
        "other.csv": (parquet, r"other\.csv is a Parquet file; input\.format parquet reads it"),
        "other.jsonl": (parquet, "is a Parquet file"),
        "one.jsonl": (b'[{"prompt": "x"}]', r"one\.jsonl is a JSON array, not JSON Lines: one object a line"),
        "many.jsonl": (b'\n[\n {"prompt": "x"},\n {"prompt": "y"}\n]\n', "is a JSON array, not JSON Lines"),
        "blanks.csv": (b"sample_id, prompt\na, x\n", r"the data set lacks; its columns: sample_id, ' prompt'$"),
    }
    for name, (content, sentence) in sentences.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            make_source(_config(tmp_path / name)).plan(2, None)


def test_a_column_called_as_a_parquet_file_begins_is_a_column(tmp_path, read_all):
    (tmp_path / "p.csv").write_text("PAR1,prompt\na,x\n")
    assert [row["prompt"] for row in read_all(_config(tmp_path / "p.csv"))[1]] == ["x"]


@pytest.mark.parametrize("setting", ["prompt_column", "image_column", "id_column"])
def test_an_empty_name_of_a_column_is_refused(setting):
    with pytest.raises(ConfigError, match=rf"input\.{setting} is empty"):
        InputConfig("csv", "x.csv", **{setting: ""})


def test_pictures_that_exist_and_are_no_files_are_not_said_to_be_missing(tmp_path, read_all):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    sentences = {
        "folder.png": "is a folder, not a file",
        "loop.png": "is a link that leads to no file",
        "pipe.png": "is no regular file, but a pipe, socket or device",
        "data:image/png;base64,AAAA": "is named by a data: URI, which is no path; give its bytes, or a file",
        "s3://bucket/x.png": "is named by the URI of another file system, and such references are not followed",
        "ftp://host/x.png": "is named by the URI of another file system, and such references are not followed",
        "gone.png": "does not exist",
    }
    path = _jsonl(tmp_path / "p.jsonl", [{"prompt": "x", "image": name} for name in sentences])
    _, rows = read_all(_config(path))
    said = [row["error"].removeprefix(f"the picture of sample {row['sample_id']} ") for row in rows]
    assert said == list(sentences.values())
    assert {row["error_kind"] for row in rows} == {"image_missing"}


def test_an_image_root_that_is_absent_stops_the_plan_and_one_that_nothing_refers_to_is_noted(tmp_path, png):
    named = _csv(tmp_path / "p.csv", [{"prompt": "x", "image": "a.png"}])
    pq.write_table(pa.table({"prompt": ["x"], "image": ["a.png"]}), tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": ["x"], "image": [png(1)]}), tmp_path / "bytes.parquet")
    bare = _csv(tmp_path / "bare.csv", [{"prompt": "x"}])
    idle = "input.image_root has no effect: no row names a picture"
    for path in (named, tmp_path / "p.parquet"):
        with pytest.raises(InputError, match=rf"^input\.image_root {tmp_path}/gone does not exist$"):
            make_source(_config(path, image_root=str(tmp_path / "gone"))).plan(2, None)
        with pytest.raises(InputError, match=r"p\.csv is no folder$"):
            make_source(_config(path, image_root=str(named))).plan(2, None)
        assert idle not in make_source(_config(path, image_root=str(tmp_path))).plan(2, None).notes
    for path in (bare, tmp_path / "bytes.parquet"):
        assert idle in make_source(_config(path, image_root=str(tmp_path))).plan(2, None).notes
        assert idle not in make_source(_config(path)).plan(2, None).notes


def test_settings_that_mean_nothing_and_names_that_are_taken_are_refused(tmp_path):
    path = _csv(tmp_path / "p.csv", [{"prompt": "x", "y": "z"}])
    with pytest.raises(ConfigError, match=r"input\.split has no meaning for format csv"):
        make_source(_config(path, split="train"))
    with pytest.raises(ConfigError, match="response is a column of the results already"):
        make_source(_config(path, passthrough=["response"]), reserved=["response"])
    with pytest.raises(ConfigError, match="image is a column of the results already"):
        make_source(_config(path, passthrough=["image"]))
    with pytest.raises(ConfigError, match="twice"):
        make_source(_config(path, passthrough=["y", "y"]))


def test_missing_and_empty_inputs_are_named_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("prompt\n")
    (tmp_path / "none.csv").write_text("")
    (tmp_path / "folder").mkdir()
    sentences = {
        "gone.csv": "input.path gone.csv does not exist",
        "*.jsonl": r"input.path \*.jsonl does not exist",
        "folder": "input.path folder holds no file that ends in .csv",
        "empty.csv": "nothing to audit: empty.csv holds no rows",
        "none.csv": "nothing to audit: none.csv holds no rows",
        "nowhere://x/p.csv": "input.path nowhere://x/p.csv cannot be read",
    }
    for path, sentence in sentences.items():
        with pytest.raises(InputError, match=sentence):
            make_source(InputConfig(format="csv", path=path)).plan(2, None)


def test_a_table_that_changed_after_planning_is_an_error(tmp_path):
    path = _csv(tmp_path / "p.csv", [{"prompt": "x"}] * 4)
    source = make_source(_config(path))
    plan = source.plan(4, None)
    _csv(path, [{"prompt": "x"}] * 3)
    with pytest.raises(InputError, match=r"shard 0 has 3 rows instead of the 4 planned: p\.csv changed"):
        source.read(plan.shards[0])


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_remote_tables_and_pictures(memory, png, read_all, suffix):
    out = io.StringIO(newline="")
    rows = [{"prompt": f"p{i}\n", "image": f"pics/{i}.png"} for i in range(3)] + [
        {"prompt": "q", "image": "../../x.png"}
    ]
    if suffix == "csv":
        writer = csv.DictWriter(out, ["prompt", "image"])
        writer.writeheader()
        writer.writerows(rows)
    else:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    memory.pipe({f"/a/b/p.{suffix}": out.getvalue().encode(), "/x.png": png(9), "/a/b/pics/left.png": png(4)})
    memory.pipe({f"/a/b/pics/{i}.png": png(i) for i in (0, 1)})
    for typed in (f"memory://a/b/p.{suffix}", "memory://a/b", f"memory://a/b/*.{suffix}"):
        plan, read = read_all(_config(typed, format=suffix), 2)
        assert [row["image"] for row in read] == [png(0), png(1), None, None]
        assert [row["error_kind"] for row in read] == [None, None, "image_missing", "image_missing"]
        assert [row["source"] for row in read] == [f"p.{suffix}#{i}" for i in range(4)]
        assert [file.path for file in plan.files] == [f"p.{suffix}", "pics/0.png", "pics/1.png"]
        assert all(file.etag for file in plan.files)
        assert f"1 image file has no line in p.{suffix}: pics/left.png" in plan.notes


def test_the_plan_reads_no_picture(counting, read_all):
    big = bytes(5_000_000)
    table = "prompt,image\n" + "".join(f"x,{i}.png\n" for i in range(5))
    counting().pipe({"/p.csv": table.encode(), **{f"/{i}.png": big for i in range(5)}})
    make_source(_config("counting:///p.csv", format="csv")).plan(2, None)
    assert 0 < counting.num_bytes_read < 10_000
    read_all(_config("counting:///p.csv", format="csv"))
    assert counting.num_bytes_read > 25_000_000
