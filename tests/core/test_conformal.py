"""Split-conformal thresholds: the two guarantees as theorems, exactly and by repeated draws, ties included."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom, kstest, norm

from guardalign.core.conformal import conformal_threshold, order_statistic, samples_needed
from guardalign.errors import ConfigError, InputError

RATES = st.integers(1, 999).map(lambda thousandths: thousandths / 1000)
REDRAWS = 200
SURE = 3.0
"""Standard errors of binomial noise that the redraws may stray."""


def mean_rate_over_orders(scores: tuple[float, ...], alpha: float) -> Fraction:
    """How often each of n + 1 scores is flagged by the threshold of the others, each order being equally likely."""
    flagged = sum(
        scores[i] < conformal_threshold(scores[:i] + scores[i + 1 :], alpha).value for i in range(len(scores))
    )
    return Fraction(flagged, len(scores))


@given(st.lists(st.integers(0, 6).map(float), min_size=3, max_size=40), RATES)
def test_the_mean_rate_never_exceeds_the_target_whatever_the_ties(scores: list[float], alpha: float) -> None:
    if len(scores) - 1 < samples_needed(alpha):
        return
    assert mean_rate_over_orders(tuple(scores), alpha) <= Fraction(repr(alpha))


@given(st.integers(2, 60), RATES)
def test_without_ties_the_mean_rate_is_k_of_n_plus_1(n: int, alpha: float) -> None:
    if n < samples_needed(alpha):
        return
    scores = tuple(float(i * 7 % 61) for i in range(n + 1))
    found = conformal_threshold(scores[:n], alpha)
    assert mean_rate_over_orders(scores, alpha) == Fraction(found.order, n + 1) <= Fraction(repr(alpha))
    assert found.mean_rate == pytest.approx(found.order / (n + 1))
    assert Fraction(found.order + 1, n + 1) > Fraction(repr(alpha)), "the next order statistic would do, too"


@given(st.integers(1, 400), RATES, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_confident_order_is_the_largest_that_scipys_beta_allows(n: int, alpha: float, confidence: float) -> None:
    """Brute force over all order statistics; the same through the binomial law of the scores below alpha's quantile."""
    k = order_statistic(n, alpha, confidence)
    exceeded = [beta.sf(alpha, j, n + 1 - j) for j in range(1, n + 1)]
    assert [binom.cdf(j - 1, n, alpha) for j in range(1, n + 1)] == pytest.approx(exceeded, abs=1e-9)
    allowed = [j for j in range(1, n + 1) if exceeded[j - 1] <= 1 - confidence + 1e-12]
    assert k == max(allowed, default=0)


@given(st.integers(1, 400), RATES, st.sampled_from([0.5, 0.9, 0.95]))
def test_more_confidence_and_lower_rates_never_raise_the_threshold(n: int, alpha: float, confidence: float) -> None:
    assert order_statistic(n, alpha, 0.99) <= order_statistic(n, alpha, confidence)
    assert order_statistic(n, alpha / 2) <= order_statistic(n, alpha)


@given(RATES, st.sampled_from([None, 0.5, 0.9, 0.95, 0.99]))
def test_the_samples_needed_are_the_fewest_that_do(alpha: float, confidence: float | None) -> None:
    n = samples_needed(alpha, confidence)
    assert order_statistic(n, alpha, confidence) >= 1
    assert n == 1 or order_statistic(n - 1, alpha, confidence) == 0


def test_the_numbers_of_the_textbook() -> None:
    """Wilks (1941): 59 samples for a one-sided 95 % / 95 % bound, 299 for 99 % / 95 %."""
    assert (samples_needed(0.05, 0.95), samples_needed(0.01, 0.95)) == (59, 299)
    assert (samples_needed(0.05), samples_needed(0.01)) == (19, 99)


def test_a_rate_means_the_decimal_that_was_written() -> None:
    assert math.floor(100 * 0.29) == 28
    assert order_statistic(99, 0.29) == 29


EDGES = (1e-9, 1 - 2**-53, 0.5, 5e-324, 2**-53)


