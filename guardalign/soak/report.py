"""What a soak says: kills by place, where the run was, and what was found wrong.

Knows nothing of how kills are dealt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from statistics import median

from guardalign.soak.checking import Findings
from guardalign.soak.dealing import Kill
from guardalign.soak.rounds import RoundResult

BINS = 10
WORDS = {
    "lost": "rows lost",
    "duplicated": "rows duplicated",
    "different": "rows different",
    "stray": "stray files",
    "manifest": "faults of run.json",
    "redone": "committed shards redone",
    "orphans": "processes left behind",
    "hung": "starts that hung",
    "failed": "starts that failed by themselves",
    "tracebacks": "starts that ended in a traceback",
}
"""The figures of `Findings`, as they are printed."""


def report(results: Sequence[RoundResult]) -> Iterator[str]:
    """The table's lines."""
    kills = [kill for result in results for kill in result.kills]
    yield f"{'kills by place':28} {'kills':>5} {'survived':>9} {'resumed':>8}   share committed: min, median, max"
    for place in sorted({kill.place for kill in kills}):
        yield _line(place, [kill for kill in kills if kill.place == place])
    yield _line("all", kills)
    yield ""
    yield from _counted("by engine", kills, lambda kill: kill.engine)
    yield from _counted("by the crash point that the victim had passed last", kills, lambda kill: kill.passed)
    yield from _histogram(kills)
    yield ""
    yield from _figures(results)


def _line(place: str, kills: Sequence[Kill]) -> str:
    shares = [kill.share for kill in kills] or [0.0]
    survived = sum(kill.is_survived for kill in kills)
    figures = f"{len(kills):5} {survived:9} {len(kills) - survived:8}"
    return f"{place:28} {figures}   {min(shares):.0%}, {median(shares):.0%}, {max(shares):.0%}"


def _counted(title: str, kills: Sequence[Kill], key: Callable[[Kill], str]) -> Iterator[str]:
    counts = Counter(key(kill) for kill in kills)
    yield f"{title}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _histogram(kills: Sequence[Kill]) -> Iterator[str]:
    counts = Counter(min(int(kill.share * BINS), BINS - 1) for kill in kills)
    yield "share of shards committed at the kill:"
    for place in range(BINS):
        yield f"  {place / BINS:4.0%} to {(place + 1) / BINS:4.0%}  {counts[place]:4}  {'#' * counts[place]}"


def _figures(results: Sequence[RoundResult]) -> Iterator[str]:
    whole = found(results)
    for each in fields(Findings):
        yield f"{WORDS[each.name]:34} {getattr(whole, each.name):6}"
    read_again, in_flight = redone(results)
    yield f"{'shards read again':34} {read_again:6}   at most {in_flight}: those in flight, summed over the kills"
    seconds = sum(result.seconds for result in results)
    num_kills = sum(len(result.kills) for result in results)
    starts = sum(result.starts for result in results)
    yield f"{num_kills} kills in {len(results)} rounds, {starts} starts, {seconds:.0f} s, {_each(seconds, num_kills)}"
    yield from (note for result in results for note in result.notes)


def _each(seconds: float, num_kills: int) -> str:
    return f"{seconds / num_kills:.1f} s a kill" if num_kills else "no kill"


def found(results: Sequence[RoundResult]) -> Findings:
    """All that was found wrong."""
    return sum((result.findings for result in results), Findings())


def redone(results: Sequence[RoundResult]) -> tuple[int, int]:
    """Shards that were read again, and how many were in flight at the kills."""
    in_flight = sum(kill.in_flight for result in results for kill in result.kills)
    return sum(result.read_again for result in results), in_flight


def is_sound(results: Sequence[RoundResult]) -> bool:
    """Nothing went wrong, and no more was done again than was in flight."""
    read_again, in_flight = redone(results)
    return found(results).total == 0 and read_again <= in_flight
