"""A row that kills, hangs or bloats its worker costs itself; a worker that is killed from outside costs nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from guardalign.config import ClusterConfig
from guardalign.errors import ConfigError, ModelError
from guardalign.faults import HARMS
from guardalign.in_hand import in_hand
from guardalign.machine import memory_gib, resident_gib, used_memory
from guardalign.schema import PLANNED, Trace, trace_of, with_columns, with_trace
from guardalign.supervision import DEATHS, Isolated
from guardalign.worker import Order


@dataclass(frozen=True)
class Step:
    """As the pipeline's, whose import takes seconds."""

    pool: str
    make: Any


IDS = tuple("abcdefgh")


@dataclass(frozen=True)
class Harmful:
    """A stage without a model, some of whose rows do harm; it works on two rows at once."""

    harms: Mapping[str, str]
    """by id: one of `HARMS`, or `killed`: SIGKILL"""
    marks: str
    """folder for marks, so that a harm can be done once only"""
    name: str = "generate"

    def __call__(self, table: pa.Table) -> pa.Table:
        """Writes every living row's id in capitals as its response."""
        alive = [error is None for error in table["error"].to_pylist()]
        ids = table["sample_id"].to_pylist()
        for first in range(0, len(ids), 2):
            pair = [ids[at] for at in range(first, min(first + 2, len(ids))) if alive[at]]
            with in_hand(pair):
                for each in pair:
                    self._strike(each)
        response = [each.upper() if is_alive else None for each, is_alive in zip(ids, alive, strict=True)]
        return with_trace(with_columns(table, {"response": response}), Trace({self.name: 0.5}, {"calls": 1}, ("hi",)))

    def _strike(self, sample_id: str) -> None:
        kind, _, times = self.harms.get(sample_id, "").partition("*")
        if not kind:
            return
        mark = Path(self.marks, f"{sample_id}-{time.monotonic_ns()}")
        mark.touch()
        if times and len(list(Path(self.marks).glob(f"{sample_id}-*"))) > int(times):
            return
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "spin":
            while True:
                sum(range(10**9))  # native code that holds the interpreter's lock
        HARMS[kind]()


@dataclass(frozen=True)
class Together:
    """Dies of any two rows together."""

    name: str = "detect"

    def __call__(self, table: pa.Table) -> pa.Table:
        """As above."""
        with in_hand(table["sample_id"].to_pylist()):
            if table.num_rows > 1:
                os._exit(3)
        return with_trace(with_columns(table, {"response": table["sample_id"].to_pylist()}), Trace({"detect": 1.0}))


def broken() -> Any:
    raise ConfigError("the layers are wrong")


def deadly() -> Any:
    os._exit(9)


def failing() -> Any:
    return lambda table: table["no such column"]


def shard() -> pa.Table:
    rows = len(IDS)
    return with_columns(
        pa.table({"sample_id": list(IDS)}),
        {"error": [None] * rows, "error_stage": [None] * rows, "error_kind": [None] * rows, PLANNED: [rows] * rows},
    )


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Any]:
    made: list[Isolated] = []

    def make(stage: Any, **limits: Any) -> Isolated:
        steps = [Step("generate", partial(as_it_is, stage))]
        made.append(Isolated(Order("generate", steps, 1, is_last=False), ClusterConfig(**limits)))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def as_it_is(stage: Any) -> Any:
    return stage


def outcome(table: pa.Table) -> dict[str, str | None]:
    """Response or kind of error by id."""
    names = ("sample_id", "response", "error_kind")
    return {name: kind or text for name, text, kind in zip(*(table[each].to_pylist() for each in names), strict=True)}


def expected(**culprits: str) -> dict[str, str]:
    return {each: each.upper() for each in IDS} | culprits


def test_without_harm_isolation_changes_nothing(worker: Any, tmp_path: Path) -> None:
    stage = Harmful({}, str(tmp_path))
    alone, isolated = stage(shard()), worker(stage)(shard())
    assert isolated.drop_columns(["_trace"]).equals(alone.drop_columns(["_trace"]))
    assert trace_of(isolated).notes == ("hi",)
    assert DEATHS not in trace_of(isolated).counters


