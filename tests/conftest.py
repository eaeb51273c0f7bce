"""What all tests share: a cache folder for built models, one small local Ray cluster, the FigStep folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: no test asks the hub

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)  # each run the examples of the last one
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("search" if os.environ.get("GUARDALIGN_FUZZ") else "same")

FIGSTEP = Path(__file__).resolve().parents[2] / "shared" / "data" / "figstep"


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Built models go to a folder of this session; workers inherit the variable."""
    folder = tmp_path_factory.mktemp("models")
    before = os.environ.get("GUARDALIGN_CACHE")
    os.environ["GUARDALIGN_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["GUARDALIGN_CACHE"]
    else:
        os.environ["GUARDALIGN_CACHE"] = before


@pytest.fixture(scope="session")
def ray_cluster(model_cache: Path) -> Iterator[None]:
    """One local cluster for the whole session, with more logical CPUs than actors."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
        object_store_memory=400 * 1024 * 1024,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def figstep() -> Path:
    """The real FigStep set, where it lies beside the checkout."""
    if not FIGSTEP.exists():
        pytest.skip("the FigStep set does not lie beside this checkout")
    return FIGSTEP
