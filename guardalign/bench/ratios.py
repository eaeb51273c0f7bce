"""Measures a ratio: both sides alternately in the same run, the median of the rounds and their spread.

Machines are noisy and differ; what two sides did in neighbouring seconds on one machine can be compared. Knows nothing
of what is measured.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter

import torch

Side = Callable[[], float]
"""Does the work once and returns its cost: seconds, or bytes."""


@dataclass(frozen=True)
class Benchmark:
    """A ratio and what it must be."""

    title: str
    """what is divided by what"""
    must_be: float
    """the bound of this version"""
    goal: float
    """the goal of the next round"""
    at_least: bool
    """the bound is a lower one (speed-ups); else an upper one (costs)"""
    rounds: int
    """times each side is measured, alternately"""
    prepare: Callable[[], tuple[Side, Side]]
    """builds both sides: the ratio is the cost of the first divided by that of the second"""
    warm_up: bool = True
    """each side runs once unmeasured before; False where every run is a fresh process"""


@dataclass(frozen=True)
class Outcome:
    """One measured ratio."""

    title: str
    """what was divided by what"""
    ratio: float
    """median of the rounds' ratios"""
    lowest: float
    """smallest of the rounds' ratios"""
    highest: float
    """largest of the rounds' ratios"""
    must_be: float
    """the bound"""
    goal: float
    """the goal of the next round"""
    at_least: bool
    """the bound is a lower one"""
    costs: tuple[tuple[float, float], ...]
    """both sides' costs by round [s or bytes]"""

    @property
    def short(self) -> bool:
        """The ratio misses its bound."""
        return self.ratio < self.must_be if self.at_least else self.ratio > self.must_be


def timed(work: Callable[[], object]) -> Side:
    """A side that costs the seconds that `work` takes."""

    def side() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return perf_counter() - started

    return side


def measure(benchmark: Benchmark) -> Outcome:
    """Warms both sides up, then measures them in turn; says on stderr what it is at."""
    print(f"measuring {benchmark.title}", file=sys.stderr, flush=True)
    first, second = benchmark.prepare()
    if benchmark.warm_up:
        first(), second()
    costs = tuple((first(), second()) for _ in range(benchmark.rounds))
    ratios = [one / other for one, other in costs]
    return Outcome(
        title=benchmark.title,
        ratio=median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        must_be=benchmark.must_be,
        goal=benchmark.goal,
        at_least=benchmark.at_least,
        costs=costs,
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as lines; those short of "must be" are marked."""
    head = f"{'ratio':72} {'median':>8} {'spread':>15} {'must be':>8} {'goal':>7}"
    return "\n".join([head, "-" * len(head), *map(_line, outcomes)])


def _line(outcome: Outcome) -> str:
    sign = ">=" if outcome.at_least else "<="
    spread = f"{outcome.lowest:.2f} to {outcome.highest:.2f}"
    mark = "  SHORT" if outcome.short else ""
    return (
        f"{outcome.title:72} {outcome.ratio:8.3f} {spread:>15} {sign + format(outcome.must_be, 'g'):>8} "
        f"{sign + format(outcome.goal, 'g'):>7}{mark}"
    )


def as_json(outcomes: Sequence[Outcome]) -> str:
    """The outcomes with the machine they were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    rows = [asdict(outcome) | {"short": outcome.short} for outcome in outcomes]
    return json.dumps(
        {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, indent=1
    )
