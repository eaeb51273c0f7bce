"""WebDataset tars: samples, offsets, and tars that mean harm."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from guardalign.config import InputConfig
from guardalign.errors import ConfigError, InputError
from guardalign.sources import make_source
from guardalign.sources.endings import IMAGE_SUFFIXES

Members = list[tuple[str, bytes]]


def _tar(members: Members, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def _write(path: Path, members: Members) -> Path:
    path.write_bytes(_tar(members))
    return path


def _config(path: Path | str, **options) -> InputConfig:
    return InputConfig(format="webdataset", path=str(path), **options)


def test_a_sample_is_the_members_of_one_key(tmp_path, png, read_all):
    record = {"prompt": "from json", "category": "c", "label": 1, "sample_id": "own", "extra": [1]}
    members = [
        ("000.png", png(0)),
        ("000.txt", "Grüße".encode()),
        ("a/b.c/001.JPG", png(1)),
        ("a/b.c/001.json", json.dumps(record).encode()),
        ("a/b.c/001.txt", b"from json\n"),
        ("002.txt", b"text only"),
        ("003.webp", png(3)),
        ("003.cls", b"4"),
        ("004.seg.png", png(4)),
        ("004.txt", b"x"),
    ]
    plan, rows = read_all(_config(_write(tmp_path / "train.tar", members), passthrough=["extra"]), 2)
    assert [row["sample_id"] for row in rows] == ["train.tar#000", "own", *(f"train.tar#00{i}" for i in (2, 3, 4))]
    assert [row["source"] for row in rows][1] == "train.tar#a/b.c/001"
    assert [row["prompt"] for row in rows] == ["Grüße", "from json", "text only", None, "x"]
    assert [row["image"] for row in rows] == [png(0), png(1), None, png(3), png(4)]
    assert (rows[1]["sample_category"], rows[1]["label"], rows[1]["extra"]) == ("c", "1", "[1]")
    assert not any(row["error"] for row in rows)
    assert [file.path for file in plan.files] == ["train.tar"]


_NAME = st.text("abc/é", min_size=1, max_size=130).map(lambda text: "k" + text.strip("/").replace("//", "/"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.lists(st.lists(_NAME, max_size=6, unique=True), min_size=1, max_size=3).filter(any),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    shard_rows=st.integers(1, 9),
    limit=st.integers(1, 9),
)
def test_shards_of_any_size_give_the_same_rows(tmp_path_factory, read_all, keys, form, shard_rows, limit):
    folder = tmp_path_factory.mktemp("tars")
    for number, names in enumerate(keys):
        members = [part for name in names for part in ((f"{name}.png", name.encode()), (f"{name}.txt", name.encode()))]
        (folder / f"{number}.tar").write_bytes(_tar(members, form))
    expected = [(f"{number}.tar#{name}", name) for number, names in enumerate(keys) for name in names]
    plan, rows = read_all(_config(folder), shard_rows, limit)
    assert [(row["source"], row["prompt"]) for row in rows] == expected[:limit]
    assert [row["image"].decode() for row in rows] == [name for _, name in expected[:limit]]
    assert len(plan.files) == len(keys)


def test_links_devices_and_names_that_lead_out_are_error_rows_and_never_followed(tmp_path, png, read_all):
    (tmp_path / "secret.png").write_bytes(b"secret")
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind, target in (
            ("good.png", tarfile.REGTYPE, ""),
            ("symlink.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")),
            ("hardlink.png", tarfile.LNKTYPE, "good.png"),
            ("device.png", tarfile.CHRTYPE, ""),
            ("pipe.png", tarfile.FIFOTYPE, ""),
            ("../../up.png", tarfile.REGTYPE, ""),
            ("/etc/absolute.png", tarfile.REGTYPE, ""),
            ("last.png", tarfile.REGTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            member.size = len(png(1)) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(png(1)))
            text = tarfile.TarInfo(name.replace(".png", ".txt"))
            tar.addfile(text)
    before = sorted(tmp_path.rglob("*"))
    _, rows = read_all(_config(path), 3)
    assert [row["error_kind"] for row in rows] == [None, *["row_unreadable"] * 6, None]
    assert [row["image"] for row in rows] == [png(1), *[None] * 6, png(1)]
    assert sorted(tmp_path.rglob("*")) == before


def test_broken_words_are_error_rows(tmp_path, read_all):
    members = [
        ("0.json", b"{"), ("1.json", b"[]"), ("2.txt", b"\xff"), ("3.json", b'{"prompt": ["x"]}'), ("4.txt", b"fine"),
        ("5.json", b'{"prompt": "\\udc00"}'), ("6.png", b"x"), ("6.jpg", b"x"), ("6.txt", b"x"),
    ]  # fmt: skip
    _, rows = read_all(_config(_write(tmp_path / "a.tar", members)))
    kinds = [None if i == 4 else "row_unreadable" for i in range(7)]
    assert [row["error_kind"] for row in rows] == kinds
    assert [row["sample_id"] for row in rows] == [f"a.tar#{i}" for i in range(7)]


def test_the_picture_is_chosen_by_its_ending_where_there_are_several(tmp_path, read_all):
    path = _write(tmp_path / "a.tar", [("6.png", b"p"), ("6.mask.png", b"m"), ("6.jpg", b"j"), ("6.txt", b"x")])
    for ending, picture in (("png", b"p"), ("mask.png", b"m")):
        assert read_all(_config(path, image_column=ending))[1][0]["image"] == picture
    with pytest.raises(InputError, match=r"image_column names the column tiff, which the data set lacks"):
        make_source(_config(path, image_column="tiff")).plan(2, None)


def test_whatever_ends_as_a_picture_is_one_and_pillow_has_no_ending_that_is_missing(tmp_path, png, read_all):
    assert set(Image.registered_extensions()) <= set(IMAGE_SUFFIXES)
    assert {".heic", ".heif", ".jxl", ".jp2", ".svg", ".pdf", ".psd"} <= set(IMAGE_SUFFIXES)
    endings = [*IMAGE_SUFFIXES, ".TIF", ".image", ".left.png"]
    members = [
        (f"{i}{end}", content) for i, end in enumerate(endings) for end, content in ((end, png(i)), (".txt", b"x"))
    ]
    plan, rows = read_all(_config(_write(tmp_path / "a.tar", members)), 50)
    assert [row["image"] for row in rows] == [png(i) for i in range(len(endings))]
    assert not any("left out" in note or "column image" in note for note in plan.notes)


@pytest.mark.parametrize("endings", [("png", "tif"), ("heic", "svg"), ("left.png", "right.png"), ("jxl", "jxl")])
def test_two_pictures_are_refused_whatever_their_endings(tmp_path, read_all, endings):
    members = [("0.txt", b"x"), *((f"0.{ending}", b"p") for ending in endings)]
    _, [row] = read_all(_config(_write(tmp_path / "a.tar", members)))
    assert (row["error_kind"], row["image"]) == ("row_unreadable", None)


def test_members_of_unknown_endings_are_counted_and_those_of_known_side_files_are_not(tmp_path, read_all):
    members = [
        ("0.bin", b"p"), ("0.txt", b"x"), ("1.img", b"p"), ("1.txt", b"x"), ("2.bin", b"p"), ("2.jpg", b"p"),
        ("3.cls", b"3"), ("3.txt", b"x"), ("4.png", b"p"), ("4.mask.png", b"m"),
    ]  # fmt: skip
    plan, rows = read_all(_config(_write(tmp_path / "a.tar", members)))
    assert [row["image"] for row in rows] == [None, None, b"p", None, b"p"]
    (note,) = (note for note in plan.notes if "left out" in note)
    assert note.startswith("4 tar members with unknown endings (.bin, .img, .mask.png) are left out")
    plan, _ = read_all(_config(_write(tmp_path / "b.tar", [("0.txt", b"x"), ("0.npy", b"x")])))
    assert any(note.startswith("1 tar member with the unknown ending .npy is left out") for note in plan.notes)


def test_a_chosen_ending_leaves_no_picture_of_another_sample_out_without_a_word(tmp_path, read_all):
    members = [("0.tif", b"t"), ("0.txt", b"x"), ("1.png", b"p"), ("1.txt", b"x"), ("2.tif", b"t"), ("2.png", b"p")]
    plan, rows = read_all(_config(_write(tmp_path / "a.tar", members), image_column="tif"))
    assert [row["image"] for row in rows] == [b"t", None, b"t"]
    (note,) = (note for note in plan.notes if "left out" in note)
    assert note.startswith("1 tar member with the picture ending .png is left out: without the .tif")
    both = _write(tmp_path / "both.tar", [*members[4:], ("2.txt", b"x")])
    assert not any("left out" in note for note in read_all(_config(both, image_column="tif"))[0].notes)


def test_a_field_of_the_json_is_no_picture(tmp_path):
    path = _write(tmp_path / "a.tar", [("0.json", b'{"prompt": "x", "photo": "a.png", "image": "a.png"}')])
    with pytest.raises(InputError, match="image_column names the column photo"):
        make_source(_config(path, image_column="photo")).plan(2, None)
    notes = make_source(_config(path)).plan(2, None).notes
    assert "column image is absent: every row is a text-only prompt" in notes


def test_a_prompt_in_words_and_another_in_the_json_is_an_error_row(tmp_path, read_all):
    same, other = b'{"prompt": "x"}', b'{"prompt": "y", "caption": "z"}'
    members = [
        ("0.json", same), ("0.txt", b"\xef\xbb\xbfx\n"), ("1.json", other), ("1.txt", b"x"), ("2.txt", b"x"),
        ("2.json", b'{"prompt": ""}'), ("3.json", b'{"prompt": null}'), ("3.txt", b"x"),
    ]  # fmt: skip
    path = _write(tmp_path / "a.tar", members)
    _, rows = read_all(_config(path))
    assert [row["error_kind"] for row in rows] == [None, "row_unreadable", "row_unreadable", None]
    assert [row["prompt"] for row in rows] == ["x", None, None, "x"]
    sentence = "sample a.tar#1 has one prompt in its .txt and another in its .json; keep one of them"
    assert rows[1]["error"] == sentence
    assert read_all(_config(path, prompt_column="caption"))[1][1]["prompt"] == "z"


def test_member_names_that_are_no_utf8_still_make_ids(tmp_path, read_all):
    path = tmp_path / "a.tar"
    path.write_bytes(_tar([(os.fsdecode(b"k\xff.txt"), b"x")], tarfile.GNU_FORMAT))
    assert [row["sample_id"] for row in read_all(_config(path))[1]] == ["a.tar#k\\udcff"]


def test_what_is_no_sample_is_passed_by_and_named(tmp_path, read_all):
    members = [("._0.txt", b"x"), ("README", b"x"), ("__meta__.txt", b"x"), ("0.txt", b"yes"), ("d/.hidden", b"")]
    plan, rows = read_all(_config(_write(tmp_path / "a.tar", members)))
    assert [row["prompt"] for row in rows] == ["yes"]
    (note,) = (note for note in plan.notes if "no sample" in note)
    assert note.startswith("4 tar members") and note.endswith("._0.txt, README, __meta__.txt, d/.hidden")


def test_absent_columns_are_named_and_the_caption_of_a_json_can_be_the_prompt(tmp_path, read_all):
    path = _write(tmp_path / "a.tar", [("0.json", b'{"caption": "c"}'), ("1.json", b'{"caption": "d"}')])
    with pytest.raises(
        InputError, match="names the column prompt, which the data set lacks; its columns: caption, json"
    ):
        make_source(_config(path)).plan(2, None)
    _, rows = read_all(_config(path, prompt_column="caption"))
    assert [row["prompt"] for row in rows] == ["c", "d"]


def test_keys_and_ids_stand_once(tmp_path):
    split = [("a.txt", b"1"), ("b.txt", b"2"), ("a.png", b"3")]
    with pytest.raises(InputError, match=r"'a\.tar#a' stands twice"):
        make_source(_config(_write(tmp_path / "a.tar", split))).plan(2, None)
    same = [("a.json", b'{"prompt": "", "sample_id": "x"}'), ("b.json", b'{"prompt": "", "sample_id": "x"}')]
    with pytest.raises(InputError, match=r"sample id 'x' stands twice: a\.tar#a and a\.tar#b"):
        make_source(_config(_write(tmp_path / "a.tar", same))).plan(2, None)


def test_damaged_and_compressed_tars_are_named(tmp_path):
    good = _tar([(f"{i}.txt", b"x" * 600) for i in range(9)])
    damages = {
        "cut.tar": good[:4000],
        "cut_header.tar": good[: 1536 * 2 + 200],
        "middle.tar": good[:3072] + b"\x01" * 512 + good[3584:],
        "text.tar": b"no tar" * 1000,
        "gz.tar": b"\x1f\x8b" + bytes(2000),
        "empty.tar": b"",
    }
    for name, content in damages.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            make_source(_config(tmp_path / name)).plan(2, None)
    with pytest.raises(InputError, match=r"gz\.tar is compressed \(gzip\); decompress it first"):
        make_source(_config(tmp_path / "gz.tar")).plan(2, None)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.tar\.gz is compressed"):
        make_source(_config(tmp_path / "a.tar.gz")).plan(2, None)
    (tmp_path / "nothing.tar").write_bytes(_tar([]))
    with pytest.raises(InputError, match="nothing to audit"):
        make_source(_config(tmp_path / "nothing.tar")).plan(2, None)
    with pytest.raises(ConfigError, match=r"input\.image_root has no meaning for format webdataset"):
        make_source(_config(tmp_path, image_root="x"))


def test_the_plan_reads_no_picture_and_a_shard_only_its_own(counting, read_all):
    members = [part for i in range(9) for part in ((f"{i}.png", bytes([i]) * 1_000_000), (f"{i}.txt", b"x"))]
    counting().pipe({"/in/a.tar": _tar(members)})
    source = make_source(_config("counting://in"))
    plan = source.plan(2, None)
    assert 0 < counting.num_bytes_read < 100_000
    counting.num_bytes_read = 0
    table = source.read(plan.shards[3])
    assert table["image"].to_pylist() == [bytes([i]) * 1_000_000 for i in (6, 7)]
    assert counting.num_bytes_read < 2_100_000


def test_memory_uris(memory, png, read_all):
    memory.pipe({"/in/x/a.tar": _tar([("0.png", png(1)), ("0.txt", b"x")]), "/in/y/a.tar": _tar([("0.txt", b"y")])})
    _, rows = read_all(_config("memory://in"))
    assert [row["source"] for row in rows] == ["x/a.tar#0", "y/a.tar#0"]
    assert [row["image"] for row in rows] == [png(1), None]
