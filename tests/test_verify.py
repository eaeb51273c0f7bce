"""`guardalign verify`: whatever is not as the run left it is found and named; rows computed again agree."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import run

from guardalign.cli import main
from guardalign.config import AuditConfig, ClipConfig, ClusterConfig, LvlmConfig
from guardalign.errors import RunFailedError
from guardalign.micro import FOLDER
from guardalign.receipts import RECEIPT_KEY, shard_receipt
from guardalign.results import RunFolder, shard_name
from guardalign.schema import RESULT_NAMES, VOLATILE, Trace, with_columns
from guardalign.seals import sha256
from guardalign.verify import Asked, verify
from guardalign.verify.agreement import GROUPS, Agreement, distance
from guardalign.verify.devices import bounds, recorded
from guardalign.verify.rows import row_problems
from guardalign.verify.sample import draw
from tests.judges.test_endpoint_judge import VARIABLE, Server, about, serve
from tests.sources.test_web import Web, server
from tests.sources.test_web import say as answering

__all__ = ["serve", "server"]

NUM_ROWS = 15
SPOILT = {4: {"image": b"no picture"}, 11: {"prompt": " "}}
"""rows of the input that end in an error"""


@pytest.fixture(scope="module")
def input_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = pq.read_table(FOLDER / "sample.parquet").slice(0, NUM_ROWS).select(["sample_id", "image", "prompt", "label"])
    spoilt = [row | SPOILT.get(at, {}) for at, row in enumerate(rows.to_pylist())]
    path = tmp_path_factory.mktemp("input") / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(spoilt, schema=rows.schema.remove_metadata()), path)
    return path


@pytest.fixture(scope="module")
def finished(input_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    flags = ("--input.format", "parquet", "--input.path", input_file, "--shard_rows", 5, "--images.keep", "flagged")
    assert run(*flags, "--output", out) == 0
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def said(out: object, **asked: Any) -> list[str]:
    """The lines of a verification, its last words included."""
    lines: list[str] = []
    try:
        verify(Asked(str(out), **asked), lines.append)
    except RunFailedError as error:
        lines.append(str(error))
    return lines


def files_only(out: object) -> list[str]:
    """The lines of what is wrong with the files, but for the count of them."""
    return [line for line in said(out, sample=0) if not line.startswith("files ")]


def rewrite(out: Path, shard: int, change: Callable[[pa.Table], pa.Table], recount: bool = True) -> None:
    """Changes a shard and everything that would tell so, but for the sums: only rows and models can tell then."""
    folder, name = RunFolder(str(out)), shard_name(shard)
    before = folder.read_table(name)
    table = change(before).replace_schema_metadata(before.schema.metadata)
    receipt = folder.receipt(name)
    if recount:
        receipt = shard_receipt(table, receipt.shard, receipt.run_id, Trace())
    stamp = {RECEIPT_KEY.encode(): json.dumps(asdict(receipt) | {"sha256": ""}).encode()}
    digest = folder.write_table(name, table.replace_schema_metadata(before.schema.metadata | stamp))
    manifest = folder.read_json("run.json")
    for file in manifest["files"]:
        if file["name"] == name:
            file.update(sha256=digest, rows=table.num_rows if recount else file["rows"])
    folder.write_sealed("run.json", manifest)


def with_cell(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    values = table[column].to_pylist()
    return with_columns(table, {column: [*values[:row], value, *values[row + 1 :]]})


def test_an_undisturbed_run_agrees_in_every_column(finished: Path) -> None:
    lines = said(finished)
    assert lines[-1].startswith(f"differing  0 of {NUM_ROWS}")
    counts = {line.split()[0]: line.split()[1:3] for line in lines if line.split()[0] in GROUPS}
    assert list(counts) == list(GROUPS)
    assert counts["sample"] == counts["reply"] == [str(NUM_ROWS)] * 2
    assert counts["error"] == ["2", "2"]
    assert any("2 error rows" in line and "flagged" in line for line in lines)


def test_sampled_answers_are_drawn_again_the_same(tmp_path: Path) -> None:
    flags = ("--recipe", "none", "--generation.temperature", 1, "--limit", 6, "--shard_rows", 3)
    assert run(*flags, "--output", tmp_path / "out") == 0
    assert said(tmp_path / "out", sample=4)[-1].startswith("differing  0 of 4")


def test_a_judge_behind_an_endpoint_is_asked_again_only_on_request(
    serve: Callable[..., Server],
    tmp_path: Path,
) -> None:
    judge, source, out = serve(about), tmp_path / "in.csv", tmp_path / "out"
    source.write_text("prompt\nWhy? [harm]\nWhy? [broken]\nWhy?\n")
    flags = ["--recipe", "none", "--input.format", "csv", "--input.path", source, "--judge.name", "endpoint"]
    flags += ["--judge.url", judge.url, "--judge.model", "judge-1", "--judge.key_variable", VARIABLE]
    assert run(*flags, "--judge.retries", 0, "--output", out) == 0
    asked = len(judge.seen)
    lines = said(out)
    assert "left out   rows that are not tried again: errors of the judge 1" in lines
    assert any("--judge asks it again" in line for line in lines)
    assert not any(line.startswith("verdict ") for line in lines)
    assert len(judge.seen) == asked and lines[-1].startswith("differing  0 of 2")
    assert said(out, judge=True)[-1].startswith("differing  0 of 3")
    assert len(judge.seen) > asked


@pytest.mark.slow
def test_in_bf16_the_share_that_differs_is_told_and_bounded(tmp_path: Path) -> None:
    flags = ("--recipe", "none", "--lvlm.dtype", "bfloat16", "--limit", 4, "--shard_rows", 2)
    assert run(*flags, "--output", tmp_path / "out") == 0
    last = said(tmp_path / "out")[-1]
    assert last.startswith("differing  ") and "95 % interval" in last and last.endswith("at most 2.0% may")


@pytest.mark.parametrize(
    "name", ["results/shard-000000.parquet", "results/shard-000002.parquet", "plan.json", "inputs.parquet", "run.json"]
)
def test_any_flipped_bit_in_any_file_is_found_and_the_file_named(out: Path, name: str) -> None:
    whole, draws = (out / name).read_bytes(), random.Random(name)
    places = [0, len(whole) - 1, *(draws.randrange(len(whole)) for _ in range(16))]
    for place in places:
        flipped = bytes([whole[place] ^ 1 << draws.randrange(8)])
        (out / name).write_bytes(whole[:place] + flipped + whole[place + 1 :])
        found = files_only(out)
        assert found and name in found[0], f"byte {place} of {name} was changed, and verify said {found}"


def test_white_space_in_the_manifest_does_not_pass_either(out: Path) -> None:
    text = (out / "run.json").read_text()
    (out / "run.json").write_text(text.replace("\n ", "\n  ", 1))
    assert "checksum is another" in files_only(out)[-1]


def test_half_a_character_in_the_manifest_is_found(out: Path) -> None:
    content = (out / "run.json").read_bytes()
    (out / "run.json").write_bytes(content.replace(b'"run_id": "', b'"run_id": "\xed\xa0\x80', 1))
    assert "run.json has changed" in files_only(out)[-1]


def test_a_run_whose_canaries_drifted_is_wrong_though_all_else_holds(out: Path) -> None:
    folder = RunFolder(str(out))
    manifest = folder.read_json("run.json")
    manifest["self_check"]["drifted_shards"] = ["results/shard-000001.parquet"]
    folder.write_sealed("run.json", manifest)
    warning, last = files_only(out)
    assert warning.startswith("warning    the models drifted")
    assert "the models drifted in 1 shards (results/shard-000001.parquet)" in last


def test_files_that_are_missing_foreign_or_left_over_are_named(out: Path) -> None:
    shutil.copy(out / "results/shard-000000.parquet", out / "results/shard-000009.parquet")
    (out / "results/.shard-000001.parquet.77.tmp").write_bytes(b"half")
    (out / ".run.json.77.tmp").write_bytes(b"half")
    (out / "results/shard-000001.parquet").unlink()
    (out / "notes.txt").write_text("of the user's own, and no business of ours")
    *problems, last = files_only(out)
    assert len(problems) == 4 and "4 things are wrong" in last
    for name, word in {
        "results/shard-000009.parquet": "foreign",
        "results/.shard-000001.parquet.77.tmp": "temporary",
        ".run.json.77.tmp": "temporary",
        "results/shard-000001.parquet": "missing",
    }.items():
        assert any(name in line and word in line for line in problems)


def test_rows_are_counted_again_and_no_footer_is_believed(out: Path) -> None:
    rewrite(out, 1, lambda table: table.slice(0, 4), recount=False)
    problems = files_only(out)
    assert any("holds 4 rows, and run.json says 5" in line for line in problems)
    assert any("receipt says num_rows 5, its rows 4" in line for line in problems)


def test_sums_that_are_not_the_rows_are_named(out: Path) -> None:
    rewrite(out, 1, lambda table: table.slice(0, 4))
    problems = files_only(out)
    assert any(f"run.json says rows {NUM_ROWS}, the rows {NUM_ROWS - 1}" in line for line in problems)


def test_an_id_that_stands_twice_is_named(out: Path) -> None:
    first = pq.read_table(out / shard_name(0))["sample_id"][0].as_py()
    rewrite(out, 2, lambda table: with_cell(table, "sample_id", 3, first))
    assert any(f"'{first}' stands twice" in line for line in files_only(out))


def test_a_shard_of_another_schema_is_named(out: Path) -> None:
    rewrite(out, 1, lambda table: table.drop_columns(["judge_score"]).append_column("judge_score", table["error"]))
    assert any("columns are not those of the contract" in line for line in files_only(out))


BROKEN: dict[str, tuple[str, Any]] = {
    "have no sample_id": ("sample_id", None),
    "have some but not all of error": ("error", "sample x is broken"),
    "gave up at no known stage": ("error_stage", "lunch"),
    "have an error of no known kind": ("error_kind", "tired"),
    "have neither an answer nor an error": ("response", None),
    "have neither a verdict nor an error": ("judge", None),
    "belong to another shard": ("shard", 7),
    "are of another run": ("run_id", "another"),
    "have a number of attempts": ("attempts", 2),
}


@pytest.mark.parametrize("claim", BROKEN)
def test_every_claim_on_rows_can_be_broken(finished: Path, claim: str) -> None:
    table = RunFolder(str(finished)).read_table(shard_name(0))
    run_id = table["run_id"][0].as_py()
    assert not list(row_problems(table, 0, run_id, 1, judged=True))
    broken = with_cell(table, BROKEN[claim][0], 2, BROKEN[claim][1])
    assert any(claim in problem for problem in row_problems(broken, 0, run_id, 1, judged=True))


@pytest.mark.parametrize(
    ("stage", "column"), [("read", "image_score"), ("detect", "response"), ("sanitize", "refused"), ("judge", "judge")]
)
def test_a_row_that_was_given_up_holds_nothing_of_later_stages(finished: Path, stage: str, column: str) -> None:
    table = RunFolder(str(finished)).read_table(shard_name(0))
    for name, value in {"error": "x", "error_stage": stage, "error_kind": "generation_failed"}.items():
        table = with_cell(table, name, 2, value)
    problems = list(row_problems(table, 0, table["run_id"][0].as_py(), 1, judged=True))
    assert any(f"gave up at stage {stage}, yet hold {column}" in problem for problem in problems)


def test_cells_that_the_models_do_not_give_are_found_under_the_best_checksums(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(out, 0, lambda table: with_cell(table, "response", 1, "another answer"))
    rewrite(out, 1, lambda table: with_cell(table, "image_score", 4, 0.123))
    changed = [pq.read_table(out / shard_name(shard))["sample_id"][at].as_py() for shard, at in ((0, 1), (1, 4))]
    assert main(["verify", str(out)]) == 1
    told = capsys.readouterr()
    assert f"differs    {changed[0]}: response" in told.out and f"differs    {changed[1]}: image_score" in told.out
    assert f"2 of {NUM_ROWS} recomputed rows differ" in told.err
    assert main(["verify", str(out), "--most_differing", "0.15"]) == 0


def test_another_sample_is_no_rounding(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(out, 0, lambda table: with_cell(table, "image_sha256", 1, "0" * 64))
    assert main(["verify", str(out), "--most_differing", "1"]) == 1
    assert f"1 of {NUM_ROWS} recomputed rows differ" in capsys.readouterr().err


def test_another_input_cannot_be_recomputed(out: Path, input_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / input_file.name
    other.parent.mkdir()
    table = pq.read_table(input_file)
    pq.write_table(table.set_column(2, "prompt", pa.array(["Why?"] * NUM_ROWS)), other)
    *_, problem, last = said(out, flags=("--input.path", str(other)))
    assert "rows.parquet has changed" in problem
    assert "rows cannot be recomputed" in last
    assert "--input.path" in said(out, flags=("--input.path", str(tmp_path / "gone.parquet")))[-1]


def test_a_moved_input_and_other_batches_are_the_same_run(out: Path, input_file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved" / input_file.name
    moved.parent.mkdir()
    shutil.copy2(input_file, moved)
    flags = ("--input.path", str(moved), "--lvlm.batch_size", "3")
    assert said(out, sample=6, flags=flags)[-1].startswith("differing  0 of 6")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--defense.gamma", "0.1"], "defense.gamma was"),
        (["--recipe", "none"], "recipe has no place"),
        (["--sample", "-1"], "--sample must be"),
        (["--most_differing", "2"], "--most_differing must lie"),
        (["--lvlm.modle", "x"], "no setting"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    finished: Path, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(finished), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert complaint in line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--nonsense", "3"], "--nonsense 3"),
        (["--lvlm.device", "cpu", "left"], "--lvlm.device cpu left"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml"),
        (["--judge"], "--judge"),
        (["--most_differing", "0.5"], "--most_differing"),
    ],
)
@pytest.mark.parametrize("kind", ["an audit", "an evaluation"])
def test_what_has_no_effect_where_nothing_is_recomputed_is_a_mistake(
    kind: str, words: list[str], named: str, finished: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(finished), "--sample", "0"] if kind == "an audit" else [str(evaluated)]
    assert main(["verify", *command, *words]) == 2
    told = capsys.readouterr()
    assert told.err == f"guardalign: settings ({named}) have no effect: nothing is recomputed\n" and not told.out


def test_a_misspelt_setting_is_told_before_any_file_is_read(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / shard_name(0)).unlink()
    assert main(["verify", str(out), "--nonsense", "3"]) == 2
    assert "there is no setting 'nonsense'" in capsys.readouterr().err


NUM_PICTURES = 8


@pytest.fixture
def from_the_web(server: Web, tmp_path: Path) -> Path:
    """A finished run over pictures of a real server, which had not all of them, and one from a file."""
    rows = pq.read_table(FOLDER / "sample.parquet").slice(0, NUM_PICTURES + 1).to_pylist()
    local = tmp_path / "here.png"
    local.write_bytes(rows[-1]["image"])
    server.answers |= {f"/{at}": answering(200, row["image"]) for at, row in enumerate(rows[:-1])}
    server.answers |= {"/0": answering(404), "/1": answering(404)}
    places = [server.url(f"/{at}") for at in range(NUM_PICTURES)] + [str(local)]
    cells = {name: [row[name] for row in rows] for name in ("sample_id", "prompt")}
    pq.write_table(pa.table(cells | {"image": places}), tmp_path / "rows.parquet")
    flags = ("--input.format", "parquet", "--input.path", tmp_path / "rows.parquet", "--input.allow_urls", "true")
    assert run(*flags, "--input.image_root", tmp_path, "--shard_rows", 4, "--output", tmp_path / "out") == 0
    for at, row in enumerate(rows[:-1]):
        server.answers[f"/{at}"] = answering(200, row["image"])
    server.asked.clear()
    return tmp_path / "out"


def test_pictures_that_the_web_gives_otherwise_are_told_and_are_not_wrong(from_the_web: Path, server: Web) -> None:
    untouched = said(from_the_web)
    assert "left out   rows that are not tried again: image_missing 2" in untouched
    assert untouched[-1].startswith(f"differing  0 of {NUM_PICTURES - 1}")
    assert not any("on the web" in line for line in untouched)
    server.answers |= {"/2": answering(404), "/3": server.answers["/4"], "/5": answering(200, b"no picture")}
    lines = said(from_the_web)
    assert "left out   pictures that changed on the web: 3" in lines
    assert lines[-1].startswith(f"differing  0 of {NUM_PICTURES - 4}")


@pytest.mark.slow
def test_only_pictures_of_drawn_rows_are_fetched(from_the_web: Path, server: Web) -> None:
    assert said(from_the_web, sample=3)[-1].startswith("differing  0 of 3")
    assert 2 <= len(server.asked) <= 3
    for at in range(NUM_PICTURES):
        server.answers[f"/{at}"] = answering(404)
    lines = said(from_the_web)
    assert f"left out   pictures that changed on the web: {NUM_PICTURES - 2}" in lines
    assert lines[-1].startswith("differing  0 of 1"), "the one from a file"


def test_a_picture_that_is_no_web_address_may_not_change_though_the_web_is_allowed(from_the_web: Path) -> None:
    rewrite(from_the_web, 2, lambda table: with_cell(table, "image_sha256", 0, "0" * 64))
    lines = said(from_the_web, most_differing=1.0)
    assert any("image_sha256" in line for line in lines) and "1 of 7 recomputed rows differ" in lines[-1]


def placed(device: str, **more: Any) -> AuditConfig:
    lvlm, clip = LvlmConfig(device=device), ClipConfig(device=device)
    return AuditConfig(lvlm=lvlm, clip=clip, **{"engine": "local", **more})


def test_where_the_run_computed_is_read_from_its_record_or_not_told() -> None:
    auto, stated = placed("auto"), placed("cuda:1")
    assert [recorded("lvlm", {"cuda": there}, auto) for there in (True, False)] == ["cuda", "cpu"]
    assert recorded("lvlm", {}, auto) is None and recorded("clip", {}, stated) == "cuda"
    held = placed("auto", engine="ray", cluster=ClusterConfig(generate_gpus=0.5))
    assert recorded("lvlm", {"cuda": False}, held) == "cuda" and recorded("clip", {"cuda": False}, held) == "cpu"


def test_fp32_is_held_to_its_own_rounding_only_where_both_runs_round_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, auto = placed("cpu"), placed("cuda"), placed("auto")
    exact = {"clip.dtype": "float32", "lvlm.dtype": "float32"}
    loose = dict.fromkeys(exact, "float16")
    assert bounds({}, cpu, cpu) == (exact, ())
    with torch.backends.cudnn.flags(allow_tf32=True):
        found, (clip, lvlm) = bounds({}, cuda, cuda)
        assert found == loose and clip.startswith("clip computes on cuda, where fp32 may be TF32")
        assert lvlm.startswith("lvlm")
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert bounds({}, cuda, cuda) == (exact, ())
        found, (clip, _) = bounds({}, cuda, cpu)
        assert found == loose and "in the run clip computed on cuda, now on cpu" in clip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bounds({"cuda": False}, auto, auto) == (exact, ())
    found, (clip, _) = bounds({}, auto, auto)
    assert found == loose and "on a device that it did not record, now on cpu" in clip
    half = dataclasses.replace(cpu, lvlm=LvlmConfig(dtype="bfloat16", device="cpu"))
    assert bounds({}, half, half)[0]["lvlm.dtype"] == "bfloat16"


def test_a_run_that_did_not_record_its_device_is_held_to_looser_tolerances_and_says_so(out: Path) -> None:
    folder = RunFolder(str(out))
    assert not any(line.startswith("rounding") for line in said(out, sample=2))
    manifest = folder.read_json("run.json")
    del manifest["cuda"]
    folder.write_sealed("run.json", manifest)
    lines = said(out, sample=2)
    assert len([line for line in lines if line.startswith("rounding")]) == 2
    assert lines[-1].startswith("differing  0 of 2") and lines[-1].endswith("at most 2.0% may")


def test_folders_without_a_finished_run_are_said_to_be_such(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "run.json").unlink()
    for folder, word in ((out, "not finished"), (tmp_path / "nothing", "holds no run")):
        assert main(["verify", str(folder)]) == 2
        assert word in capsys.readouterr().err
    assert main(["verify", "--sample", "3"]) == 2
    assert "needs the run's folder" in capsys.readouterr().err


def test_a_run_in_an_object_store_is_verified_where_it_lies(finished: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in finished.rglob("*"):
        if path.is_file() and path.name != ".lock":
            store.pipe_file(f"/verified/{path.relative_to(finished)}", path.read_bytes())
    assert said("memory://verified", sample=3)[-1].startswith("differing  0 of 3")
    store.pipe_file("/verified/results/shard-000001.parquet", b"PAR1 and more")
    assert "results/shard-000001.parquet has changed" in files_only("memory://verified")[0]


def small_results(folder: Path) -> RunFolder:
    """Two shards of 50 rows: every tenth an error, some of them a worker's death, every fifth flagged."""
    run_folder = RunFolder(str(folder))
    for shard in range(2):
        places = range(50)
        kinds = [{0: "killed_worker", 1: "timed_out", 2: "judging_failed"}.get(at) if at < 3 else None for at in places]
        kinds = ["image_unreadable" if at % 10 == 9 else kind for at, kind in enumerate(kinds)]
        stages = [{2: "judge"}.get(at, "generate") if kind else None for at, kind in enumerate(kinds)]
        flagged = [at % 5 == 3 for at in places]
        run_folder.write_table(
            shard_name(shard), pa.table({"error_kind": kinds, "error_stage": stages, "flagged": flagged})
        )
    return run_folder


