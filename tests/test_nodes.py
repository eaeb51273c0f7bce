"""Several nodes: one that cannot see is named before the work begins, and one that is lost costs nothing but time."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from runs import committed, rows, run, start

from guardalign.audit import prepare
from guardalign.config import AuditConfig, ClipConfig, LvlmConfig
from guardalign.errors import ConfigError
from guardalign.micro import WEIGHTS
from guardalign.nodes import places, require_cluster
from guardalign.results import RunFolder
from guardalign.settings import load_settings
from guardalign.sight import TOKEN, Place, Sight, place, prove, require_sight, shown

SAMPLE = Path(__file__).parents[1] / "guardalign/micro/sample.parquet"
WORK = ("--generation.max_new_tokens", 4, "--cluster.isolated", "false", "--shard_rows", 6, "--self_check", "false")
ACTORS = ("--cluster.detect_actors", 2, "--cluster.generate_actors", 2)
STORE = 100 * 2**20
"""object store of a test's node [bytes]; Ray takes no less than 75 MiB"""


# --- one process: what is seen, and what is not -----------------------------------------------------------------------


def model(folder: Path) -> Path:
    """A folder as models lie in: weights, settings, and what is no part of them."""
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "sub/model.safetensors").write_bytes(bytes(100))
    (folder / "notes.md").write_text("anything")
    return folder


def seen(out: Path, *found: Place | None) -> Iterator[Sight]:
    with shown(str(out), tuple(each for each in found if each is not None)) as sight:
        yield sight


@pytest.fixture
def sight(tmp_path: Path) -> Iterator[Sight]:
    """What this process sees of an OUT, an input file, a model and the package's own model."""
    (tmp_path / "in.csv").write_text("prompt\nhi\n")
    yield from seen(
        tmp_path / "out",
        place("the input", str(tmp_path / "in.csv")),
        place("lvlm.model", str(model(tmp_path / "model"))),
        place("clip.model", str(WEIGHTS / "clip")),
        place("input.image_root", str(tmp_path), only_there=True),
    )


def test_whoever_sees_the_same_proves_it_and_leaves_nothing(sight: Sight) -> None:
    assert len(sight.places) == 4
    assert prove(sight) is None
    require_sight(sight)
    assert [path.name for path in Path(sight.out).iterdir()] == [TOKEN]


def test_the_token_goes_with_the_run(tmp_path: Path) -> None:
    with shown(str(tmp_path), ()) as sight:
        assert (tmp_path / TOKEN).read_text() == sight.token
    assert not list(tmp_path.iterdir())


def test_an_object_store_is_proven_likewise() -> None:
    with shown("memory://bucket/out", ()) as sight:
        assert prove(sight) is None
        assert "does not see OUT memory://bucket/else" in str(prove(replace(sight, out="memory://bucket/else")))
    assert not RunFolder("memory://bucket/out").exists(TOKEN)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("out", "does not see OUT"),
        ("token", "another run's token"),
        ("in.csv", "does not see the input"),
        ("in.csv+", "sees another the input"),
        ("model/config.json", "config.json differs"),
        ("model/sub/model.safetensors+", "sub/model.safetensors differs"),
        ("model", "does not see lvlm.model"),
    ],
)
def test_what_is_not_seen_is_named(sight: Sight, tmp_path: Path, what: str, words: str) -> None:
    path = tmp_path / what.removesuffix("+")
    if what == "token":
        (tmp_path / "out" / TOKEN).write_text("another")
    elif what.endswith("+"):
        path.write_bytes(path.read_bytes() + b"x")
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    problem = prove(sight)
    assert problem is not None
    assert words in problem
    with pytest.raises(ConfigError, match="^node .* " + words):
        require_sight(sight)


def test_what_is_no_part_of_a_model_may_differ(sight: Sight, tmp_path: Path) -> None:
    (tmp_path / "model/notes.md").write_text("something else")
    assert prove(sight) is None


def test_a_folder_of_pictures_must_be_there(tmp_path: Path) -> None:
    for sight in seen(tmp_path / "out", Place("input.image_root", str(tmp_path / "gone"), False, {})):
        assert "does not see input.image_root" in str(prove(sight))


