"""Signals: the first interrupts and is told of, the second disturbs nobody, the third ends; under Ray as without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import committed, rows, run, start

from guardalign.signals import held_back

WORKS_AND_CLEANS_UP = """
import atexit, sys, time
from guardalign.signals import interrupt_on_signals

def clean_up():
    print("cleaning", file=sys.stderr, flush=True)
    time.sleep(float(sys.argv[2]))
    print("clean", file=sys.stderr, flush=True)

interrupt_on_signals()
atexit.register(clean_up)
try:
    print("working", file=sys.stderr, flush=True)
    time.sleep(float(sys.argv[1]))
except KeyboardInterrupt:
    print("interrupted")
    clean_up()
    sys.exit(130)
"""
NEVER = 60
"""no test waits for so long [s]"""


def worker(seconds: float, cleaning_seconds: float, *before: str) -> subprocess.Popen[str]:
    """A process that works, and then cleans up."""
    command = [*before, sys.executable, "-c", WORKS_AND_CLEANS_UP, str(seconds), str(cleaning_seconds)]
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit code, what it printed, and its last words; unlike `communicate` with lines that were read ahead."""
    assert process.stdout is not None and process.stderr is not None
    printed, words = process.stdout.read(), process.stderr.read()
    return process.wait(), printed, words


def await_line(stream: Any, wanted: str) -> None:
    """Reads on until a line says so."""
    for line in stream:
        if line == f"{wanted}\n":
            return
    raise AssertionError(f"it ended and never said {wanted}")


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell that runs the tests in the background lets them, and what they start, ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signals", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)], ids=str)
@pytest.mark.parametrize("moment", ["cleaning", "clean"])  # of its own, and then at exit
def test_a_second_signal_does_not_disturb_the_clean_up(signals: Sequence[signal.Signals], moment: str) -> None:
    process = worker(NEVER, 0.3)
    for each, line in zip(signals, ("working", moment), strict=True):
        await_line(process.stderr, line)
        process.send_signal(each)
    rest = {"cleaning": "clean\ncleaning\nclean\n", "clean": "cleaning\nclean\n"}
    assert ended(process) == (130, "interrupted\n", rest[moment])


def test_a_third_signal_ends_a_clean_up_that_hangs_and_what_was_said_stays() -> None:
    process = worker(NEVER, NEVER)
    await_line(process.stderr, "working")
    process.send_signal(signal.SIGTERM)
    await_line(process.stderr, "cleaning")
    began = time.monotonic()
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert ended(process) == (130, "interrupted\n", "")
    assert time.monotonic() - began < NEVER / 2


def test_a_signal_does_not_disturb_the_clean_up_of_work_that_is_done() -> None:
    process = worker(0, 0.3)
    await_line(process.stderr, "cleaning")
    process.send_signal(signal.SIGINT)
    assert ended(process) == (0, "", "clean\n")


def test_a_signal_that_the_caller_ignores_stays_ignored() -> None:
    process = worker(0.5, 0, "sh", "-c", "trap '' INT; exec \"$@\"", "sh")
    await_line(process.stderr, "working")
    process.send_signal(signal.SIGINT)
    assert ended(process) == (0, "", "cleaning\nclean\n")


def test_a_signal_held_back_is_heard_at_the_end_and_by_the_handler_from_before() -> None:
    told: list[int] = []

    def own(number: int, _: object) -> None:
        told.append(number)

    before = signal.signal(signal.SIGTERM, own)
    try:
        with held_back():
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
            signal.raise_signal(signal.SIGTERM)
            assert not told
        assert signal.getsignal(signal.SIGTERM) is own and told == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_third_signal_is_not_held_back() -> None:
    hangs = "with held_back():\n    while True:\n        signal.raise_signal(signal.SIGINT)"
    script = f"import signal\nfrom guardalign.signals import held_back\n{hangs}"
    assert subprocess.run([sys.executable, "-c", script], timeout=NEVER).returncode == 130


FLAGS = ("--limit", 24, "--shard_rows", 4, "--generation.max_new_tokens", 4)
LOCAL = ("--engine", "local", "--recipe", "none")


def interrupted_at(
    out: Path, shards: int, signals: Sequence[signal.Signals], *flags: object, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[str]]:
    """The exit code of an audit that gets the first signal at so many shards, the rest when it has told of it; its
    lines."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    process = start(*FLAGS, *flags, "--output", out)
    assert process.stdout is not None
    while committed(out) < shards:
        assert process.poll() is None, process.communicate()[0].decode()[-2000:]
        time.sleep(0.02)
    process.send_signal(signals[0])
    said = []
    for line in process.stdout:
        said.append(line.decode().rstrip())
        if said[-1].startswith("to resume"):
            for each in signals[1:]:
                process.send_signal(each)
    return process.wait(), said


def assert_told(said: Sequence[str]) -> None:
    """The note of the embedded models, the two lines, and nothing more."""
    assert [line.split(":")[0] for line in said] == ["NOTE", "interrupted", "to resume, type the same line again"], said


@pytest.mark.slow
def test_two_sigints_end_an_audit_with_its_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = (signal.SIGINT, signal.SIGINT)
    code, said = interrupted_at(tmp_path / "out", 1, twice, *LOCAL, monkeypatch=monkeypatch)
    assert code == 130
    assert_told(said)


@pytest.mark.slow
def test_a_sigterm_under_ray_ends_as_an_interruption_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, mark = tmp_path / "out", f"GUARDALIGN_TEST_RUN={tmp_path}"
    monkeypatch.setenv(*mark.split("=", 1))
    code, said = interrupted_at(out, 1, [signal.SIGTERM], monkeypatch=monkeypatch)
    assert code == 130
    assert_told(said)
    assert committed(out) < 6 and not (out / "run.json").exists()
    deadline = time.monotonic() + 20
    while (left := carrying(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, "processes outlived the driver"
    assert run(*FLAGS, "--output", out) == run(*FLAGS, "--output", tmp_path / "undisturbed") == 0
    assert rows(out) == rows(tmp_path / "undisturbed")


def carrying(mark: str) -> list[str]:
    """The ids of the other processes with this setting in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            settings = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in settings and folder.name != str(os.getpid()):
            found.append(folder.name)
    return found
