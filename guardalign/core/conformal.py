"""Split-conformal thresholds: how low a score may lie before it is called unsafe, with a bound on false alarms.

Scores of n benign pictures, and of one more, are taken to be exchangeable; a picture is flagged when its score lies
strictly below the threshold. The threshold is the k-th lowest of the n scores. The false-alarm rate that this gives is
itself random, through the n pictures that happened to be drawn:

    mean form          E[rate] <= k / (n + 1)                              k = floor((n + 1) alpha)
    confidence form    P[rate > alpha] <= P[Beta(k, n + 1 - k) > alpha]    k = the largest with that <= 1 - confidence

With continuous scores both hold with equality: the rate is the k-th lowest of n uniform draws, whose law is
Beta(k, n + 1 - k). With ties the rate can only be lower: a score s = F^-(u) lies strictly below s_k = F^-(u_k) only if
u < u_k. Sources: Vovk, Gammerman and Shafer (2005), Algorithmic Learning in a Random World; Vovk (2012), Conditional
validity of inductive conformal predictors, prop. 2a; GuardAlign has a fixed number (0.42) in this place.

Knows nothing of pictures, labels or files. Legend: n scores, k order statistic counted from 1, alpha the target rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from scipy.special import betainc, betaincc

from guardalign.errors import InputError, require

LEAST_RATE = 1e-9
"""The lowest target rate; even that one asks for a thousand million pictures."""
SLACK = 1e-12
"""Relative rounding of a probability that counts as equality."""


@dataclass(frozen=True)
class ConformalThreshold:
    """A threshold and what it rests on."""

    value: float
    """scores strictly below it are flagged; one of the scores it was drawn from"""
    order: int
    """k: it is the k-th lowest of the scores, counted from 1"""
    num_scores: int
    """n: the scores it was drawn from"""

    @property
    def mean_rate(self) -> float:
        """k / (n + 1), the largest mean false-alarm rate over draws of the n scores."""
        return self.order / (self.num_scores + 1)


def conformal_threshold(scores: Sequence[float], alpha: float, confidence: float | None = None) -> ConformalThreshold:
    """The highest threshold that keeps the false-alarm rate at `alpha`: on average, or with this confidence.

    `InputError` when there are too few scores for any, or one that is not finite.
    """
    k, n = order_statistic(len(scores), alpha, confidence), len(scores)
    odd = sum(not math.isfinite(score) for score in scores)
    if odd:
        raise InputError(f"{odd:,} of {n:,} scores are not finite (NaN or infinite): no threshold can be drawn of them")
    if k == 0:
        form = "" if confidence is None else f" at confidence {confidence:g}"
        raise InputError(
            f"{n:,} scores are too few for a false-alarm rate of {alpha:g}{form}: "
            f"at least {samples_needed(alpha, confidence):,} are needed"
        )
    return ConformalThreshold(float(sorted(scores)[k - 1]), k, n)


def order_statistic(n: int, alpha: float, confidence: float | None = None) -> int:
    """k of the mean form, or of the confidence form; 0 when n is too small for any."""
    _require_fractions(alpha, confidence)
    if confidence is None:
        return math.floor((n + 1) * _as_written(alpha))
    low, high = 0, n  # P[Beta(k, n + 1 - k) <= alpha] falls as k rises
    while low < high:
        k = (low + high + 1) // 2
        low, high = (k, high) if _is_sure(k, n, alpha, confidence) else (low, k - 1)
    return low


def _is_sure(k: int, n: int, alpha: float, confidence: float) -> bool:
    """P[Beta(k, n + 1 - k) <= alpha] >= confidence, by the smaller tail: close to 1 a float tells few numbers apart."""
    if confidence < 0.5:
        return bool(betainc(k, n + 1 - k, alpha) >= confidence * (1 - SLACK))
    return bool(betaincc(k, n + 1 - k, alpha) <= (1 - confidence) * (1 + SLACK))


def samples_needed(alpha: float, confidence: float | None = None) -> int:
    """The smallest n with an order statistic: ceil(1 / alpha) - 1, or ln(1 - confidence) / ln(1 - alpha) rounded up."""
    _require_fractions(alpha, confidence)
    if confidence is None:
        return math.ceil(1 / _as_written(alpha)) - 1
    n = max(1, math.floor(math.log1p(-confidence) / math.log1p(-alpha)) - 1)
    while order_statistic(n, alpha, confidence) == 0:
        n += 1
    return n


def _as_written(alpha: float) -> Fraction:
    """0.29 means 29/100, although its nearest binary number lies below it: 100 * 0.29 must not round down to 28."""
    return Fraction(repr(float(alpha)))


def _require_fractions(alpha: float, confidence: float | None) -> None:
    require(
        LEAST_RATE <= alpha < 1,
        f"the false-alarm rate must lie between 0 and 1, and be {LEAST_RATE:g} or more, not {alpha}",
    )
    require(confidence is None or 0 < confidence < 1, f"the confidence must lie between 0 and 1, not {confidence}")
