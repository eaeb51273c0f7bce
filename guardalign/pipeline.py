"""The audit as a literal list of steps, and the two engines that run it: a loop, or actor pools on Ray Data.

    read -> detect -> sanitize -> generate -> judge -> write

One shard is one Arrow table, all the way; what comes back is one small receipt a shard. This file and `nodes.py` alone
import Ray, and only when the Ray engine runs. Knows nothing of resuming, of locks or of what is printed.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from guardalign.canaries import Canary, Checked
from guardalign.canaries.decoding import DecodingCanary
from guardalign.canaries.detection import DetectionCanary
from guardalign.canaries.judging import JudgingCanary
from guardalign.config import AuditConfig
from guardalign.defenses import defense_of
from guardalign.detectors import DETECTORS
from guardalign.journal import Journal
from guardalign.judges import Judge as JudgeProtocol
from guardalign.judges import judge_of
from guardalign.micro import resolve_clip, resolve_lvlm
from guardalign.nodes import cluster_errors, proven, require_cluster, watched
from guardalign.reading import read_noted, read_task
from guardalign.receipts import Receipt
from guardalign.results import ShardWriter
from guardalign.sanitizers import SANITIZERS
from guardalign.sight import Sight
from guardalign.signals import held_back
from guardalign.sources import Shard, Source
from guardalign.stages import Detect, Generate, GenerateAndJudge, Judge, Sanitize, Thumbnails
from guardalign.supervision import Pool, receipt_of, staged
from guardalign.taxonomy import Taxonomy
from guardalign.worker import Order

Stage = Callable[[pa.Table], pa.Table]
POOLS = ("detect", "generate", "judge")
"""The actor pools, in the order in which a shard passes through them; one without a stage is not there."""
NONE = "none"
"""A strategy's name that leaves its stage out."""


@dataclass(frozen=True)
class Step:
    """One stage of the pipeline, to be built where it runs."""

    pool: str
    """the actor pool that holds it: detect, generate or judge"""
    make: Callable[[], Stage]
    """loads and returns the stage"""


def steps(config: AuditConfig, taxonomy: Taxonomy) -> list[Step]:
    """What happens to every shard between reading and writing, in order."""
    max_pixels = config.input.max_image_pixels
    listed = []
    if config.detector.name != NONE:
        listed.append(Step("detect", partial(_detect, config, taxonomy)))
    if config.images.keep != "none":
        images = config.images
        listed.append(Step("detect", partial(Thumbnails, images.keep, images.thumbnail_size, max_pixels)))
    if config.sanitizer.name != NONE and config.detector.name != NONE:
        sanitizer = SANITIZERS[config.sanitizer.name](**config.sanitizer.options)
        listed.append(Step("detect", partial(Sanitize, sanitizer, max_pixels)))
    judge = None if config.judge.name == NONE else judge_of(config.judge)
    if judge is not None and judge.shares_target:
        return [*listed, Step("generate", partial(_generate_and_judge, config, judge))]
    listed.append(Step("generate", partial(_generate, config)))
    if judge is not None:
        listed.append(Step(judge.pool, partial(_judge, config, judge)))
    return listed


def _detect(config: AuditConfig, taxonomy: Taxonomy) -> Stage:
    detector = DETECTORS[config.detector.name](**config.detector.options)
    stage = Detect(resolve_clip(config.clip), detector, taxonomy, config.input.max_image_pixels)
    return checked(config, stage, DetectionCanary(stage, config))


def _generate(config: AuditConfig) -> Stage:
    stage = _generating(config)
    return checked(config, stage, _decoding_canary(config, stage))


def _generating(config: AuditConfig) -> Generate:
    defense = defense_of(config)
    max_pixels = config.input.max_image_pixels
    return Generate(resolve_lvlm(config.lvlm), defense, config.defense.name, config.generation, max_pixels)


def _judge(config: AuditConfig, judge: JudgeProtocol) -> Stage:
    stage = Judge(judge.ready(num_actors=config.cluster.judge_actors), config.input.max_image_pixels)
    return checked(config, stage, JudgingCanary(stage, judge))


def _generate_and_judge(config: AuditConfig, judge: JudgeProtocol) -> Stage:
    """The LVLM answers and judges; it is loaded once."""
    generate = _generating(config)
    own = Judge(judge.ready(generate.lvlm), config.input.max_image_pixels)
    canaries = _decoding_canary(config, generate), JudgingCanary(own, judge, generate.lvlm)
    return checked(config, GenerateAndJudge(generate, own), *canaries)


def _decoding_canary(config: AuditConfig, stage: Generate) -> DecodingCanary:
    return DecodingCanary(stage.lvlm, config.lvlm, [stage.defense])


def checked(config: AuditConfig, stage: Stage, *canaries: Canary) -> Stage:
    """The stage under its canaries, unless `self_check` is off."""
    return Checked(stage, canaries) if config.self_check else stage


