"""The nodes of a Ray cluster: proof that all of them see what the driver sees, and what becomes of a cluster that dies.

**What the nodes of a cluster must share.** OUT: a mounted file system or an object store, written by the last pool on
any node. The input, under the same path or URI, with the folder of its pictures. Every local model folder that the
settings name, the same files under the same path; hub models need not be shared. The same versions of this package, of
Python and of the libraries that compute. `proven` asks every node for it before the work begins, and each pool proves
it again where it starts, so that a node that joins later is held to the same. A node without CPUs and GPUs does no
work and is not asked.

**Why a lost node costs nothing but time.** Ray Data restarts the pools' actors elsewhere and repeats their tasks
without limit (max_restarts and max_task_retries of -1 are its defaults for map_batches), and places them SPREAD. What
a finished shard left in a lost node's memory, such as the first pool's tables, is made again from its lineage, down to
the read: pools that are done are let go by reference, not killed, so that they can come back for it. The shards'
descriptions lie with the driver. One task gives one block, so a repetition gives the same one, and a commit is a
rename: doing it twice changes nothing. What kills whoever works on it, a row or a file, is not repeated for ever: the
journal in OUT counts (`journal.py`, `reading.py`).

**The driver's own node** is the one that may not be lost: Ray ends the driver then, without a word. `watched` sees it
first and says what happened; the same line typed again resumes.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from guardalign.config import EMBEDDED, AuditConfig
from guardalign.defenses import defense_of
from guardalign.errors import ConfigError, RunFailedError
from guardalign.judges import judge_of
from guardalign.micro import WEIGHTS, resolve_clip, resolve_lvlm
from guardalign.sight import Place, Sight, place, prove, shown
from guardalign.sources import Shard, Source

__all__ = ["cluster_errors", "prove", "proven", "require_cluster", "watched"]

PATIENCE: Final = 120.0
"""how long a node may take to prove its sight: a busy one takes its time, a dead mount for ever [s]"""
RAYLET_GONE, GCS_GONE = 3, 45
"""refused looks, one a second, after which the node's own process, or the cluster's head, counts as dead; a head with
a store of its own may come back, and Ray itself gives up after 60 s"""
NAMED: Final = 3
"""blind nodes that are named one by one"""
AGAIN: Final = "type the same line again to resume, once there is a cluster"


@contextmanager
def proven(
    config: AuditConfig, source: Source, shards: Sequence[Shard], out: str, pools: Sequence[str]
) -> Iterator[Sight]:
    """What every node has proven to see; `ConfigError` that names one that does not. Its token is in OUT meanwhile."""
    with shown(out, tuple(places(config, source, shards, pools))) as sight:
        refuse_blind(sight)
        yield sight


def places(config: AuditConfig, source: Source, shards: Sequence[Shard], pools: Sequence[str]) -> Iterator[Place]:
    """What these pools read that lies on a file system: the input's ends, and the models."""
    ends = dict.fromkeys((shards[0].spans[0].uri, shards[-1].spans[-1].uri))
    wanted = [*(("the input", uri) for uri in ends), *_models(config, pools)]
    yield from (found for name, path in wanted if path and (found := place(name, path)))
    root = getattr(getattr(source, "config", None), "image_root", None)
    if root and (folder := place("input.image_root", root, only_there=True)):
        yield folder


