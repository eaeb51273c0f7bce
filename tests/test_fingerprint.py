"""The fingerprint holds what decides a row and nothing of where the work runs; differences are told by name."""

from __future__ import annotations

import dataclasses

from guardalign.config import AuditConfig, Choice, ClusterConfig, LvlmConfig
from guardalign.fingerprint import changed_files, differences, science

CONFIG = AuditConfig(defense=Choice("guardalign", {"gamma": 1.0}))


def sealed(config: AuditConfig = CONFIG, weights: str = "a" * 64) -> dict[str, object]:
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


def test_files_that_came_went_or_changed_are_named() -> None:
    before = [{"path": "a", "size": 1, "etag": "x"}, {"path": "b", "size": 1, "etag": "x"}]
    now = [{"path": "b", "size": 2, "etag": "x"}, {"path": "c", "size": 1, "etag": "x"}]
    assert changed_files(before, now) == ["c is new", "a is gone", "b has changed"]
