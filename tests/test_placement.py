"""A run's folder does not lie where its own files would be inputs: it is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import run

from guardalign.errors import ConfigError
from guardalign.placement import refuse_output_among_inputs


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """in/ with a file and a folder, and a link to in/."""
    (tmp_path / "in/deeper").mkdir(parents=True)
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "in/a.parquet")
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "output"),
    [
        ("in", "in"),
        ("in/", "./in/out"),
        ("in", "link/out"),
        ("link", "in/out"),
        ("file://{}/in", "in/deeper/out"),
        ("in/*.parquet", "in"),
        ("in/**/*.parquet", "in/out"),
        ("out/results", "out"),
        ("out/inputs.parquet", "out"),
        (["elsewhere.csv", "in"], "in/out"),
    ],
)
def test_an_output_that_the_inputs_listing_would_take_is_refused(
    path: str | list[str], output: str, here: Path
) -> None:
    (here / "out/results").mkdir(parents=True)
    path = path.format(here) if isinstance(path, str) else path
    with pytest.raises(ConfigError, match=r"lies inside the input .*; name another --output"):
        refuse_output_among_inputs(output, path)


@pytest.mark.parametrize(
    ("path", "output"),
    [
        ("", "in"),
        ("in", "inner"),
        ("in", "."),
        ("in/a.parquet", "in"),
        ("in/*.parquet", "in/out"),
        ("in/**a.parquet", "in"),
        ("s3://bucket/in", "in"),
        ("in", "s3://bucket/in/out"),
        ("owner/name", "out"),
    ],
)
def test_an_output_that_no_listing_takes_is_let_pass(path: str, output: str, here: Path) -> None:
    refuse_output_among_inputs(output, path)


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
def test_an_audit_into_its_own_input_ends_before_the_first_write(
    dry: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--recipe", "none", "--input.format", "parquet", "--input.path", "in", "--output", "in/out", *dry)
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "output in/out lies inside the input in; name another --output" in line
    assert not (here / "in/out").exists()
