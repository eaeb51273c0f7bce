"""Rounds: an audit is started, killed, and started again until it is complete; then it is held against the reference.

a round is one folder and one engine: Ray on its own, Ray on a cluster of several raylets, or none
a start of the audit lasts until it is complete or dies; several kills may fall into one
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Final

from guardalign.faults import VISITS
from guardalign.soak.audits import SHARD_ROWS, Audit, Cluster, joined, scratch, write_rows
from guardalign.soak.checking import Findings, checked, rows_of
from guardalign.soak.dealing import AT, Deck, Kill, Moment, hits, last_passed, moments, visits
from guardalign.soak.processes import PLACES, Scene, left_behind, living, strike

ENGINES: Final = ("ray", "local", "cluster")
"""of the rounds, in turn"""
ROWS: Final = "rows.parquet"
"""file of the rounds' input"""
KILLS_A_ROUND: Final = 7
OF_THE_HEAD: Final = {"gcs_server", "raylet, driver's"}
"""places without which a cluster is none"""
HUNG: Final = 300.0
"""without a new shard, a start has hung after so long [s]"""
PATIENCE: Final = 20.0
"""in which all processes of a round must have gone, its driver gone and its cluster stopped [s]"""
MOST_FAILURES: Final = 3
"""failures of a round, nothing having been done to it, before it is given up"""
GLANCE: Final = 0.02
"""between two looks at the audit [s]"""


@dataclass(frozen=True)
class Soak:
    """What is asked for."""

    kills: int
    """so many at least"""
    output: Path
    """folder for the rows, the reference and the rounds"""
    rows: int = 200
    """rows of each round"""
    seed: int = 0
    """of what is drawn"""
    seconds: float = float("inf")
    """no round begins after this time"""
    engines: tuple[str, ...] = ENGINES
    """of the rounds, in turn"""


@dataclass(frozen=True)
class RoundResult:
    """What one round came to."""

    kills: tuple[Kill, ...]
    """in their order"""
    findings: Findings
    """beside the reference"""
    starts: int
    """of the audit"""
    seconds: float
    """from the first start to the last check"""
    read_again: int
    """shards read beyond the first time"""
    num_shards: int
    """of the run"""
    notes: tuple[str, ...]
    """on what went wrong"""


def undisturbed(asked: Soak) -> Sequence[dict[str, Any]]:
    """Writes the rounds' input and audits it; what every round must come to."""
    rows = asked.output / ROWS
    write_rows(rows, asked.rows)
    with scratch() as folder:
        reference = Audit(rows, asked.output / "reference", "local", f"{asked.output}/reference", folder)
        reference.finish(asked.output / "reference.log")
    return rows_of(reference.out)


def soak(asked: Soak, wanted: Sequence[dict[str, Any]]) -> Iterator[RoundResult]:
    """Rounds, until so many kills are dealt, each held against what it must come to."""
    draw = Random(asked.seed)
    deck, started = Deck(draw), time.monotonic()
    dealt = number = 0
    while dealt < asked.kills and time.monotonic() - started < asked.seconds:
        engine = asked.engines[number % len(asked.engines)]
        count = min(KILLS_A_ROUND, asked.kills - dealt)
        with scratch() as folder:
            here = Round(asked, number, engine, folder, deck, moments(draw, count), wanted)
            try:
                result = here.run()
            finally:
                left_behind(here.audit.mark, here.sessions, patience=0)
        dealt, number = dealt + len(result.kills), number + 1
        yield result