def scoring_steps(config: AuditConfig, taxonomy: Taxonomy) -> list[Step]:
    """The audit's first step alone, which ends in the detector's scores; the LVLM is not loaded."""
    assert config.detector.name != NONE, "without a detector there are no scores"
    return steps(config, taxonomy)[:1]


def run_locally(
    config: AuditConfig,
    taxonomy: Taxonomy,
    source: Source,
    shards: Sequence[Shard],
    writer: ShardWriter,
    listed: Sequence[Step] | None = None,
) -> Iterator[Receipt]:
    """The engine without Ray: every shard through every stage (or the listed ones), one after the other."""
    listed = steps(config, taxonomy) if listed is None else listed
    pools = "+".join(dict.fromkeys(step.pool for step in listed))
    work = staged(Order(pools, listed, config.cluster.threads, is_last=True), config.cluster)
    reads = Journal(writer.out, "read", None)
    journal = Journal(writer.out, pools, writer.run_id if config.cluster.isolated else None)
    try:
        for shard in shards:
            yield writer.commit(journal.through(work, read_noted(source, shard, reads)))
    finally:
        work.stop()


def run_on_ray(
    config: AuditConfig,
    taxonomy: Taxonomy,
    source: Source,
    shards: Sequence[Shard],
    writer: ShardWriter,
    listed: Sequence[Step] | None = None,
) -> Iterator[Receipt]:
    """The engine on Ray Data: tasks read, actor pools detect, answer and judge; the last pool writes.

    A judge without a model of its own works in the second pool.
    """
    with cluster_errors():
        with held_back():
            _join_cluster(config)
        _keep_shards_whole()
        listed = steps(config, taxonomy) if listed is None else listed
        with watched(), proven(config, source, shards, writer.out, [step.pool for step in listed]) as sight:
            for batch in _batches(config, source, shards, listed, writer, sight):
                yield receipt_of(batch)


def _batches(
    config: AuditConfig,
    source: Source,
    shards: Sequence[Shard],
    listed: Sequence[Step],
    writer: ShardWriter,
    sight: Sight,
) -> Iterator[pa.Table]:
    """What the last pool gives back of each shard, as it is done."""
    import ray

    last = listed[-1].pool
    rows = [{"shard": pickle.dumps(shard)} for shard in shards]
    readers = 2 * max(getattr(config.cluster, f"{pool}_actors") for pool in POOLS)
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        partial(read_task, source, writer.out, writer.run_id),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=READ_CPUS,
        compute=ray.data.TaskPoolStrategy(size=min(readers, len(rows))),
    )
    for pool in POOLS:
        members = [step for step in listed if step.pool == pool]
        if members:
            dataset = _through_pool(dataset, config, members, writer, pool == last, sight)
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


READ_CPUS = 0.5
"""Logical CPUs of a read task: it waits for files. Unlike the pools', so that Ray does not fuse it into an actor."""


def _through_pool(
    dataset: Any, config: AuditConfig, members: Sequence[Step], writer: ShardWriter, is_last: bool, sight: Sight
) -> Any:
    import ray

    cluster, pool = config.cluster, members[0].pool
    order = Order(pool, pickle.dumps(list(members)), cluster.threads, is_last)
    return dataset.map_batches(
        Pool,
        fn_constructor_args=(order, cluster, writer, is_last, sight),
        compute=ray.data.ActorPoolStrategy(size=getattr(cluster, f"{pool}_actors")),
        num_gpus=getattr(cluster, f"{pool}_gpus"),
        num_cpus=getattr(cluster, f"{pool}_cpus"),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
    )


def _join_cluster(config: AuditConfig) -> None:
    """Joins the cluster that the settings or RAY_ADDRESS name; else starts a small one on this machine.

    A local cluster declares more logical CPUs than it may have: every actor and task holds some, and two pools that
    wait for a third one's CPU wait for ever.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet = {"logging_level": "error", "log_to_driver": False}
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        require_cluster(address)
        with _stderr_closed():  # the log level above announces itself there, whatever it is
            ray.init(address=address, **quiet)
        return
    cluster = config.cluster
    held = sum(getattr(cluster, f"{pool}_actors") * getattr(cluster, f"{pool}_cpus") for pool in POOLS)
    with _stderr_closed():
        ray.init(address="local", num_cpus=int(max(os.cpu_count() or 1, held + 4)), include_dashboard=False, **quiet)


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """What native code writes to the error stream goes nowhere meanwhile; exceptions still tell."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _keep_shards_whole() -> None:
    """Ray Data must neither split nor merge blocks: a block is a shard, and a shard is a file."""
    import logging

    import ray

    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # of a failure it would print the traceback


ENGINES: dict[str, Callable[..., Iterator[Receipt]]] = {"ray": run_on_ray, "local": run_locally}
