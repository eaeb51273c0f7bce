"""Whatever is killed, wherever: after the resume every row stands once and is what it would have been; and who checks
that can fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import forked, run

from guardalign.cli import main
from guardalign.config import ClusterConfig
from guardalign.faults import POINTS, VARIABLE, VISITS, reach
from guardalign.pipeline import Step
from guardalign.results import RunFolder, ShardWriter
from guardalign.schema import result_schema
from guardalign.sight import shown
from guardalign.soak.audits import Audit, scratch
from guardalign.soak.checking import Findings, checked, is_close, rows_of, strays
from guardalign.soak.dealing import AT, USED, Deck, Kill, Moment, hits, moments, visits
from guardalign.soak.poison import HARMS, prices_of
from guardalign.soak.processes import MARK, PLACES, Process, Scene, left_behind, living
from guardalign.soak.report import is_sound, report
from guardalign.soak.rounds import ROWS, Round, RoundResult, Soak, soak
from guardalign.soak.rounds import undisturbed as reference_of
from guardalign.supervision import Pool, receipt_of
from guardalign.worker import Order

FLAGS = ("--recipe", "none", "--shard_rows", "4", "--limit", "16", "--engine", "local", "--cluster.isolated", "false")
FLAGS += ("--generation.max_new_tokens", "4")
SHARDS = 4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(*FLAGS, "--output", out, quick=False) == 0
    return out


Rounds = Callable[[Path], Sequence[dict[str, Any]]]
"""Puts the input of rounds into a folder; returns what each must come to."""


@pytest.fixture(scope="module")
def rounds_of_64(tmp_path_factory: pytest.TempPathFactory) -> Rounds:
    folder = tmp_path_factory.mktemp("rounds")
    wanted = reference_of(Soak(0, folder, 64))

    def begin(there: Path) -> Sequence[dict[str, Any]]:
        shutil.copy(folder / ROWS, there)
        return wanted

    return begin


def write_in_place(self: RunFolder, target: str, content: bytes) -> None:
    """What a careless commit does: readers see the half that is there."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with Path(target).open("wb") as stream:
        stream.write(content[: len(content) // 2])
        stream.flush()
        reach("write.half")
        stream.write(content[len(content) // 2 :])


def audit_with_faults(out: str, faults: str, is_careless: bool) -> None:
    os.environ[VARIABLE] = faults
    if is_careless:
        RunFolder._write = write_in_place  # type: ignore[method-assign]
    sys.exit(main(["audit", *FLAGS, "--output", out]))


def killed_at(point: str, visit: int, out: Path, faults: Path, *, is_careless: bool = False) -> int:
    """The exit code of an audit that dies at this visit of the point, in a process forked from one that has torch."""
    faults.mkdir(exist_ok=True)
    (faults / VISITS).touch()
    (faults / point).write_text(str(visit))
    return forked(audit_with_faults, str(out), str(faults), is_careless)


@pytest.mark.parametrize(
    ("point", "visit"),
    [
        pytest.param("read.shard", 3, marks=pytest.mark.slow),
        pytest.param("commit.begin", 2, marks=pytest.mark.slow),
        ("write.half", 1),  # the first file of all
        ("write.half", 8),  # a shard
        pytest.param("write.whole", 8, marks=pytest.mark.slow),
        pytest.param("write.renamed", 8, marks=pytest.mark.slow),
        ("manifest.begin", 1),
    ],
)
def test_a_driver_that_dies_at_a_crash_point_loses_nothing(
    point: str, visit: int, undisturbed: Path, tmp_path: Path
) -> None:
    out, faults = tmp_path / "out", tmp_path / "faults"
    assert killed_at(point, visit, out, faults) == -signal.SIGKILL
    assert set(hits(faults)) == {point}
    before = Audit(tmp_path, out, "local", "", tmp_path).committed()
    read = [each.point for each in visits(faults)].count("read.shard")
    assert 0 <= read - len(before) <= 1, "one shard at most is in flight"
    assert run(*FLAGS, "--output", out, quick=False) == 0
    assert checked(out, rows_of(undisturbed)) == Findings()
    after = Audit(tmp_path, out, "local", "", tmp_path).committed()
    assert {name: after[name] for name in before} == before, "what was committed is never written again"
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["this_run"]["totals"]["rows"] == 4 * (SHARDS - len(before)), "nor computed again"


def test_a_commit_that_is_not_atomic_is_found_out(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for visit in range(3, 12):  # until the file is a shard's
        assert killed_at("write.half", visit, out, tmp_path / "faults", is_careless=True) == -signal.SIGKILL
        if list(out.glob("results/*.parquet")):
            break
        shutil.rmtree(out)
    assert run(*FLAGS, "--output", out, quick=False) != 0
    found = checked(out, rows_of(undisturbed))
    assert found.manifest == 1
    assert found.lost > 0


@pytest.fixture
def out(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "out"))


def never() -> None:
    raise AssertionError("the stages are not to be called")


def test_a_pool_does_not_do_a_shard_again_that_is_committed(out: Path) -> None:
    """As when an actor dies after the rename, and Ray repeats its task."""
    before = Audit(out, out, "local", "", out).committed()
    writer = ShardWriter(str(out), result_schema(), "another", 2)
    order = Order("generate", [Step("generate", lambda: lambda _: never())], 1, is_last=True)
    with shown(str(out), ()) as sight:
        pool = Pool(order, ClusterConfig(isolated=False), writer, True, sight)
        found = receipt_of(pool(pa.table({"shard": [2, 2, 2, 2]})))
        assert found == RunFolder(str(out)).receipt("results/shard-000002.parquet")
        assert Audit(out, out, "local", "", out).committed() == before
        with pytest.raises(AssertionError, match="not to be called"):
            pool(pa.table({"shard": [99], "sample_id": ["a"], "error": [None]}))


def rewritten(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path)


def test_a_run_is_what_it_is(out: Path, undisturbed: Path) -> None:
    assert checked(out, rows_of(undisturbed)) == Findings()


def test_every_kind_of_fault_is_found(out: Path, undisturbed: Path) -> None:
    reference = rows_of(undisturbed)
    first, second = (out / f"results/shard-00000{index}.parquet" for index in (0, 1))
    table = pq.read_table(first)
    (out / "results/.shard-000001.parquet.99.tmp").touch()
    (out / ".journal").mkdir()
    (out / ".journal/generate-000001.json").touch()
    assert checked(out, reference) == Findings(stray=2)
    for path in strays(out):
        path.unlink()
    rewritten(first, table)
    assert checked(out, reference) == Findings(manifest=1), "another checksum"
    response = pa.array(["something else", *table["response"].to_pylist()[1:]], pa.large_string())
    place = table.schema.get_field_index("response")
    rewritten(first, table.set_column(place, table.schema.field(place), response))
    assert checked(out, reference) == Findings(manifest=1, different=1)
    rewritten(first, pa.concat_tables([table.slice(1), table.slice(2, 1)]))
    assert checked(out, reference) == Findings(manifest=1, lost=1, duplicated=1)
    second.unlink()
    assert checked(out, reference) == Findings(manifest=2, lost=5, duplicated=1)
    (out / "run.json").unlink()
    assert checked(out, reference).manifest == 1


def test_rows_may_differ_in_what_they_took_only(out: Path, undisturbed: Path) -> None:
    path = out / "results/shard-000000.parquet"
    table = pq.read_table(path)
    for name, value in (("attempts", pa.array([7] * 4, pa.int32())), ("run_id", pa.array(["x"] * 4))):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), value)
    rewritten(path, table)
    assert checked(out, rows_of(undisturbed)).different == 0


def test_floats_are_close_wherever_they_stand() -> None:
    row = {"a": 0.5, "b": [0.1, (("c", 0.2),)], "d": None, "e": float("nan")}
    near = {"a": 0.5 + 1e-7, "b": [0.1, (("c", 0.2 - 1e-7),)], "d": None, "e": float("nan")}
    assert is_close(row, near, 1e-6)
    assert not is_close(row, near, 1e-8)
    assert not is_close(row, near | {"d": 0.0}, 1.0)
    assert is_close(row, row, 0.0)


def a_round(tmp_path: Path, rows: int = 16) -> Round:
    asked = Soak(1, tmp_path, rows, engines=("local",))
    return Round(asked, 0, "local", tmp_path, Deck(Random(0)), [], [])


def test_a_committed_shard_that_is_written_again_is_noted(tmp_path: Path) -> None:
    here = a_round(tmp_path)
    shards = here.audit.out / "results"
    shards.mkdir(parents=True)
    for index in (0, 1):
        (shards / f"shard-00000{index}.parquet").touch()
    assert here._compare_committed("a kill") == 2
    (shards / "shard-000002.parquet").touch()
    assert here._compare_committed("another") == 3
    assert here.findings.redone == 0
    os.utime(shards / "shard-000001.parquet")
    (shards / "shard-000002.parquet").unlink()
    here._compare_committed("the end")
    assert here.findings.redone == 2


def test_a_start_that_fails_by_itself_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Audit, log: Path) -> subprocess.Popen[bytes]:
        log.write_text("guardalign: no such file\n")
        return subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(2)"], start_new_session=True)

    monkeypatch.setattr(Audit, "start", fail)
    result = a_round(tmp_path).run()
    assert result.findings.failed == 3
    assert "exit code 2, and nothing was done to it: guardalign: no such file" in result.notes[0]
    assert not is_sound([result])


def test_all_places_are_dealt_before_one_is_dealt_again(tmp_path: Path) -> None:
    deck = Deck(Random(3))
    scene = Scene(2**22 + 1, {2**22 + 1: Process(2**22 + 1, 1, 1, ("python",))})  # nobody has this id
    dealt = [deck.deal(scene, tmp_path) for _ in range(len(USED) + 3)]
    assert sorted(each[0] for each in dealt if each) == ["driver", "driver's group", "driver, SIGTERM"]
    assert {path.name for path in tmp_path.iterdir()} == set(USED)
    (tmp_path / "write.half").unlink()
    deck.cards = []
    deck.take_back(tmp_path)
    assert set(deck.cards) == {f"{AT}{point}" for point in USED if point != "write.half"}


def test_a_place_that_is_not_there_keeps_its_turn(tmp_path: Path) -> None:
    deck = Deck(Random(0))
    deck.cards = ["raylet, another's", "at read.shard"]
    assert deck.deal(Scene(1, {}), tmp_path) is None
    assert deck.cards == ["raylet, another's"]
    assert (tmp_path / "read.shard").exists()


def test_places_are_told_apart_by_pool_and_by_node() -> None:
    worker = ("python", "-P", "-m", "guardalign.worker", "3", "4", "5")
    listed = [
        Process(10, 1, 10, ("python", "-m", "guardalign.cli", "audit")),
        Process(11, 10, 10, ("/ray/gcs/gcs_server", "--log_dir=x")),
        Process(12, 10, 10, ("/ray/raylet/raylet", "--x")),
        Process(13, 12, 10, ("ray::MapWorker(MapBatches(Pool))",)),
        Process(14, 13, 10, (*worker, "detect")),
        Process(15, 12, 10, ("ray::MapWorker(MapBatches(Pool)).submit",)),
        Process(16, 15, 10, (*worker, "generate")),
        Process(17, 12, 10, ("ray::MapBatches(read_task)",)),
        Process(18, 1, 18, ("/ray/raylet/raylet", "--y")),
    ]
    scene = Scene(10, {each.pid: each for each in listed})
    found = {name: list(place.find(scene)) for name, place in PLACES.items()}
    drivers = {"driver": [10], "driver's group": [10], "driver, SIGTERM": [10]}
    pools = {"worker of detect": [14], "actor of detect": [13], "worker of generate": [16], "actor of generate": [15]}
    ray = {"reader": [17], "gcs_server": [11], "raylet, driver's": [12], "raylet, another's": [18]}
    assert found == drivers | pools | ray
    local = Scene(10, {10: listed[0], 14: Process(14, 10, 10, (*worker, "detect+generate"))})
    assert local.workers("detect") == local.workers("generate") == [14]
    assert local.actors("generate") == [], "the driver is no actor"


def test_kills_are_spread_over_the_run() -> None:
    due = moments(Random(1), 600)
    shares = [each.share for each in due if each.share is not None]
    assert shares == sorted(shares)
    tenths = [sum(int(share * 10) == tenth for share in shares) for tenth in range(10)]
    assert min(tenths) > 25
    assert 60 < sum(each.share is None for each in due) < 140


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"], start_new_session=True, env={MARK: "here", "PATH": os.environ["PATH"]})
    yield process
    process.kill()
    process.wait()


def test_a_process_is_found_by_mark_or_session_and_not_once_it_is_dead(sleeper: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while sleeper.pid not in living("here"):
        assert time.monotonic() < deadline
    assert living("elsewhere", [sleeper.pid])[sleeper.pid].words == ("sleep", "60")
    assert sleeper.pid not in living("elsewhere")
    (left,) = left_behind("here", (), patience=0.1)
    assert left.pid == sleeper.pid
    sleeper.wait(10)
    assert living("here") == {}


def test_rays_own_agents_may_take_longer_to_go() -> None:
    process = subprocess.Popen(["ray::RuntimeEnvAgent", "1"], executable="/bin/sleep", env={MARK: "agents"})
    started = time.monotonic()
    while not living("agents"):
        assert time.monotonic() - started < 1
    assert left_behind("agents", (), patience=0.4) == [], "2 s for it"
    process.wait(10)


def test_visits_are_written_down_where_somebody_wants_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    reach("commit.begin")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / VISITS).touch()
    for point in POINTS:
        reach(point)
    assert [(each.pid, each.point) for each in visits(tmp_path)] == [(os.getpid(), point) for point in POINTS]


def test_the_table_says_what_was_hit_and_what_was_lost() -> None:
    kill = Kill("driver", "ray", 0.25, "generate.shard", 2, True, is_survived=False)
    kills = (kill, replace(kill, place="reader", share=0.75, passed="starting", is_survived=True))
    result = RoundResult(kills, Findings(lost=3), 2, 40.0, 4, 25, ("round-000 (ray): said",))
    text = "\n".join(report([result, result]))
    assert "driver                           2         0        2   25%, 25%, 25%" in text
    assert "by the crash point that the victim had passed last: generate.shard 2, starting 2" in text
    assert "rows lost                               6" in text
    assert "4 kills in 2 rounds, 4 starts, 80 s, 20.0 s a kill" in text
    assert not is_sound([result])
    assert is_sound([replace(result, findings=Findings())])
    assert not is_sound([replace(result, findings=Findings(), read_again=5)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ["local", "ray", "cluster"])
def test_a_few_random_kills_lose_nothing(engine: str, rounds_of_64: Rounds, tmp_path: Path) -> None:
    results = list(soak(Soak(3, tmp_path, 64, seed=1, engines=(engine,)), rounds_of_64(tmp_path)))
    assert is_sound(results), "\n".join(report(results))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_actors_that_die_between_rename_and_receipt_write_no_shard_twice(rounds_of_64: Rounds, tmp_path: Path) -> None:
    deck = Deck(Random(0))
    deck.cards = [f"{AT}write.renamed"] * 3
    due = [Moment(share / 4, 0.0) for share in range(1, 4)]
    wanted = rounds_of_64(tmp_path)
    with scratch() as folder:
        result = Round(Soak(0, tmp_path, 64), 0, "ray", folder, deck, due, wanted).run()
    assert is_sound([result]), "\n".join(report([result]))
    assert len(result.kills) > 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_harness_finds_a_commit_that_is_not_atomic(
    rounds_of_64: Rounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'guardalign.cli' in sys.orig_argv:\n"
        f"    sys.path.append({str(Path(__file__).parent)!r})\n"
        "    from guardalign.results import RunFolder\n"
        "    from test_soak import write_in_place\n"
        "    RunFolder._write = write_in_place\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    deck = Deck(Random(0))
    deck.cards = [f"{AT}write.half"] * 3
    here = Round(Soak(0, tmp_path, 64), 0, "local", tmp_path, deck, moments(Random(0), 3), rounds_of_64(tmp_path))
    assert not is_sound([here.run()])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_poison_rows_cost_what_is_promised_and_no_other_row(tmp_path: Path) -> None:
    for price in prices_of(tmp_path, ("generate",)):
        assert price.is_kept, price
        assert set(price.errors) == set(HARMS)


@pytest.mark.parametrize(("is_fatal", "failed"), [(True, 0), (False, 1)])
def test_a_run_that_ends_of_what_it_is_to_survive_is_a_fault(tmp_path: Path, is_fatal: bool, failed: int) -> None:
    here = a_round(tmp_path)
    here.kills.append(Kill("worker of detect", "ray", 0.5, "detect.shard", 1, is_fatal))
    here._blame([0])
    assert not here.kills[0].is_survived
    assert here.findings.failed == failed
