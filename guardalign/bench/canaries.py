"""What the canaries cost a shard of the default size: one row measured after 128 were worked on, embedded models.

Knows nothing of how ratios are measured or printed.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import pyarrow.parquet as pq

from guardalign.bench.inputs import working_table
from guardalign.bench.ratios import Benchmark, Side, timed
from guardalign.canaries import Checked
from guardalign.micro import resolve_input, resolve_taxonomy
from guardalign.pipeline import steps
from guardalign.settings import load_settings
from guardalign.taxonomy import load_taxonomy

NUM_TOKENS = 16
"""longest answer"""
TIMES = 10
"""The canaries alone are measured so often: two percent of a shard drown in the noise of a ratio of shards."""


def canaries_of_a_shard(pool: Literal["detect", "generate"], rounds: int) -> Benchmark:
    """Time of a stage's canaries, ten times over, over that of the stage on one shard: 0.2 is two percent."""
    return Benchmark(
        title=f"{TIMES} x canaries after a shard / {pool} on its 128 rows, embedded models",
        must_be=0.02 * TIMES,
        goal=0.01 * TIMES,
        at_least=False,
        rounds=rounds,
        prepare=partial(_sides, pool),
    )


def _sides(pool: str) -> tuple[Side, Side]:
    config = load_settings("guardalign", (), ["--generation.max_new_tokens", str(NUM_TOKENS)])
    watched = next(step for step in steps(config, load_taxonomy(resolve_taxonomy(config))) if step.pool == pool)
    stage = watched.make()
    assert isinstance(stage, Checked), "self_check is on by default"
    sample = pq.read_table(str(resolve_input(config.input).path)).slice(0, config.shard_rows)
    table = working_table(sample["prompt"].to_pylist(), sample["image"].to_pylist())
    return timed(partial(_measured, stage)), timed(partial(stage.stage, table))


def _measured(stage: Checked) -> None:
    for _ in range(TIMES):
        for canary in stage.canaries:
            canary.numbers()
