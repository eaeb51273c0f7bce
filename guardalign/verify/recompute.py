"""Rows of a finished run, computed again by the run's own stages, in this process and in other batches than the run's.

Settings come from run.json. Others may say where things lie and run, never what is computed: the fingerprint is
compared. Knows nothing of how rows are compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import yaml

from guardalign.audit import Prepared, prepare, reconcile
from guardalign.config import AuditConfig, Choice, Dtype
from guardalign.errors import ConfigError, InputError, RunFailedError
from guardalign.fingerprint import changed_files, differences, science
from guardalign.pipeline import Stage, steps
from guardalign.reading import read_shard
from guardalign.receipts import Receipt
from guardalign.results import RunFolder, shard_name
from guardalign.schema import result_schema, to_result
from guardalign.settings import load_settings, refuse_settings
from guardalign.sources.pictures import fetching_only
from guardalign.sources.rows import picked
from guardalign.verify.agreement import GROUPS
from guardalign.verify.devices import bounds
from guardalign.verify.sample import Drawn
from guardalign.working import chunks

NO_PLACE: Final = ("recipe", "output", "engine", "dry_run")
"""settings that say nothing here"""
FP32_TOLERANCE: Final = 1e-5
HALF_TOLERANCE: Final = 1e-2
"""of numbers behind a model in bf16 or fp16"""
ENDPOINT: Final = "endpoint"
"""the judge that is asked over the network"""


@dataclass(frozen=True)
class Recomputation:
    """How rows are computed again."""

    prepared: Prepared
    """the run as it would be started now"""
    asks_judge: bool
    """False leaves verdicts out: the judge is an endpoint, and shall not be asked"""

    precisions: Mapping[str, Dtype]
    """by number-format setting, the format whose rounding bounds what may differ (`devices.bounds`)"""
    doubts: tuple[str, ...]
    """sentences on models that are held to looser tolerances than their number format's"""

    @property
    def is_exact(self) -> bool:
        """Every model of the run rounds as fp32, then and now."""
        return set(self.precisions.values()) == {"float32"}

    @property
    def tolerances(self) -> dict[str, float]:
        """For every group that is compared, how far its numbers may differ."""
        detects = self.precisions.get("clip.dtype", "float32") == "float32"
        after = FP32_TOLERANCE if self.is_exact else HALF_TOLERANCE
        found = dict.fromkeys(GROUPS, after) | {
            "sample": 0.0,
            "detection": FP32_TOLERANCE if detects else HALF_TOLERANCE,
        }
        return found if self.asks_judge else {name: found[name] for name in found if name != "verdict"}

    @property
    def stages(self) -> list[Stage]:
        """The run's own stages, loaded."""
        config = self.prepared.config
        config = config if self.asks_judge else replace(config, judge=Choice("none"))
        return [step.make() for step in steps(config, self.prepared.taxonomy)]


def settings(
    manifest: Mapping[str, Any], files: Sequence[str], flags: Sequence[str]
) -> tuple[AuditConfig, AuditConfig]:
    """The run's settings, alone and under these files and flags; `ConfigError` for ones that would compute something
    else."""
    refuse_settings([], flags, NO_PLACE, "has no place in guardalign verify: it takes the run's own")
    own, now = _settings(manifest["config"], files, flags)
    changes = differences(science(own, {}, {}, ""), science(now, {}, {}, ""))
    if changes:
        raise ConfigError(f"verify computes what the run has computed: {changes[0]}; leave that setting out")
    return own, now


def planned(manifest: Mapping[str, Any], files: Sequence[str], flags: Sequence[str], judge: bool) -> Recomputation:
    """The run of this manifest, planned anew; raises as `settings` does."""
    own, now = settings(manifest, files, flags)
    try:
        prepared = prepare(replace(now, self_check=False))
    except InputError as error:
        sentence = "if the input lies elsewhere now, say so with --input.path"
        raise RunFailedError(f"rows cannot be recomputed: {error}; {sentence}") from None
    return Recomputation(prepared, judge or now.judge.name != ENDPOINT, *bounds(manifest, own, now))


