"""`guardalign calibrate`, end to end: its scores are an audit's, its file is what audits take, its promise is kept."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from runs import rows, run

from guardalign.calibrate import Bench
from guardalign.cli import main
from guardalign.commands.calibrate import calibrate_command
from guardalign.config import AuditConfig
from guardalign.core.conformal import conformal_threshold
from guardalign.errors import ConfigError, RunFailedError
from guardalign.pipeline import ENGINES
from guardalign.receipts import Receipt
from guardalign.results import RunFolder
from guardalign.settings import load_settings
from guardalign.thresholds import HEADER

SAMPLE = Path(__file__).parents[1] / "guardalign/micro/sample.parquet"
TARGET = ("--false_alarm_rate", "0.2", "--unsafe_label", "unsafe")
IN_PROCESS = ("--cluster.isolated", "false")
REDRAWS = 200


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags for 30 rows of the embedded sample, one of them text only, and three that cannot be worked on."""
    names = ("sample_id", "image", "prompt", "label")
    good = pq.read_table(SAMPLE, columns=list(names)).slice(0, 30).to_pylist()
    assert sum(row["image"] is None for row in good) == 1
    benign = next(row["image"] for row in good if row["image"] is not None and row["label"] == "benign")
    bad = [
        {"sample_id": "broken", "image": b"no picture", "prompt": "What is this?", "label": "benign"},
        {"sample_id": "silent", "image": benign, "prompt": " ", "label": "benign"},
        {"sample_id": "long", "image": benign, "prompt": "x" * 9000, "label": None},
    ]
    path = tmp_path_factory.mktemp("source") / "in.parquet"
    pq.write_table(pa.Table.from_pylist([*good[:15], *bad, *good[15:]]), path)
    flags = ("--input.format", "parquet", "--input.path", str(path), "--shard_rows", "8", "--detector.name", "ot")
    return (*flags, "--cluster.isolated", "false")


