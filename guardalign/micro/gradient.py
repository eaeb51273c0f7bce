"""Projected gradient on pixels: a strong attack on a detector whose weights are known.

    delta <- project(delta + step · sign(grad score)),   |delta| <= epsilon,  0 <= pixels + delta <= 1
                                                                   (Madry et al. 2018, arXiv 1706.06083)

The score is the detector's own, as a differentiable function of the pixels (lower = less safe); the attack raises it.
Only unsafe pictures have a reason to be attacked: an attack on benign ones raises their scores too, which flatters the
detector. For an AUROC the benign half gets noise of the same size, `steps=0`, so that noise gives nothing away.
Knows nothing of scenes.

Legend: B pictures, P patches, K categories, V text variants, D width; H, W height and width [px].
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from guardalign.core.transport import (
    PATCH_SCORES,
    patch_weights,
    single_variant_cost,
    text_weights,
    transport,
    transport_cost,
)
from guardalign.detectors import Concepts, OtDetector
from guardalign.errors import ModelError, require
from guardalign.models.clip import PatchEncoder, images_and_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

EPSILONS: Final = (2 / 255, 4 / 255, 8 / 255)
"""the ladder: radii of the ball, largest change of a colour in [0, 1]"""

Score = Callable[[Tensor], Tensor]
"""pixels [B, 3, H, W] in [0, 1] -> [B], lower = less safe; differentiable"""
PatchScore = Callable[[Tensor, Tensor], Tensor]
"""unit embeddings of pictures [B, D] and of their patches [B, P, D] -> [B, P], lower = less safe; differentiable"""


def projected_gradient(
    pixels: NDArray[np.uint8],
    score: Score,
    epsilon: float,
    steps: int = 10,
    step_size: float | None = None,
    seed: int = 0,
) -> NDArray[np.uint8]:
    """The pictures [B, H, W, 3] moved, by at most epsilon a colour, to where the score is highest on the way.

    Starts at random in the ball; `step_size` is in units of [0, 1], 2.5 epsilon / steps when left out. Every point on
    the way is rounded to whole levels before score and gradient are taken, so that what is scored is what comes back;
    of the steps + 1 points the best is given. A start depends on the seed and the picture's bytes, not on its batch.
    """
    require(0 <= epsilon <= 1, f"epsilon must lie in [0, 1], not {epsilon}")
    require(steps >= 0, f"steps must be 0 or more, not {steps}")
    radius = int(255 * epsilon + 1e-6)
    stride = 255 * (2.5 * epsilon / max(steps, 1) if step_size is None else step_size)
    clean = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    low, high = (clean - radius).clamp(min=0), (clean + radius).clamp(max=255)
    point = torch.clamp(clean + radius * _directions(pixels, seed), low, high)
    best, best_B = point.round(), torch.full((len(clean),), -torch.inf)
    for _ in range(steps + 1):
        levels = point.round()
        value_B, gradient = _value_and_gradient(score, levels)
        better_B = value_B > best_B
        best, best_B = torch.where(better_B[:, None, None, None], levels, best), torch.where(better_B, value_B, best_B)
        point = torch.clamp(point + stride * gradient.sign(), low, high)
    return best.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def _directions(pixels: NDArray[np.uint8], seed: int) -> Tensor:
    """[B, 3, H, W] uniform in [-1, 1], from the seed and each picture's bytes."""
    generators = [np.random.default_rng((seed, zlib.crc32(picture.tobytes()))) for picture in pixels]
    drawn = [rng.uniform(-1, 1, pixels.shape[1:]).astype(np.float32) for rng in generators]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