def _models(config: AuditConfig, pools: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    if "detect" in pools and config.detector.name != "none":
        clip = resolve_clip(config.clip)
        yield "clip.model", clip.model.removeprefix("local-dir:")
        yield "clip.pretrained", clip.pretrained
    if "generate" in pools:
        yield "lvlm.model", resolve_lvlm(config.lvlm).model
        yield from _named_by(defense_of(config), "defense", ("reward", "head", "clip", "clip_pretrained"))
    if pools[-1] != "detect" and config.judge.name != "none":
        yield from _named_by(judge_of(config.judge), "judge", ("model", "template", "phrases"))


_SHIPPED: Mapping[str, str] = {"reward": "reward", "head": "casa", "clip": "clip"}


def _named_by(strategy: Any, section: str, settings: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    for name in settings:
        path = getattr(strategy, name, None)
        shipped = path == EMBEDDED and name in _SHIPPED
        yield (
            f"{section}.{name}",
            str(WEIGHTS / _SHIPPED[name]) if shipped else path and path.removeprefix("local-dir:"),
        )


def refuse_blind(sight: Sight) -> None:
    """Asks all nodes at once, one small task each; `ConfigError` with those that do not see what the driver sees."""
    asked = _workers()
    own = None if _through_client() else _own_node_id()
    if [node["NodeID"] for node in asked] == [own]:
        return
    blind = [f"node {_called(node)} {problem}" for node, problem in _answers(asked, sight) if problem]
    if blind:
        more = f"; and {len(blind) - NAMED} more nodes" if blind[NAMED:] else ""
        raise ConfigError("; ".join(blind[:NAMED]) + more)


def _workers() -> list[dict[str, Any]]:
    """The nodes that are alive and may be given work."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and any(node["Resources"].get(r) for r in ("CPU", "GPU"))]


def _called(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def _through_client() -> bool:
    """Whether this process is connected by ray://, and so on no node itself."""
    from ray.util.client import ray as client

    return bool(client.is_connected())


def _own_node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _answers(asked: Sequence[dict[str, Any]], sight: Sight) -> Iterator[tuple[dict[str, Any], str | None]]:
    """What each node lacks; nodes that died meanwhile are left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(prove)
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in asked]
    answers = [task.options(scheduling_strategy=each).remote(sight) for each in strategies]
    ready, _ = ray.wait(answers, num_returns=len(answers), timeout=PATIENCE)
    problems = [_answer(ref) if ref in set(ready) else f"did not answer within {PATIENCE:.0f} s" for ref in answers]
    alive = {node["NodeID"] for node in _workers()} if any(problems) else set()
    yield from ((node, problem) for node, problem in zip(asked, problems, strict=True) if node["NodeID"] in alive)


def _answer(ref: Any) -> str | None:
    import ray

    try:
        found: str | None = ray.get(ref)
    except ray.exceptions.RayError as error:
        return f"cannot run guardalign as the driver does: {_gist(error)}"
    return found


def _gist(error: BaseException) -> str:
    """The last line of an error that says something: of a traceback, what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return ([type(error).__name__, *lines[:1], *raised])[-1]


def require_cluster(address: str) -> None:
    """`ConfigError` where nobody listens at HOST:PORT or ray://HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit() and not _Probe(address, host.strip("[]"), int(port), 1).listens():
        raise ConfigError(
            f"there is no Ray cluster at {address}; start one, or leave cluster.address and RAY_ADDRESS out"
        )


@contextmanager
def cluster_errors() -> Iterator[None]:
    """What Ray could not mend is a `RunFailedError`; a fault of ours that came through Ray stays what it is."""
    import ray
    from ray.data.exceptions import SystemException

    try:
        yield
    except (ray.exceptions.RayTaskError, ray.exceptions.UserCodeException):
        raise
    except (ray.exceptions.RayError, SystemException, ConnectionError) as error:
        raise RunFailedError(f"the cluster failed ({_gist(error)}); {AGAIN}") from error


@contextmanager
def watched() -> Iterator[None]:
    """While the work runs: should the cluster's head or this node's own part of the cluster die, this process says so
    and ends with exit code 1.

    Ray ends a driver that has lost either by itself, from native code, after up to a minute and without a word: no
    exception could be raised in its place, so the watching thread ends the process a little earlier.
    """
    over = threading.Event()
    probes = [] if _through_client() else [probe for probe in _probes() if probe.listens()]
    if probes:
        threading.Thread(target=_watch, args=(probes, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


@dataclass(frozen=True)
class _Probe:
    """A process of the cluster that this one cannot do without."""

    who: str
    """to the user"""
    host: str
    port: int
    most: int
    """refused looks in a row that are believed"""

    def listens(self) -> bool:
        """False only where the machine is there and refuses: a slow network is no death."""
        try:
            with socket.create_connection((self.host, self.port), timeout=5):
                return True
        except ConnectionRefusedError:
            return False
        except OSError:
            return True


def _probes() -> list[_Probe]:
    import ray

    host, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")
    own = [node for node in ray.nodes() if node["NodeID"] == _own_node_id()]
    return [
        *(_Probe("Ray on this node", node["NodeManagerAddress"], node["NodeManagerPort"], RAYLET_GONE) for node in own),
        _Probe("the cluster's head", host.strip("[]"), int(port), GCS_GONE),
    ]


def _watch(probes: Sequence[_Probe], over: threading.Event) -> None:
    refused = dict.fromkeys(probes, 0)
    while not over.wait(1.0):
        refused = {probe: 0 if probe.listens() else times + 1 for probe, times in refused.items()}
        dead = [probe.who for probe, times in refused.items() if times >= probe.most]
        if dead and not over.is_set():
            sys.stdout.flush()
            sys.stderr.write(f"\nguardalign: the cluster failed: {dead[0]} is gone; {AGAIN}\n")
            sys.stderr.flush()
            os._exit(1)
