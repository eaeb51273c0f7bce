"""`guardalign calibrate`, end to end: its scores are an audit's, its file is what audits take, its promise is kept."""

from __future__ import annotations

import json
import math
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
from guardalign.config import AuditConfig
from guardalign.core.conformal import conformal_threshold
from guardalign.errors import ConfigError
from guardalign.pipeline import ENGINES
from guardalign.results import Receipt, RunFolder
from guardalign.settings import load_settings

SAMPLE = Path(__file__).parents[1] / "guardalign/micro/sample.parquet"
TARGET = ("--false_alarm_rate", "0.2", "--unsafe_label", "unsafe")
REDRAWS = 200


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags for 30 rows of the embedded sample, one of them text only, and three that cannot be worked on."""
    names = ("sample_id", "image", "prompt", "label")
    good = pq.read_table(SAMPLE, columns=list(names)).slice(0, 30).to_pylist()
    assert sum(row["image"] is None for row in good) == 1
    bad = [
        {"sample_id": "broken", "image": b"no picture", "prompt": "What is this?", "label": "benign"},
        {"sample_id": "silent", "image": good[0]["image"], "prompt": " ", "label": "benign"},
        {"sample_id": "long", "image": good[0]["image"], "prompt": "x" * 9000, "label": None},
    ]
    path = tmp_path_factory.mktemp("source") / "in.parquet"
    pq.write_table(pa.Table.from_pylist([*good[:15], *bad, *good[15:]]), path)
    return ("--input.format", "parquet", "--input.path", str(path), "--shard_rows", "8", "--detector.name", "ot")


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
    """And no LVLM is asked for them: there is none at that place."""
    made, read = tmp_path / "made.yaml", tmp_path / "read.yaml"
    assert main(["calibrate", *source, *TARGET, "--lvlm.model", "/nowhere", "--output", str(made)]) == 0
    assert "1 text-only, 2 errors" in capsys.readouterr().out
    assert main(["calibrate", "--from", str(audited), *TARGET, "--output", str(read)]) == 0
    assert made.read_bytes() == read.read_bytes()
    assert figures(made) == figures(read)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.json", "made.yaml", "read.json", "read.yaml"]


def test_ray_gives_the_threshold_of_the_loop(
    source: tuple[str, ...], swept: Path, tmp_path: Path, ray_cluster: None
) -> None:
    path = tmp_path / "t.yaml"
    assert main(["calibrate", *source, *TARGET, "--engine", "ray", "--output", str(path)]) == 0
    assert path.read_bytes() == swept.read_bytes()


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
    flags = ("--false_alarm_rate", "0.01", "--confidence", "0.95", "--output", str(tmp_path / "t.yaml"))
    assert main(["calibrate", "--from", str(audited), *flags]) == 2
    assert "at least 299 are needed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_too_many_errors_fail_the_calibration(
    source: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*TARGET, "--max_error_fraction", "0.05", "--output", str(tmp_path / "t.yaml"))
    assert main(["calibrate", *source, *flags]) == 1
    assert "2 of 33 rows ended in an error" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--recipe", "none"), "needs a detector"),
        (("--dry_run", "true"), "no dry run"),
        (("--unsafe_label", "unsafe", "--gammas", "0,1", "--defense.name", "prefix"), "prefix has none"),
        (("--unsafe_label", "unsafe", "--gammas", "0,1", "--judge.name", "none"), "needs a judge"),
        (("--gammas", "0,1"), "needs --unsafe_label"),
        (("--gammas", "a"), "expected numbers with commas"),
        (("--from", "somewhere", "--detector.fit", "squash", "--recipe", "none"), "--detector.fit squash --recipe"),
        (("--from", "somewhere", "--gammas", "0", "--unsafe_label", "unsafe"), "--from runs nothing"),
        (("--from", "nowhere"), "nowhere holds no run"),
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
    manifest = {"config": {"detector": {"name": "none"}}, "totals": {}, "fingerprint": {}, "versions": {}}
    RunFolder(str(tmp_path)).write_json("run.json", manifest)
    assert main(["calibrate", "--from", str(tmp_path), "--output", str(tmp_path / "t.yaml")]) == 2
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
    from guardalign.cli import _calibrate

    with pytest.raises(ConfigError, match=f"began on {engine}"):
        _calibrate(flags)


@pytest.fixture(scope="module")
def benign_scores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[np.ndarray]:
    """The scores of the embedded sample's benign scenes, as the embedded detector gives them."""
    bench = Bench.prepare(load_settings("guardalign", [], ["--engine", "local"]), tmp_path_factory.mktemp("benign"))
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
