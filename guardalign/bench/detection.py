"""Benchmarks of the first pool: the Detect stage against the bare model, the transport solver against POT.

Knows nothing of how ratios are measured or printed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ot
import torch
from torch import Tensor
from torch.nn.functional import normalize

from guardalign.bench.inputs import photo, require_answered, working_table
from guardalign.bench.ratios import Benchmark, Side, timed
from guardalign.config import ClipConfig
from guardalign.core.transport import Transport, transport_cost
from guardalign.core.transport import transport as solve
from guardalign.detectors import OtDetector
from guardalign.models.clip_weights import load_model, write_random_model
from guardalign.stages import Detect
from guardalign.taxonomy import load_taxonomy

MAX_PIXELS = 100_000_000
SEED = 20260224
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPSILON = 0.1
STOPPING_ERROR = 5e-6
"""Both solvers stop when their marginal's error is below this: ours in L1, so no later than POT's, in L2."""
SHAPE = (64, 13, 576, 10)
"""Images, categories, patches, text variants."""


def detect_stage(
    rounds: int, architecture: str | Mapping[str, Any] = "ViT-B-16", num_pictures: int = 16, batch_size: int = 8
) -> Benchmark:
    """Throughput of the Detect stage, from JPEG bytes to scores, over that of bare `encode_image` on ready tensors."""
    name = architecture if isinstance(architecture, str) else "a small ViT"
    return Benchmark(
        title=f"throughput of Detect from JPEG / encode_image, {name}, batch {batch_size}",
        must_be=0.8,
        goal=0.95,
        at_least=True,
        rounds=rounds,
        prepare=lambda: _detect_sides(architecture, num_pictures, batch_size),
    )


def _detect_sides(architecture: str | Mapping[str, Any], num_pictures: int, batch_size: int) -> tuple[Side, Side]:
    """The same weights on both sides; the texts' embeddings are made in the warm-up, as once in an actor's life."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder), architecture, SEED)
        config = ClipConfig(model=f"local-dir:{folder}", batch_size=batch_size)
        stage = Detect(config, OtDetector(), load_taxonomy("mlcommons"), MAX_PIXELS)
        model, _ = load_model(config, DEVICE)
    table = working_table([""] * num_pictures, [photo(seed) for seed in range(num_pictures)])
    width, height = stage.encoder.image_size
    ready = torch.randn(num_pictures, 3, height, width, generator=torch.Generator().manual_seed(SEED)).to(DEVICE)

    @torch.inference_mode()
    def bare() -> None:
        for batch in ready.split(batch_size):
            model.encode_image(batch)

    return timed(bare), timed(lambda: require_answered(stage(table)))


def transport(rounds: int, shape: tuple[int, int, int, int] = SHAPE) -> Benchmark:
    """Time of `ot.sinkhorn`, problem by problem in fp64, over ours, batched in fp32; costs and weights are given.

    Before anything is measured, both sides' plans are held against each other.
    """
    images, categories, patches, variants = shape
    return Benchmark(
        title=f"ot.sinkhorn in a loop (fp64) / ours, {images} images x {categories} x {patches} x {variants}",
        must_be=5.0,
        goal=20.0,
        at_least=True,
        rounds=rounds,
        prepare=lambda: _transport_sides(shape),
    )


def _transport_sides(shape: tuple[int, int, int, int]) -> tuple[Side, Side]:
    cost_BKVP, a_BP, b_BKV = random_problems(shape)
    single = [x.to(DEVICE, torch.float32) for x in (cost_BKVP, a_BP, b_BKV)]
    C, a, b = (x.double().numpy() for x in (cost_BKVP, a_BP, b_BKV))
    problems = [(a[i], b[i, k], np.ascontiguousarray(C[i, k].T)) for i in range(shape[0]) for k in range(shape[1])]

    def ours() -> Transport:
        return solve(single[0], single[1], single[2], EPSILON, max_iterations=1000, tolerance=STOPPING_ERROR)

    def theirs() -> list[Any]:
        return [ot.sinkhorn(*problem, reg=EPSILON, stopThr=STOPPING_ERROR) for problem in problems]

    _require_equal(ours().plan(single[0], EPSILON).cpu().double(), theirs(), a_BP.double(), b_BKV.double())
    return timed(theirs), timed(ours)


def random_problems(shape: tuple[int, int, int, int], width: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Costs [B, K, V, P] of unit vectors whose cosines lie where CLIP's do, about 0.1 to 0.3; weights a and b."""
    B, K, P, V = shape
    draw = torch.Generator().manual_seed(SEED)

    def units(*sizes: int) -> Tensor:
        x = torch.randn(*sizes, width, generator=draw) / math.sqrt(width)
        x[..., 0] += 0.5  # the direction that all of CLIP's embeddings share: cosines of about 0.2
        return normalize(x, dim=-1)

    a_BP = torch.randn(B, P, generator=draw).softmax(-1)
    b_BKV = torch.randn(B, K, V, generator=draw).softmax(-1)
    return transport_cost(units(B, P), units(K, V)), a_BP, b_BKV


def _require_equal(plan_BKVP: Tensor, theirs: list[Any], a_BP: Tensor, b_BKV: Tensor) -> None:
    """Plans to 1e-4 relative, entry by entry; marginals to 1e-5 in L1."""
    other_BKVP = torch.from_numpy(np.stack(theirs)).transpose(1, 2).reshape(plan_BKVP.shape)
    worst = float(((plan_BKVP - other_BKVP).abs() / other_BKVP).max())
    assert worst < 1e-4, f"plans differ by {worst:.1e} relative"
    rows = float((plan_BKVP.sum(2) - a_BP[:, None]).abs().sum(-1).max())
    columns = float((plan_BKVP.sum(3) - b_BKV).abs().sum(-1).max())
    assert max(rows, columns) < 1e-5, f"marginals are off by {rows:.1e} (patches) and {columns:.1e} (texts)"
