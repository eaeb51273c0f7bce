"""The transport is the reference solver's, its marginals hold, and no problem depends on its neighbours."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import numpy as np
import ot
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from guardalign.core import transport as module
from guardalign.core.transport import (
    PATCH_SCORES,
    SAFE_EPSILON,
    Transport,
    entropy,
    patch_weights,
    single_variant_cost,
    text_weights,
    transport,
    transport_cost,
)

TIGHT = {"max_iterations": 2000, "tolerance": 2e-6}
SCALE = 100.0


def unit(*shape: int, seed: int = 0, common: float = 0.5) -> Tensor:
    """Unit vectors with CLIP's habit of a shared direction (cosines near 0.2)."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(shape[-1], generator=torch.Generator().manual_seed(99))
    return normalize(torch.randn(*shape, generator=generator) + common * shared, dim=-1)


def problem(B: int = 3, K: int = 4, V: int = 5, P: int = 20, D: int = 32, seed: int = 0) -> tuple[Tensor, ...]:
    """Costs and weights as the detector makes them: cost [B, K, V, P], a [B, P], b [B, K, V]."""
    x_BPD, g_BD, z_KVD = unit(B, P, D, seed=seed), unit(B, D, seed=seed + 1), unit(K, V, D, seed=seed + 2)
    zbar_KD = normalize(z_KVD.mean(1), dim=-1)
    a_BP = patch_weights(x_BPD, zbar_KD, SCALE, 0.5)
    b_BKV = text_weights(g_BD, z_KVD, zbar_KD, SCALE, 0.5)
    return transport_cost(x_BPD, z_KVD), a_BP, b_BKV


def reference_plan(cost_VP: Tensor, a_P: Tensor, b_V: Tensor, epsilon: float) -> np.ndarray:
    """POT in fp64."""
    a, b, cost = (tensor.double().numpy() for tensor in (a_P, b_V, cost_VP.T))
    method = "sinkhorn" if epsilon >= SAFE_EPSILON else "sinkhorn_log"
    plan = ot.sinkhorn(a / a.sum(), b / b.sum(), cost, epsilon, method=method, stopThr=1e-9, numItermax=20_000)
    return np.asarray(plan).T


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.05, 0.02])
@pytest.mark.parametrize("seed", range(3))
def test_plans_equal_the_reference_solver(epsilon: float, seed: int) -> None:
    cost, a, b = problem(seed=10 * seed)
    plans = transport(cost, a, b, epsilon, **TIGHT).plan(cost, epsilon)
    for sample, concept in np.ndindex(*cost.shape[:2]):
        expected = reference_plan(cost[sample, concept], a[sample], b[sample, concept], epsilon)
        np.testing.assert_allclose(plans[sample, concept], expected, rtol=1e-4 if epsilon > 0.02 else 1e-3, atol=1e-9)


def test_conditional_cost_and_distance_equal_the_reference_plans() -> None:
    cost, a, b = problem()
    ours = transport(cost, a, b, **TIGHT)
    for sample, concept in np.ndindex(*cost.shape[:2]):
        plan = reference_plan(cost[sample, concept], a[sample], b[sample, concept], 0.1)
        moved = plan * cost[sample, concept].numpy()
        np.testing.assert_allclose(ours.conditional_cost[sample, concept], moved.sum(0) / plan.sum(0), rtol=1e-5)
        np.testing.assert_allclose(ours.distance[sample, concept], moved.sum(), rtol=1e-5)


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_marginals_hold(epsilon: float) -> None:
    cost, a, b = problem(B=4, P=50)
    ours = transport(cost, a, b, epsilon, **TIGHT)
    plan = ours.plan(cost, epsilon)
    assert (plan.sum(-1) - b).abs().sum(-1).max() < 1e-5
    errors = (plan.sum(2) - a[:, None]).abs().sum(-1)
    assert errors.max() < 1e-5
    assert (ours.marginal_error < TIGHT["tolerance"]).all()