def test_error_rows_and_flagged_rows_are_among_the_drawn_and_poison_is_not(tmp_path: Path) -> None:
    folder = small_results(tmp_path)
    drawn = draw(folder, 20, seed=1)
    assert drawn.num_rows == 20 == len(set(drawn.places)) == sum(drawn.strata.values())
    assert drawn.strata["error rows"] >= 5 and drawn.strata["flagged"] >= 5 and drawn.strata["others"] >= 1
    assert drawn.left_out == {"killed_worker": 2, "timed_out": 2}
    assert not {(shard, at) for shard in (0, 1) for at in (0, 1)} & set(drawn.places)
    assert draw(folder, 20, seed=1) == drawn != draw(folder, 20, seed=2)
    assert draw(folder, 1000, seed=1).num_rows == 96
    assert draw(folder, 3, seed=1).num_rows == 3
    assert draw(folder, 1000, seed=1, with_judge_errors=False).left_out["errors of the judge"] == 2


def test_numbers_agree_within_the_tolerance_and_texts_when_they_are_equal() -> None:
    nan, inf = float("nan"), float("inf")
    assert distance(1.0, 1.0 + 1e-6) == pytest.approx(1e-6, rel=1e-3)
    assert distance(1000.0, 1001.0) == pytest.approx(1 / 1001)
    assert distance([0.0, ("a", 2.0)], [0.5, ("a", 2.0)]) == 0.5
    assert distance(nan, nan) == distance(None, None) == distance([], []) == 0.0
    assert inf == distance(None, 1.0) == distance([1.0], [1.0, 2.0]) == distance(nan, 1.0) == distance(-inf, inf)
    assert distance(("a", 1.0), ("b", 1.0)) == inf


