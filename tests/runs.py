"""Running audits in tests: quick settings, and results as plain rows without what may differ between runs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from guardalign.cli import main
from guardalign.faults import VARIABLE
from guardalign.schema import VOLATILE

QUICK = ("--generation.max_new_tokens", "4", "--engine", "local", "--cluster.isolated", "false")
NUM_ROWS = 64
"""rows of the embedded sample that a test runs through, unless it says otherwise"""


def run(*flags: object, quick: bool = True) -> int:
    """The exit code of `guardalign audit` with these flags."""
    return main(["audit", *(QUICK if quick else ()), *_limit(flags), *map(str, flags)])


def _limit(flags: tuple[object, ...]) -> tuple[str, ...]:
    own_input = {"--limit", "--input.path", "--config"} & {str(flag) for flag in flags}
    return () if own_input else ("--limit", str(NUM_ROWS))


def assert_only_killer(sample_id: str, out: Path, undisturbed: Path) -> None:
    """This row killed whoever worked on it; all others answer as they do without it."""
    found, whole = rows(out), rows(undisturbed)
    assert found.keys() == whole.keys()
    assert found.pop(sample_id)["error_kind"] == "killed_worker"
    assert {name: row["response"] for name, row in found.items()} == {name: whole[name]["response"] for name in found}


def table(out: Path) -> pa.Table:
    """All result rows, in the input's order."""
    return pa.concat_tables(pq.read_table(path) for path in sorted((out / "results").glob("*.parquet")))


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """Result rows by id, without the columns that may differ between two runs."""
    kept = table(out).drop_columns(list(VOLATILE)).to_pylist()
    by_id = {row["sample_id"]: row for row in kept}
    assert len(by_id) == len(kept), "an id stands twice"
    return by_id


def committed(out: Path) -> int:
    """Shard files that are there."""
    return len(list((out / "results").glob("shard-*.parquet")))


def start(*flags: object) -> subprocess.Popen[bytes]:
    """An audit in a process group of its own."""
    command = [sys.executable, "-m", "guardalign.cli", "audit", *_limit(flags), *map(str, flags)]
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ)
    )


def forked(target: Callable[..., object], *arguments: object) -> int:
    """Exit code of a process that ends with `target(*arguments)`, forked from one that has torch: it starts at once."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["guardalign.audit", "guardalign.cli", "open_clip", "transformers"])
    process = forkserver.Process(target=target, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def audited(faults: Path, *flags: object) -> None:
    """For `forked`: an audit with faults on purpose."""
    os.environ[VARIABLE] = str(faults)
    sys.exit(run(*flags))


def kill_when(process: subprocess.Popen[bytes], out: Path, shards: int, seconds: float = 300) -> int:
    """SIGKILLs the audit once that many shards are committed; returns how many were when it died."""
    deadline = time.monotonic() + seconds
    while committed(out) < shards:
        assert process.poll() is None, process.communicate()[0].decode()[-2000:]
        assert time.monotonic() < deadline, "the audit is too slow to be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return committed(out)
