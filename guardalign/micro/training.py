"""The training loop of the micro models: AdamW for vectors, Muon for matrices, a cosine schedule, checkpoints.

Muon (K. Jordan et al. 2024, "Muon: An optimizer for hidden layers") sends the momentum of every hidden matrix through a
Newton-Schulz iteration, which makes all its singular values about one. torch's own runs it in bfloat16, which is slow
on CPUs without such units; this one is float32. Knows nothing of scenes or models.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

NEWTON_SCHULZ: Final = (3.4445, -4.7750, 2.0315)
"""coefficients of the quintic iteration"""
WARM_UP: Final = 100
LAST_RATE: Final = 0.02
"""the schedule ends at this share of the peak"""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; its updates have the root mean square of AdamW's, about 0.2."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.05) -> None:
        super().__init__(list(parameters), {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None, "no closures here"
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, group)

    def _update(self, matrix: nn.Parameter, group: dict[str, Any]) -> None:
        assert matrix.grad is not None
        beta = group["momentum"]
        momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
        momentum.lerp_(matrix.grad, 1 - beta)
        update = orthogonalised(torch.lerp(matrix.grad, momentum, beta))
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of the matrix's singular value decomposition: its singular values come to lie in 0.7 .. 1.2."""
    a, b, c = NEWTON_SCHULZ
    X = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    X = X / (X.norm() + 1e-7)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if matrix.shape[0] > matrix.shape[1] else X


def train(
    name: str,
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    steps: int,
    peak_rate: float,
    checkpoint: Path | None = None,
    every: int = 50,
) -> None:
    """Train in place; `loss_at(step)` must depend on nothing but the step and the weights, so that resuming is exact.

    Hidden matrices (two dimensions, inside a list of layers) go to Muon, everything else to AdamW.
    """
    optimizers = _optimizers(model, peak_rate)
    start = _resumed(checkpoint, model, optimizers)
    begun, mean = time.monotonic(), 0.0
    for step in range(start, steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, steps, peak_rate)
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mean += (float(loss.detach()) - mean) * max(0.02, 1 / (step - start + 1))
        if (step + 1) % every == 0 or step + 1 == steps:
            log.info("%s  step %d of %d  loss %.3f  %.0f s", name, step + 1, steps, mean, time.monotonic() - begun)
            _save(checkpoint, step + 1, model, optimizers)


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to `LAST_RATE` of the peak."""
    warm = min(1.0, (step + 1) / min(WARM_UP, max(1, steps // 10)))
    return peak * warm * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if p.ndim == 2 and any(part.isdigit() for part in name.split("."))]
    chosen = {id(p) for p in hidden}
    others = [p for _, p in named if id(p) not in chosen]
    return [Muon(hidden, rate), torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.0)]


def _save(path: Path | None, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    if path is None:
        return
    state = {"step": step, "model": model.state_dict(), "optimizers": [each.state_dict() for each in optimizers]}
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def _resumed(path: Path | None, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """The step to go on from; 0 without a checkpoint."""
    if path is None or not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    log.info("resumed from step %d", state["step"])
    return int(state["step"])
