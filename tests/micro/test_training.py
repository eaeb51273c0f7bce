"""The training loop: Muon's updates, the schedule, and checkpoints that resume exactly."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from guardalign.micro.training import LAST_RATE, Muon, orthogonalised, rate_at, train


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_orthogonalised_keeps_directions_and_evens_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, 1.5, shape[1]))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalised(matrix) @ vh.T
    assert torch.allclose(found, torch.diag(found.diagonal()), atol=1e-4)
    assert found.diagonal().min() > 0.6 and found.diagonal().max() < 1.3


def test_a_muon_step_has_the_size_it_promises() -> None:
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.zeros(64, 32))
    matrix.grad = torch.randn(64, 32)
    Muon([matrix], lr=0.1, weight_decay=0.0).step()
    assert 0.1 * 0.2 * 0.7 < matrix.square().mean().sqrt() < 0.1 * 0.2 * 1.3


def test_the_rate_warms_up_and_ends_low() -> None:
    rates = [rate_at(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01, rel=0.01)
    assert max(rates) == pytest.approx(rates[99], rel=0.01)
    assert rates[-1] == pytest.approx(LAST_RATE, rel=0.01)
    assert all(later <= earlier for earlier, later in pairwise(rates[100:]))


class InterruptedBuildError(Exception):
    """Stands for a killed build."""


def trained(checkpoint: Path | None, stop_at: int | None = None) -> nn.Module:
    torch.manual_seed(1)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 1)])})

    def loss_at(step: int) -> Tensor:
        if step == stop_at:
            raise InterruptedBuildError
        first, second = model["layers"]  # type: ignore[misc]
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return (second(first(x).relu())[:, 0] - x.sum(1)).square().mean()

    train("test", model, loss_at, 60, 0.1, checkpoint, every=10)
    return model


def test_an_interrupted_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = trained(None)
    with pytest.raises(InterruptedBuildError):
        trained(tmp_path / "c.pt", stop_at=37)
    resumed = trained(tmp_path / "c.pt")
    for name, x in whole.state_dict().items():
        assert torch.equal(x, resumed.state_dict()[name]), name


def test_training_learns() -> None:
    torch.manual_seed(1)
    x = torch.randn(64, 4)
    first, second = trained(None)["layers"]  # type: ignore[index]
    assert (second(first(x).relu())[:, 0] - x.sum(1)).square().mean() < 0.5 * x.sum(1).square().mean()
