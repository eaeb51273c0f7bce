"""The calibrated scores are equations 13 and 14, element by element, and touch nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guardalign.core.calibration import default_layers, score_gain


def scores(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("form", ["gain", "printed"])
def test_gamma_zero_adds_exactly_nothing(form: str) -> None:
    assert (score_gain(scores(), 0.0, form, 0.25) == 0).all()


def test_gain_raises_positive_scores_by_the_factor_and_leaves_the_others() -> None:
    Z = scores()
    raised = Z + score_gain(Z, 0.7, "gain", 0.25)
    torch.testing.assert_close(raised, torch.where(Z > 0, 1.7 * Z, Z))


def test_printed_is_equation_14_with_the_unscaled_product() -> None:
    Z, scaling, gamma = scores(), 0.25, 0.01
    product = Z / scaling
    M = torch.clamp(product, min=0)
    torch.testing.assert_close(score_gain(Z, gamma, "printed", scaling), gamma * M * Z)


@given(st.integers(0, 1000), st.floats(0, 10), st.sampled_from(["gain", "printed"]))
def test_no_score_is_ever_lowered(seed: int, gamma: float, form: str) -> None:
    assert (score_gain(scores(seed), gamma, form, 0.25) >= 0).all()


@pytest.mark.parametrize(
    ("num_layers", "first", "last"), [(32, 9, 14), (6, 2, 3), (4, 1, 2), (40, 11, 18), (28, 8, 12), (1, 0, 0)]
)
def test_default_layers_are_the_middle_ones_halves_rounded_up(num_layers: int, first: int, last: int) -> None:
    assert default_layers(num_layers) == tuple(range(first, last + 1))