@pytest.mark.parametrize(
    ("harm", "words", "kind", "deaths"),
    [
        ("segfault", "killed the worker 2 times (segmentation fault, SIGSEGV)", "killed_worker", 2),
        pytest.param(
            *("exit", "killed the worker 2 times (it ended with exit code 17)", "killed_worker", 2),
            marks=pytest.mark.slow,
        ),
        ("killed", "killed the worker 3 times (killed, SIGKILL)", "killed_worker", 3),
        ("hang", "held the worker 2 times (longer than cluster.shard_seconds (2 s))", "timed_out", 2),
        pytest.param(
            *("spin", "held the worker 2 times (longer than cluster.shard_seconds (2 s))", "timed_out", 2),
            marks=pytest.mark.slow,
        ),
        ("memory", "took memory 2 times (more than cluster.worker_gib (1 GiB))", "out_of_memory", 2),
    ],
)
def test_a_poison_row_costs_itself_alone(
    worker: Any, tmp_path: Path, harm: str, words: str, kind: str, deaths: int
) -> None:
    pool = worker(
        Harmful({"d": harm}, str(tmp_path)), shard_seconds=2 if harm in ("hang", "spin") else 60, worker_gib=1.0
    )
    found = pool(shard())
    assert outcome(found) == expected(d=kind)
    row = found.to_pylist()[IDS.index("d")]
    assert row["error"] == f"sample d {words}"
    assert row["error_stage"] == "generate"
    assert trace_of(found).counters[DEATHS] == deaths
    again = pool(shard().filter([each != "d" for each in IDS]))
    assert set(outcome(again).values()) == {each.upper() for each in IDS} - {"D"}, "the worker works on"


@pytest.mark.parametrize("harm", ["segfault", "killed*1"])
def test_rows_are_tried_alone_behind_another_pool_too(worker: Any, tmp_path: Path, harm: str) -> None:
    """The shard's trace stands in its first row; the others have none."""
    before = with_trace(shard(), Trace({"detect": 2.0}))
    found = worker(Harmful({"d": harm}, str(tmp_path)))(before)
    assert outcome(found) == (expected() if "*" in harm else expected(d="killed_worker"))


def test_several_poison_rows_of_a_shard_are_all_found(worker: Any, tmp_path: Path) -> None:
    harms = {"a": "segfault", "b": "exit", "g": "segfault"}
    found = worker(Harmful(harms, str(tmp_path)))(shard())
    assert outcome(found) == expected(a="killed_worker", b="killed_worker", g="killed_worker")
    assert trace_of(found).counters[DEATHS] == 5, "a and b: once together, each once alone; g: together and alone"


@pytest.mark.parametrize("harm", ["killed*1", "killed*2", "segfault*1", "exit*1"])
def test_a_death_that_does_not_come_again_costs_no_row(worker: Any, tmp_path: Path, harm: str) -> None:
    found = worker(Harmful({"c": harm}, str(tmp_path)))(shard())
    assert outcome(found) == expected()
    assert trace_of(found).counters[DEATHS] == int(harm[-1])


def test_what_no_row_explains_is_done_row_by_row(worker: Any) -> None:
    found = worker(Together())(shard())
    assert outcome(found) == {each: each for each in IDS}
    assert found[PLANNED].to_pylist() == [len(IDS)] * len(IDS)
    assert trace_of(found).counters[DEATHS] == 3
    assert trace_of(found).seconds["detect"] == len(IDS)


def test_a_users_mistake_in_a_worker_keeps_its_words(worker: Any) -> None:
    pool = Isolated(Order("generate", [Step("generate", broken)], 1, is_last=False), ClusterConfig())
    with pytest.raises(ConfigError, match="the layers are wrong"):
        pool(shard())
    pool.stop()


def test_a_worker_that_dies_of_its_models_ends_the_run() -> None:
    pool = Isolated(Order("generate", [Step("generate", deadly)], 1, is_last=False), ClusterConfig())
    with pytest.raises(ModelError, match=r"died 3 times \(it ended with exit code 9\) while it loaded its models"):
        pool(shard())
    pool.stop()


def test_a_fault_of_ours_is_no_rows() -> None:
    pool = Isolated(Order("generate", [Step("generate", failing)], 1, is_last=False), ClusterConfig())
    with pytest.raises(RuntimeError, match=r"fault of ours(?s:.*)no such column"):
        pool(shard())
    pool.stop()