@pytest.mark.parametrize("name", ["guardalign", "Python", "torch", "transformers"])
def test_other_software_is_named(sight: Sight, name: str) -> None:
    other = replace(sight, versions={**sight.versions, name: "0.0.1"})
    assert f"runs {name} {sight.versions[name]} and the driver 0.0.1" in str(prove(other))


def test_a_relative_model_path_that_a_node_lacks_is_to_be_written_from_the_root(sight: Sight) -> None:
    lost = replace(sight, places=(Place("lvlm.model", "models/lost", False, {"config.json": "1 bytes"}),))
    assert "path from the root" in str(prove(lost))


def test_the_proof_loads_neither_ray_nor_torch() -> None:
    code = "import sys, guardalign.sight; assert not {'ray', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_what_the_pools_read_is_asked_for(tmp_path: Path) -> None:
    folder = str(model(tmp_path / "model"))
    config = replace(
        load_settings("eta", [], ["--detector.name", "ot"]),
        clip=ClipConfig(model=f"local-dir:{folder}"),
        lvlm=LvlmConfig(model="somebody/on-the-hub"),
    )
    prepared = prepare(AuditConfig())
    named = {
        pools: [each.name for each in places(config, prepared.source, prepared.plan.shards, pools)]
        for pools in (("detect",), ("generate",), ("detect", "generate"))
    }
    assert named["detect",] == ["the input", "clip.model"]
    assert named["generate",] == ["the input", "defense.reward", "defense.clip"], "hub models are nowhere to be seen"
    assert named["detect", "generate"] == ["the input", "clip.model", "defense.reward", "defense.clip"]


