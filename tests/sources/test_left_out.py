"""Folders and globs: what is read below them, and what is left out with or without a word."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from guardalign.config import InputConfig
from guardalign.errors import InputError
from guardalign.sources import Plan, make_source


def _plan(form: str, path: object) -> Plan:
    return make_source(InputConfig(format=form, path=str(path))).plan(10, None)  # type: ignore[arg-type]


def _left_out(plan: Plan) -> list[str]:
    return [note for note in plan.notes if "left out" in note]


def _put(folder: Path, *names: str, content: str = "prompt\nx\n") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_files_of_other_endings_are_counted_and_three_are_named_those_that_look_like_input_first(tmp_path):
    _put(tmp_path, "a.csv", "LICENSE", "b.tsv", "c.csv.gz", "sub/d.txt", "sub/e.csv")
    plan = _plan("csv", tmp_path)
    assert [file.path for file in plan.files] == ["a.csv", "sub/e.csv"]
    are = "4 files of the input's folder are left out (visible ones in .csv are read)"
    assert _left_out(plan) == [f"{are}: c.csv.gz, LICENSE, b.tsv and 1 more"]


def test_every_format_tells_what_it_leaves_out(tmp_path):
    _put(tmp_path / "jsonl", "a.jsonl", "b.json", content='{"prompt": "x"}\n')
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "parquet" / "a.parquet")
    _put(tmp_path / "parquet", "b.parquet.gz")
    (tmp_path / "webdataset").mkdir()
    with tarfile.open(tmp_path / "webdataset" / "a.tar", "w") as tar:
        member = tarfile.TarInfo("0.txt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    _put(tmp_path / "webdataset", "b.tar.zst")
    for form, name in (("jsonl", "b.json"), ("parquet", "b.parquet.gz"), ("webdataset", "b.tar.zst")):
        (note,) = _left_out(_plan(form, tmp_path / form))
        assert note.startswith("1 file of the input's folder is left out") and note.endswith(f": {name}")


def test_hidden_tables_linked_folders_and_what_is_no_file_are_counted(tmp_path):
    _put(tmp_path / "elsewhere", "z.csv")
    folder = tmp_path / "in"
    _put(folder, "a.csv", "_m.csv", ".hidden/h.csv")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "linked.csv").symlink_to(tmp_path / "elsewhere" / "z.csv")
    (folder / "broken.csv").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    plan = _plan("csv", folder)
    assert [file.path for file in plan.files] == ["a.csv", "linked.csv"]
    (note,) = _left_out(plan)
    assert note.startswith("5 files") and note.endswith(
        ": .hidden/h.csv (hidden), _m.csv (hidden), broken.csv (no regular file) and 2 more"
    )
    for name in ("_m.csv", ".hidden/h.csv", "broken.csv"):
        (folder / name).unlink()
    (note,) = _left_out(_plan("csv", folder))
    assert note.endswith(": link (a linked folder), pipe (no regular file)")


def test_pictures_and_what_writers_leave_behind_are_left_out_without_a_word(tmp_path, png):
    _put(tmp_path, "_SUCCESS", "_metadata", "_common_metadata", ".a.csv.crc", "_temporary/0/x.csv", ".DS_Store")
    _put(tmp_path, "a.csv", content="prompt,image\nx,pics/1\nx,pics/2.heic\n")
    for name in ("1", "2.heic", "3.jpe"):
        (tmp_path / "pics").mkdir(exist_ok=True)
        (tmp_path / "pics" / name).write_bytes(png(1))
    plan = _plan("csv", tmp_path)
    assert _left_out(plan) == []
    assert "1 image file has no line in a.csv: pics/3.jpe" in plan.notes
    assert _left_out(_plan("csv", tmp_path / "a.csv")) == []


@pytest.mark.parametrize("pattern", ["part-*", "part-*/", "*"])
def test_folders_that_a_glob_matches_are_looked_through(tmp_path, pattern):
    _put(tmp_path, "part-1/x.csv", "part-1/y.tsv", "part-1/deep/z.csv", "part-2.csv")
    plan = _plan("csv", f"{tmp_path}/{pattern}")
    assert [file.path for file in plan.files] == ["part-1/deep/z.csv", "part-1/x.csv", "part-2.csv"]
    assert plan.num_rows == 3
    (note,) = _left_out(plan)
    assert note.endswith(": part-1/y.tsv")


def test_a_linked_folder_that_a_glob_matches_is_looked_through(tmp_path):
    _put(tmp_path / "elsewhere", "x.csv")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "part-1").symlink_to(tmp_path / "elsewhere")
    assert [file.path for file in _plan("csv", f"{tmp_path}/in/part-*").files] == ["part-1/x.csv"]


def test_a_glob_of_folders_alone_is_looked_through_and_one_without_tables_says_so(tmp_path):
    _put(tmp_path, "day-1/x.csv", "day-2/x.csv", "other/readme")
    assert [file.path for file in _plan("csv", f"{tmp_path}/day-*").files] == ["day-1/x.csv", "day-2/x.csv"]
    with pytest.raises(InputError, match=r"oth\* holds no file that ends in \.csv"):
        _plan("csv", f"{tmp_path}/oth*")
    with pytest.raises(InputError, match=r"gone\* does not exist"):
        _plan("csv", f"{tmp_path}/gone*")


def test_a_glob_finds_hidden_folders_only_where_it_names_them(tmp_path):
    _put(tmp_path, "_old/x.csv", "new/x.csv", "_temporary/y.csv")
    plan = _plan("csv", f"{tmp_path}/*")
    assert [file.path for file in plan.files] == ["new/x.csv"]
    assert _left_out(plan)[0].endswith(": _old/x.csv (hidden)")
    assert [file.path for file in _plan("csv", f"{tmp_path}/_o*").files] == ["_old/x.csv"]


def test_a_file_that_a_glob_finds_twice_is_read_once(tmp_path):
    _put(tmp_path, "a/b/x.csv")
    assert [file.path for file in _plan("csv", f"{tmp_path}/**").files] == ["a/b/x.csv"]


def test_remote_folders_and_globs_alike(memory):
    memory.pipe({f"/in/{name}": b"prompt\nx\n" for name in ("part-1/x.csv", "part-2.csv", "_m.csv", "b.tsv")})
    plan = _plan("csv", "memory://in/part-*")
    assert [file.path for file in plan.files] == ["part-1/x.csv", "part-2.csv"]
    (note,) = _left_out(_plan("csv", "memory://in"))
    assert note.endswith(": _m.csv (hidden), b.tsv")


def test_a_list_names_what_is_left_out_from_the_folder_common_to_all(tmp_path):
    _put(tmp_path, "x/a.csv", "x/b.tsv", "y/a.csv", "y/b.tsv")
    plan = make_source(InputConfig(format="csv", path=[str(tmp_path / "x"), str(tmp_path / "y")])).plan(10, None)
    assert _left_out(plan)[0].endswith(": x/b.tsv, y/b.tsv")
