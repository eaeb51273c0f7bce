"""One audit, end to end, on the embedded models: every input ends as one row, whatever happens on the way."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from runs import NUM_ROWS, committed, kill_when, rows, run, start, table

from guardalign.audit import refuse_double_rows
from guardalign.cli import main
from guardalign.errors import RunFailedError
from guardalign.micro import NOTICE
from guardalign.results import RunFolder
from guardalign.summary import rate


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over the embedded sample in shards of 8."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run("--shard_rows", 8, "--output", out) == 0
    return out


def pictures(folder: Path, good: int, bad: int) -> Path:
    """A CSV of `good` pictures and `bad` broken ones."""
    lines = ["sample_id,image,prompt"]
    breakages = [b"", b"not a picture", None]
    for number in range(good + bad):
        name = f"{number:03d}.png"
        buffer = io.BytesIO()
        Image.new("RGB", (40 + number, 50), (number, 90, 200)).save(buffer, "PNG")
        content: bytes | None = buffer.getvalue()
        if number % 6 == 5 and bad:
            kind = (*breakages, content[: len(content) // 2])[number // 6 % 4]  # type: ignore[index]
            content = kind
        if content is not None:
            (folder / name).write_bytes(content)
        lines.append(f"p{number},{name},What is this?")
    (folder / "prompts.csv").write_text("\n".join(lines) + "\n")
    return folder / "prompts.csv"


def test_every_input_has_one_complete_row(undisturbed: Path) -> None:
    found = rows(undisturbed)
    sample = pq.read_table(Path(__file__).parents[1] / "guardalign/micro/sample.parquet")
    assert list(found) == sample["sample_id"].to_pylist()[:NUM_ROWS]
    for row in found.values():
        assert row["error"] is None
        assert row["stop_reason"] in ("end", "length")
        assert row["response"] is not None
        assert (row["patch_scores"] is None) == (row["image_sha256"] is None)
        assert row["unsafe"] is None
        if row["patch_scores"] is not None:
            assert len(row["patch_scores"]) == row["patch_grid"][0] * row["patch_grid"][1]
            assert row["flagged"] == (min(row["patch_scores"]) < row["threshold"])
            assert (row["masked_fraction"] > 0) == bool(row["unsafe_patches"])


def test_run_json_tells_the_whole_run(undisturbed: Path) -> None:
    manifest = json.loads((undisturbed / "run.json").read_text())
    totals = manifest["totals"]
    assert totals["rows"] == NUM_ROWS
    found = list(rows(undisturbed).values())
    masked = [row for row in found if row["masked_fraction"]]
    assert totals["masked"] == len(masked) == totals["flagged"] > 0
    assert totals["masked_patches"] == sum(len(row["unsafe_patches"]) for row in masked) >= len(masked)
    assert totals["refused"] == sum(row["refused"] is True for row in found)
    assert manifest["counters"]["clip_loads"] == manifest["counters"]["lvlm_loads"] == 1
    assert manifest["counters"]["lvlm_forward_calls"] > 8
    run_folder = RunFolder(str(undisturbed))
    for file in manifest["files"]:
        assert run_folder.receipt(file["name"]).sha256 == file["sha256"]
    assert manifest["versions"]["torch"]
    assert manifest["fingerprint"]["clip"]["weights"]


def test_the_embedded_models_say_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--recipe", "none", "--limit", 4, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out.splitlines()[0] == NOTICE


def test_the_summary_sets_flags_and_refusals_against_the_labels(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--output", tmp_path / "out", "--generation.max_new_tokens", 16) == 0
    lines = capsys.readouterr().out.splitlines()
    found = table(tmp_path / "out").to_pylist()
    for label in ("benign", "unsafe"):
        flags = [row["flagged"] for row in found if row["label"] == label and row["flagged"] is not None]
        assert f"  label {label}: flagged {rate(sum(flags), len(flags))}" in lines
        refusals = [row["refused"] for row in found if row["label"] == label]
        assert f"  label {label}: refused {rate(sum(refusals), len(refusals))}" in lines


def test_ray_gives_the_rows_of_the_loop(undisturbed: Path, tmp_path: Path, ray_cluster: None) -> None:
    out = tmp_path / "out"
    flags = ("--shard_rows", 8, "--generation.max_new_tokens", 4, "--cluster.generate_actors", 2)
    assert run(*flags, "--output", out, quick=False) == 0
    assert rows(out) == rows(undisturbed)


@pytest.mark.slow
def test_a_users_mistake_in_a_worker_is_one_line(
    tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--defense.layers", "[99]", "--output", tmp_path / "out", quick=False) == 2
    assert "99" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_killed_run_resumes_to_equal_rows(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--shard_rows", 8, "--generation.max_new_tokens", 4, "--engine", "local", "--output", out)
    counts = [kill_when(start(*flags), out, shards) for shards in (1, 3)]
    assert counts[-1] < 8, "the run was over before it was killed"
    assert not (out / "run.json").exists()
    assert run("--shard_rows", 8, "--output", out) == 0
    assert committed(out) == 8
    assert rows(out) == rows(undisturbed)
    assert not list(out.rglob("*.tmp"))
    assert set(table(out)["attempts"].to_pylist()) == {1, 2, 3}


def test_a_finished_run_has_nothing_to_do(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (undisturbed / "run.json").read_bytes()
    assert run("--shard_rows", 8, "--output", undisturbed) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (undisturbed / "run.json").read_bytes() == before


def test_a_lost_shard_is_done_again(undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    (out / "results/shard-000002.parquet").unlink()
    assert run("--shard_rows", 8, "--output", out) == 0
    assert rows(out) == rows(undisturbed)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--defense.gamma", 0.5), "defense.gamma was 1.0, is now 0.5"),
        (("--detector.threshold", 0.25), "detector.threshold was 0.9, is now 0.25"),
        (("--limit", 9), "limit was 64, is now 9"),
    ],
)
def test_a_resume_that_would_mix_results_is_refused(
    undisturbed: Path, flags: tuple[object, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--shard_rows", 8, "--output", undisturbed, *flags) == 2
    assert words in capsys.readouterr().err


def test_a_run_that_failed_before_its_first_shard_takes_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--limit", 4, "--output", tmp_path, "--generation.max_new_tokens", 10**6) == 2
    assert "leaves no room for a prompt" in capsys.readouterr().err
    assert (tmp_path / "plan.json").exists()
    assert run("--limit", 4, "--output", tmp_path) == 0
    assert table(tmp_path)["attempts"].to_pylist() == [1] * 4


def test_one_more_input_file_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    sample = pq.read_table(Path(__file__).parents[1] / "guardalign/micro/sample.parquet")
    pq.write_table(sample.slice(0, 4), source / "a.parquet")
    flags = ("--recipe", "none", "--input.format", "parquet", "--input.path", source, "--output", tmp_path / "out")
    assert run(*flags) == 0
    pq.write_table(sample.slice(4, 4), source / "b.parquet")
    assert run(*flags) == 2
    assert "b.parquet is new" in capsys.readouterr().err


def test_bad_files_are_rows_with_the_right_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pictures(tmp_path, 50, 10)
    flags = ("--input.format", "csv", "--input.path", path, "--output", tmp_path / "out")
    assert run(*flags) == 0
    found = rows(tmp_path / "out")
    assert len(found) == 60
    bad = {name: row for name, row in found.items() if row["error"] is not None}
    assert set(bad) == {f"p{number}" for number in range(60) if number % 6 == 5}
    assert {row["error_kind"] for row in bad.values()} == {"image_missing", "image_unreadable"}
    assert all(name in row["error"] and row["response"] is None for name, row in bad.items())
    assert run(*flags, "--max_error_fraction", 0.1) == 1
    assert "10 of 60 rows" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["none", "prefix", "guardalign-detect-only", "guardalign-calibrate-only"])
def test_every_recipe_runs_offline_as_it_is(recipe: str, tmp_path: Path) -> None:
    assert run("--recipe", recipe, "--limit", 6, "--output", tmp_path / "out") == 0
    found = rows(tmp_path / "out")
    assert len(found) == 6
    detects = "detect" in recipe
    assert all((row["patch_scores"] is not None) == detects for row in found.values())


def test_the_summary_counts_the_defenses_own_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--recipe", "ecso", "--limit", 6, "--output", tmp_path / "out") == 0
    verdicts = [row["defense_flagged"] for row in rows(tmp_path / "out").values()]
    decided = [verdict for verdict in verdicts if verdict is not None]
    assert decided and f"defense   flagged {sum(decided)} of {len(decided)} " in capsys.readouterr().out


@pytest.mark.slow
def test_the_local_engine_needs_no_ray(tmp_path: Path) -> None:
    begin = "import os, sys; sys.modules['ray'] = None; from guardalign.cli import main; "
    code = begin + "code = main(sys.argv[1:]); sys.stdout.flush(); os._exit(code)"  # not a test of interpreter teardown
    flags = ["--engine", "local", "--limit", "2", "--generation.max_new_tokens", "2", "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, "audit", *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    assert len(rows(tmp_path / "out")) == 2


def test_rows_that_stand_twice_fail_the_run(undisturbed: Path, tmp_path: Path) -> None:
    out = RunFolder(str(tmp_path / "out"))
    shard = pq.read_table(undisturbed / "results/shard-000001.parquet")
    out.write_table("results/shard-000001.parquet", shard)
    refuse_double_rows(out)
    out.write_table("results/shard-000002.parquet", shard.slice(0, 1))
    with pytest.raises(RunFailedError, match="'scene-008' stands twice: shard 1 and shard 1"):
        refuse_double_rows(out)


def test_an_empty_prompt_and_an_over_long_one_are_rows(tmp_path: Path) -> None:
    prompts = ["fine", "", "   ", "x" * 9000, "<image> <image> </s>"]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in.parquet")
    flags = ("--recipe", "none", "--input.format", "parquet", "--input.path", tmp_path / "in.parquet")
    assert run(*flags, "--output", tmp_path / "out") == 0
    kinds = [row["error_kind"] for row in rows(tmp_path / "out").values()]
    assert kinds == [None, "prompt_missing", "prompt_missing", "prompt_too_long", None]


def test_kept_thumbnails_are_the_flagged_ones_or_all(tmp_path: Path) -> None:
    for keep in ("flagged", "all"):
        assert run("--limit", 20, "--images.keep", keep, "--output", tmp_path / keep) == 0
    everything, flagged = table(tmp_path / "all").to_pylist(), table(tmp_path / "flagged").to_pylist()
    assert all((row["thumbnail"] is not None) == (row["image_sha256"] is not None) for row in everything)
    assert all((row["thumbnail"] is not None) == bool(row["flagged"]) for row in flagged)


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dry_run", "--output", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "64 rows" in text
    assert "stage generate: ready" in text
    assert "column patch_scores" in text
    assert not (tmp_path / "out").exists()


def test_rescored_flags_equal_a_reruns(undisturbed: Path, tmp_path: Path) -> None:
    scores = sorted(row["image_score"] for row in rows(undisturbed).values() if row["image_score"] is not None)
    threshold = scores[len(scores) // 3]
    assert main(["rescore", str(undisturbed), "--threshold", repr(threshold)]) == 0
    (path,) = (undisturbed / "rescored").glob("*.parquet")
    rescored = {row["sample_id"]: row for row in pq.read_table(path).to_pylist()}
    assert run("--shard_rows", 8, "--detector.threshold", threshold, "--output", tmp_path / "out") == 0
    before = rows(undisturbed)
    for name, row in rows(tmp_path / "out").items():
        again = rescored[name]
        assert (again["flagged"], again["unsafe_patches"] or []) == (row["flagged"], row["unsafe_patches"] or [])
        assert again["masked_fraction"] == row["masked_fraction"]
        if row["flagged"] is not None:
            assert again["picture_changed"] == (row["unsafe_patches"] != before[name]["unsafe_patches"])


def test_show_prints_a_row_and_draws_its_picture(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(undisturbed), "scene-001"]) == 0
    assert "image_score" in capsys.readouterr().out
    (path,) = (undisturbed / "shown").glob("*.png")
    row = rows(undisturbed)["scene-001"]
    with Image.open(path) as sheet:
        assert sheet.size == (3 * row["width"], row["height"])
    assert main(["show", str(undisturbed), "nobody"]) == 2


def test_figstep_whole(figstep: Path, tmp_path: Path) -> None:
    flags = ("--input.format", "figstep", "--input.path", figstep, "--limit", 24, "--output", tmp_path / "out")
    assert run(*flags) == 0
    found = rows(tmp_path / "out")
    assert len(found) == 24
    assert all(row["patch_scores"] and row["stop_reason"] and row["label"] == "unsafe" for row in found.values())


@pytest.mark.slow
def test_ray_killed_three_times_resumes_to_equal_rows(figstep: Path, tmp_path: Path) -> None:
    flags = ["--input.format", "figstep", "--input.path", figstep, "--shard_rows", 20, "--generation.max_new_tokens", 8]
    assert start(*flags, "--output", tmp_path / "whole").wait() == 0
    out = tmp_path / "killed"
    counts = [kill_when(start(*flags, "--output", out), out, shards) for shards in (3, 9, 16)]
    assert all(2 < count < 23 for count in counts), counts
    assert start(*flags, "--output", out).wait() == 0
    assert len(rows(out)) == 500
    assert rows(out) == rows(tmp_path / "whole")


def test_a_combination_that_cannot_work_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--recipe",
        "ecso",
        "--defense.detect",
        "ot",
        "--limit",
        2,
        "--engine",
        "local",
        "--output",
        tmp_path / "o",
    )
    assert run(*words) == 2
    assert "takes the detector's flag here, and there is none; set detector.name" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
def test_answers_longer_than_the_model_reads_are_refused_before_the_first_shard(
    dry: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--recipe", "none", "--generation.max_new_tokens", 4096, "--output", tmp_path / "o", *dry)
    assert run(*words) == 2
    (*_, line) = capsys.readouterr().err.strip().splitlines()
    assert "generation.max_new_tokens 4,096 leaves no room for a prompt" in line and "takes 4,096 tokens" in line
    assert committed(tmp_path / "o") == 0
