"""The fingerprint holds what decides a row and nothing of where the work runs; differences are told by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from guardalign.config import AuditConfig, CalibrationRecord, Choice, ClipConfig, ClusterConfig, LvlmConfig
from guardalign.errors import ConfigError
from guardalign.fingerprint import changed_files, differences, refuse_foreign_calibration, science, scores_fingerprint
from guardalign.version import VERSION

CONFIG = AuditConfig(defense=Choice("guardalign", {"gamma": 1.0}))


def sealed(config: AuditConfig = CONFIG, weights: str = "a" * 64) -> dict[str, Any]:
    return science(config, {"clip": weights}, {"lvlm": "b" * 64}, "c" * 64)


def test_hardware_is_not_in_it() -> None:
    moved = dataclasses.replace(
        CONFIG,
        cluster=ClusterConfig(detect_actors=8, generate_gpus=1.0),
        output="elsewhere",
        engine="local",
        max_error_fraction=0.5,
        lvlm=LvlmConfig(model="/mnt/other/model", batch_size=64, device="cuda"),
    )
    assert sealed(moved) == sealed()


def test_a_changed_setting_is_named_with_both_values() -> None:
    other = dataclasses.replace(CONFIG, defense=Choice("guardalign", {"gamma": 2.0}))
    assert differences(sealed(), sealed(other)) == ["defense.gamma was 1.0, is now 2.0"]


def test_changed_weights_are_named() -> None:
    assert differences(sealed(), sealed(weights="d" * 64)) == [
        f"clip.weights.clip was {'a' * 12}..., is now {'d' * 12}..."
    ]


def test_equal_records_do_not_differ() -> None:
    assert differences(sealed(), sealed()) == []


DETECTOR = Choice("ot", {"threshold": 0.5, "fit": "pad", "score": "margin", "epsilon": 0.1})


def refusal(now: AuditConfig, weights: str = "a" * 64) -> str:
    """What an audit with these settings says to a calibration of `DETECTOR`."""
    calibrated: dict[str, Any] = scores_fingerprint(sealed(dataclasses.replace(CONFIG, detector=DETECTOR)))
    record = CalibrationRecord(0.5, 100, 0.05, None, "split-conformal", VERSION, calibrated)
    with pytest.raises(ConfigError) as caught:
        refuse_foreign_calibration(record, sealed(now, weights))
    return str(caught.value)


def test_a_foreign_calibration_names_the_models_settings_one_by_one() -> None:
    other = dataclasses.replace(CONFIG, detector=DETECTOR, clip=ClipConfig(dtype="bfloat16"))
    assert "detector: clip.dtype was float32, is now bfloat16; run" in refusal(other)
    text = refusal(dataclasses.replace(CONFIG, detector=DETECTOR), weights="d" * 64)
    assert "detector: clip.weights was " in text and "dtype" not in text


def test_a_foreign_calibration_says_how_many_more_settings_differ() -> None:
    options = {"threshold": 0.7, "fit": "squash", "score": "printed", "epsilon": 0.2}
    for changed, more in ((3, ""), (4, "; and 1 more")):
        now = Choice("ot", {**DETECTOR.options, **dict(list(options.items())[4 - changed :])})
        text = refusal(dataclasses.replace(CONFIG, detector=now))
        assert text.count(" was ") == 4 and f"epsilon was 0.1, is now 0.2{more}; run guardalign calibrate" in text


def test_a_calibration_without_a_detector_has_its_own_sentence() -> None:
    text = refusal(dataclasses.replace(CONFIG, detector=Choice("none")))
    assert text.startswith("a calibrated threshold needs a detector; the recipe has none")


def test_files_that_came_went_or_changed_are_named() -> None:
    before = [{"path": "a", "size": 1, "etag": "x"}, {"path": "b", "size": 1, "etag": "x"}]
    now = [{"path": "b", "size": 2, "etag": "x"}, {"path": "c", "size": 1, "etag": "x"}]
    assert changed_files(before, now) == ["c is new", "a is gone", "b has changed"]