def test_what_is_beyond_the_tolerance_differs_and_what_may_differ_is_not_looked_at(finished: Path) -> None:
    stored = RunFolder(str(finished)).read_table(shard_name(0))
    fresh = with_cell(with_cell(stored, "judge_score", 0, 1e-6), "judge_score", 1, 1e-4)
    fresh = with_columns(fresh, {"attempts": [9] * 5, "run_id": ["x"] * 5})
    stored = with_cell(with_cell(stored, "judge_score", 0, 0.0), "judge_score", 1, 0.0)
    found = Agreement.between([(stored, fresh)], dict.fromkeys(GROUPS, 1e-5))
    assert found.differing == {stored["sample_id"][1].as_py(): ("judge_score",)}
    assert found.groups[3].largest == pytest.approx(1e-4)


def test_every_column_of_the_contract_is_compared_or_may_differ() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted({*grouped, *VOLATILE}) == sorted(RESULT_NAMES)
    assert len(grouped) == len(set(grouped))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "out"
    quick = ("--generation.max_new_tokens", "3", "--engine", "local", "--cluster.isolated", "false")
    words = ["evaluate", "--suite", "micro", "--defenses", "none,guardalign", "--limit", "4", "--shard_rows", "2"]
    assert main([*words, *quick, "--output", str(out)]) == 0
    return out


