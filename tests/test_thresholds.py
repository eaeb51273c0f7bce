"""A calibration's words: which rows are its samples, what its file and its figures hold, what it says."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from guardalign.config import AuditConfig, CalibrationRecord
from guardalign.core.statistics import auroc
from guardalign.errors import ConfigError, InputError
from guardalign.fingerprint import refuse_foreign_calibration, science, scores_fingerprint
from guardalign.results import RunFolder, shard_name
from guardalign.schema import result_schema, to_result, with_columns
from guardalign.settings import as_yaml, load_settings
from guardalign.thresholds import (
    Scored,
    SweepPoint,
    Target,
    as_threshold_file,
    figures,
    fit,
    record_of,
    summary,
    sweep_lines,
)
from guardalign.version import VERSION

HALF = Target(false_alarm_rate=0.5)
FINITE = st.floats(-2, 2, width=32)


def results(folder: Path, *rows: dict[str, Any]) -> RunFolder:
    """Result files of two shards with these cells; all others are null."""
    out = RunFolder(str(folder))
    for shard, part in enumerate((rows[::2], rows[1::2])):
        table = pa.table({"sample_id": [f"{shard}-{number}" for number in range(len(part))]})
        names = {name for row in rows for name in row}
        table = with_columns(table, {name: [row.get(name) for row in part] for name in sorted(names)})
        out.write_table(shard_name(shard), to_result(table, result_schema()))
    return out


@functools.cache
def default() -> AuditConfig:
    return load_settings("guardalign", [], ["--detector.name", "ot"])


def scored(scores: list[float], labels: list[str | None] | None = None, **more: Any) -> Scored:
    config = default()
    sealed = science(config, {"weights": "a" * 64}, {}, "b" * 64)
    detector = {"name": config.detector.name, **config.detector.options}
    labels = labels or [None] * len(scores)
    counts = {"label_counts": dict(Counter(filter(None, labels))), "num_text_only": 0} | more
    return Scored(detector, scores_fingerprint(sealed), VERSION, scores, labels, **counts)


def calibrated(found: Scored, target: Target = HALF) -> CalibrationRecord:
    return record_of(found, fit(found, target), target)


def test_samples_are_the_rows_with_a_score_and_the_rest_is_counted(tmp_path: Path) -> None:
    out = results(
        tmp_path,
        {"image_score": 0.5, "label": "benign"},
        {"image_score": 0.25, "error_stage": "generate", "error": "too long"},
        {"error_stage": "detect", "error": "broken", "error_kind": "image_unreadable"},
        {"error_stage": "read", "error": "no picture", "error_kind": "image_missing"},
        {"label": "benign"},
        {"error_stage": "generate", "error": "a text-only prompt that is too long"},
        {"image_score": 0.75},
    )
    found = Scored.read(out, {}, {}, VERSION)
    assert sorted(zip(found.scores, found.labels, strict=True)) == [(0.25, None), (0.5, "benign"), (0.75, None)]
    assert (found.num_errors, found.num_text_only, found.num_rows) == (2, 2, 7)
    assert found.errors == {"image_missing": 1, "image_unreadable": 1}


def test_a_picture_counts_once_however_many_rows_show_it(tmp_path: Path) -> None:
    """Questions on one picture are no draws of their own: the promise is one about pictures."""
    rows = [{"image_score": 0.1 * (at % 3), "image_sha256": "abc"[at % 3] * 64, "label": "benign"} for at in range(12)]
    found = Scored.read(results(tmp_path, *rows, {"error": "x", "error_stage": "read"}), {}, {}, VERSION)
    assert (len(found.scores), found.num_repeats, found.num_rows) == (3, 9, 13)
    assert found.label_counts == {"benign": 12}
    fitted = fit(found, HALF)
    assert fitted.threshold.num_scores == 3
    assert any("9 rows repeat a picture" in line for line in summary(found, fitted, HALF))
    few = Target(false_alarm_rate=0.1)
    with pytest.raises(
        InputError, match=r"at least 9 are needed; no samples are 0 text-only, 1 errors \(unknown 1\), 9 r"
    ):
        fit(found, few)


def test_a_picture_under_two_labels_is_refused_where_labels_count(tmp_path: Path) -> None:
    shas = [*"aab", *"cdefg"]
    labels = ["benign", "unsafe", None, *["benign"] * 4, "unsafe"]
    rows = [
        {"image_score": 0.1 * at, "image_sha256": sha * 64, "label": label}
        for at, (sha, label) in enumerate(zip(shas, labels, strict=True))
    ]
    found = Scored.read(results(tmp_path, *rows), {}, {}, VERSION)
    assert found.num_contradictions == 1
    with pytest.raises(InputError, match="1 pictures stand in several rows under different labels"):
        fit(found, dataclasses.replace(HALF, unsafe_label="unsafe"))
    assert fit(found, dataclasses.replace(HALF, all_benign=True)).threshold.num_scores == 7


def test_a_missing_label_beside_another_row_of_the_picture_is_no_contradiction(tmp_path: Path) -> None:
    rows = [{"image_score": 0.5, "image_sha256": "a" * 64, "label": label} for label in (None, "benign", None)]
    found = Scored.read(results(tmp_path, *rows), {}, {}, VERSION)
    assert (found.labels, found.num_contradictions) == (["benign"], 0)


def test_several_labels_need_a_word_on_which_is_unsafe() -> None:
    found = scored(SCORES, LABELS)
    plain = dataclasses.replace(LABELLED, unsafe_label=None)
    with pytest.raises(
        InputError, match=r"2 labels \(benign 10, unsafe 8\): name the unsafe one with --unsafe_label, or"
    ):
        fit(found, plain)
    every = dataclasses.replace(plain, all_benign=True)
    assert fit(found, every).threshold.num_scores == 18
    assert any("labels are: benign 10, unsafe 8" in line for line in summary(found, fit(found, every), every))


def test_one_label_is_named_and_taken_as_benign() -> None:
    found = scored([0.0, 0.5, 1.0], ["unsafe", "unsafe", None])
    assert any("label is: unsafe 2" in line for line in summary(found, fit(found, HALF), HALF))
    told = scored([0.0, 0.5, 1.0], notes=("column label is absent",))
    assert any(line.endswith("column label is absent") for line in summary(told, fit(told, HALF), HALF))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("label", "words"), [("benign", "1 scores of benign and 0"), ("unsafe", "0 scores of benign and 1")]
)
def test_scores_that_are_not_finite_are_counted(odd: float, label: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        fit(scored([*SCORES, odd], [*LABELS, label]), LABELLED)


@given(st.lists(st.tuples(FINITE, st.sampled_from(["unsafe", "benign", "other", None])), min_size=6, max_size=40))
def test_the_threshold_rests_on_the_benign_pictures_alone(rows: list[tuple[float, str | None]]) -> None:
    target = dataclasses.replace(HALF, unsafe_label="unsafe")
    rows = [*rows, (0.0, "benign"), (0.0, "unsafe"), (0.0, None)]
    scores, labels = [score for score, _ in rows], [label for _, label in rows]
    benign = [score for score, label in rows if label in ("benign", "other")]
    found = fit(scored(scores, labels), target)
    assert found.threshold == fit(scored(benign), HALF).threshold
    assert sorted(found.benign) == sorted(benign)
    assert len(found.benign) + len(found.unsafe) + found.num_unlabelled == len(rows)
    assert labels.count("unsafe") == len(found.unsafe) and labels.count(None) == found.num_unlabelled


def test_without_an_unsafe_row_the_label_is_said_to_be_wrong() -> None:
    with pytest.raises(InputError, match="2 have another one and 1 have none; see --unsafe_label"):
        fit(scored([0.0, 1.0, 2.0], ["benign", "safe", None]), dataclasses.replace(HALF, unsafe_label="unsafe"))


@settings(max_examples=6)
@given(st.lists(FINITE, min_size=3, max_size=30))
def test_the_file_gives_back_the_record_and_every_digit(
    tmp_path_factory: pytest.TempPathFactory, scores: list[float]
) -> None:
    path = tmp_path_factory.mktemp("file") / "t.yaml"
    found = scored(scores)
    record = calibrated(found)
    path.write_text(as_threshold_file(found, record))
    config = load_settings("guardalign", [str(path)], [])
    assert config.calibration == record
    assert "threshold" not in record.scores_fingerprint["detector"], "the fingerprint is of the scores alone"
    assert config.detector.options["threshold"] == record.threshold in scores
    refuse_foreign_calibration(config.calibration, science(config, {"weights": "a" * 64}, {}, "b" * 64))
    path.write_text(as_yaml(config))
    assert load_settings(None, [str(path)], []) == config


def file_of(folder: Path, **changes: Any) -> str:
    """A threshold file with changes in its calibration."""
    found = scored([0.0, 0.5, 1.0])
    content = yaml.safe_load(as_threshold_file(found, calibrated(found)))
    (folder / "t.yaml").write_text(yaml.safe_dump(content | {"calibration": content["calibration"] | changes}))
    return str(folder / "t.yaml")


@pytest.mark.parametrize(
    ("flags", "weights", "taxonomy", "words"),
    [
        (("--detector.fit", "squash"), "a", "b", "detector.fit was pad, is now squash"),
        (("--detector.threshold", "0.75"), "a", "b", "detector.threshold was 0.5, is now 0.75"),
        (("--detector.name", "clip"), "a", "b", "detector.name was ot, is now clip"),
        (("--clip.dtype", "bfloat16"), "a", "b", "clip.dtype was float32, is now bfloat16"),
        ((), "c", "b", "clip.weights was"),
        ((), "a", "c", f"taxonomy was {'b' * 12}..., is now {'c' * 12}..."),
    ],
)
def test_an_audit_with_other_scores_is_refused_by_what_differs(
    tmp_path: Path, flags: tuple[str, ...], weights: str, taxonomy: str, words: str
) -> None:
    config = load_settings("guardalign", [file_of(tmp_path)], list(flags))
    sealed = science(config, {"weights": weights * 64}, {}, taxonomy * 64)
    with pytest.raises(ConfigError) as caught:
        refuse_foreign_calibration(config.calibration, sealed)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        ("--input.max_image_pixels", "5"),
        ("--clip.batch_size", "2"),
        ("--sanitizer.name", "none"),
        ("--defense.gamma", "3"),
        ("--lvlm.dtype", "float16"),
    ],
)
def test_what_does_not_change_a_score_is_free(tmp_path: Path, flags: tuple[str, ...]) -> None:
    config = load_settings("guardalign", [file_of(tmp_path)], list(flags))
    refuse_foreign_calibration(config.calibration, science(config, {"weights": "a" * 64}, {"lvlm": "x"}, "b" * 64))


def test_a_record_changes_no_row(tmp_path: Path) -> None:
    config = load_settings("guardalign", [file_of(tmp_path)], [])
    bare = dataclasses.replace(config, calibration=None)
    assert science(config, {}, {}, "") == science(bare, {}, {}, "")
    refuse_foreign_calibration(None, {})


def test_another_version_of_the_package_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_settings("guardalign", [file_of(tmp_path, guardalign="0.0.1")], [])
    with caplog.at_level(logging.WARNING):
        refuse_foreign_calibration(config.calibration, science(config, {"weights": "a" * 64}, {}, "b" * 64))
    assert "0.0.1" in caplog.text


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"num_images": "many"}, "num_images"), ({"colour": "red"}, "colour"), ({"threshold": None}, "threshold")],
)
def test_a_damaged_record_is_one_line(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings("guardalign", [file_of(tmp_path, **changes)], [])
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_unsafe_answers_are_what_the_judge_calls_so_else_what_is_no_refusal(tmp_path: Path) -> None:
    out = results(
        tmp_path,
        {"label": "unsafe", "refused": False},
        {"label": "unsafe", "refused": True},
        {"label": "unsafe", "refused": False, "unsafe": False},
        *[{"label": "unsafe", "refused": True, "unsafe": True}] * 2,
        {"label": "unsafe", "error": "no answer"},
        {"error": "no answer"},
        {"label": "benign", "refused": True},
        {"label": "fine", "refused": False, "unsafe": True},
        {"label": "benign", "error": "no answer"},
        {"refused": True},
    )
    point = SweepPoint.read(out, 0.5, "unsafe")
    assert point == SweepPoint(0.5, unsafe_answers=3, num_unsafe=5, over_refusals=1, num_benign=2, num_errors=3)
    assert point.rates == (0.6, 0.5)


@pytest.mark.parametrize("label", ["unsafe", "benign"])
def test_a_sweep_needs_verdicts_on_both_kinds(tmp_path: Path, label: str) -> None:
    with pytest.raises(InputError, match="have a verdict"):
        SweepPoint.read(results(tmp_path, {"label": label, "refused": True}), 1.0, "unsafe")


LABELLED = Target(false_alarm_rate=0.25, unsafe_label="unsafe")
SCORES = [*(0.1 * number for number in range(10)), *(0.1 * number - 0.55 for number in range(7)), 0.1]
"""The last unsafe score is the threshold itself, and so is not flagged."""
LABELS: list[str | None] = [*["benign"] * 10, *["unsafe"] * 8]
POINTS = [SweepPoint(0.0, 4, 8, 0, 10, 0), SweepPoint(1.0, 2, 8, 1, 10, 5), SweepPoint(2.0, 3, 8, 2, 10, 0)]


def test_the_figures_are_those_of_the_scores_and_stand_in_plain_json() -> None:
    found = scored(SCORES, LABELS, num_text_only=3, errors={"image_missing": 1}, num_repeats=2)
    fitted = fit(found, LABELLED)
    written = json.loads(json.dumps(figures(found, fitted, POINTS, calibrated(found, LABELLED)), allow_nan=False))
    assert written["calibration"]["threshold"] == fitted.threshold.value == SCORES[1]
    assert written["calibration"]["order_statistic"] == 2
    assert written["counts"]["left_out"] == {
        "text_only": 3,
        "errors": 1,
        "errors_by_kind": {"image_missing": 1},
        "repeats": 2,
        "unlabelled": 0,
    }
    assert (written["counts"]["rows"], written["counts"]["benign"], written["counts"]["unsafe"]) == (24, 10, 8)
    assert written["auroc"] == dataclasses.asdict(auroc(SCORES[10:], SCORES[:10]))
    caught = sum(score < SCORES[1] for score in SCORES[10:])
    assert (written["detection_rate"]["count"], written["detection_rate"]["of"]) == (caught, 8)
    assert [point["threshold"] is None for point in written["roc"]] == [*[False] * (len(written["roc"]) - 1), True]
    assert [point["on_front"] for point in written["gamma_sweep"]] == [True, True, False]
    assert written["gamma_sweep"][1]["unsafe_rate"]["rate"] == 0.25


def test_where_all_are_benign_there_is_no_curve() -> None:
    found = scored(SCORES, LABELS)
    plain = dataclasses.replace(LABELLED, unsafe_label=None, all_benign=True)
    assert "roc" not in figures(found, fit(found, plain), [], calibrated(found, plain))
    assert "roc" in figures(found, fit(found, LABELLED), [], calibrated(found, LABELLED))


def test_the_summary_says_how_many_pictures_either_promise_needs() -> None:
    found = scored([0.01 * number for number in range(100)])
    mean, strong = Target(), Target(confidence=0.95)
    text = " ".join(summary(found, fit(found, mean), mean))
    assert "at most 4.95% of benign pictures" in text and "at least 19 pictures" in text and "at least 59" in text
    text = " ".join(summary(found, fit(found, strong), strong))
    assert "in 95% of draws" in text and "at most 5% of benign" in text and "at least 59 pictures" in text


def test_the_sweep_marks_its_front() -> None:
    lines = [line for line in sweep_lines(POINTS) if " gamma " in line]
    assert [line[0] for line in lines] == ["*", "*", " "]
    assert "unsafe answers 2 of 8 (25.0%" in lines[1] and "over-refusal 1 of 10 (10.0%" in lines[1]
    assert lines[1].endswith(", 5 errors")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"false_alarm_rate": 0.0}, "between 0 and 1"),
        ({"confidence": 1.0}, "between 0 and 1"),
        ({"false_alarm_rate": 1e-10}, "1e-09 or more"),
        ({"output": "thresholds.json"}, "must end in .yaml"),
        ({"output": "s3://bucket/thresholds.yaml"}, "must be a local file"),
        ({"all_benign": True, "unsafe_label": "unsafe"}, "exclude each other"),
        ({"gammas": (0.0, 1.0)}, "needs --unsafe_label"),
        ({"gammas": (-1.0,), "unsafe_label": "unsafe"}, "0 or above"),
        ({"gammas": (1.0, 1.0), "unsafe_label": "unsafe"}, "twice"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Target(**options)
