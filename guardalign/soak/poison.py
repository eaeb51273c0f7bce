"""Rows that end whoever works on them, among rows that do not: what they cost, beside the promise.

    time with poison <= 2 x undisturbed time + time limits + two worker starts for each poison row

A row that hangs reaches the time limit twice: once with its neighbours, once alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from guardalign.audit import Prepared, prepare
from guardalign.pipeline import steps
from guardalign.reading import read_shard
from guardalign.settings import load_settings
from guardalign.soak.audits import Audit, scratch, write_rows
from guardalign.soak.checking import Findings, checked, rows_of
from guardalign.soak.processes import left_behind
from guardalign.watching import Worker
from guardalign.worker import Order

NUM_ROWS: Final = 300
SHARD_SECONDS: Final = 20.0
WORKER_GIB: Final = 2.0
LIMITS: Final = ("--cluster.shard_seconds", str(SHARD_SECONDS), "--cluster.worker_gib", str(WORKER_GIB))
HARMS: Final[Mapping[str, str]] = {"row-00050": "segfault", "row-00150": "hang", "row-00250": "memory"}
"""by row, what it does to its worker; all of them in shards of their own"""
KINDS: Final = {"segfault": "killed_worker", "hang": "timed_out", "memory": "out_of_memory"}
"""by harm, the error that it must become"""
PATIENCE: Final = 20.0
"""in which all processes of a run must have gone [s]"""
TOLERANCE: Final = 1e-5
"""of floats, whose micro-batches are others in a poisoned shard"""
STAGES: Final = ("generate", "detect")


@dataclass(frozen=True)
class Price:
    """What the poison cost."""

    stage: str
    """the stage that it struck"""
    undisturbed: float
    """time of the run without it [s]"""
    disturbed: float
    """time of the run with it [s]"""
    start: float
    """start of a worker of that stage, and one row [s]"""
    findings: Findings
    """the healthy rows, beside those of the undisturbed run"""
    errors: Mapping[str, str]
    """the error cells, by row"""
    wrong: tuple[str, ...]
    """rows whose error is not the one that was expected"""

    @property
    def allowed(self) -> float:
        """The promise [s]."""
        return 2 * self.undisturbed + 2 * SHARD_SECONDS + 2 * len(HARMS) * self.start

    @property
    def is_kept(self) -> bool:
        """Time, rows and errors are as promised."""
        return self.disturbed <= self.allowed and not self.findings.total and not self.wrong


def poisoned(output: Path, say: Callable[[str], object], stages: tuple[str, ...] = STAGES) -> int:
    """Measures and says what poison in each stage costs; 1 where the promise is not kept."""
    prices = []
    for price in prices_of(output, stages):
        prices.append(price)
        for line in lines(price):
            say(line)
    return int(not all(price.is_kept for price in prices))


def prices_of(output: Path, stages: tuple[str, ...] = STAGES) -> Iterator[Price]:
    """An undisturbed run, then one with poison in each stage."""
    rows = output / "rows.parquet"
    write_rows(rows, NUM_ROWS)
    with scratch() as folder:
        audit = Audit(rows, output / "undisturbed", "ray", f"{output}/poison", folder, flags=LIMITS)
        seconds = audit.finish(output / "undisturbed.log")
        prepared = prepare(load_settings(None, [], audit.words))
        for stage in stages:
            yield _price(audit, seconds, stage, worker_start(prepared, stage))


def worker_start(prepared: Prepared, stage: str) -> float:
    """How long a worker of this stage takes to start and to work on one row [s]."""
    members = [step for step in steps(prepared.config, prepared.taxonomy) if step.pool == stage]
    row = read_shard(prepared.source, prepared.plan.shards[0]).slice(0, 1)
    worker = Worker(Order(stage, members, prepared.config.cluster.threads, is_last=False), None, None)
    started = time.monotonic()
    try:
        worker(row)
    finally:
        worker.stop()
    return time.monotonic() - started


def _price(audit: Audit, undisturbed: float, stage: str, start: float) -> Price:
    folder = audit.out.with_name(stage)
    faults = folder.with_name(f"{stage}-faults")
    faults.mkdir(parents=True, exist_ok=True)
    (faults / "rows.json").write_text(json.dumps({stage: dict(HARMS)}))
    poisoned = replace(audit, out=folder, faults=faults)
    disturbed = poisoned.finish(folder.with_name(f"{stage}.log"))
    left = left_behind(audit.mark, (), PATIENCE)
    reference = [row for row in rows_of(audit.out) if row["sample_id"] not in HARMS]
    rows = {row["sample_id"]: row for row in rows_of(folder)}
    expected = {row: (stage, KINDS[harm]) for row, harm in HARMS.items()}
    told = {row: (cells["error_stage"], cells["error_kind"]) for row, cells in rows.items() if cells["error"]}
    wrong = sorted(row for row in {*expected, *told} if expected.get(row) != told.get(row))
    findings = checked(folder, reference, TOLERANCE)
    poison = sum(row in rows for row in HARMS)  # they have rows, and none in the reference
    findings = replace(findings, duplicated=findings.duplicated - poison, orphans=len(left))
    return Price(
        stage, undisturbed, disturbed, start, findings, {row: rows[row]["error"] for row in told}, tuple(wrong)
    )


def lines(price: Price) -> Iterator[str]:
    """What is printed of a stage's poison."""
    yield f"{len(HARMS)} of {NUM_ROWS} rows harm their worker in stage {price.stage}:"
    yield from (f"  {error}" for _, error in sorted(price.errors.items()))
    yield from (f"  {row}: another error than expected" for row in price.wrong)
    found = price.findings
    counts = f"{found.lost} lost, {found.duplicated} duplicated, {found.different} different"
    yield f"  {NUM_ROWS - len(HARMS)} other rows: {counts}"
    yield f"  stray files {found.stray}, faults of run.json {found.manifest}, processes left behind {found.orphans}"
    parts = f"2 x {price.undisturbed:.1f} + 2 x {SHARD_SECONDS:.0f} + {2 * len(HARMS)} x {price.start:.1f}"
    sign = "<=" if price.disturbed <= price.allowed else ">"
    yield f"  {price.disturbed:.1f} s {sign} {price.allowed:.1f} s = {parts} (undisturbed, time limits, worker starts)"