def test_the_reported_error_is_that_of_the_plan() -> None:
    cost, a, b = problem()
    for limit in (1, 2, 3):
        ours = transport(cost, a, b, 0.03, max_iterations=limit, tolerance=1e-6)
        errors = (ours.plan(cost, 0.03).sum(2) - a[:, None]).abs().sum(-1)
        torch.testing.assert_close(ours.marginal_error, errors, rtol=1e-3, atol=1e-6)
        assert (ours.iterations == limit).all()


def test_more_iterations_never_worsen_the_marginals() -> None:
    cost, a, b = problem()
    errors = [transport(cost, a, b, 0.05, max_iterations=n, tolerance=1e-9).marginal_error for n in range(1, 12)]
    assert all((later <= sooner + 1e-6).all() for sooner, later in pairwise(errors))
    assert errors[-1].max() < errors[0].max()


def mixed_problems() -> tuple[Tensor, Tensor, Tensor]:
    """Easy and hard problems in one batch: constant costs settle at once, spread ones do not."""
    cost, a, b = problem(B=4, P=24)
    spread = torch.tensor([0.0, 1.0, 3.0, 5.0])[:, None, None, None]
    return (0.8 + spread * (cost - 0.8)).clamp(0, 2), a, b


@pytest.mark.parametrize("epsilon", [0.05, 0.02])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_batched_equals_looped_and_a_frozen_plan_ignores_its_neighbours(epsilon: float, tolerance: float) -> None:
    cost, a, b = mixed_problems()
    together = transport(cost, a, b, epsilon, 500, tolerance)
    assert len(together.iterations.unique()) > 1, "the problems must settle at different times"
    for i in range(len(cost)):
        for k in range(cost.shape[1]):
            alone = transport(
                cost[i : i + 1, k : k + 1], a[i : i + 1], b[i : i + 1, k : k + 1], epsilon, 500, tolerance
            )
            for field in fields(Transport):
                got, want = getattr(together, field.name)[i, k], getattr(alone, field.name)[0, 0]
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            assert together.iterations[i, k] == alone.iterations[0, 0]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, a, b = mixed_problems()
    whole = transport(cost, a, b)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", cost[0].numel())
    for field in fields(Transport):
        assert torch.equal(getattr(transport(cost, a, b), field.name), getattr(whole, field.name))


@pytest.mark.parametrize("epsilon", [0.1, 0.02])
def test_padded_equals_unpadded(epsilon: float) -> None:
    B, K, V, P, D = 2, 3, 4, 10, 16
    x, g, z = unit(B, P, D), unit(B, D, seed=1), unit(K, V, D, seed=2)
    zbar = normalize(z.mean(1), dim=-1)
    plain_a, plain_b = patch_weights(x, zbar, SCALE, 0.5), text_weights(g, z, zbar, SCALE, 0.5)
    plain = transport(transport_cost(x, z), plain_a, plain_b, epsilon, 200, 1e-4)

    wide_x = torch.cat([x, unit(B, 3, D, seed=7)], dim=1)
    wide_z = torch.cat([z, torch.zeros(K, 2, D)], dim=1)
    patches = (torch.arange(P + 3) < P).expand(B, -1)
    variants = (torch.arange(V + 2) < V).expand(K, -1)
    a = patch_weights(wide_x, zbar, SCALE, 0.5, mask_BP=patches)
    b = text_weights(g, wide_z, zbar, SCALE, 0.5, variants)
    padded = transport(transport_cost(wide_x, wide_z), a, b, epsilon, 200, 1e-4)

    assert (a[:, P:] == 0).all() and (b[..., V:] == 0).all()
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(padded.conditional_cost[..., :P], plain.conditional_cost, **close)
    torch.testing.assert_close(padded.log_r[..., :P], plain.log_r, rtol=1e-5, atol=1e-5)
    assert torch.equal(padded.iterations, plain.iterations)
    for name in ("distance", "marginal_error"):
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name), **close)