def test_an_evaluations_files_are_checked_with_its_detections_and_tables(evaluated: Path, tmp_path: Path) -> None:
    found, recompute = said(evaluated)
    assert "4 files" in found or "2 files" in found
    assert recompute.startswith("recompute  not done")
    for number, name in enumerate(("detections/results/shard-000000.parquet", "tables.json", "detections/plan.json")):
        copy = Path(shutil.copytree(evaluated, tmp_path / str(number)))
        (copy / name).write_bytes((copy / name).read_bytes()[:-1] + b"?")
        assert f"{name} has changed" in files_only(copy)[0]
    (copy / "detections/results/shard-000077.parquet").write_bytes(b"")
    assert any("shard-000077.parquet is foreign" in line for line in files_only(copy))


def test_an_evaluation_lacks_no_recipe_of_a_sample(evaluated: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(evaluated, tmp_path / "copy"))

    def renamed(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index("recipe")
        return table.set_column(place, table.schema.field(place), pa.array(["none"] * table.num_rows))

    rewrite(copy, 0, renamed)
    problems = files_only(copy)
    assert any("recipe guardalign: 2 samples have a row, of 4" in line for line in problems)
    assert any("2 rows stand twice" in line for line in problems)


@pytest.mark.parametrize("command", [["show", "OUT", "x"], ["rescore", "OUT", "--threshold", "1"], ["calibrate"]])
def test_commands_that_read_audits_say_that_a_folder_is_an_evaluation(
    evaluated: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(evaluated) if word == "OUT" else word for word in command]
    extra = ["--from", str(evaluated), "--output", str(tmp_path / "t.yaml")] if words == ["calibrate"] else []
    assert main([*words, *extra]) == 2
    assert "holds an evaluation" in capsys.readouterr().err


def test_a_checksum_is_of_the_content(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    folder.write_sealed("a.json", {"x": 1, "y": [0.1, "é"]})
    assert folder.is_intact("a.json")
    folder.write_json("a.json", folder.read_json("a.json") | {"x": 2})
    assert not folder.is_intact("a.json")
    assert folder.checksums("a.json", "absent") == [
        {"name": "a.json", "sha256": sha256((tmp_path / "a.json").read_bytes())}
    ]
