"""A user's worst day: broken folders, odd data and odd words end as one line that says what to mend."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import run, table

from guardalign.cli import main
from guardalign.errors import ConfigError
from guardalign.settings import load_settings

FLAGS = ("--recipe", "none", "--shard_rows", 2, "--limit", 4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run(*FLAGS, "--output", out) == 0
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("guardalign: ")
    return line


def written(path: Path, **columns: object) -> tuple[object, ...]:
    pq.write_table(pa.table(columns), path)
    return ("--recipe", "none", "--input.format", "parquet", "--input.path", path)


@pytest.mark.parametrize("name", ["plan.json", "inputs.parquet"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", None])
def test_a_damaged_folder_is_refused_by_the_files_name(
    out: Path, name: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None and name == "plan.json":
        pytest.skip("a folder with results and without a plan has its own sentence")
    (out / name).unlink()
    if content is not None:
        (out / name).write_bytes(content)
    assert run(*FLAGS, "--output", out) == 2
    assert name in only_line(capsys)


def test_a_damaged_manifest_is_one_line_for_all_commands(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "run.json").write_text("{}")
    for words in (["show", str(out), "scene-000"], ["rescore", str(out), "--threshold", "1"]):
        assert main(words) == 2
        assert "run.json" in only_line(capsys)


def test_a_damaged_shard_is_named_and_mended_by_removing_it(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "results/shard-000000.parquet").write_bytes(b"broken")
    assert main(["show", str(out), "scene-000"]) == 2
    assert "shard-000000.parquet" in only_line(capsys)
    (out / "run.json").unlink()
    assert run(*FLAGS, "--output", out) == 2
    assert "remove it" in only_line(capsys)
    (out / "results/shard-000000.parquet").unlink()
    assert run(*FLAGS, "--output", out) == 0
    assert table(out).num_rows == 4


def test_shards_that_are_not_this_runs_are_named(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = out / "results"
    (out / "run.json").unlink()
    shutil.copy(results / "shard-000000.parquet", results / "shard-000077.parquet")
    assert run(*FLAGS, "--output", out) == 2
    assert "shard-000077.parquet" in only_line(capsys)
    (results / "shard-000077.parquet").rename(results / "shard-000001.parquet")
    assert run(*FLAGS, "--output", out) == 2
    assert "holds shard 0" in only_line(capsys)
    shutil.move(results / "shard-000001.parquet", results / "shard-1.parquet")
    assert run(*FLAGS, "--output", out) == 0, "a file of another name is no shard"


@pytest.mark.parametrize("place", ["file", "file/below", "foo://nowhere"])
def test_an_output_that_is_no_folder_is_one_line(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("here already")
    target = place if "://" in place else tmp_path / place
    assert run("--recipe", "none", "--limit", 1, "--output", target) == 2
    assert place in only_line(capsys)


def test_results_that_cannot_be_written_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").write_text("in the way")
    assert run("--recipe", "none", "--limit", 1, "--output", tmp_path) == 2
    assert "results" in only_line(capsys)


def test_dates_beyond_python_pass_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    days = pa.array([-(10**7), None], pa.date32())
    flags = written(tmp_path / "in.parquet", sample_id=["a", "b"], prompt=["hi", "ho"], day=days)
    assert run(*flags, "--input.passthrough", '["day"]', "--output", tmp_path / "out") == 0
    assert table(tmp_path / "out")["day"].cast(pa.int32()).to_pylist() == [-(10**7), None]
    assert main(["show", str(tmp_path / "out"), "a"]) == 0
    assert "date32" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["_problem", "_trace", "image", "shard"])
def test_a_passed_through_column_may_not_take_a_name_of_ours(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = written(tmp_path / "in.parquet", prompt=["hi"], **{name: ["x"]})
    assert run(*flags, "--input.passthrough", f'["{name}"]', "--output", tmp_path / "out") == 2
    assert name in only_line(capsys)


def test_a_parquet_column_that_stands_twice_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(both, tmp_path / "in.parquet")
    flags = ("--recipe", "none", "--input.format", "parquet", "--input.path", tmp_path / "in.parquet")
    assert run(*flags, "--output", tmp_path / "out") == 2
    assert "prompt twice" in only_line(capsys)


def test_an_id_can_neither_steer_the_terminal_nor_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample_id = "-a\x1b[2J; touch hacked"
    flags = written(tmp_path / "in.parquet", sample_id=[sample_id], prompt=["hi"])
    assert run(*flags, "--output", tmp_path / "out") == 0
    assert main(["show", str(tmp_path / "out"), "--", sample_id]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "-- '-a" in text
    assert main(["show", str(tmp_path / "out"), "a\udcff\x1b"]) == 2
    assert "\x1b" not in only_line(capsys)


@pytest.mark.parametrize("words", [["show"], ["rescore", "x"], ["rescore", "x", "--threshold", "y"]])
def test_a_wrong_call_of_show_and_rescore_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "--help" in only_line(capsys)


def test_close_thresholds_have_files_of_their_own(tmp_path: Path) -> None:
    assert run("--limit", 2, "--output", tmp_path) == 0
    for threshold in ("0.12345671", "0.12345672", "-1e-3"):
        assert main(["rescore", str(tmp_path), "--threshold", threshold]) == 0
    assert len(list((tmp_path / "rescored").iterdir())) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("input: 5", "input must hold"),
        ("cluster: []", "cluster must hold"),
        ("generation: {max_new_tokens: null}", "generation.max_new_tokens is empty"),
        ("input: {prompt_column: null}", "input.prompt_column is empty"),
        ("detector: {epsilon: null}", "detector.epsilon is empty"),
        ("a: &a\n  b: *a", "nested too deeply"),
        ("a: " + "[" * 3000, "nested too deeply"),
    ],
)
def test_no_setting_in_a_file_is_passed_over(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_settings(None, [str(tmp_path / "a.yaml")], [])


@pytest.mark.parametrize("flags", [("--detector", "none"), ("--input", '{"format": "csv"}'), ("--detector={}",)])
def test_a_group_of_settings_is_no_flag(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="group of settings"):
        load_settings(None, [], flags)