def test_one_variant_moves_every_patch_at_its_cost() -> None:
    x, z = unit(3, 30, 16), unit(5, 16, seed=2)
    cost = transport_cost(x, z[:, None])
    b = torch.ones(3, 5, 1)
    for sign in ("negative", "printed"):
        a = patch_weights(x, z, SCALE, 0.1, sign)
        solved = transport(cost, a, b)
        assert (solved.iterations == 1).all() and solved.marginal_error.max() < 1e-5
        torch.testing.assert_close(solved.conditional_cost, single_variant_cost(x, z))
        torch.testing.assert_close(solved.distance, (a[:, None] * single_variant_cost(x, z)).sum(-1))


def test_patch_weights_act_on_the_conditional_cost_only_through_the_text_marginal() -> None:
    """a_p cancels in c(p): from one a to another, a patch's cost moves by no more than its costs spread over texts."""
    cost, a, b = problem(P=60)
    uniform = torch.full_like(a, 1 / a.shape[1])
    first, second = (transport(cost, weights, b, **TIGHT).conditional_cost for weights in (a, uniform))
    spread = cost.amax(2) - cost.amin(2)
    moved = (first - second).abs()
    assert moved.max() > 0
    assert (moved <= spread).all() and moved.max() < 0.05


def test_conditional_cost_of_a_patch_with_hardly_any_weight_is_finite() -> None:
    cost, a, b = problem()
    a = torch.cat([torch.full((len(a), 1), 1e-37), a[:, 1:]], dim=1)
    a = a / a.sum(1, keepdim=True)
    low, high = cost.amin(2), cost.amax(2)
    found = transport(cost, a, b).conditional_cost
    assert found.isfinite().all() and (found >= low - 1e-5).all() and (found <= high + 1e-5).all()