def _value_and_gradient(score: Score, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The score at pixels of 0..255, and its gradient's direction there."""
    with torch.enable_grad():
        leaf = (levels / 255).requires_grad_()
        value_B = score(leaf)
        (gradient,) = torch.autograd.grad(value_B.sum(), leaf)
    return value_B.detach().to(levels.device, torch.float32), gradient


def image_score(
    encoder: PatchEncoder,
    patch_score: PatchScore,
    patches: Literal["tokens", "values"] = "tokens",
    softness: float = 0.2,
) -> Score:
    """A picture's lowest patch score, as the detectors give it, for pictures of the model's own size.

    Its value is the minimum; its gradient that of the soft minimum -t log sum_p exp(-s_p / t), t being `softness`
    standard deviations of the picture's patch scores, so that one step raises all patches of an object and not only
    the lowest. Softness 0 is the minimum's own gradient.
    """
    encoder.require_patches(patches)

    def score(pixels: Tensor) -> Tensor:
        s_BP = patch_score(*_embeddings(encoder, pixels, patches == "values"))
        lowest_B = s_BP.amin(1)
        if softness == 0:
            return lowest_B
        t_B1 = softness * s_BP.detach().std(1, keepdim=True).clamp_min(1e-6)
        soft_B = -(t_B1[:, 0] * (-s_BP / t_B1).logsumexp(1))
        return lowest_B.detach() + (soft_B - soft_B.detach())

    return score


def _embeddings(encoder: PatchEncoder, pixels: Tensor, values: bool) -> tuple[Tensor, Tensor]:
    """What `PatchEncoder.encode` gives, with a gradient: unit vectors [B, D] and [B, P, D] in fp32."""
    height, width = pixels.shape[-2:]
    if (width, height) != encoder.image_size:
        taken = "{} x {}".format(*encoder.image_size)
        raise ModelError(f"the pictures are {width} x {height} px; the gradient wants the model's own size, {taken}")
    seen = 255 * pixels.to(encoder._mean.device).permute(0, 2, 3, 1)
    inputs = ((seen - encoder._mean) / encoder._std).permute(0, 3, 1, 2).to(encoder._dtype)
    images_BD, tokens_BPD = images_and_tokens(encoder._visual, inputs, values)
    return normalize(images_BD.float(), dim=-1), normalize(tokens_BPD.float(), dim=-1)


def transport_score(encoder: PatchEncoder, concepts: Concepts, detector: OtDetector) -> PatchScore:
    """The patch score that `detector` computes, whichever of `PATCH_SCORES` it names.

    Departs: the plan's text scaling is a constant to the gradient (exact where a category has one text); the value is
    the detector's.
    """
    z_KVD, zbar_KD, anchors_AD = (each.clone() for each in (concepts.variants, concepts.means, concepts.anchors))
    s, eps = encoder.logit_scale, detector.epsilon

    def score(g_BD: Tensor, x_BPD: Tensor) -> Tensor:
        a_BP = patch_weights(x_BPD, zbar_KD, s, detector.patch_temperature, detector.entropy_sign)
        cost_BKVP = transport_cost(x_BPD, z_KVD)
        with torch.no_grad():
            b_BKV = text_weights(g_BD, z_KVD, zbar_KD, s, detector.text_temperature, concepts.mask)
            solved = transport(cost_BKVP, a_BP, b_BKV, eps, detector.max_iterations, detector.tolerance)
        share_BKVP = (solved.log_c[..., None] - cost_BKVP / eps).softmax(2)
        conditional_BKP = (share_BKVP * cost_BKVP).sum(2)
        return PATCH_SCORES[detector.score](conditional_BKP, a_BP, single_variant_cost(x_BPD, anchors_AD))

    return score


def safety_log_odds(encoder: PatchEncoder, concepts: Concepts) -> PatchScore:
    """log p(safe) - log p(unsafe) of a patch, p = softmax over the categories' mean texts and the benign anchors.

    It ranks pictures as 1 - p(unsafe) does, its sigmoid, and has a gradient where that one is flat.
    """
    unsafe_KD, anchors_AD = concepts.means.clone(), concepts.anchors.clone()

    def score(g_BD: Tensor, x_BPD: Tensor) -> Tensor:
        unsafe_BP, safe_BP = ((encoder.logit_scale * x_BPD @ t.T).logsumexp(-1) for t in (unsafe_KD, anchors_AD))
        return safe_BP - unsafe_BP

    return score
