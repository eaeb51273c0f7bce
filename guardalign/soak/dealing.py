"""Which kill comes next, and what is known of one that was dealt.

A deck holds every place once; it is dealt to its end before it is shuffled again, so that all places get their share.
Knows nothing of how an audit is started.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from guardalign.faults import POINTS, VISITS
from guardalign.soak.processes import PLACES, Scene, strike

AT: Final = "at "
"""a crash point's name in the deck begins so"""
USED: Final = tuple(point for point in POINTS if point != "judge.shard")
"""crash points that an audit without a third pool comes by"""
MOST_VISITS: Final = 3
"""a crash point strikes at a visit drawn from 1 to this"""
JITTER: Final = 0.3
"""a kill comes so long after its shard was committed, at most [s]"""
EARLY: Final = 12.0
"""a kill that waits for no shard comes so long after the one before, at most [s]"""
EARLY_SHARE: Final = 1 / 6
"""kills that wait for no shard"""


@dataclass(frozen=True)
class Kill:
    """One kill that was dealt."""

    place: str
    """key of `PLACES`, or `at ` and a crash point"""
    engine: str
    """ray, cluster or local"""
    share: float
    """shards committed, in [0, 1]"""
    passed: str
    """the crash point that the victim, or else anybody of this start, had passed last; `starting` before the first"""
    in_flight: int
    """shards read in this start and not yet committed"""
    is_fatal: bool
    """the driver cannot survive it"""
    is_survived: bool = True
    """the run went on without a resume"""


@dataclass(frozen=True)
class Moment:
    """When a kill is due."""

    share: float | None
    """once this share of the shards is committed, in [0, 1); None: at once"""
    seconds: float
    """and so long after that [s]"""


def moments(draw: Random, count: int) -> list[Moment]:
    """So many moments, spread evenly over a run."""
    shares = sorted(draw.random() for _ in range(count))
    is_early = [draw.random() < EARLY_SHARE for _ in shares]
    return [
        Moment(None, draw.uniform(0, EARLY)) if early else Moment(share, draw.uniform(0, JITTER))
        for share, early in zip(shares, is_early, strict=True)
    ]


class Deck:
    """All places, in an order drawn by seed."""

    def __init__(self, draw: Random) -> None:
        self.draw = draw
        self.cards: list[str] = []

    def deal(self, scene: Scene, armed: Path) -> tuple[str, int] | None:
        """Kills somebody, or arms a crash point in the folder; the place and the victim's id where it was a kill."""
        for again in (False, True):
            if again or not self.cards:
                self.cards += self._shuffled()
            for name in list(self.cards):
                if name.startswith(AT):
                    self.cards.remove(name)
                    (armed / name.removeprefix(AT)).write_text(str(self.draw.randint(1, MOST_VISITS)))
                    return None
                if found := PLACES[name].find(scene):
                    self.cards.remove(name)
                    victim = self.draw.choice(sorted(found))
                    strike(victim, PLACES[name].by, group=PLACES[name].group)
                    return name, victim
        return None

    def take_back(self, armed: Path) -> None:
        """Crash points that nobody came by are dealt again."""
        self.cards += [f"{AT}{point}" for point in USED if (armed / point).exists()]

    def _shuffled(self) -> list[str]:
        cards = [*PLACES, *(f"{AT}{point}" for point in USED)]
        self.draw.shuffle(cards)
        return cards


def hits(armed: Path) -> Mapping[str, tuple[int, float]]:
    """Crash points that have struck since somebody last asked: name -> id of the process that died, and when."""
    found = {}
    for path in armed.glob("*.hit"):
        deadline = time.monotonic() + 1  # the id is written a moment after the file is there
        while not path.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        found[path.name.removesuffix(".hit")] = (int(path.read_text() or 0), path.stat().st_mtime)
        path.unlink()
    return found


@dataclass(frozen=True)
class Visit:
    """Somebody came by a crash point."""

    at: float
    """seconds since 1970"""
    pid: int
    """the process"""
    point: str
    """the point's name"""


def visits(folder: Path) -> list[Visit]:
    """All of them so far, in their order."""
    lines = (line.split() for line in (folder / VISITS).read_text().splitlines())
    return [Visit(float(at), int(pid), point) for at, pid, point in lines]


def last_passed(since: Sequence[Visit], pid: int) -> str:
    """The point that the process passed last; anybody's, where it passed none."""
    own = [visit.point for visit in since if visit.pid == pid]
    return (own or [visit.point for visit in since] or ["starting"])[-1]
