"""One plan from the patches to all texts at once: unsafe categories and benign anchors compete for every patch. Ours.

    T = argmin_{T >= 0}  <T, C> + eps sum T (log T - 1) + rho KL(T^T 1 | b)     s.t.  T 1 = a
        C(p, n) = 1 - <x_p, z_n>,   eps = temperature / s,   KL(m | b) = sum_n m log(m / b) - m + b

GuardAlign solves one plan per category, whose patches all have to go to that category; here a patch goes where it fits.
The patches' marginal holds exactly, the texts' one is only wished for, as strongly as phi = rho / (rho + eps) says:

    T(p, n) = a(p) softmax_n(l(p, n) + log c(n)),   l = s <x_p, z_n> / temperature
    log c(n) = phi (log b(n) - log sum_p a(p) softmax_n(l(p, n) + log c(n)) / c(n))
    score(p) = sum over anchors n of T(p, n) / a(p)     in [0, 1], lower = less safe

At phi = 0 nothing is wished for, c = 1, and the score is 1 - p(unsafe) of the plain softmax: **all that transport adds
is c**, one factor a text and picture, below 1 for texts that ask for more of the picture than b grants. At phi = 1 the
plan is balanced. b is uniform over all texts.

A negative result, kept so that it can be measured again: on validation scenes of the micro world's first build c at
phi = 0.2 raised the AUROC of the taught CLIP under a shift (.880 to .886), less than a temperature of 1.67 without
transport (.889), and lowered that of the contrastive CLIP (.793 to .790). Balanced (phi = 1) it did harm on every set
that was tried. The proof's tables (guardalign/micro/PROOF.md) hold both again, on test scenes of the shipped build.

The form is that of unbalanced transport (Chizat et al. 2018, Math. Comp. 87, 2563-2609), relaxed on one side.
Legend: B samples, P patches, K unsafe categories, N texts: the categories' mean texts first, then the benign anchors.
Knows nothing of models, pictures, files or settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from guardalign.core.transport import CHUNK_ELEMENTS

PRECISION = 1e-6
"""What the iteration leaves of the distance of log c to the solution, at most."""


def num_updates(strength: float) -> int:
    """Updates of c until `PRECISION`: each one shrinks the largest error of log c to phi times itself, or less.

    It depends on nothing but phi, so no plan depends on its neighbours. [0, 1) -> 0, 1, 2, ...
    """
    return math.ceil(math.log(PRECISION) / math.log(strength)) if strength > 0 else 0


def text_scaling(l_BPN: Tensor, a_BP: Tensor, strength: float, updates: int | None = None) -> Tensor:
    """log c [B, N] for a uniform b, with phi = `strength` in [0, 1); `updates` stands for `num_updates` of it.

    Patches of weight 0 (padding) do not count. All in logarithms: at s = 100 the kernel exp(l) would underflow.
    """
    log_a_BP, log_b = a_BP.log(), -math.log(l_BPN.shape[-1])
    log_c_BN = torch.zeros_like(l_BPN[:, 0])
    for _ in range(num_updates(strength) if updates is None else updates):
        log_share_BPN = (l_BPN + log_c_BN[:, None]).log_softmax(-1)
        log_mass_BN = (log_share_BPN + log_a_BP[..., None]).logsumexp(1)
        log_c_BN = strength * (log_b - (log_mass_BN - log_c_BN))
    return log_c_BN


def safe_probability_score(l_BPN: Tensor, num_unsafe: int, a_BP: Tensor, strength: float) -> Tensor:
    """1 - p(unsafe), p = softmax over the categories' mean texts and the anchors, in [0, 1]; no transport."""
    return l_BPN.softmax(-1)[..., num_unsafe:].sum(-1)


def joint_score(l_BPN: Tensor, num_unsafe: int, a_BP: Tensor, strength: float) -> Tensor:
    """The share of a patch's mass that the joint plan moves to benign anchors, in [0, 1]."""
    rows = max(1, CHUNK_ELEMENTS // l_BPN[0].numel()) if l_BPN.device.type == "cpu" else len(l_BPN)
    scaled = [
        few_BPN + text_scaling(few_BPN, a, strength)[:, None]
        for few_BPN, a in zip(l_BPN.split(rows), a_BP.split(rows), strict=True)
    ]
    return safe_probability_score(torch.cat(scaled), num_unsafe, a_BP, strength)


SHARE_SCORES: dict[str, Callable[[Tensor, int, Tensor, float], Tensor]] = {
    "safe_probability": safe_probability_score,
    "joint": joint_score,
}
"""name -> score of a patch [B, P] from logits of all texts, number of unsafe ones, patch weights and phi; lower = less
safe in all"""
