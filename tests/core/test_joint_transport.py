"""The joint plan is the reference solver's, without strength it is the plain softmax, and neighbours are ignored."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import ot
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from guardalign.core import joint_transport as module
from guardalign.core.joint_transport import (
    PRECISION,
    SHARE_SCORES,
    joint_score,
    num_updates,
    safe_probability_score,
    text_scaling,
)

STRENGTHS = (0.05, 0.2, 0.5, 0.9)
NUM_UNSAFE = 3


def problem(B: int = 3, P: int = 20, N: int = 9, scale: float = 20.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [B, P, N] of unit vectors and patch weights [B, P], in fp64."""
    draw = torch.Generator().manual_seed(seed)
    x, z = (normalize(torch.randn(*shape, generator=draw).double(), dim=-1) for shape in ((B, P, 16), (N, 16)))
    return scale * x @ z.T, torch.rand(B, P, generator=draw).double().softmax(-1)


def plan(l_BPN: Tensor, a_BP: Tensor, log_c_BN: Tensor) -> Tensor:
    """T [B, P, N]."""
    return a_BP[..., None] * (l_BPN + log_c_BN[:, None]).softmax(-1)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("seed", range(3))
def test_the_plan_equals_the_reference_solver(strength: float, seed: int) -> None:
    scale = 20.0
    logits, a = problem(scale=scale, seed=seed)
    ours = plan(logits, a, text_scaling(logits, a, strength))
    epsilon, b = 1 / scale, np.full(logits.shape[-1], 1 / logits.shape[-1])
    rho = epsilon * strength / (1 - strength)
    for sample in range(len(a)):
        cost = 1 - logits[sample].numpy() / scale
        settings = {"reg_type": "entropy", "numItermax": 20_000, "stopThr": 1e-13}
        theirs = ot.sinkhorn_unbalanced(a[sample].numpy(), b, cost, epsilon, (float("inf"), rho), **settings)
        np.testing.assert_allclose(ours[sample], theirs, rtol=1e-4, atol=1e-9)


def test_at_full_strength_it_is_balanced_transport() -> None:
    logits, a = problem(scale=10.0)
    ours = plan(logits, a, text_scaling(logits, a, 1.0, updates=500))
    b = np.full(logits.shape[-1], 1 / logits.shape[-1])
    for sample in range(len(a)):
        cost = 1 - logits[sample].numpy() / 10
        theirs = ot.sinkhorn(a[sample].numpy(), b, cost, 0.1, stopThr=1e-12, numItermax=20_000)
        np.testing.assert_allclose(ours[sample], theirs, rtol=1e-6, atol=1e-10)


def test_strength_zero_is_the_plain_softmax_bit_for_bit() -> None:
    logits, a = (each.float() for each in problem(scale=100.0))
    assert torch.equal(joint_score(logits, NUM_UNSAFE, a, 0.0), safe_probability_score(logits, NUM_UNSAFE, a, 0.2))
    p_unsafe = logits.softmax(-1)[..., :NUM_UNSAFE].sum(-1)
    torch.testing.assert_close(safe_probability_score(logits, NUM_UNSAFE, a, 0.0), 1 - p_unsafe)


def test_a_little_strength_stays_close_and_more_differs() -> None:
    logits, a = problem()
    plain = safe_probability_score(logits, NUM_UNSAFE, a, 0.0)
    near, far = ((joint_score(logits, NUM_UNSAFE, a, strength) - plain).abs().max() for strength in (1e-6, 0.5))
    assert 0 < near < 1e-4 and far > 0.05