@pytest.mark.parametrize("alpha", [edge for edge in EDGES if edge >= 1e-9])
@pytest.mark.parametrize("confidence", [None, *EDGES])
def test_the_fewest_samples_are_found_at_the_edges_at_once(alpha: float, confidence: float | None) -> None:
    """Counting up to them one by one would take a thousand million steps."""
    n = samples_needed(alpha, confidence)
    assert order_statistic(n, alpha, confidence) >= 1
    assert n == 1 or order_statistic(n - 1, alpha, confidence) == 0


@given(st.floats(), st.none() | st.floats())
def test_every_float_is_a_rate_or_one_sentence(alpha: float, confidence: float | None) -> None:
    try:
        n = samples_needed(alpha, confidence)
    except ConfigError as error:
        assert "between 0 and 1" in str(error)
    else:
        assert order_statistic(n, alpha, confidence) >= 1


@pytest.mark.parametrize("ties", [False, True], ids=["continuous", "ties"])
@pytest.mark.parametrize("confidence", [None, 0.95])
def test_redraws_keep_the_promise(confidence: float | None, ties: bool) -> None:
    """200 redraws of 300 normal scores, or of such scores rounded to tenths; the realised rates are exact."""
    alpha, generator = 0.05, np.random.default_rng(5)
    draws = generator.standard_normal((REDRAWS, 300)).round(1 if ties else 15)
    thresholds = [conformal_threshold(scores.tolist(), alpha, confidence).value for scores in draws]
    rates = norm.cdf(np.array(thresholds) - (0.05 if ties else 0.0))
    if confidence is None:
        assert rates.mean() <= alpha + SURE * rates.std() / math.sqrt(REDRAWS)
        assert ties or rates.mean() >= alpha - SURE * rates.std() / math.sqrt(REDRAWS), "needlessly low"
        assert (rates > alpha).mean() > 0.1, "single draws do exceed the target: the mean form promises the mean only"
    else:
        exceeded, allowed = int((rates > alpha).sum()), 1 - confidence
        assert exceeded <= REDRAWS * allowed + SURE * math.sqrt(REDRAWS * allowed * confidence)
        assert ties or rates.mean() >= alpha / 2, "needlessly low"


@pytest.mark.parametrize("confidence", [None, 0.9])
def test_the_realised_rate_follows_the_beta_law(confidence: float | None) -> None:
    """Uniform scores: the threshold is the realised rate, and its law is Beta(k, n + 1 - k)."""
    generator = np.random.default_rng(3)
    drawn = [conformal_threshold(generator.random(80).tolist(), 0.1, confidence) for _ in range(2_000)]
    (k,) = {found.order for found in drawn}
    assert kstest([found.value for found in drawn], beta(k, 81 - k).cdf).pvalue > 1e-4


def test_the_threshold_is_one_of_the_scores_whatever_their_order() -> None:
    scores = [0.5, -1.0, 2.0, 0.25, 0.75, 3.0, 1.0]
    found = {conformal_threshold(list(order), 0.3) for order in itertools.permutations(scores)}
    assert [(one.value, one.order, one.num_scores) for one in found] == [(0.25, 2, 7)]


@pytest.mark.parametrize(("confidence", "needed"), [(None, "19"), (0.95, "59")])
def test_too_few_scores_say_how_many_are_needed(confidence: float | None, needed: str) -> None:
    with pytest.raises(InputError, match=f"at least {needed} are needed"):
        conformal_threshold([0.0] * (int(needed) - 1), 0.05, confidence)
    assert conformal_threshold([0.0] * int(needed), 0.05, confidence).order == 1


def test_what_is_no_number_or_no_rate_is_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        conformal_threshold([0.0, float("nan")], 0.5)
    with pytest.raises(InputError, match="2 of 3 scores are not finite"):
        conformal_threshold([0.0, math.inf, -math.inf], 0.5)
    for alpha, confidence in ((0.0, None), (1.0, None), (float("nan"), None), (0.1, 0.0), (0.1, 1.0)):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            order_statistic(10, alpha, confidence)