def test_cost_lies_between_0_and_2_and_is_the_distance_of_unit_vectors() -> None:
    x = unit(1, 4, 8)
    z = torch.stack([x[0, :2], -x[0, :2]])
    cost = transport_cost(x, z)
    assert cost.min() >= 0 and cost.max() <= 2
    torch.testing.assert_close(cost[0, 0, 0, 0], torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(cost[0, 1, 0, 0], torch.tensor(2.0))
    torch.testing.assert_close(cost[0], (x[0][None, None] - z[:, :, None]).square().sum(-1) / 2, rtol=1e-4, atol=1e-5)


def test_a_constant_added_to_the_cost_changes_no_plan_and_no_stopping() -> None:
    cost, a, b = problem()
    one, other = transport(cost, a, b), transport(cost + 0.3, a, b)
    assert torch.equal(one.iterations, other.iterations)
    torch.testing.assert_close(one.plan(cost, 0.1), other.plan(cost + 0.3, 0.1), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(one.conditional_cost + 0.3, other.conditional_cost, rtol=1e-5, atol=1e-6)


def test_the_kernel_and_the_logarithms_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, a, b = problem()
    kernel = transport(cost, a, b)
    monkeypatch.setattr(module, "SAFE_EPSILON", 1.0)
    logarithms = transport(cost, a, b)
    for field in fields(Transport):
        torch.testing.assert_close(getattr(kernel, field.name), getattr(logarithms, field.name), rtol=1e-4, atol=1e-5)


def test_the_distance_shrinks_with_epsilon_towards_the_unregularised_optimum() -> None:
    cost, a, b = problem(B=1, K=2)
    distances = [transport(cost, a, b, eps, 20_000, 1e-5).distance[0] for eps in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)]
    assert all((tighter <= looser + 1e-5).all() for looser, tighter in pairwise(distances))
    for concept in range(2):
        weights = (a[0].double().numpy(), b[0, concept].double().numpy())
        exact = ot.emd2(
            weights[0] / weights[0].sum(), weights[1] / weights[1].sum(), cost[0, concept].T.double().numpy()
        )
        assert exact - 1e-5 <= float(distances[-1][concept]) <= exact + 0.01


def test_confident_patches_weigh_more_and_the_printed_sign_turns_it_round() -> None:
    zbar = torch.eye(4)
    confident, torn = zbar[0], normalize(zbar.mean(0), dim=-1)
    x = torch.stack([confident, torn])[None]
    ours, printed = (patch_weights(x, zbar, 20.0, 0.5, sign)[0] for sign in ("negative", "printed"))
    assert ours[0] > 0.8 > 0.2 > printed[0]
    torch.testing.assert_close(ours, printed.flip(0))


def test_text_weights_follow_awt() -> None:
    """H of the logits with entry k replaced by the variant's own, one variant at a time."""
    g, z = unit(2, 16), unit(3, 4, 16, seed=5)
    zbar = normalize(z.mean(1), dim=-1)
    weights = text_weights(g, z, zbar, SCALE, 0.5)
    for sample, concept in np.ndindex(2, 3):
        entropies = []
        for variant in range(4):
            logits = SCALE * zbar @ g[sample]
            logits[concept] = SCALE * z[concept, variant] @ g[sample]
            p = logits.softmax(0)
            entropies.append(-(p * p.log()).sum())
        torch.testing.assert_close(weights[sample, concept], (-torch.stack(entropies) / 0.5).softmax(0))


def test_entropy_is_log_k_for_equal_logits_and_0_for_certainty() -> None:
    torch.testing.assert_close(entropy(torch.zeros(7)), torch.tensor(7.0).log())
    assert entropy(torch.tensor([1e4, 0.0, 0.0])) == 0


def test_printed_score_sees_the_number_of_patches_and_hardly_the_picture() -> None:
    """METHODS.md 1.1, row 3: 13 categories, costs 0.7-0.85, uniform weights: tau = 0.42 cuts between M = 21 and 27."""
    for num_patches, masked in ((21, False), (27, True)):
        a = torch.full((1, num_patches), 1 / num_patches)
        for constant in (0.7, 0.85):
            cost = torch.full((1, 13, num_patches), constant)
            score = PATCH_SCORES["printed"](cost, a, cost[:, :1])
            assert bool((score <= 0.42).all()) is masked
            assert bool((score <= 0.42).any()) is masked


def test_scores_are_ordered_and_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    cost, anchors = 2 * torch.rand(2, 6, 9, generator=generator), 2 * torch.rand(2, 3, 9, generator=generator)
    a = torch.rand(2, 9, generator=generator).softmax(-1)
    score = {name: function(cost, a, anchors) for name, function in PATCH_SCORES.items()}
    assert (score["min_cost"] <= score["mean_cost"]).all()
    torch.testing.assert_close(score["margin"], score["min_cost"] - anchors.amin(1))
    torch.testing.assert_close(score["printed"], 6 * a * score["mean_cost"])


def test_nearer_to_the_unsafe_text_scores_lower_and_nearer_to_the_anchor_higher() -> None:
    unsafe, benign, patch = unit(1, 1, 16, seed=1), unit(1, 16, seed=2), unit(16, seed=3)
    towards = [normalize(patch + share * unsafe[0, 0], dim=0) for share in (0.0, 0.5, 1.0)]
    x = torch.stack(towards)[None]
    a = torch.full((1, 3), 1 / 3)
    cost = transport(transport_cost(x, unsafe), a, torch.ones(1, 1, 1)).conditional_cost
    anchors = single_variant_cost(torch.stack([patch] * 3)[None], benign)
    for name in PATCH_SCORES:
        score = PATCH_SCORES[name](cost, a, anchors)[0]
        assert (score.diff() < 0).all(), name
    assert (PATCH_SCORES["margin"](cost, a, anchors - 0.1) > PATCH_SCORES["margin"](cost, a, anchors)).all()
