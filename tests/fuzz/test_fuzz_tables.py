"""Broken tables: every row planned has its row, or the table is refused in one line; whatever the bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guardalign.config import InputConfig
from guardalign.errors import ERROR_KINDS, InputError, UserError
from guardalign.sources import make_source, records
from tests.fuzz.corpus_tables import SECRET, lines, parquet, tables, two
from tests.fuzz.endings import AT_LENGTH, FORMATS, must_end

TABLES = tables()
BY_TURNS = [
    name if number % 10 == 0 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(TABLES)
]
"""Every tenth table goes end to end by default, all of them in the slow suite."""


@pytest.mark.parametrize("name", BY_TURNS)
def test_every_table_ends_as_rows_or_as_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    must_end(TABLES[name], name, tmp_path, capsys)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_read_as_planned_or_refused(name: str, tmp_path: Path) -> None:
    case = TABLES[name]
    found = read(tmp_path / f"{name}{case.suffix}", case.content)
    assert (found is None) == (case.rows is None)
    unread = {id_.replace("{name}", f"{name}{case.suffix}") for id_, kind in (case.rows or {}).items()}
    assert set(found or {}) == unread


def read(path: Path, content: bytes) -> dict[str, str | None] | None:
    """Error kinds by id, as a run's source gives them; None where the source is refused."""
    path.write_bytes(content)
    source = make_source(InputConfig(format=FORMATS[path.suffix], path=str(path)))  # type: ignore[arg-type]
    try:
        plan = source.plan(2, None)
        found = [row for shard in plan.shards for row in source.read(shard).to_pylist()]
    except UserError as error:
        assert "\n" not in str(error)
        # a broken quote in a header makes cells part of a column's name, which may be told
        assert path.suffix == ".csv" or SECRET not in str(error)
        return None
    assert len(found) == plan.num_rows
    for row in found:
        assert row["error_kind"] in (None, *ERROR_KINDS)
        assert row["error"] is None or row["sample_id"] in row["error"]
        # after a broken quote, a line of the cell may stand where an id does
        assert SECRET not in (row["error"] or "").replace(row["sample_id"], "")
    kinds = {row["sample_id"]: row["error_kind"] for row in found}
    assert len(kinds) == len(found), "an id stands twice"
    return kinds


# ---- any bytes at all

WIDE = two(
    label=pa.array(["x", "y"]).dictionary_encode(),
    image=pa.array([{"bytes": b"x", "path": None}, {"bytes": None, "path": "a.png"}]),
)
SOUND = {
    "plain.parquet": parquet(two(), use_dictionary=False),
    "groups.parquet": parquet(WIDE, row_group_size=1),
    "packed.parquet": parquet(WIDE, compression="zstd", data_page_version="2.0"),
    "a.csv": f'sample_id,prompt,image\na,"x, ""y""\n{SECRET}",a.png\nb,é,\n\nc,z,c.png\n'.encode(),
    "a.jsonl": lines({"sample_id": "a", "prompt": "x", "label": [1]}, {"prompt": SECRET}, b"", {"prompt": "é\x00"}),
}
Edit = tuple[float, bytes, int | None]
"""Where (as a share of the file), what to write there, how many bytes to drop; None: as many as are written."""
BYTES = st.one_of(
    st.binary(max_size=5), st.sampled_from([b'"', b"\n", b",", b"\x00", b"\xff\xff\xff\xff\x0f", b"{", b"["])
)
EDITS = st.lists(st.tuples(st.floats(0, 1), BYTES, st.none() | st.integers(0, 6)), min_size=1, max_size=5)


def mutated(whole: bytes, edits: list[Edit]) -> bytes:
    """The file with these edits."""
    for share, written, dropped in edits:
        at = int(share * len(whole))
        whole = whole[:at] + written + whole[at + (len(written) if dropped is None else dropped) :]
    return whole


def check_mutations(name: str, examples: int, folder: Path) -> Callable[[], None]:
    """Reads so many mutations of the file."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(EDITS)
    def mutations(edits: list[Edit]) -> None:
        read(folder / name, mutated(SOUND[name], edits))

    return mutations


@pytest.mark.parametrize("name", SOUND)
def test_any_bytes_are_rows_or_a_refusal(name: str, tmp_path: Path) -> None:
    check_mutations(name, 80, tmp_path)()


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_any_bytes_are_rows_or_a_refusal_at_length(name: str, tmp_path: Path) -> None:
    check_mutations(name, AT_LENGTH, tmp_path)()


# ---- limits


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_without_line_ends_is_not_read_into_memory(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 1000)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"prompt\n" + b"x" * 1001)
    with pytest.raises(InputError, match="a line of more than 1,000 bytes"):
        make_source(InputConfig(format=FORMATS[suffix], path=str(path))).plan(2, None)  # type: ignore[arg-type]
