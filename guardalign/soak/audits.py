"""An audit as a process of its own: its rows, its settings, its start, and the cluster that it may join.

Knows nothing of kills.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from guardalign.config import InputConfig
from guardalign.errors import RunFailedError, require
from guardalign.faults import VARIABLE
from guardalign.micro import resolve_input
from guardalign.soak.processes import MARK, left_behind

SHARD_ROWS: Final = 8
FLAGS: Final = ("--generation.max_new_tokens", "4", "--cluster.log_seconds", "5")
NODES: Final = 3
"""raylets of a cluster that the audit joins"""
NODE: Final = ("--num-cpus=3", "--object-store-memory=200000000", "--min-worker-port=0", "--max-worker-port=0")
MOST_STARTS: Final = 3
"""of a node of Ray, before it is given up"""
START_SECONDS: Final = 120.0
"""how long a node of Ray may take to start"""


def write_rows(path: Path, num_rows: int) -> None:
    """So many rows of the sample that ships with the package, over and over, under ids of their own."""
    require(num_rows > 0, "--rows must be positive")
    sample = pq.read_table(resolve_input(InputConfig()).path, columns=["image", "prompt", "category", "label"])
    copies = pa.concat_tables([sample] * -(-num_rows // sample.num_rows)).slice(0, num_rows)
    ids = pa.array([f"row-{index:05d}" for index in range(num_rows)])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(copies.add_column(0, "sample_id", ids), path)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder with a short name, for Ray's sockets and logs."""
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Audit:
    """What is started, and started again until it is complete."""

    rows: Path
    """Parquet file with the rows"""
    out: Path
    """the run's folder"""
    engine: str
    """ray or local"""
    mark: str
    """its processes carry it"""
    scratch: Path
    """Ray's folder; short, since sockets lie in it"""
    faults: Path | None = None
    """folder of faults"""
    address: str | None = None
    """cluster to join; None: its own"""
    flags: tuple[str, ...] = ()
    """more settings"""

    @property
    def environment(self) -> Mapping[str, str]:
        """Of its processes, and of the cluster that it joins."""
        kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", VARIABLE)}
        return kept | (
            {MARK: self.mark, "RAY_TMPDIR": str(self.scratch), "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
            | ({"RAY_ADDRESS": self.address} if self.address else {})
            | ({VARIABLE: str(self.faults)} if self.faults else {})
        )

    @property
    def words(self) -> list[str]:
        """Its settings, as they are typed."""
        words = ["--input.format", "parquet", "--input.path", str(self.rows), "--output", str(self.out)]
        return [*words, "--engine", self.engine, "--shard_rows", str(SHARD_ROWS), *FLAGS, *self.flags]

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        """The audit in a session of its own; what it says is added to the log."""
        with log.open("ab") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "guardalign.cli", "audit", *self.words],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=self.environment,
            )

    def finish(self, log: Path) -> float:
        """Runs it undisturbed; returns the seconds that it took. `RunFailedError` with its last words."""
        started = time.monotonic()
        code = self.start(log).wait()
        if code != 0:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RunFailedError(f"an undisturbed audit ended with exit code {code}: {' '.join(last)}")
        return time.monotonic() - started

    def committed(self) -> dict[str, tuple[int, int]]:
        """The shards that are done: file name -> inode and time of the last change [ns]."""
        found = {}
        for path in (self.out / "results").glob("shard-*.parquet"):
            status = path.stat()
            found[path.name] = (status.st_ino, status.st_mtime_ns)
        return found


class Cluster:
    """A Ray cluster of several raylets on this machine, each with the processes of a node of its own."""

    def __init__(self, environment: Mapping[str, str], scratch: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("", 0))
            self.port = probe.getsockname()[1]
        self.environment = environment
        self.folder = Path(tempfile.mkdtemp(prefix="c", dir=scratch))
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.sessions: list[int] = []

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return f"127.0.0.1:{self.port}"

    @property
    def has_head(self) -> bool:
        """Whether the head's node is there: the others are none without it."""
        return self.head.poll() is None

    def start(self) -> None:
        """Begins all nodes, one after the other."""
        head = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        self.head = self._started(head)
        for _ in range(1, NODES):
            self._started([f"--address={self.address}"])

    def _started(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        """A node that is there; a few times anew, where it does not come up."""
        for _ in range(MOST_STARTS):
            node, log = self._begin(words)
            deadline = time.monotonic() + START_SECONDS
            while node.poll() is None and time.monotonic() < deadline:
                if "Ray runtime started" in log.read_text(errors="replace"):
                    return node
                time.sleep(0.1)
            node.kill()
            left_behind("", [node.pid], patience=0)
        said = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RunFailedError(f"a node of Ray did not start: {' '.join(said)[:300]}")

    def _begin(self, words: Sequence[str]) -> tuple[subprocess.Popen[bytes], Path]:
        log = self.folder / f"node-{len(self.sessions)}.log"
        program = Path(sys.executable).with_name("ray")
        with log.open("wb") as stream:
            node = subprocess.Popen(
                [str(program), "start", *words, *NODE, "--disable-usage-stats", "--block"],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=self.environment,
            )
        self.nodes.append(node)
        self.sessions.append(node.pid)
        return node, log

    def mend(self) -> None:
        """Begins a node for every one that was lost, and does not wait for it."""
        self.nodes = [node for node in self.nodes if node.poll() is None]
        for _ in range(NODES - len(self.nodes)):
            self._begin([f"--address={self.address}"])

    def stop(self) -> None:
        """Ends the nodes: what Ray itself runs, and what runs on them."""
        for node in self.nodes:
            node.kill()
            node.wait()
        left_behind(self.environment[MARK], self.sessions, patience=0)
        self.nodes = []


@contextmanager
def joined(environment: Mapping[str, str], scratch: Path) -> Iterator[Cluster]:
    """A cluster that is there meanwhile."""
    cluster = Cluster(environment, scratch)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
