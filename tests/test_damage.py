"""A run whose files were damaged says which one, and what to do about it: whatever reads it, and before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from runs import rows, run

from guardalign.cli import main
from guardalign.errors import ResumeError
from guardalign.results import RunFolder, shard_name
from guardalign.schema import with_columns
from guardalign.seals import sha256

SHARD = shard_name(1)
FLAGS = ("--recipe", "guardalign-detect-only", "--limit", 12, "--shard_rows", 4)
MEND = f"{SHARD} is missing or damaged; remove it and run its audit again"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("damage") / "out"
    assert run(*FLAGS, "--output", out) == 0
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def unfinished(out: Path) -> Path:
    (out / "run.json").unlink()
    (out / shard_name(2)).unlink()
    return out


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def end_of(file: Path, column: str) -> int:
    """The last byte of a column's last page."""
    group = pq.ParquetFile(file).metadata.row_group(0)
    chunks = [group.column(place) for place in range(group.num_columns)]
    (chunk,) = [each for each in chunks if each.path_in_schema == column]
    return int((chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 1)


def changed_by_hand(file: Path) -> None:
    """Another answer, all metadata kept."""
    table = pq.read_table(file)
    answers = ["No.", *table["response"].to_pylist()[1:]]
    pq.write_table(with_columns(table, {"response": answers}).replace_schema_metadata(table.schema.metadata), file)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a page": lambda file: flip(file, end_of(file, "response")),
    "the footer": lambda file: flip(file, file.stat().st_size - 400),
    "the middle": lambda file: flip(file, file.stat().st_size // 2),
    "by hand": changed_by_hand,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-50]) and None,
    "empty": lambda file: file.write_bytes(b"") and None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_not_resumed_upon(
    damage: str, unfinished: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[damage](unfinished / SHARD)
    plan = (unfinished / "plan.json").read_bytes()
    assert run(*FLAGS, "--output", unfinished) == 2
    assert capsys.readouterr().err.strip().endswith(MEND)
    assert (unfinished / "plan.json").read_bytes() == plan, "before any work"
    assert not (unfinished / "run.json").exists() and not (unfinished / shard_name(2)).exists()


def test_a_damaged_shard_that_is_removed_is_done_again(unfinished: Path, finished: Path) -> None:
    (unfinished / SHARD).unlink()
    assert run(*FLAGS, "--output", unfinished) == 0
    assert rows(unfinished) == rows(finished)
    assert main(["verify", str(unfinished), "--sample", "0"]) == 0


def test_a_shard_that_run_json_has_blessed_is_found_by_its_seal(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As before there were seals: run.json holds the damaged file's own checksum."""
    changed_by_hand(out / SHARD)
    folder = RunFolder(str(out))
    manifest = folder.read_json("run.json")
    content = (out / SHARD).read_bytes()
    manifest["files"][1] |= {"sha256": sha256(content), "num_bytes": len(content)}
    folder.write_sealed("run.json", manifest)
    assert main(["verify", str(out), "--sample", "0"]) != 0
    assert f"{SHARD} is damaged: its bytes are not those of its seal" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_finished_run_with_a_shard_of_another_size_is_not_complete(
    damage: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[damage](out / SHARD)
    assert run(*FLAGS, "--output", out) == 2
    said = capsys.readouterr()
    assert said.err.strip().endswith(MEND) and "nothing to do" not in said.out


def test_run_json_holds_every_files_size(finished: Path) -> None:
    listed = json.loads((finished / "run.json").read_text())["files"]
    assert [each["num_bytes"] for each in listed] == [(finished / each["name"]).stat().st_size for each in listed]


COMMANDS = {
    "rescore": ["--threshold", "0.5"],
    "calibrate": ["--all_benign", "--false_alarm_rate", "0.5", "--from"],
    "show": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flipped_bit_in_what_a_command_reads_is_one_line(
    command: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = pq.read_table(out / SHARD)["sample_id"][-1].as_py()
    flip(out / SHARD, end_of(out / SHARD, "image_score"))
    more = {"show": [last], "calibrate": ["--output", str(tmp_path / "t.yaml")]}.get(command, [])
    words = [command, *COMMANDS[command], str(out), *more]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith(MEND)
    assert not (out / "rescored").exists() and not (tmp_path / "t.yaml").exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def other_count(file: Path) -> None:
    content = file.read_bytes()
    assert b'"rows": 12' in content
    file.write_bytes(content.replace(b'"rows": 12', b'"rows": 13', 1))


@pytest.mark.parametrize("damage", [cut, other_count])
def test_a_damaged_run_json_says_how_it_comes_back(
    damage: Callable[[Path], None], out: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(out / "run.json")
    assert run(*FLAGS, "--output", out) == 2
    said = capsys.readouterr()
    advice = "run.json is damaged; remove it and type the audit again: it is written anew from the shards"
    assert said.err.strip().endswith(advice) and "nothing to do" not in said.out
    if damage is cut:
        assert main(["rescore", str(out), "--threshold", "0.5"]) == 2
        assert capsys.readouterr().err.strip().endswith(advice)
    (out / "run.json").unlink()
    assert run(*FLAGS, "--output", out) == 0
    before, now = (json.loads((folder / "run.json").read_text()) for folder in (finished, out))
    assert (now["files"], now["totals"]) == (before["files"], before["totals"])
    assert now["this_run"]["totals"]["rows"] == 0


@pytest.mark.parametrize("state", ["out", "unfinished"])
def test_a_damaged_plan_is_not_taken_for_another_run(
    state: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    out: Path = request.getfixturevalue(state)
    content = (out / "plan.json").read_bytes()
    (out / "plan.json").write_bytes(content.replace(b"category_column", b"bategory_column", 1))
    assert run(*FLAGS, "--output", out) == 2
    assert "plan.json is missing or damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("threshold", "many"), [("7", "every"), ("0", "no"), ("0.5", None)])
def test_a_threshold_off_the_scores_scale_is_warned_of(
    threshold: str, many: str | None, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rescore", str(out), "--threshold", threshold]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    sentence = f"flags {many} picture: it is not on the scale of detector.score=safe_probability"
    assert first == (f"warning    --threshold {threshold} {sentence}" if many else f"threshold  {threshold}")


def test_reading_columns_of_a_damaged_shard_gives_their_values_or_an_error(out: Path) -> None:
    """Wherever the bit: in the column's own pages, its name, and every so often in all else."""
    folder, wanted = RunFolder(str(out)), ["sample_id", "image_score", "flagged"]
    whole, content = folder.read_table(SHARD, wanted), (out / SHARD).read_bytes()
    end, name = end_of(out / SHARD, "image_score"), content.rindex(b"image_score")
    spots = [*range(end - 60, end + 1), *range(name, name + 11), *range(0, len(content), 401)]
    num_wrong = 0
    for at in spots:
        (out / SHARD).write_bytes(content)
        flip(out / SHARD, at)
        try:
            assert folder.read_table(SHARD, wanted).equals(whole), at
        except ResumeError as error:
            assert str(error).endswith(MEND)
            num_wrong += 1
    assert num_wrong > 40, "most of a page is its values; where pages end differs from run to run"
