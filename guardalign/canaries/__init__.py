"""Canaries: rows with known answers pass through the loaded models before the first shard, a part of them after each.

    detection.py    CLIP: embeddings are sound, the embedded models and named ones know what they see
    decoding.py     the LVLM: logits are sound, no row hangs on its neighbours, the picture matters, calibration acts
    judging.py      the judge: a verdict comes
    drift.py        what the shards' receipts tell when all is done

A canary that fails stops the run with one sentence. What canaries cost is counted nowhere, but what an endpoint is
asked. Knows nothing of engines, files or what is printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

import pyarrow as pa

from guardalign.errors import ErrorKind, ModelError
from guardalign.guard import Failure, guarded
from guardalign.schema import trace_of, with_trace

AS_LOADED: Final = " as loaded"
"""Ends the name of the numbers that a canary gave when the models had just been loaded and had passed."""
WAY_OUT: Final = "mend the model or what the settings say of it; --self_check false runs without this check"


class Canary(Protocol):
    """Rows with known answers for one stage."""

    @property
    def name(self) -> str:
        """Stage, number format and what else its numbers depend on, as `drift.named` writes them."""
        ...

    @property
    def kind(self) -> ErrorKind:
        """The error of a row that fails in this stage."""
        ...

    def check(self) -> tuple[str, ...]:
        """Notes for run.json; a `ModelError` that names the canary, what was expected and what came."""
        ...

    def numbers(self) -> tuple[float, ...]:
        """What must stay the same from shard to shard; empty where nothing is watched."""
        ...


class Checked:
    """A stage whose models are watched: checked when it is built, measured again after every shard."""

    def __init__(self, stage: Callable[[pa.Table], pa.Table], canaries: Sequence[Canary]) -> None:
        """Raises `ModelError` in one sentence where a canary fails."""
        self.stage, self.canaries = stage, canaries
        self.name: str = getattr(stage, "name", "")
        self._notes = tuple(note for canary in canaries for note in _passed(self.name, canary))
        self._loaded = {canary.name + AS_LOADED: found for canary in canaries if (found := canary.numbers())}

    def __call__(self, table: pa.Table) -> pa.Table:
        """The shard through the stage; its trace holds the canaries' numbers, as loaded and as they are now."""
        table = self.stage(table)
        now = {canary.name: _measured(canary) for canary in self.canaries if canary.name + AS_LOADED in self._loaded}
        trace = trace_of(table)
        notes, self._notes = self._notes, ()
        watched = {**trace.canaries, **self._loaded, **now}
        return with_trace(table, replace(trace, canaries=watched, notes=trace.notes + notes))


def readiness(stage: Any) -> str:
    """What a dry run says of a stage that has been built."""
    return "ready, canaries passed" if isinstance(stage, Checked) else "ready"


def _passed(stage: str, canary: Canary) -> tuple[str, ...]:
    def check(some: Sequence[Canary]) -> list[tuple[str, ...]]:
        return [each.check() for each in some]

    try:
        (found,) = guarded(check, [canary], ["canary"], canary.kind, tells=False)
    except ModelError as problem:
        raise ModelError(f"self-check of stage {stage}: {problem}; {WAY_OUT}") from None
    if isinstance(found, Failure):
        raise ModelError(f"self-check of stage {stage}: {found.message}; {WAY_OUT}")
    return found


def _measured(canary: Canary) -> tuple[float, ...]:
    """The canary's numbers; not a number where there are none any more: that marks the shard, and loses no row."""

    def measure(some: Sequence[Canary]) -> list[tuple[float, ...]]:
        return [each.numbers() for each in some]

    try:
        (found,) = guarded(measure, [canary], ["canary"], canary.kind, tells=False)
    except ModelError:
        return (math.nan,)
    return (math.nan,) if isinstance(found, Failure) else found