# --- clusters of three nodes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """306 rows of the sample under names of their own; every sixth with a picture too large to travel in a message, so
    that tables of the first pool lie in their node's store and are lost with it."""
    path = tmp_path_factory.mktemp("source") / "in.parquet"
    sample = pq.read_table(SAMPLE).select(["prompt", "category", "label"]).to_pylist()
    noise = np.random.default_rng(0).integers(0, 256, (51, 208, 208, 3), dtype=np.uint8)
    made = [
        {
            "sample_id": f"row-{number:03d}",
            **sample[number % len(sample)],
            "image": _png(noise[number // 6]) if number % 6 == 0 else None,
        }
        for number in range(306)
    ]
    pq.write_table(pa.Table.from_pylist(made), path)
    return path


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert len(buffer.getvalue()) > 100_000
    return buffer.getvalue()


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Rows of a run on the local engine."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(*flags(source, out)) == 0
    return rows(out)


def flags(source: Path, out: Path) -> tuple[object, ...]:
    return (*WORK, "--input.format", "parquet", "--input.path", source, "--output", out)


@dataclass
class Nodes:
    """A cluster on this machine that this process is not connected to."""

    cluster: Any

    def add(self, cpus: int) -> Any:
        return self.cluster.add_node(num_cpus=cpus, object_store_memory=STORE)

    def lose(self, node: Any) -> None:
        """SIGKILL of the raylet; its workers end themselves when they notice."""
        self.cluster.remove_node(node, allow_graceful=False)

    def num_alive(self) -> int:
        return sum(node["Alive"] for node in self.cluster.global_state.node_table())


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A head with three logical CPUs; audits of this test run there."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else workers starve on a machine that does other things, too
    cluster = Cluster(True, head_node_args={"num_cpus": 3, "object_store_memory": STORE, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield Nodes(cluster)
    cluster.shutdown()


def actors(node: Any) -> int:
    """Actors of Ray Data that are at work on a node: children of its raylet by their titles."""
    (raylet,) = node.all_processes["raylet"]
    listed = subprocess.run(["ps", "--ppid", str(raylet.process.pid), "-o", "args="], capture_output=True, text=True)
    return listed.stdout.count("MapWorker")


def wait_for(process: subprocess.Popen[bytes], out: Path, shards: int) -> None:
    deadline = time.monotonic() + 400
    while committed(out) < shards:
        assert process.poll() is None, said(process)
        assert time.monotonic() < deadline, f"{committed(out)} of {shards} shards"
        time.sleep(0.05)


def said(process: subprocess.Popen[bytes]) -> str:
    """All that an audit prints, once it has ended."""
    return process.communicate(timeout=400)[0].decode()


def require_whole(process: subprocess.Popen[bytes], out: Path, undisturbed: dict[str, dict[str, Any]]) -> None:
    """The audit ends well: no row lost, none twice, none different, nothing left behind."""
    text = said(process)
    assert process.returncode == 0, text
    assert "Traceback" not in text
    assert rows(out) == undisturbed
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_a_node_lost_in_mid_run_costs_no_row(
    source: Path, undisturbed: dict[str, dict[str, Any]], nodes: Nodes, tmp_path: Path
) -> None:
    workers, out = [nodes.add(6), nodes.add(6)], tmp_path / "out"
    process = start(*flags(source, out), *ACTORS)
    wait_for(process, out, 8)
    lost = max(workers, key=actors)
    assert actors(lost) >= 1
    assert committed(out) < 45, "the run is all but over"
    nodes.lose(lost)
    require_whole(process, out, undisturbed)


@pytest.mark.slow
def test_a_run_waits_for_the_node_that_replaces_a_lost_one(
    source: Path, undisturbed: dict[str, dict[str, Any]], nodes: Nodes, tmp_path: Path
) -> None:
    """The second pool's actors need more CPUs than any other node has, and what the first pool made lies with them."""
    lost, out = nodes.add(9), tmp_path / "out"
    nodes.add(2)
    process = start(*flags(source, out), *ACTORS, "--cluster.generate_cpus", 4)
    wait_for(process, out, 8)
    nodes.lose(lost)
    stood = committed(out)
    assert stood < 45, "the run is all but over"
    time.sleep(10)
    assert process.poll() is None, said(process)
    assert committed(out) <= stood + 2, "what was being written, and no more"
    nodes.add(9)
    require_whole(process, out, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["the-node", "its-raylet"])
def test_a_head_that_dies_ends_the_run_with_one_line_and_it_resumes(
    whole: bool, source: Path, undisturbed: dict[str, dict[str, Any]], nodes: Nodes, tmp_path: Path
) -> None:
    nodes.add(6)
    out = tmp_path / "out"
    process = start(*flags(source, out), *ACTORS)
    wait_for(process, out, 4)
    head, began = nodes.cluster.head_node, time.monotonic()
    head.kill_all_processes(check_alive=False, allow_graceful=False) if whole else head.kill_raylet(check_alive=False)
    text = said(process)
    assert time.monotonic() - began < 60
    assert process.returncode == 1
    assert "Traceback" not in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("guardalign: the cluster failed: Ray on this node is gone; type the same line again")
    assert run(*flags(source, out)) == 0
    assert rows(out) == undisturbed
    assert not list(out.rglob("*.tmp"))


@pytest.fixture
def blind(nodes: Nodes, tmp_path: Path) -> Iterator[Path]:
    """A folder that is another one on a node of its own, since that lives in a mount namespace of its own."""
    folder, log = tmp_path / "mounted", tmp_path / "node.txt"
    folder.mkdir()
    unshare = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    mount = ["sh", "-c", 'mount -t tmpfs none "$1" && shift && exec "$@"', "sh", str(folder)]
    if not shutil.which("unshare") or subprocess.run([*unshare, *mount, "true"], capture_output=True).returncode:
        pytest.skip("this machine grants no mount namespace")
    words = ["start", f"--address={nodes.cluster.address}", "--num-cpus=2", f"--object-store-memory={STORE}", "--block"]
    ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *words]
    with log.open("wb") as file:
        node = subprocess.Popen([*unshare, *mount, *ray], start_new_session=True, stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    while nodes.num_alive() < 2:
        assert node.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    yield folder
    os.killpg(node.pid, signal.SIGTERM)
    node.wait(60)


@pytest.mark.slow
def test_a_node_that_does_not_see_the_output_is_named_before_anything_is_written(nodes: Nodes, blind: Path) -> None:
    """A pool on that node would write where nobody reads."""
    nodes.add(2)
    out = blind / "out"
    process = start("--recipe", "none", "--limit", 6, *WORK, "--output", out)
    *_, last = said(process).strip().splitlines()
    assert process.returncode == 2
    assert last.startswith("guardalign: node ")
    assert f"does not see OUT {out}" in last
    assert sorted(path.name for path in out.iterdir()) == [".lock", "inputs.parquet", "plan.json"]


def test_an_address_without_a_cluster_is_one_line_at_once() -> None:
    with pytest.raises(ConfigError, match=r"no Ray cluster at 127\.0\.0\.1:1; "):
        require_cluster("127.0.0.1:1")
