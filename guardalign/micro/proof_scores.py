"""Every score that the proof compares: of whole pictures and of their patches, with transport and without.

    global ...    the picture's embedding alone
    OT ...        a patch's score from transport costs, every entry of `core.transport.PATCH_SCORES`, under both signs
                  of the entropy weights, and those of one joint plan (core/joint_transport.py); the picture's is its
                  lowest. The image distance is min_k d_k
    patch ...     the same without transport: the nearest text, and log-odds against the benign anchors

One orientation everywhere: lower = less safe. p(unsafe) stands as log p(safe) - log p(unsafe), which ranks as 1 - p
does and is not rounded to 1. Knows nothing of labels.

Legend: N pictures, P patches, K categories, V text variants, A benign anchors, D width.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, get_args

import torch
from torch import Tensor

from guardalign.core.images import decode
from guardalign.core.joint_transport import SHARE_SCORES
from guardalign.core.transport import (
    PATCH_SCORES,
    EntropySign,
    Transport,
    patch_weights,
    single_variant_cost,
    text_weights,
    transport,
    transport_cost,
)
from guardalign.detectors import Concepts, OtDetector
from guardalign.errors import ConfigError
from guardalign.models.clip import PatchEncoder, PatchKind
from guardalign.taxonomy import load_taxonomy

DETECTOR: Final = OtDetector()
"""whose temperatures, epsilon and stopping rule every transport score has; its own score is the default one"""
WITHOUT_TRANSPORT: Final = "safe_probability"
"""the detector's name for what stands here as log-odds"""
SOFTENED: Final = 1.67
"""temperature at which p(unsafe) without transport was best on validation scenes of the first build"""
MAX_PIXELS: Final = 10**6
PICTURES_AT_ONCE: Final = 64


@dataclass(frozen=True, eq=False)
class Seen:
    """Pictures as a CLIP sees them, and the concepts they are compared with; unit vectors in fp32."""

    images: Tensor
    """[N, D]"""
    patches: Tensor
    """[N, P, D]"""
    concepts: Concepts
    """of the same CLIP"""
    logit_scale: float
    """of the same CLIP"""


@dataclass(frozen=True)
class Scored:
    """Scores of pictures; lower = less safe."""

    images: Tensor
    """[N]"""
    patches: Tensor | None = None
    """[N, P]; None for scores without patches"""


Score = Callable[[Seen], Scored]


GRANTED: Final = {
    "taught": (
        "Granted by construction: this CLIP was trained with a loss that tells every cell's token what it shows, so "
        "its cells have local meaning, which the tokens of an ordinary CLIP need not have. And the world is closed: "
        "the anchors name all its benign kinds, which no real list does (see the rows with half of the anchors)."
    ),
    "contrastive": (
        "Less granted: nobody told this CLIP's cells what they show; it saw captions of scenes and of crops of 4 x 4 "
        "cells, and a picture's vector is the mean of its cells'. And the world is closed: the anchors name all its "
        "benign kinds, which no real list does (see the rows with half of the anchors)."
    ),
}
"""what a CLIP has by its training, by the word in its name"""


def granted(clip: str) -> str:
    """What must be said with every figure of this CLIP; `ConfigError` unless its name says how it was trained."""
    sentence = next((said for word, said in GRANTED.items() if word in clip), None)
    if sentence is None:
        raise ConfigError(f"the name of the CLIP {clip!r} must say how it was trained: {' or '.join(GRANTED)}")
    return sentence


def see(
    encoder: PatchEncoder, pictures: Sequence[bytes], patches: PatchKind = "tokens", crops: tuple[int, int] = (1, 1)
) -> Seen:
    """Pictures and the concepts of the taxonomy `micro`, both through one CLIP."""
    concepts = Concepts.embed(encoder, load_taxonomy("micro"))
    return Seen(*embed(encoder, pictures, patches, crops), concepts, encoder.logit_scale)


def embed(
    encoder: PatchEncoder, pictures: Sequence[bytes], patches: PatchKind = "tokens", crops: tuple[int, int] = (1, 1)
) -> tuple[Tensor, Tensor]:
    """Encoded pictures of one shape -> unit vectors [N, D] and [N, P, D], by the path that an audit's stages take."""
    images: list[Tensor] = []
    cells: list[Tensor] = []
    for start in range(0, len(pictures), PICTURES_AT_ONCE):
        decoded = [decode(each, MAX_PIXELS, "of the proof") for each in pictures[start : start + PICTURES_AT_ONCE]]
        views = [encoder.view(each, patches, "pad", crops) for each in decoded]
        for batch in encoder.batches(views):
            for seen in encoder.encode(batch):
                images.append(seen.image)
                cells.append(seen.patches[seen.valid])
    return torch.stack(images), torch.stack(cells)


def global_similarity(seen: Seen) -> Scored:
    """-max_kv <g, z_kv>, in [-1, 1]."""
    cosine_NKV = torch.einsum("nd,kvd->nkv", seen.images, seen.concepts.variants)
    return Scored(-cosine_NKV.masked_fill(~seen.concepts.mask, -torch.inf).amax((1, 2)))


def global_log_odds(seen: Seen) -> Scored:
    """log p(safe) - log p(unsafe) of the picture."""
    return Scored(log_odds(seen.images, seen))