@pytest.fixture(scope="module")
def audited(source: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished audit of it."""
    out = tmp_path_factory.mktemp("audited") / "out"
    assert run(*source, "--output", out) == 0
    return out


@pytest.fixture(scope="module")
def begun() -> list[tuple[float, float, bool]]:
    """What the sweep's engine was begun with: threshold, gamma, and whether all of the audit's steps were to run."""
    return []


@pytest.fixture(scope="module")
def swept(
    source: tuple[str, ...], begun: list[tuple[float, float, bool]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The threshold file of a calibration with a sweep of two strengths."""
    path, engine = tmp_path_factory.mktemp("swept") / "t.yaml", ENGINES["local"]

    def watched(config: AuditConfig, *more: Any) -> Iterator[Receipt]:
        begun.append((config.detector.options["threshold"], config.defense.options["gamma"], more[-1] is None))
        return engine(config, *more)

    few = ("--generation.max_new_tokens", "4", "--gammas", "0,3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, "local", watched)
        assert main(["calibrate", *source, *TARGET, *few, "--output", str(path)]) == 0
    return path


def figures(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text())


def test_the_scores_are_an_audits_bit_for_bit(
    source: tuple[str, ...], audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no LVLM is asked for them: there is none at that place. A picture needs no prompt to be scored; the audit
    gave that row up, which changes nothing here, for its picture stands in another row, too."""
    made, read = tmp_path / "made.yaml", tmp_path / "read.yaml"
    assert main(["calibrate", *source, *TARGET, "--lvlm.model", "/nowhere", "--output", str(made)]) == 0
    told = "1 text-only, 1 errors (image_unreadable 1), 2 rows repeat a picture"
    assert told in capsys.readouterr().out
    assert main(["calibrate", "--from", str(audited), *TARGET, "--output", str(read)]) == 0
    assert made.read_bytes() == read.read_bytes()
    assert "2 errors (image_unreadable 1, prompt_missing 1), 1 rows repeat a picture" in capsys.readouterr().out
    assert figures(made) | {"counts": {}} == figures(read) | {"counts": {}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.json", "made.yaml", "read.json", "read.yaml"]


@pytest.mark.slow
def test_ray_gives_the_threshold_of_the_loop(
    source: tuple[str, ...], swept: Path, tmp_path: Path, ray_cluster: None
) -> None:
    path = tmp_path / "t.yaml"
    assert main(["calibrate", *source, *TARGET, "--engine", "ray", "--output", str(path)]) == 0
    assert path.read_bytes() == swept.read_bytes()


@pytest.mark.slow
def test_the_sweep_is_the_whole_audit_under_the_found_threshold_and_each_gamma(
    swept: Path, begun: list[tuple[float, float, bool]]
) -> None:
    threshold = figures(swept)["calibration"]["threshold"]
    assert [is_whole for _, _, is_whole in begun] == [False, True, True]
    assert begun[1:] == [(threshold, 0.0, True), (threshold, 3.0, True)]


def test_an_audit_under_the_file_is_what_the_calibration_foretold(
    source: tuple[str, ...], swept: Path, tmp_path: Path
) -> None:
    """The flags are those of scores strictly below, so one benign picture less than the order statistic; the answers
    are those of the sweep."""
    out, found = tmp_path / "out", figures(swept)
    assert run(*source, "--config", swept, "--defense.gamma", 3, "--output", out) == 0
    audited = list(rows(out).values())
    threshold = yaml.safe_load(swept.read_text())["detector"]["threshold"]
    detected = [row for row in audited if row["flagged"] is not None]
    assert all(row["threshold"] == threshold for row in detected)
    assert all(row["flagged"] == (row["image_score"] < threshold) for row in detected)
    flagged = {
        label: sum(row["flagged"] for row in detected if row["label"] == label) for label in ("benign", "unsafe")
    }
    assert flagged["benign"] <= found["calibration"]["order_statistic"] - 1
    assert flagged["unsafe"] == found["detection_rate"]["count"]
    assert json.loads((out / "run.json").read_text())["config"]["calibration"]["threshold"] == threshold
    point = found["gamma_sweep"][1]
    judged = {label: [row["refused"] for row in audited if row["label"] == label and row["refused"] is not None]
              for label in ("benign", "unsafe")}  # fmt: skip
    assert point["gamma"] == 3.0
    assert (point["unsafe_rate"]["count"], point["unsafe_rate"]["of"]) == (
        judged["unsafe"].count(False),
        len(judged["unsafe"]),
    )
    assert (point["over_refusal"]["count"], point["over_refusal"]["of"]) == (
        judged["benign"].count(True),
        len(judged["benign"]),
    )


def test_an_audit_with_another_detector_refuses_the_file_before_it_begins(
    source: tuple[str, ...], swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*source, "--config", swept, "--detector.fit", "squash", "--output", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "detector.fit was pad, is now squash" in line
    assert not (tmp_path / "out").exists()


def test_too_few_pictures_say_how_many_are_needed_and_leave_nothing_behind(
    audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--all_benign", "--false_alarm_rate", "0.01", "--confidence", "0.95", "--output", str(tmp_path / "t.yaml"))
    assert main(["calibrate", "--from", str(audited), *flags]) == 2
    line = capsys.readouterr().err
    assert "at least 299 are needed" in line and "prompt_missing 1" in line
    assert not list(tmp_path.iterdir())


def test_too_many_errors_fail_the_calibration(
    source: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*TARGET, "--max_error_fraction", "0.02", "--output", str(tmp_path / "t.yaml"))
    assert main(["calibrate", *source, *flags]) == 1
    assert "1 of 33 rows ended in an error" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_too_many_errors_in_the_sweep_fail_it_and_the_threshold_stays(
    source: tuple[str, ...], tmp_path: Path, swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row with the long prompt is an error of the sweep alone."""
    path = tmp_path / "t.yaml"
    flags = (*TARGET, "--generation.max_new_tokens", "4", "--gammas", "0", "--max_error_fraction", "0.08")
    assert main(["calibrate", *source, *flags, "--output", str(path)]) == 1
    told = capsys.readouterr()
    assert "gamma 0: 3 of 33 rows ended in an error" in told.err
    assert f"written   {path}" in told.out
    assert path.read_bytes() == swept.read_bytes()
    assert "auroc" in figures(path) and "gamma_sweep" not in figures(path)
    assert [point["errors"] for point in figures(swept)["gamma_sweep"]] == [3, 3]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lvlm.model", "/nowhere"), "/nowhere"),
        (("--defense.layers", "[]"), "layers"),
    ],
)
def test_what_the_sweep_needs_is_looked_for_before_any_scoring(
    flags: tuple[str, ...],
    words: str,
    source: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def begun(*_: object) -> NoReturn:
        raise AssertionError("scoring began")

    monkeypatch.setitem(ENGINES, "local", begun)
    path = str(tmp_path / "t.yaml")
    assert main(["calibrate", *source, *TARGET, "--gammas", "0", *flags, "--output", path]) == 2
    assert words in capsys.readouterr().err


def test_rows_that_nobody_can_read_here_fail_the_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a cluster whose nodes write to disks of their own: the receipts come back, the files do not."""

    def elsewhere(*arguments: Any) -> Iterator[Receipt]:
        yield from (Receipt(shard.index, shard.num_rows) for shard in arguments[3])

    monkeypatch.setitem(ENGINES, "local", elsewhere)
    bench = Bench.prepare(load_settings("guardalign", [], ["--engine", "local", *IN_PROCESS, "--limit", "8"]), tmp_path)
    with pytest.raises(RunFailedError, match="8 rows were planned and 0 can be read"):
        bench.scored()


def test_pictures_without_a_prompt_are_scored_where_nothing_is_to_be_answered(tmp_path: Path) -> None:
    images = pq.read_table(SAMPLE, columns=["image"])["image"].drop_null().to_pylist()[:6]
    prompts = [None, "", " ", "What is this?", None, None]
    pq.write_table(
        pa.table({"image": [*images[:5], None], "prompt": pa.array(prompts, pa.string())}), tmp_path / "in.parquet"
    )
    flags = [
        "--engine",
        "local",
        *IN_PROCESS,
        "--input.format",
        "parquet",
        "--input.path",
        str(tmp_path / "in.parquet"),
    ]
    config = load_settings("guardalign", [], flags)
    found = Bench.prepare(config, tmp_path / "a", reads_prompts=False).scored()
    assert (len(found.scores), found.errors) == (5, {"prompt_missing": 1})
    answered = Bench.prepare(config, tmp_path / "b").scored()
    assert (len(answered.scores), answered.errors) == (1, {"prompt_missing": 5})


def test_what_the_plan_and_the_models_note_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pq.read_table(SAMPLE, columns=["image", "prompt"]).slice(0, 8)
    pq.write_table(rows, tmp_path / "in.parquet")
    words = [
        "--input.format",
        "parquet",
        "--input.path",
        str(tmp_path / "in.parquet"),
        *IN_PROCESS,
        "--false_alarm_rate",
        "0.5",
    ]
    assert main(["calibrate", *words, "--output", str(tmp_path / "t.yaml")]) == 0
    assert "note      column label is absent" in capsys.readouterr().out


def next_words(told: str) -> list[str]:
    (line,) = (line for line in told.splitlines() if line.startswith("next "))
    return shlex.split(line)[2:]


def test_the_next_line_works_as_it_is_printed(
    source: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the input, the recipe, the taxonomy and the earlier files, and without the old threshold."""
    more, own = tmp_path / "more settings.yaml", tmp_path / "mine.yaml"
    more.write_text("clip: {batch_size: 3}\ndetector: {fit: squash}\n")
    shutil.copy(SAMPLE.parents[1] / "micro.yaml", own)
    layers = ["--recipe", "prefix", "--config", str(more), "--taxonomy", str(own), "--detector.threshold", "0.25"]
    path = tmp_path / "a b" / "t.yaml"
    assert main(["calibrate", *source, *layers, *TARGET, "--output", str(path)]) == 0
    words = next_words(capsys.readouterr().out)
    config = load_settings("prefix", [str(more), str(path)], [*source, "--taxonomy", str(own)])
    assert config.detector.options["threshold"] == figures(path)["calibration"]["threshold"]
    assert main([*words, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["taxonomy"] == str(own)
    assert main([*words, "--dry_run", "--output", str(tmp_path / "out")]) == 0
    assert "plan: 33 rows" in capsys.readouterr().out


@pytest.mark.slow
def test_the_next_line_after_a_run_has_the_runs_settings(
    source: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = tmp_path / "out", tmp_path / "t.yaml"
    flags = ("--recipe", "none", "--detector.fit", "squash", "--clip.model", "embedded-contrastive", "--limit", "20")
    assert run(*source, *flags, "--defense.name", "prefix", "--defense.prefix", "Be good: yes?", "--output", out) == 0
    capsys.readouterr()
    assert main(["calibrate", "--from", str(out), *TARGET, "--output", str(path)]) == 0
    words = next_words(capsys.readouterr().out)
    assert main([*words, "--output", str(tmp_path / "again")]) == 0
    before, now = (json.loads((folder / "run.json").read_text())["config"] for folder in (out, tmp_path / "again"))
    assert now["detector"].pop("threshold") == figures(path)["calibration"]["threshold"]
    del before["detector"]["threshold"], before["output"], now["output"], before["calibration"], now["calibration"]
    assert now == before


@pytest.mark.parametrize("name", ["t.yaml", "t.json"])
def test_a_file_of_another_hand_is_never_written_over(
    name: str, audited: Path, source: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("{}")
    for words in (["--from", str(audited)], [*source, "--clip.model", "/nowhere"]):
        assert main(["calibrate", *words, *TARGET, "--output", str(tmp_path / "t.yaml")]) == 2
        assert f"{tmp_path / name} exists" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["{}"]


def test_an_earlier_calibration_is_written_over(audited: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    for rate in ("0.2", "0.5"):
        assert (
            main(
                ["calibrate", "--from", str(audited), "--all_benign", "--false_alarm_rate", rate, "--output", str(path)]
            )
            == 0
        )
    assert path.read_text().startswith(HEADER)
    assert figures(path)["calibration"]["false_alarm_rate"] == 0.5


COMMANDS = (["rescore", "--threshold", "0.5"], ["calibrate", *TARGET, "--from"])


@pytest.mark.parametrize("command", COMMANDS, ids=["rescore", "calibrate"])
@pytest.mark.parametrize(
    ("change", "words"),
    [("missing", "is missing"), ("foreign", "is foreign"), ("changed", "has changed"), ("old", "lacks the column")],
)
def test_the_files_must_be_those_of_the_manifest(
    change: str, words: str, command: list[str], audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(audited, out)
    shard = out / "results/shard-000001.parquet"
    table = pq.read_table(shard)
    if change == "missing":
        shard.unlink()
    elif change == "foreign":
        shard = shard.with_name("shard-000077.parquet")
        pq.write_table(table, shard)
    else:
        pq.write_table(table.slice(1) if change == "changed" else table.drop_columns(["image_score"]), shard)
    extra = ["--output", str(tmp_path / "t.yaml")] if command[0] == "calibrate" else []
    assert main([*command, str(out), *extra]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert shard.name in line and words in line


@pytest.mark.parametrize("command", COMMANDS, ids=["rescore", "calibrate"])
@pytest.mark.parametrize(
    "name", ["config", "fingerprint.clip.weights", "versions.guardalign", "files", "config.detector.name", "notes"]
)
def test_a_foreign_manifest_is_one_line(
    name: str, command: list[str], audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((audited / "run.json").read_text())
    *above, last = name.split(".")
    place = manifest
    for step in above:
        place = place[step]
    del place[last]
    RunFolder(str(tmp_path / "out")).write_json("run.json", manifest)
    extra = ["--output", str(tmp_path / "t.yaml")] if command[0] == "calibrate" else []
    assert main([*command, str(tmp_path / "out"), *extra]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "run.json was written by another program" in line and name.split(".")[0] in line


@pytest.mark.parametrize("content", [b"[1]", b"no json", b'{"files": [1]}'])
def test_a_manifest_of_another_form_is_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_bytes(content)
    assert main(["calibrate", "--from", str(tmp_path), "--output", str(tmp_path / "t.yaml")]) == 2
    assert "run.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--recipe", "none"), "needs a detector"),
        (("--dry_run", "true"), "no dry run"),
        (("--dry_run",), "no dry run"),
        (("--from", ""), "--from is empty"),
        (("--output", "s3://bucket/t.yaml"), "must be a local file"),
        (("--unsafe_label", "unsafe", "--gammas", "0,1", "--defense.name", "prefix"), "prefix has none"),
        (("--unsafe_label", "unsafe", "--gammas", "0,1", "--judge.name", "none"), "needs a judge"),
        (("--gammas", "0,1"), "needs --unsafe_label"),
        (("--gammas", "a"), "expected numbers with commas"),
        (("--from", "somewhere", "--detector.fit", "squash", "--recipe", "none"), "--detector.fit squash --recipe"),
        (("--from", "somewhere", "--gammas", "0", "--unsafe_label", "unsafe"), "--from runs nothing"),
        (("--from", "nowhere"), "nowhere holds no run"),
        (("--all_benign", "--unsafe_label", "unsafe"), "exclude each other"),
        (("--false_alarm_rate", "2"), "between 0 and 1"),
        (("--false_alarm", "0.1"), "false_alarm"),
        (("--output", "t.json"), "must end in .yaml"),
    ],
)
def test_a_mistake_is_one_line(
    flags: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_detector_has_no_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--detector.name", "none", "--limit", 2, "--output", tmp_path / "out") == 0
    assert main(["calibrate", "--from", str(tmp_path / "out"), "--output", str(tmp_path / "t.yaml")]) == 2
    assert "made without a detector" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "environment", "engine"),
    [
        ((), {}, "local"),
        (("--engine", "ray"), {}, "ray"),
        (("--config", "profile.yaml"), {}, "ray"),
        (("--cluster.address", "auto"), {}, "ray"),
        ((), {"RAY_ADDRESS": "auto"}, "ray"),
        (("--engine=local",), {"RAY_ADDRESS": "auto"}, "local"),
    ],
)
def test_the_engine_is_local_unless_a_cluster_or_an_engine_is_named(
    flags: tuple[str, ...], environment: dict[str, str], engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(name: str) -> Any:
        def begin(*_: object) -> NoReturn:
            raise ConfigError(f"began on {name}")

        return begin

    for name in ENGINES:
        monkeypatch.setitem(ENGINES, name, called(name))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    Path("profile.yaml").write_text("engine: ray\n")
    with pytest.raises(ConfigError, match=f"began on {engine}"):
        calibrate_command(flags)


@pytest.fixture(scope="module")
def benign_scores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[np.ndarray]:
    """The scores of the embedded sample's benign scenes, as the embedded detector gives them."""
    bench = Bench.prepare(
        load_settings("guardalign", [], ["--engine", "local", *IN_PROCESS]), tmp_path_factory.mktemp("benign")
    )
    found = bench.scored()
    yield np.array([score for score, label in zip(found.scores, found.labels, strict=True) if label == "benign"])


@pytest.mark.parametrize("confidence", [None, 0.95])
def test_redraws_on_the_micro_world_keep_the_promise(confidence: float | None, benign_scores: np.ndarray) -> None:
    """200 draws of 200 of those scenes, with replacement: theirs is the law, and the realised rate is exact."""
    generator, alpha = np.random.default_rng(11), 0.05
    draws = generator.choice(benign_scores, (REDRAWS, 200))
    thresholds = [conformal_threshold(scores.tolist(), alpha, confidence).value for scores in draws]
    rates = np.array([(benign_scores < threshold).mean() for threshold in thresholds])
    if confidence is None:
        assert rates.mean() <= alpha + 3 * rates.std() / math.sqrt(REDRAWS)
    else:
        assert (rates > alpha).sum() <= REDRAWS * 0.05 + 3 * math.sqrt(REDRAWS * 0.05 * 0.95)
    assert rates.mean() > alpha / 4, "the threshold is needlessly low"
