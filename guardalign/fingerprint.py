"""What a run's rows depend on, as nested plain values, and the words for how two such records differ.

The science (settings, weight hashes, taxonomy, package version) and the input's shape are in it; where and how fast the
work runs is not, nor are paths, which differ between machines. Knows nothing of models, files or Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guardalign.config import AuditConfig, CalibrationRecord, to_plain
from guardalign.errors import ConfigError
from guardalign.models.provenance import seal
from guardalign.version import VERSION

log = logging.getLogger(__name__)

NAMED = 3
"""Differences from a calibration that are told one by one."""
_HARDWARE = ("recipe", "calibration", "cluster", "output", "engine", "dry_run", "max_error_fraction", "self_check")
_NESTED_HARDWARE = {
    "input": ("path", "image_root", "url_seconds"),
    "clip": ("model", "pretrained", "device", "batch_size"),
    "lvlm": ("model", "revision", "device", "device_map", "batch_size"),
    "judge": (
        *("phrases", "template", "model", "revision", "device", "batch_size"),
        *("key_variable", "requests_per_minute", "parallel", "timeout", "retries", "longest_wait"),
        *("prompt_price", "answer_price"),
    ),
}


def science(
    config: AuditConfig,
    clip_weights: Mapping[str, str],
    lvlm_weights: Mapping[str, str],
    taxonomy: str,
    judge: str = "",
    defense: str = "",
) -> dict[str, Any]:
    """The settings that decide a row, with weights and taxonomy by hash instead of by place."""
    plain = {key: value for key, value in to_plain(config).items() if key not in _HARDWARE}
    for section, names in _NESTED_HARDWARE.items():
        plain[section] = {key: value for key, value in plain[section].items() if key not in names}
    if judge:
        plain["judge"]["fingerprint"] = judge
    if defense:
        plain["defense"]["fingerprint"] = defense
    plain["clip"]["weights"], plain["lvlm"]["weights"] = dict(clip_weights), dict(lvlm_weights)
    return plain | {"taxonomy": taxonomy, "guardalign": VERSION}


def scores_fingerprint(sealed: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's science that its scores depend on; neither the threshold nor the input is in it."""
    detector = {key: value for key, value in sealed["detector"].items() if key != "threshold"}
    clip = {**sealed["clip"], "weights": seal(sealed["clip"]["weights"])}
    return {"clip": clip, "taxonomy": sealed["taxonomy"], "detector": detector}


def refuse_foreign_calibration(record: CalibrationRecord | None, sealed: Mapping[str, Any]) -> None:
    """`ConfigError` where a threshold was calibrated on other scores than the run's, or is not the one in use."""
    if record is None:
        return
    if sealed["detector"]["name"] == "none":
        raise ConfigError(
            "a calibrated threshold needs a detector; the recipe has none: choose one with --detector.name, or leave "
            "the threshold file out"
        )
    calibrated = {**record.scores_fingerprint, "detector.threshold": record.threshold}
    now = scores_fingerprint(sealed) | {"detector.threshold": sealed["detector"].get("threshold")}
    changes = differences(calibrated, now)
    if changes:
        more = f"; and {len(changes) - NAMED} more" if changes[NAMED:] else ""
        raise ConfigError(
            f"the threshold was calibrated for another detector: {'; '.join(changes[:NAMED])}{more}; run guardalign "
            "calibrate with these settings, or leave the threshold file out"
        )
    if record.guardalign != VERSION:
        log.warning(
            "the threshold was calibrated by guardalign %s, this is %s: if scores changed, so did its false-alarm rate",
            record.guardalign,
            VERSION,
        )


def flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One phrase for each setting that differs, in the order of the settings."""
    old, new = dict(flat(before)), dict(flat(now))
    names = [*new, *(name for name in old if name not in new)]
    missing = "absent"
    return [
        f"{name} was {_shown(old.get(name, missing))}, is now {_shown(new.get(name, missing))}"
        for name in names
        if old.get(name, missing) != new.get(name, missing)
    ]


def _shown(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text


def changed_files(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """One phrase for each input file that came, went or changed."""
    old, new = {row["path"]: row for row in before}, {row["path"]: row for row in now}
    came = [f"{path} is new" for path in new if path not in old]
    went = [f"{path} is gone" for path in old if path not in new]
    changed = [f"{path} has changed" for path in new if path in old and dict(old[path]) != dict(new[path])]
    return came + went + changed