def test_every_update_shrinks_the_error_by_the_strength_and_all_of_them_to_the_precision() -> None:
    for strength in STRENGTHS:
        logits, a = problem(scale=100.0)
        solution = text_scaling(logits, a, strength, updates=1000)
        errors = [(text_scaling(logits, a, strength, n) - solution).abs().amax(-1) for n in range(8)]
        for before, after in pairwise(errors):
            assert (after <= strength * before + 1e-12).all()
        found = (text_scaling(logits, a, strength) - solution).abs().amax(-1)
        assert (found <= PRECISION * errors[0] + 1e-12).all() and (errors[0] > 0.01).all()
        assert (text_scaling(logits, a, strength, num_updates(strength) // 3) - solution).abs().max() > 1e-4


def test_more_strength_brings_the_texts_masses_nearer_to_equal_and_patches_keep_theirs() -> None:
    logits, a = problem()
    divergences = []
    for strength in (0.0, *STRENGTHS):
        T = plan(logits, a, text_scaling(logits, a, strength))
        torch.testing.assert_close(T.sum(-1), a)
        mass = T.sum(1)
        divergences.append((mass * (mass * mass.shape[-1]).log()).sum(-1))
    assert all((later < sooner).all() for sooner, later in pairwise(divergences))


def test_a_text_that_asks_for_the_whole_picture_is_held_down_and_one_that_asks_for_a_patch_is_not() -> None:
    """Two pictures of 10 patches: an unsafe text slightly ahead everywhere, and one far ahead in a single patch."""
    everywhere, once = torch.zeros(10, 4), torch.zeros(10, 4)
    everywhere[:, 0], once[4, 0] = 1.0, 1.0
    logits, a = torch.stack([everywhere, once]), torch.full((2, 10), 0.1)
    score = joint_score(logits, 1, a, 0.5)
    plain = safe_probability_score(logits, 1, a, 0.5)
    raised = (score - plain)[:, 4]
    assert raised[0] > 0.1 > 0.05 > raised[1].abs()
    assert score[1].argmin() == 4


@pytest.mark.parametrize("strength", STRENGTHS)
def test_batched_equals_looped(strength: float) -> None:
    """Easy and hard pictures in one batch."""
    logits, a = problem(B=4)
    logits = logits * torch.tensor([0.1, 1.0, 5.0, 0.0])[:, None, None]
    together = joint_score(logits, NUM_UNSAFE, a, strength)
    for row in range(4):
        alone = joint_score(logits[row : row + 1], NUM_UNSAFE, a[row : row + 1], strength)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, a = problem(B=5)
    whole = joint_score(logits, NUM_UNSAFE, a, 0.3)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2 * logits[0].numel())
    assert torch.equal(joint_score(logits, NUM_UNSAFE, a, 0.3), whole)


def test_padding_patches_change_nothing() -> None:
    logits, a = problem()
    padding = 50 * problem(P=6, seed=9)[0]
    wide, wide_a = torch.cat([logits, padding], 1), torch.cat([a, torch.zeros(len(a), 6).double()], 1)
    for name, score in SHARE_SCORES.items():
        with_padding = score(wide, NUM_UNSAFE, wide_a, 0.5)
        assert with_padding.isfinite().all(), name
        torch.testing.assert_close(with_padding[:, :20], score(logits, NUM_UNSAFE, a, 0.5), rtol=0, atol=1e-12)


def test_a_number_added_to_all_logits_of_a_patch_changes_nothing() -> None:
    logits, a = problem()
    shift = torch.linspace(-30, 30, logits.shape[1]).double()[:, None]
    torch.testing.assert_close(joint_score(logits + shift, NUM_UNSAFE, a, 0.4), joint_score(logits, NUM_UNSAFE, a, 0.4))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_text_that_no_patch_wants_leaves_all_numbers_finite(strength: float) -> None:
    """At s = 100 a text opposite to all patches has a share of exp(-200) in each: no kernel in fp32 holds it."""
    logits, a = (each.float() for each in problem(scale=10.0))
    logits = torch.cat([logits + 90, torch.full_like(logits[..., :1], -100.0)], -1)
    log_c = text_scaling(logits, a, strength)
    assert log_c.isfinite().all() and (log_c.argmax(-1) == logits.shape[-1] - 1).all()
    score = joint_score(logits, NUM_UNSAFE, a, strength)
    assert ((score >= 0) & (score <= 1 + 1e-6)).all()


def test_nearer_to_an_unsafe_text_scores_lower_in_all() -> None:
    logits, a = problem()
    nearer = logits.clone()
    nearer[:, 7, 1] += 2
    for name, score in SHARE_SCORES.items():
        before, after = (score(each, NUM_UNSAFE, a, 0.2)[:, 7] for each in (logits, nearer))
        assert (after < before).all(), name