def _settings(plain: Mapping[str, Any], files: Sequence[str], flags: Sequence[str]) -> tuple[AuditConfig, AuditConfig]:
    """The run's settings, alone and under these files and flags."""
    with tempfile.TemporaryDirectory() as holder:
        path = Path(holder) / "run.yaml"
        path.write_text(yaml.safe_dump(dict(plain), allow_unicode=True), encoding="utf-8")
        try:
            own = load_settings(None, [str(path)], [])
        except ConfigError as error:
            raise InputError(f"run.json was written by another program or version: {error}") from None
        return own, load_settings(None, [str(path), *files], flags)


def input_problems(folder: RunFolder, manifest: Mapping[str, Any], work: Recomputation) -> list[str]:
    """One sentence for whatever is not as it was when the run began: the input, the models, the package."""
    prepared = work.prepared
    plan, config = prepared.plan, prepared.config
    listed = [{"path": file.path, "size": file.size, "etag": file.etag} for file in plan.files]
    problems = changed_files(folder.read_table("inputs.parquet").to_pylist(), listed)
    shape = {"shard_rows": config.shard_rows, "limit": config.limit}
    problems += differences(manifest["fingerprint"], prepared.science | shape)
    receipts = [Receipt(number, file["rows"]) for number, file in enumerate(manifest["files"])]
    try:
        reconcile(plan, receipts)
    except RunFailedError:
        problems.append("the input is cut into other shards than the run's")
    stored = folder.read_table(manifest["files"][0]["name"]).schema
    if not stored.equals(result_schema(plan.passthrough_fields), check_metadata=False):
        problems.append("the passed-through columns are not those of the results")
    return problems


def recomputed(
    folder: RunFolder, work: Recomputation, drawn: Drawn, seed: int, changed: list[str]
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The drawn rows as they are stored, and computed again: shuffled, so that batches are others than the run's.

    Rows whose picture the web gives otherwise now, or not at all, are left out; their ids go into `changed`."""
    import torch

    config = work.prepared.config
    torch.set_num_threads(config.cluster.threads)
    stages, random = work.stages, np.random.default_rng(seed)
    schema = result_schema(work.prepared.plan.passthrough_fields)
    for some in chunks(drawn.places, config.shard_rows):
        order = random.permutation(len(some)).tolist()
        stored = picked(_taken(some, lambda shard: folder.read_table(shard_name(shard))), order)
        with fetching_only(stored["sample_id"].to_pylist()) as fetching:
            begun = _taken(some, lambda shard: _read(folder, work.prepared, shard))
        begun = picked(begun, order)
        same = np.array(_same_pictures(stored, begun, fetching.fetched), bool)
        changed += picked(stored, np.flatnonzero(~same).tolist())["sample_id"].to_pylist()
        stored, begun = (picked(table, np.flatnonzero(same).tolist()) for table in (stored, begun))
        if not stored.num_rows:
            continue
        done = reduce(lambda table, stage: stage(table), stages, begun)
        yield stored, to_result(done, schema)


def _read(folder: RunFolder, prepared: Prepared, shard: int) -> pa.Table:
    """A shard's rows, but for those that ended whoever read them."""
    stored = folder.read_table(shard_name(shard), ["error", "error_stage", "error_kind"]).to_pylist()
    ended = ("read", "killed_worker")
    lost = {at: row["error"] for at, row in enumerate(stored) if (row["error_stage"], row["error_kind"]) == ended}
    return read_shard(prepared.source, prepared.plan.shards[shard], lost)


def _same_pictures(stored: pa.Table, begun: pa.Table, from_web: Collection[str]) -> list[bool]:
    """By row, False for a picture from the web that is another now, or that cannot be had any more."""
    then, now = stored["image_sha256"].to_pylist(), begun["image_sha256"].to_pylist()
    rows = zip(stored["sample_id"].to_pylist(), then, now, strict=True)
    return [sample_id not in from_web or one == other for sample_id, one, other in rows]


def _taken(places: Sequence[tuple[int, int]], read: Any) -> pa.Table:
    """These rows of their shards, as one table."""
    wanted: dict[int, list[int]] = {}
    for shard, position in places:
        wanted.setdefault(shard, []).append(position)
    parts = [picked(read(shard), positions) for shard, positions in wanted.items()]
    return pa.concat_tables([part.replace_schema_metadata(None) for part in parts], promote_options="default")