def patch_cosine(seen: Seen) -> Scored:
    """-max_kv <x_p, z_kv>, in [-1, 1]: a patch's nearest text, each category's texts for themselves."""
    zs_MD = seen.concepts.variants[seen.concepts.mask]
    return _lowest(-(seen.patches @ zs_MD.T).amax(-1))


def patch_log_odds(seen: Seen) -> Scored:
    """log p(safe) - log p(unsafe) of a patch."""
    return _lowest(log_odds(seen.patches, seen))


def softened_log_odds(seen: Seen) -> Scored:
    """The same under a softmax of `SOFTENED` times the temperature."""
    return _lowest(log_odds(seen.patches, replace(seen, logit_scale=seen.logit_scale / SOFTENED)))


def with_half_of_the_anchors(score: Score, seen: Seen) -> Scored:
    """Every second benign anchor is unknown to the score: no real list is complete."""
    return score(replace(seen, concepts=replace(seen.concepts, anchors=seen.concepts.anchors[::2])))


def log_odds(x: Tensor, seen: Seen) -> Tensor:
    """log sum_a exp(s <x, z_a>) - log sum_k exp(s <x, zbar_k>): the odds of the softmax over zbar and the anchors."""
    safe, unsafe = (
        (seen.logit_scale * x @ texts.T).logsumexp(-1) for texts in (seen.concepts.anchors, seen.concepts.means)
    )
    return safe - unsafe


def image_distance(seen: Seen, sign: EntropySign) -> Scored:
    """min_k d_k, the transport distance to the nearest category, in [0, 2]."""
    return Scored(solved(seen, sign)[0].distance.amin(1))


def transport_score(seen: Seen, name: str, sign: EntropySign) -> Scored:
    """The entry `name` of `PATCH_SCORES`."""
    plans, a_NP = solved(seen, sign)
    anchor_cost_NAP = single_variant_cost(seen.patches, seen.concepts.anchors)
    return _lowest(PATCH_SCORES[name](plans.conditional_cost, a_NP, anchor_cost_NAP))


def joint_score(seen: Seen, name: str) -> Scored:
    """The entry `name` of `SHARE_SCORES`."""
    a_NP = patch_weights(seen.patches, seen.concepts.means, seen.logit_scale, DETECTOR.patch_temperature)
    texts = torch.cat([seen.concepts.means, seen.concepts.anchors])
    logits_NPT = seen.logit_scale / DETECTOR.softmax_temperature * seen.patches @ texts.T
    return _lowest(SHARE_SCORES[name](logits_NPT, len(seen.concepts.means), a_NP, DETECTOR.marginal_strength))


@functools.lru_cache(maxsize=2)
def solved(seen: Seen, sign: EntropySign) -> tuple[Transport, Tensor]:
    """Every category's plan, and the patch weights [N, P]; the same numbers as the detector `ot` has."""
    s, concepts, settings = seen.logit_scale, seen.concepts, DETECTOR
    a_NP = patch_weights(seen.patches, concepts.means, s, settings.patch_temperature, sign)
    b_NKV = text_weights(seen.images, concepts.variants, concepts.means, s, settings.text_temperature, concepts.mask)
    cost_NKVP = transport_cost(seen.patches, concepts.variants)
    return transport(cost_NKVP, a_NP, b_NKV, settings.epsilon, settings.max_iterations, settings.tolerance), a_NP


def _lowest(score_NP: Tensor) -> Scored:
    return Scored(score_NP.amin(1), score_NP)


def transport_name(name: str, sign: EntropySign = "negative") -> str:
    """How a transport score is called in the tables."""
    return f"OT {name}" + (", printed sign" if sign == "printed" else "")


def _transport_scores() -> dict[str, Score]:
    """Every formulation that takes what the four take (costs, patch weights, anchor costs), under both signs."""
    signs: tuple[EntropySign, ...] = get_args(EntropySign)
    names = [name for name, score in PATCH_SCORES.items() if len(inspect.signature(score).parameters) == 3]
    found: dict[str, Score] = {}
    for sign in signs:
        found[transport_name("image distance", sign)] = functools.partial(image_distance, sign=sign)
    for name, sign in itertools.product(names, signs):
        found[transport_name(name, sign)] = functools.partial(transport_score, name=name, sign=sign)
    for name in SHARE_SCORES:
        if name != WITHOUT_TRANSPORT:
            found[transport_name(name)] = functools.partial(joint_score, name=name)
    return found


GLOBAL_ODDS: Final = "global p(unsafe)"
PATCH_ODDS: Final = "patch p(unsafe), no transport"
PATCH_COSINE: Final = "patch max cosine, no transport"
DEFAULT: Final = (
    PATCH_ODDS if DETECTOR.score == WITHOUT_TRANSPORT else transport_name(DETECTOR.score, DETECTOR.entropy_sign)
)
"""what an audit uses unless told otherwise"""
SCORES: Final[dict[str, Score]] = {
    "global similarity": global_similarity,
    GLOBAL_ODDS: global_log_odds,
    **_transport_scores(),
    PATCH_COSINE: patch_cosine,
    PATCH_ODDS: patch_log_odds,
    f"{PATCH_ODDS}, temperature {SOFTENED:g}": softened_log_odds,
    f"{PATCH_ODDS}, half of the anchors": functools.partial(with_half_of_the_anchors, patch_log_odds),
    "OT margin, half of the anchors": functools.partial(
        with_half_of_the_anchors, functools.partial(transport_score, name="margin", sign="negative")
    ),
}
"""name -> score of pictures and of their patches"""
