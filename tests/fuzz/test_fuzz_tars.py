"""Hostile tars: every sample has its row, or the tar is refused in one line; nothing is followed, nothing inflates."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.corpus_tables import SECRET
from tests.fuzz.corpus_tars import BLOCK, TEXT, bombs, header, member, padded, pax, raw, tar, tars
from tests.fuzz.endings import AT_LENGTH, must_end
from tests.fuzz.test_fuzz_tables import EDITS, Edit, mutated, read

TARS = tars()
BY_TURNS = [
    name if number % 10 == 0 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(TARS)
]
"""Every tenth tar goes end to end by default, all of them in the slow suite."""


@pytest.mark.parametrize("name", BY_TURNS)
def test_every_tar_ends_as_rows_or_as_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    must_end(TARS[name], name, tmp_path, capsys)


@pytest.mark.parametrize("name", TARS)
def test_every_tar_is_read_as_planned_or_refused(name: str, tmp_path: Path) -> None:
    found, rows = read(tmp_path / f"{name}.tar", TARS[name].content), TARS[name].rows
    assert found == (None if rows is None else {id_.replace("{name}", f"{name}.tar"): rows[id_] for id_ in rows})


@pytest.mark.parametrize("name", bombs())
def test_no_header_makes_a_reader_hold_more_than_the_file(name: str, tmp_path: Path) -> None:
    content = TARS[name].content
    tracemalloc.start()
    try:
        read(tmp_path / f"{name}.tar", content)
        assert tracemalloc.get_traced_memory()[1] < 40 * len(content) + 2**23
    finally:
        tracemalloc.stop()


def test_a_member_that_leads_back_does_not_send_the_walk_round_for_ever(tmp_path: Path) -> None:
    for before in (b"", header(b"a.json", b"0", 0)):
        for size in (-BLOCK, -2 * BLOCK, -3 * BLOCK):
            assert read(tmp_path / "a.tar", raw(before, header(b"a.txt", b"0", size))) is None
            assert read(tmp_path / "a.tar", raw(before, pax({"size": str(size)}), header(b"a.txt", b"0", 0))) is None


# ---- any bytes at all

SOUND = {
    "plain.tar": tar([(member(f"{n}.{end}", TEXT), TEXT) for n in range(3) for end in ("txt", "png")]),
    "json.tar": tar([(member("a.json", b'{"prompt": "x"}'), b'{"prompt": "x"}'), (member("b.txt", TEXT), TEXT)]),
    "pax.tar": raw(
        pax({"path": "é" * 60 + ".txt", "comment": SECRET}), header(b"a.txt", b"0", len(TEXT)), padded(TEXT)
    ),
}


@st.composite
def blocks(draw: st.DrawFn) -> bytes:
    """Headers with sound checksums, of any kind and size, in any order: past where a damaged checksum is noticed."""
    kinds = st.sampled_from([b"0", b"1", b"2", b"5", b"x", b"g", b"L", b"K", b"S", b"D", b"V", b"\x00", b"7"])
    sizes = st.one_of(st.integers(-(2**62), 2**62), st.integers(-2048, 2048), st.sampled_from([0, 9, 512, 2**33 - 1]))
    names = st.sampled_from([b"a.txt", b"a.png", b"a.json", b"../b.txt", b"c", b"d.txt/"])
    bodies = st.one_of(
        st.binary(max_size=40), st.sampled_from([b"12 size=-12\n", b"11 path=a.\n", b"9999999 a=b\n", TEXT])
    )
    count = draw(st.integers(1, 6))
    made = [
        header(
            draw(names),
            draw(kinds),
            size if -(2**62) < size < 8**11 else 0,
            draw(st.sampled_from([b"", b"\xff" * 250])),
        )
        + padded(draw(bodies))
        for size in (draw(sizes) for _ in range(count))
    ]
    return raw(*made)


def check_mutations(name: str, examples: int, folder: Path) -> Callable[[], None]:
    """Reads so many mutations of the tar."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(EDITS)
    def mutations(edits: list[Edit]) -> None:
        read(folder / name, mutated(SOUND[name], edits))

    return mutations


def check_headers(examples: int, folder: Path) -> Callable[[], None]:
    """Reads so many tars of senseless headers."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(blocks())
    def headers(content: bytes) -> None:
        read(folder / "a.tar", content)

    return headers


@pytest.mark.parametrize("name", SOUND)
def test_any_bytes_are_rows_or_a_refusal(name: str, tmp_path: Path) -> None:
    check_mutations(name, 50, tmp_path)()


def test_any_headers_are_rows_or_a_refusal(tmp_path: Path) -> None:
    check_headers(100, tmp_path)()


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_any_bytes_are_rows_or_a_refusal_at_length(name: str, tmp_path: Path) -> None:
    check_mutations(name, AT_LENGTH, tmp_path)()


@pytest.mark.slow
def test_any_headers_are_rows_or_a_refusal_at_length(tmp_path: Path) -> None:
    check_headers(AT_LENGTH, tmp_path)()