class Round:
    """One run, from its first start to its last check."""

    def __init__(
        self,
        asked: Soak,
        number: int,
        engine: str,
        scratch: Path,
        deck: Deck,
        due: Sequence[Moment],
        wanted: Sequence[dict[str, Any]],
    ) -> None:
        self.engine, self.deck, self.due, self.wanted = engine, deck, list(due), wanted
        self.num_shards = -(-asked.rows // SHARD_ROWS)
        self.folder = asked.output / f"round-{number:03d}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.faults = self.folder / "faults"
        self.faults.mkdir(parents=True)
        (self.faults / VISITS).touch()
        mark, ray = f"{asked.output}/{number}", "local" if engine == "local" else "ray"
        self.audit = Audit(asked.output / ROWS, self.folder / "out", ray, mark, scratch, self.faults)
        self.cluster: Cluster | None = None
        self.kills: list[Kill] = []
        self.findings = Findings()
        self.notes: list[str] = []
        self.sessions: list[int] = []
        self.seen: dict[str, tuple[int, int]] = {}

    def run(self) -> RoundResult:
        """Until the audit is complete, or has failed too often."""
        began = time.monotonic()
        if self.engine == "cluster":
            self._resume_on_clusters()
        else:
            while not self._start():
                pass
        left = left_behind(self.audit.mark, self.sessions, PATIENCE)
        self._note("orphans", len(left), *(f"left behind: {' '.join(each.words)[:100]}" for each in left))
        self._compare_committed("the end")
        self.findings += checked(self.audit.out, self.wanted)
        read = sum(visit.point == "read.shard" for visit in visits(self.faults))
        self.deck.take_back(self.faults)
        if not self.findings.total:
            shutil.rmtree(self.folder)
        seconds, again = time.monotonic() - began, max(0, read - self.num_shards)
        starts, kills = len(self.sessions), tuple(self.kills)
        return RoundResult(kills, self.findings, starts, seconds, again, self.num_shards, tuple(self.notes))

    def _resume_on_clusters(self) -> None:
        """One cluster after the other, each until its head is lost or the audit is complete."""
        is_complete = False
        while not is_complete:
            with joined(self.audit.environment, self.audit.scratch) as self.cluster:
                self.audit = replace(self.audit, address=self.cluster.address)
                while not is_complete and self.cluster.has_head:
                    before = len(self.kills)
                    is_complete = self._start()
                    if {kill.place for kill in self.kills[before:]} & OF_THE_HEAD:
                        break
                if is_complete:
                    self._expect_no_workers()

    def _expect_no_workers(self) -> None:
        """On a cluster that lives on, no worker of a driver that is gone."""
        deadline = time.monotonic() + PATIENCE
        while workers := [each for each in living(self.audit.mark).values() if each.pool]:
            if time.monotonic() > deadline:
                return self._note("orphans", len(workers), "workers outlived their drivers on a cluster")
            time.sleep(0.2)
        return None

    def _start(self) -> bool:
        """One start of the audit, to its end; whether the round is over."""
        log = self.folder / f"start-{len(self.sessions):02d}.log"
        driver = self.audit.start(log)
        start = Start(self, driver)
        self.sessions.append(driver.pid)
        code = start.watch()
        words = log.read_text(errors="replace")
        self._note("tracebacks", "Traceback (most recent call last)" in words, f"a traceback stands in {log}")
        if code == 0:
            return True
        if start.dealt:
            self._blame(start.dealt)
        else:
            said = (words.strip().splitlines() or [""])[-1]
            self._note("failed", 1, f"exit code {code}, and nothing was done to it: {said[:200]}")
        return self.findings.failed + self.findings.hung >= MOST_FAILURES

    def _blame(self, dealt: Sequence[int]) -> None:
        """Of the kills of a start that died, the one that it did not survive."""
        fatal = [index for index in dealt if self.kills[index].is_fatal]
        worst = (fatal or list(dealt))[-1]
        place = self.kills[worst].place
        self._note("failed", not fatal, f"exit code not 0 after {place}, which a run is to survive")
        self.kills[worst] = replace(self.kills[worst], is_survived=False)

    def _note(self, figure: str, count: int, *sentences: str) -> None:
        if count:
            self.findings += Findings(**{figure: int(count)})
            self.notes += [f"{self.folder.name} ({self.engine}): {sentence}" for sentence in sentences]

    def _compare_committed(self, when: str) -> int:
        """Notes shards that were committed and are others now; returns how many are committed."""
        now = self.audit.committed()
        changed = [name for name, mark in self.seen.items() if now.get(name) != mark]
        self._note("redone", len(changed), f"{changed[:3]} were committed and then changed, before {when}")
        self.seen = now
        return len(now)


class Start:
    """One start of a round's audit, watched, and killed when it is due."""

    def __init__(self, round: Round, driver: subprocess.Popen[bytes]) -> None:
        self.round, self.driver = round, driver
        self.began = self.moved = self.freed = time.monotonic()
        self.began_at = time.time()
        self.committed = self.committed_before = len(round.audit.committed())
        self.dealt: list[int] = []
        self.waits_since: float | None = None

    def watch(self) -> int:
        """Until the driver's end; its exit code."""
        while (code := self.driver.poll()) is None:
            self._look()
            self._note_hits()
            if self._is_due():
                self._deal()
            if time.monotonic() - self.moved > HUNG:
                self._end_hung()
            time.sleep(GLANCE)
        self._note_hits()
        return code

    def _look(self) -> None:
        committed = len(self.round.audit.committed())
        if committed != self.committed:
            self.committed, self.moved = committed, time.monotonic()

    def _is_due(self) -> bool:
        if not self.round.due:
            return False
        moment = self.round.due[0]
        if self.waits_since is None:
            if moment.share is not None and self.committed < moment.share * self.round.num_shards:
                return False
            self.waits_since = time.monotonic()
        return time.monotonic() - self.waits_since >= moment.seconds

    def _deal(self) -> None:
        here = self.round
        self.waits_since = None
        here.due.pop(0)
        sessions = [*here.sessions, *(here.cluster.sessions if here.cluster else ())]
        scene = Scene(self.driver.pid, living(here.audit.mark, sessions))
        at = time.time()
        dealt = here.deck.deal(scene, here.faults)
        if dealt is not None:
            self._record(dealt[0], dealt[1], at, PLACES[dealt[0]].is_fatal)
            if dealt[0] == "raylet, another's" and here.cluster is not None:
                here.cluster.mend()

    def _note_hits(self) -> None:
        for point, (pid, at) in hits(self.round.faults).items():
            self._record(f"{AT}{point}", pid, at, pid == self.driver.pid)

    def _record(self, place: str, pid: int, at: float, is_fatal: bool) -> None:
        here = self.round
        committed = here._compare_committed(f"{place} was hit")
        since = [visit for visit in visits(here.faults) if self.began_at <= visit.at <= at]
        read = sum(visit.point == "read.shard" for visit in since)
        in_flight = max(0, read - (committed - self.committed_before))
        passed = last_passed(since, pid)
        self.dealt.append(len(here.kills))
        share = committed / here.num_shards
        here.kills.append(Kill(place, here.engine, share, passed, in_flight, is_fatal))
        self.moved = time.monotonic()

    def _end_hung(self) -> None:
        last = self.round.kills[self.dealt[-1]].place if self.dealt else "nothing"
        self.round._note("hung", 1, f"no new shard for {HUNG:.0f} s, the last thing dealt was: {last}")
        strike(self.driver.pid, group=True)
        self.driver.wait()
