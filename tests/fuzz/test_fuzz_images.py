"""Hostile pictures: each ends as an answered row or an error row, silently, within bounded memory; whatever the bytes.

What a sound picture becomes, and mutations of sound files, are in `tests/core/test_images.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guardalign.core import images
from guardalign.core.images import MOST_PAGES, decode
from guardalign.errors import RowError
from tests.fuzz.corpus_pictures import (
    SCENE,
    TOO_LARGE,
    UNREADABLE,
    chunk,
    encoded,
    flood,
    grey_tiff,
    pictures,
    png,
    small_png,
    tiff,
)
from tests.fuzz.endings import AT_LENGTH, rows_must_be

PICTURES = pictures()
LIMIT = 1_000_000
MEBIBYTE = 2**20

AUDIT_AND_MEASURE = """
import resource, sys
from guardalign.cli import main
def audit(path):
    code = main(["audit", "--recipe", "guardalign", "--engine", "local", "--cluster.isolated", "false",
        "--input.format", "parquet", "--input.path", path, "--output", path + ".out", "--self_check", "false",
        "--generation.max_new_tokens", "2", "--images.keep", "all"])
    assert code == 0, code
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sound = audit(sys.argv[1])
print("GREW", (audit(sys.argv[2]) - sound) // 1024)
"""


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """All pictures through one audit: its results, growth of peak memory over 32 sound ones [MiB], stderr."""
    folder = tmp_path_factory.mktemp("pictures")
    sound = {f"sound-{number}": encoded(SCENE, "PNG") for number in range(32)}
    for name, cells in (("sound", sound), ("hostile", {name: case[0] for name, case in PICTURES.items()})):
        columns = {"sample_id": list(cells), "image": pa.array(cells.values(), pa.binary())}
        pq.write_table(pa.table(columns | {"prompt": ["What is shown?"] * len(cells)}), folder / f"{name}.parquet")
    words = [sys.executable, "-c", AUDIT_AND_MEASURE, str(folder / "sound.parquet"), str(folder / "hostile.parquet")]
    ended = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder / "hostile.parquet.out", int(ended.stdout.split("GREW ")[1]), ended.stderr


def test_every_picture_ends_as_a_row_in_one_run(audited: tuple[Path, int, str]) -> None:
    rows_must_be(audited[0], {name: kind for name, (_, kind) in PICTURES.items()})


def test_no_bomb_goes_off(audited: tuple[Path, int, str]) -> None:
    assert audited[1] < 500, "MiB of peak memory above that of 32 sound pictures"


def test_neither_pillow_nor_libtiff_says_a_word(audited: tuple[Path, int, str]) -> None:
    assert audited[2] == ""


# ---- any fields behind sound checksums

CHUNKS = st.sampled_from(
    b"IHDR PLTE IDAT tRNS gAMA cHRM iCCP tEXt zTXt iTXt eXIf acTL fcTL fdAT pHYs IEND zzzz ABCD".split()
)
SMALL_FLOOD = flood(8 * MEBIBYTE)
BODIES = st.one_of(
    st.binary(max_size=30),
    st.binary(max_size=20).map(lambda body: b"k\x00\x00" + zlib.compress(body)),
    st.binary(max_size=20).map(lambda body: b"\x00\x00\x00\x01" + zlib.compress(body)),
    st.sampled_from([b"", b"k\x00\x00" + SMALL_FLOOD, b"k\x00\x01\x00\x00\x00" + SMALL_FLOOD, SMALL_FLOOD]),
)
PNGS = st.builds(
    lambda size, depth, colour, before, pixels: png(
        *size, pixels, depth, colour, b"".join(chunk(kind, body) for kind, body in before)
    ),
    st.tuples(*[st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1))] * 2),
    st.sampled_from([0, 1, 2, 4, 8, 16, 99]),
    st.sampled_from([0, 2, 3, 4, 6, 7]),
    st.lists(st.tuples(CHUNKS, BODIES), max_size=4),
    BODIES | st.integers(0, 9000).map(lambda count: zlib.compress(bytes(count))),
)
VALUES = st.one_of(st.integers(0, 20), st.integers(0, 2**32 - 1), st.sampled_from([255, 256, 65535, 65536, 2**31]))
TAGS = st.sampled_from([254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325,
                        338, 339, 347, 530, 532, 700, 33723, 34377, 34665, 34675, 34853])  # fmt: skip
TIFFS = st.builds(
    tiff,
    st.dictionaries(TAGS, st.tuples(st.integers(0, 14), VALUES, VALUES), max_size=12).map(
        lambda own: {256: (4, 1, 9), 257: (4, 1, 9), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1),
                     273: (4, 1, 8), 278: (4, 1, 9), 279: (4, 1, 81)} | own
    ),
    st.sampled_from([bytes(81), zlib.compress(bytes(81)), SMALL_FLOOD]),
    st.sampled_from([0, 8, 89]),
)  # fmt: skip
EXIFS = st.one_of(
    st.binary(max_size=60), st.dictionaries(TAGS, st.tuples(st.integers(0, 14), VALUES, VALUES)).map(tiff)
)
FIELDS = {
    "png": PNGS,
    "tiff": TIFFS,
    "jpeg": EXIFS.map(lambda block: encoded(SCENE, "JPEG", exif=b"Exif\x00\x00" + block)),
}


def check_fields(name: str, examples: int) -> Callable[[], None]:
    """Decodes so many files of senseless fields."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(FIELDS[name])
    def fields(encoded_: bytes) -> None:
        try:
            decoded = decode(encoded_, LIMIT, "a1")
        except RowError as error:
            assert error.kind in (UNREADABLE, TOO_LARGE) and "a1" in str(error) and "\n" not in str(error)
        else:
            assert decoded.picture.mode == "RGB" and decoded.width * decoded.height <= LIMIT

    return fields


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.filterwarnings("ignore")  # pytest shows what the package's own filter hides
def test_any_fields_are_a_picture_or_a_row_error(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    check_fields(name, 150)()
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_any_fields_are_a_picture_or_a_row_error_at_length(name: str) -> None:
    check_fields(name, AT_LENGTH)()


# ---- limits


def test_a_tile_counts_like_a_picture() -> None:
    small = grey_tiff(8, 8, zlib.compress(bytes(16 * 16)), 8, (16, 16))
    assert decode(small, 16 * 16, "a1").width == 8
    with pytest.raises(RowError, match="a tile of 16 x 16 pixels; at most 255 are read") as caught:
        decode(small, 16 * 16 - 1, "a1")
    assert caught.value.kind == TOO_LARGE


def test_pages_are_counted_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [SCENE.rotate(turn) for turn in range(5)]
    whole = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert decode(whole, LIMIT, "a1").num_frames == 5 < MOST_PAGES
    monkeypatch.setattr(images, "MOST_PAGES", 3)
    counted = decode(whole, LIMIT, "a1")
    assert (counted.num_frames, counted.picture.tobytes()) == (3, SCENE.tobytes())


def test_text_beside_a_picture_may_be_long() -> None:
    assert decode(small_png(chunk(b"tEXt", b"k\x00" + b"a" * (16 * MEBIBYTE))), LIMIT, "a1").width == 2
