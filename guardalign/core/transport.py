"""Entropic optimal transport between the patches of a picture and the texts of a concept, batched; and patch scores.

    a, b     entropy weights of patches and of text variants
    plan     T = argmin <T, C> - eps h(T)  with row sums a and column sums b      (Sinkhorn-Knopp)
    c(p)     the plan's conditional cost of a patch, the stuff that scores are made of

Legend: B samples, P patches, K concepts (unsafe categories), V text variants of a concept, A benign anchors, D width.
One problem is one (sample, concept) pair. Each is solved as if it stood alone: it stops by its own error and is frozen
then, so its plan does not depend on its neighbours. Padding is expressed by weights of zero, in a and in b.

Knows nothing of models, pictures, files or settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LARGEST_COST = 2.0
"""1 - cos of two unit vectors is at most this."""
SAFE_EPSILON = 0.04
"""From here on exp(-LARGEST_COST / eps) >= 2e-22 and the scaling vectors stay far inside fp32's range."""
CHUNK_ELEMENTS = 800_000
"""Costs that one pass works on when on a CPU (3 MB in fp32): the iterations then run inside its cache."""

EntropySign = Literal["negative", "printed"]


@dataclass(frozen=True)
class Transport:
    """The solved problems, in the form of scaling vectors: T(v, p) = exp(log_r(p) + log_c(v) - C(v, p) / eps)."""

    log_r: Tensor
    """[B, K, P] log of the row (patch) scaling; -inf where a is 0"""
    log_c: Tensor
    """[B, K, V] log of the column (text) scaling; -inf where b is 0"""
    conditional_cost: Tensor
    """[B, K, P] c(p) = sum_v T(v, p) C(v, p) / sum_v T(v, p), in [0, 2]"""
    distance: Tensor
    """[B, K] d = <T, C>, in [0, 2]"""
    iterations: Tensor
    """[B, K] updates of both scaling vectors until the problem stood still"""
    marginal_error: Tensor
    """[B, K] L1 error of the row sums, sum_p |T 1 - a|; the column sums are exact to rounding"""

    def plan(self, cost_BKVP: Tensor, epsilon: float) -> Tensor:
        """The transport plans themselves, [B, K, V, P]."""
        return torch.exp(self.log_r[:, :, None] + self.log_c[..., None] - cost_BKVP / epsilon)


def transport_cost(x_BPD: Tensor, z_KVD: Tensor) -> Tensor:
    """C(v, p) = 1 - <x_p, z_v> for unit vectors, in [0, 2]; [B, K, V, P] (patches last: they are the long side)."""
    num_samples, num_patches, width = x_BPD.shape
    similarity_BNP = z_KVD.reshape(-1, width) @ x_BPD.transpose(1, 2)
    cost_BNP = (1.0 - similarity_BNP).clamp(0.0, LARGEST_COST)
    return cost_BNP.reshape(num_samples, *z_KVD.shape[:2], num_patches)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy [nats] of softmax over the last dimension."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def patch_weights(
    x_BPD: Tensor,
    zbar_KD: Tensor,
    logit_scale: float,
    temperature: float,
    sign: EntropySign = "negative",
    mask_BP: Tensor | None = None,
) -> Tensor:
    """a = softmax_p(-H(softmax_k(s <x_p, zbar_k>)) / T_v): confident patches weigh more (AWT, sec. 3.3).

    `sign="printed"` is softmax_p(+H / T_v), GuardAlign, eq. 7. Patches outside the mask weigh 0; rows sum to 1.
    """
    H_BP = entropy(logit_scale * x_BPD @ zbar_KD.T)
    logits_BP = (H_BP if sign == "printed" else -H_BP) / temperature
    if mask_BP is not None:
        logits_BP = logits_BP.masked_fill(~mask_BP, -torch.inf)
    return logits_BP.softmax(-1)