def test_a_worker_dies_with_its_parent_even_when_it_hangs(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"""
import os, sys, threading
sys.path[:0] = {sys.path!r}
from test_supervision import *
step = Step("generate", partial(as_it_is, Harmful({{"a": "spin"}}, {str(tmp_path)!r})))
pool = Isolated(Order("generate", [step], 1, False), ClusterConfig())
open({str(pid_file)!r}, "w").write(str(pool.worker.process.pid))
threading.Thread(target=pool, args=(shard(),), daemon=True).start()
while not list(Path({str(tmp_path)!r}).glob("a-*")):
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while resident_gib(pid) > 0:
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.02)


def test_memory_is_read_of_living_processes_only() -> None:
    assert 0.01 < resident_gib(os.getpid()) < 50
    assert resident_gib(2**22 + 1) == 0.0


def test_the_machines_memory_is_known() -> None:
    assert 0.5 < memory_gib() < 100_000
    assert 0.001 < used_memory() < 1
    before = used_memory()
    kept = bytearray(os.urandom(1) * int(0.02 * memory_gib() * 2**30))
    assert used_memory() > before + 0.01
    del kept


@pytest.mark.slow
def test_a_row_that_fills_the_machine_is_found_before_the_kernel_or_ray_does(
    worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guardalign.watching.memory_gib", lambda: 4.0)  # as if the machine were small ...
    monkeypatch.setattr("guardalign.watching.used_memory", lambda: 0.95)  # ... and full
    found = worker(Harmful({"d": "memory"}, str(tmp_path)))(shard())
    assert outcome(found) == expected(d="out_of_memory")
    assert "when the machine's memory was nearly full" in found["error"][IDS.index("d")].as_py()


def test_a_full_machine_alone_stops_no_worker(worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guardalign.watching.used_memory", lambda: 0.99)
    monkeypatch.setattr("guardalign.watching.GLANCE", 0.001)
    found = worker(Harmful({}, str(tmp_path)))(shard())
    assert outcome(found) == expected()
    assert DEATHS not in trace_of(found).counters


@dataclass(frozen=True)
class Slow:
    """Takes its time for every row, but no row takes long."""

    name: str = "generate"

    def __call__(self, table: pa.Table) -> pa.Table:
        """As above."""
        for sample_id in table["sample_id"].to_pylist():
            with in_hand([sample_id]):
                time.sleep(0.4)
        return with_trace(with_columns(table, {"response": table["sample_id"].to_pylist()}), Trace())


@pytest.mark.slow
def test_a_shard_that_is_slow_as_a_whole_ends_row_by_row_with_a_note(worker: Any) -> None:
    found = worker(Slow(), shard_seconds=2.5)(shard())
    assert outcome(found) == {each: each for each in IDS}
    (note,) = trace_of(found).notes
    assert "longer than cluster.shard_seconds (2.5 s)), and no row of it alone did: raise that limit" in note


@dataclass(frozen=True)
class Expanding:
    """Makes so many rows of one, as an evaluation does, and dies of any two rows together."""

    times: int
    name: str = "generate"

    def __call__(self, table: pa.Table) -> pa.Table:
        """As above."""
        if table.num_rows > 1:
            os._exit(3)
        whole = pa.concat_tables([table] * self.times)
        return with_trace(with_columns(whole, {PLANNED: [self.times] * self.times}), Trace({}, {"calls": 1}, ("told",)))


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_stage_that_plans_anew_is_committed_whole_when_done_row_by_row(worker: Any, times: int) -> None:
    found = worker(Expanding(times))(shard())
    assert found.num_rows == times * len(IDS)
    assert found[PLANNED].to_pylist() == [found.num_rows] * found.num_rows


@dataclass(frozen=True)
class Hopeless:
    """Dies of any table."""

    name: str = "generate"

    def __call__(self, table: pa.Table) -> pa.Table:
        """As above."""
        os._exit(5)


@pytest.mark.slow
def test_a_worker_that_dies_of_rows_that_are_passed_by_ends_the_run_with_one_sentence(worker: Any) -> None:
    with pytest.raises(ModelError, match=r"dies even of rows passed by \(it ended with exit code 5\)"):
        worker(Hopeless())(shard().slice(0, 1))


@dataclass(frozen=True)
class Chattering:
    """Never silent, while a row takes memory, or time."""

    harm: str
    name: str = "generate"

    def __call__(self, table: pa.Table) -> pa.Table:
        """As above."""
        alive = [
            name
            for name, error in zip(*(table[n].to_pylist() for n in ("sample_id", "error")), strict=True)
            if not error
        ]

        def chatter() -> None:
            while True:
                with in_hand(["a"]):
                    time.sleep(0.002)

        threading.Thread(target=chatter, daemon=True).start()
        for each in alive:
            with in_hand([each]):
                if each == "d":
                    HARMS[self.harm]()
        return with_columns(
            table, {"response": [each.upper() if each in alive else None for each in table["sample_id"].to_pylist()]}
        )


@pytest.mark.parametrize(
    ("harm", "kind"), [("memory", "out_of_memory"), pytest.param("hang", "timed_out", marks=pytest.mark.slow)]
)
def test_limits_hold_for_a_worker_that_is_never_silent(worker: Any, harm: str, kind: str) -> None:
    found = worker(Chattering(harm), shard_seconds=4 if harm == "hang" else 60, worker_gib=1.0)(shard())
    assert outcome(found) == expected(d=kind)


@pytest.mark.slow
def test_a_worker_that_takes_nothing_in_is_stopped_at_its_limit(worker: Any, tmp_path: Path) -> None:
    pool = worker(Harmful({}, str(tmp_path)), shard_seconds=3)
    assert outcome(pool(shard())) == expected()
    os.kill(pool.worker.process.pid, signal.SIGSTOP)
    large = with_columns(shard(), {"image": [bytes(2**20)] * len(IDS)})
    found = pool(large)
    assert outcome(found) == expected()
    assert trace_of(found).counters[DEATHS] == 1


def test_what_was_counted_while_rows_were_tried_is_counted(worker: Any, tmp_path: Path) -> None:
    trace = trace_of(worker(Harmful({"d": "exit"}, str(tmp_path)))(shard()))
    assert trace.notes == ("hi",)
    assert trace.counters == {DEATHS: 2, "calls": 2}, "c, tried alone, and the shard"