def text_weights(
    g_BD: Tensor,
    z_KVD: Tensor,
    zbar_KD: Tensor,
    logit_scale: float,
    temperature: float,
    mask_KV: Tensor | None = None,
) -> Tensor:
    """b = softmax_v(-H_kv / T_t), H_kv the entropy of the picture's logits with entry k taken from variant v alone.

    The picture is its global embedding g; the other entries come from the mean texts zbar (AWT's released code).
    Variants outside the mask weigh 0; the weights of a concept sum to 1. [B, K, V]
    """
    num_concepts = zbar_KD.shape[0]
    mean_logits_BK = logit_scale * g_BD @ zbar_KD.T
    variant_logits_BKV = logit_scale * torch.einsum("bd,kvd->bkv", g_BD, z_KVD)
    own_KK = torch.eye(num_concepts, dtype=torch.bool, device=g_BD.device)
    swapped_BKVK = torch.where(own_KK[:, None], variant_logits_BKV[..., None], mean_logits_BK[:, None, None])
    logits_BKV = -entropy(swapped_BKVK) / temperature
    if mask_KV is not None:
        logits_BKV = logits_BKV.masked_fill(~mask_KV, -torch.inf)
    return logits_BKV.softmax(-1)


def transport(
    cost_BKVP: Tensor,
    a_BP: Tensor,
    b_BKV: Tensor,
    epsilon: float = 0.1,
    max_iterations: int = 100,
    tolerance: float = 1e-2,
) -> Transport:
    """Solve min <T, C> - eps h(T), T >= 0, row sums a, column sums b, for every (sample, concept); eps > 0.

    A problem stops when sum_p |T 1 - a| < tolerance, which is the a-weighted mean relative change that the next update
    would make to the scaling vector. In fp32 a tolerance below about 1e-6 is not reached.
    Departs: AWT averages the absolute change over the batch; that depends on the neighbours, and on constants added to
    the cost, which do not change the plan.
    """
    iterate = _iterate_kernel if epsilon >= SAFE_EPSILON else _iterate_logarithms
    rows = max(1, CHUNK_ELEMENTS // cost_BKVP[0].numel()) if cost_BKVP.device.type == "cpu" else len(cost_BKVP)
    solved = [
        iterate(C.flatten(0, 1), _repeat(a, C.shape[1]), b.flatten(0, 1), epsilon, max_iterations, tolerance)
        for C, a, b in zip(cost_BKVP.split(rows), a_BP.split(rows), b_BKV.split(rows), strict=True)
    ]
    shape = cost_BKVP.shape[:2]
    return Transport(*(torch.cat(column).unflatten(0, shape) for column in zip(*solved, strict=True)))


def _repeat(a_BP: Tensor, num_concepts: int) -> Tensor:
    """The same patch weights for every concept, as rows of problems; [B K, P]."""
    return a_BP[:, None].expand(-1, num_concepts, -1).flatten(0, 1)


_Solved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""The fields of `Transport` for a flat list of problems, N = B K."""


def _iterate_kernel(C_NVP: Tensor, a_NP: Tensor, b_NV: Tensor, epsilon: float, limit: int, tolerance: float) -> _Solved:
    """Sinkhorn-Knopp on the kernel G = exp(-C / eps): r = a / G c, c = b / G^T r."""
    G_NVP = torch.exp(C_NVP / -epsilon)

    def sum_texts(c_NV: Tensor) -> Tensor:
        return torch.bmm(c_NV[:, None], G_NVP)[:, 0]

    def sum_patches(r_NP: Tensor) -> Tensor:
        return torch.bmm(r_NP[:, None], G_NVP.transpose(1, 2))[:, 0]

    def update(s_NP: Tensor) -> tuple[Tensor, Tensor]:
        r_NP = a_NP / s_NP
        return r_NP, b_NV / sum_patches(r_NP)

    def row_error(r_NP: Tensor, s_NP: Tensor) -> Tensor:
        return (r_NP * s_NP - a_NP).abs().sum(-1)

    c_NV = (b_NV > 0).to(b_NV.dtype)
    r_NP, c_NV, s_NP, iterations_N, error_N = _iterate(c_NV, sum_texts, update, row_error, limit, tolerance)
    conditional_NP = torch.bmm(c_NV[:, None], G_NVP.mul_(C_NVP))[:, 0] / s_NP
    distance_N = (r_NP * s_NP * conditional_NP).sum(-1)
    return r_NP.log(), c_NV.log(), conditional_NP, distance_N, iterations_N, error_N


def _iterate_logarithms(
    C_NVP: Tensor, a_NP: Tensor, b_NV: Tensor, epsilon: float, limit: int, tolerance: float
) -> _Solved:
    """The same iteration on log r and log c, for an eps so small that the kernel would underflow; slower."""
    G_NVP = C_NVP / -epsilon
    log_a_NP, log_b_NV = a_NP.log(), b_NV.log()

    def sum_texts(c_NV: Tensor) -> Tensor:
        return torch.logsumexp(G_NVP + c_NV[..., None], 1)

    def update(s_NP: Tensor) -> tuple[Tensor, Tensor]:
        r_NP = log_a_NP - s_NP
        return r_NP, log_b_NV - torch.logsumexp(G_NVP + r_NP[:, None], 2)

    def row_error(r_NP: Tensor, s_NP: Tensor) -> Tensor:
        return ((r_NP + s_NP).exp() - a_NP).abs().sum(-1)

    c_NV = (b_NV > 0).to(b_NV.dtype).log()
    r_NP, c_NV, s_NP, iterations_N, error_N = _iterate(c_NV, sum_texts, update, row_error, limit, tolerance)
    conditional_NP = ((G_NVP + c_NV[..., None]).softmax(1) * C_NVP).sum(1)
    distance_N = ((r_NP + s_NP).exp() * conditional_NP).sum(-1)
    return r_NP, c_NV, conditional_NP, distance_N, iterations_N, error_N


def _iterate(
    c_NV: Tensor,
    sum_texts: Callable[[Tensor], Tensor],
    update: Callable[[Tensor], tuple[Tensor, Tensor]],
    row_error: Callable[[Tensor, Tensor], Tensor],
    limit: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Alternate both updates; freeze each problem when its own row error is below the tolerance.

    Gives (r, c, s = G c, iterations, row error) of what each problem stood at last.
    """
    s_NP = sum_texts(c_NV)
    r_NP, c_NV = update(s_NP)
    s_NP = sum_texts(c_NV)
    error_N = row_error(r_NP, s_NP)
    iterations_N = torch.ones_like(error_N, dtype=torch.int32)
    for _ in range(limit - 1):
        active_N = ~(error_N < tolerance)
        if not active_N.any():
            break
        fresh_r_NP, fresh_c_NV = update(s_NP)
        fresh_s_NP = sum_texts(fresh_c_NV)
        fresh_error_N = row_error(fresh_r_NP, fresh_s_NP)
        r_NP, c_NV, s_NP = (
            _where(active_N, fresh, old) for fresh, old in ((fresh_r_NP, r_NP), (fresh_c_NV, c_NV), (fresh_s_NP, s_NP))
        )
        error_N = torch.where(active_N, fresh_error_N, error_N)
        iterations_N = iterations_N + active_N
    return r_NP, c_NV, s_NP, iterations_N, error_N


def _where(active_N: Tensor, fresh: Tensor, old: Tensor) -> Tensor:
    """`fresh` for the active problems, `old` for the frozen ones; spares the copy while none is frozen."""
    return fresh if active_N.all() else torch.where(active_N[:, None], fresh, old)


def single_variant_cost(x_BPD: Tensor, z_AD: Tensor) -> Tensor:
    """The conditional cost for concepts of one text each: a plan of one column moves all of a patch to it, so c = C."""
    return transport_cost(x_BPD, z_AD[:, None])[:, :, 0]


def printed_score(cost_BKP: Tensor, a_BP: Tensor, anchor_cost_BAP: Tensor) -> Tensor:
    """sum_k sum_v T C = a(p) sum_k c_k(p), in [0, 2K a(p)] (GuardAlign, eq. 9, as it stands)."""
    return a_BP * cost_BKP.sum(1)


def mean_cost_score(cost_BKP: Tensor, a_BP: Tensor, anchor_cost_BAP: Tensor) -> Tensor:
    """mean_k c_k(p), in [0, 2]."""
    return cost_BKP.mean(1)


def min_cost_score(cost_BKP: Tensor, a_BP: Tensor, anchor_cost_BAP: Tensor) -> Tensor:
    """min_k c_k(p), in [0, 2]: the cost of the nearest unsafe concept."""
    return cost_BKP.amin(1)


def margin_score(cost_BKP: Tensor, a_BP: Tensor, anchor_cost_BAP: Tensor) -> Tensor:
    """min_k c_k(p) - min_anchor c(p), in [-2, 2]: below 0 an unsafe concept is nearer than every benign anchor."""
    return cost_BKP.amin(1) - anchor_cost_BAP.amin(1)


PATCH_SCORES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "margin": margin_score,
    "min_cost": min_cost_score,
    "mean_cost": mean_cost_score,
    "printed": printed_score,
}
"""name -> score of a patch [B, P] from unsafe costs, patch weights and anchor costs; lower = less safe in all."""
