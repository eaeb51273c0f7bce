"""Rates, AUROCs and their intervals; ROC curves; Pareto fronts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, mannwhitneyu

from guardalign.core.statistics import (
    Z_95,
    auroc,
    compare_aurocs,
    newcombe_interval,
    paired_difference,
    pareto_front,
    roc_curve,
    wilson_interval,
)

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=30)
"""Few distinct values: most samples have ties."""
REPEATS = 400


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 500))
def test_paired_differences_are_antisymmetric_and_hold_their_value(first: int, second: int, alike: int) -> None:
    pairs = first + second + alike + 1
    found, turned = paired_difference(first, second, pairs), paired_difference(second, first, pairs)
    assert found.value == pytest.approx((first - second) / pairs) and found.p_value == pytest.approx(turned.p_value)
    assert found.low == pytest.approx(-turned.high) and -1 <= found.low < found.high <= 1
    assert found.p_value == pytest.approx(binomtest(first, first + second).pvalue if first + second else 1.0)


@pytest.mark.parametrize("rates", [(0.02, 0.0), (0.05, 0.05), (0.3, 0.1)])
def test_paired_intervals_hold_the_truth_in_nineteen_of_twenty(rates: tuple[float, float]) -> None:
    rng = np.random.default_rng(1)
    drawn = rng.multinomial(200, [*rates, 1 - sum(rates)], size=2000)
    truth = rates[0] - rates[1]
    held = np.mean([found.low <= truth <= found.high for found in (paired_difference(b, c, 200) for b, c, _ in drawn)])
    assert 0.9 <= held <= 0.99


@given(st.integers(1, 500), st.data())
def test_wilson_equals_scipys(trials: int, draw: st.DataObject) -> None:
    successes = draw.draw(st.integers(0, trials))
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_no_trials_tell_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(SCORES, SCORES)
def test_the_auroc_is_mann_whitneys_u_over_all_pairs(unsafe: list[float], benign: list[float]) -> None:
    u = mannwhitneyu(benign, unsafe, method="asymptotic").statistic
    found = auroc(unsafe, benign)
    assert found.value == pytest.approx(u / (len(unsafe) * len(benign)))
    assert (found.num_unsafe, found.num_benign) == (len(unsafe), len(benign))


def delong_by_hand(first: list[list[float]], second: list[list[float]]) -> np.ndarray:
    """DeLong's 2 x 2 covariance of two AUROCs, to the letter: every pair compared, S10 and S01 by their sums."""
    (m, n), values, v10, v01 = (len(first[0]), len(first[1])), [], [], []
    for unsafe, benign in (first, second):
        psi = np.array([[1.0 if x < y else 0.5 if x == y else 0.0 for y in benign] for x in unsafe])
        values.append(psi.mean())
        v10.append(psi.mean(1))
        v01.append(psi.mean(0))
    s10 = [[sum((a - values[i]) * (b - values[j]) for a, b in zip(v10[i], v10[j], strict=True)) / (m - 1)
            for j in (0, 1)] for i in (0, 1)]  # fmt: skip
    s01 = [[sum((a - values[i]) * (b - values[j]) for a, b in zip(v01[i], v01[j], strict=True)) / (n - 1)
            for j in (0, 1)] for i in (0, 1)]  # fmt: skip
    return np.array(s10) / m + np.array(s01) / n


@given(SCORES, SCORES)
def test_the_interval_is_delongs_on_the_logit_scale(unsafe: list[float], benign: list[float]) -> None:
    found = auroc(unsafe, benign)
    variance = delong_by_hand([unsafe, benign], [unsafe, benign])[0, 0]
    if variance < 1e-12 or found.value in (0.0, 1.0):
        assert (found.low, found.high) == newcombe_interval(found.value, len(unsafe), len(benign))
        return
    for end, sign in ((found.low, -1), (found.high, 1)):
        logit = math.log(found.value) - math.log1p(-found.value)
        error = math.sqrt(variance) / (found.value * (1 - found.value))
        assert math.log(end) - math.log1p(-end) == pytest.approx(logit + sign * Z_95 * error, rel=1e-6, abs=1e-6)


@given(st.data(), st.integers(2, 20), st.integers(2, 20))
def test_the_paired_comparison_is_delongs(draw: st.DataObject, m: int, n: int) -> None:
    values = st.integers(-4, 4).map(float)
    first, second = ([draw.draw(st.lists(values, min_size=size, max_size=size)) for size in (m, n)] for _ in range(2))
    found = compare_aurocs((first[0], first[1]), (second[0], second[1]))
    covariance = delong_by_hand(first, second)
    variance = max(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1], 0.0)
    assert found.value == pytest.approx(auroc(*first).value - auroc(*second).value)
    assert found.high - found.low == pytest.approx(2 * Z_95 * math.sqrt(variance), abs=1e-6)
    if variance > 1e-9:
        assert found.p_value == pytest.approx(math.erfc(abs(found.value) / math.sqrt(2 * variance)), abs=1e-6)


@given(SCORES, SCORES)
def test_a_score_does_not_differ_from_itself_nor_from_its_ranks(unsafe: list[float], benign: list[float]) -> None:
    stretched = [value**3 for value in unsafe], [value**3 for value in benign]
    found = compare_aurocs((unsafe, benign), stretched)
    assert (found.value, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert auroc(*stretched) == auroc(unsafe, benign)


@given(SCORES, SCORES)
def test_turned_scores_turn_the_auroc_and_its_interval(unsafe: list[float], benign: list[float]) -> None:
    found, turned = auroc(unsafe, benign), auroc([-x for x in unsafe], [-x for x in benign])
    assert (turned.value, turned.low, turned.high) == pytest.approx((1 - found.value, 1 - found.high, 1 - found.low))
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high, "an interval without a width claims certainty"


def test_newcombes_interval_equals_the_published_example() -> None:
    """The data and interval of the R package SingleCaseES (NAP, 95 %), which uses Newcombe's method 5."""
    benign, unsafe = [28, 25, 24, 27, 30, 30, 29], [20, 20, 26, 25, 22, 23]
    value = auroc(unsafe, benign).value
    assert value == pytest.approx(0.9166666666666666)
    assert newcombe_interval(value, 6, 7) == pytest.approx((0.5973193600384168, 0.9859976893703788), abs=1e-9)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_the_interval_covers_the_truth_nineteen_times_in_twenty(shift: float) -> None:
    """Normal scores that lie `shift` apart: the true AUROC is Phi(shift / sqrt 2)."""
    generator = np.random.default_rng(1)
    truth = 0.5 * math.erfc(-shift / 2)
    drawn = [auroc(generator.standard_normal(40) - shift, generator.standard_normal(60)) for _ in range(REPEATS)]
    covered = sum(one.low <= truth <= one.high for one in drawn) / REPEATS
    noise = 3 * math.sqrt(0.95 * 0.05 / REPEATS)
    assert abs(covered - 0.95) <= noise


def test_a_paired_comparison_of_equals_rejects_one_time_in_twenty() -> None:
    """Two noisy readings of the same samples are equally good, and far from independent."""
    generator = np.random.default_rng(2)

    def readings(shift: float, size: int) -> np.ndarray:
        return generator.standard_normal(size) - shift + 0.5 * generator.standard_normal((2, size))

    drawn = []
    for _ in range(REPEATS):
        (u1, u2), (b1, b2) = readings(1.0, 60), readings(0.0, 60)
        drawn.append(compare_aurocs((u1, b1), (u2, b2)).p_value < 0.05)
    assert abs(np.mean(drawn) - 0.05) <= 3 * math.sqrt(0.95 * 0.05 / REPEATS)


@given(SCORES, SCORES)
def test_the_area_under_the_curve_is_the_auroc(unsafe: list[float], benign: list[float]) -> None:
    points = roc_curve(unsafe, benign)
    ends = [(p.false_alarm_rate, p.detection_rate) for p in points]
    assert ends[0] == (0.0, 0.0) and ends[-1] == (1.0, 1.0) and ends == sorted(ends)
    area = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in itertools.pairwise(ends))
    assert area == pytest.approx(auroc(unsafe, benign).value)


@given(SCORES, SCORES)
def test_a_point_of_the_curve_is_what_its_threshold_flags(unsafe: list[float], benign: list[float]) -> None:
    for point in roc_curve(unsafe, benign):
        assert point.false_alarm_rate == pytest.approx(np.mean([score < point.threshold for score in benign]))
        assert point.detection_rate == pytest.approx(np.mean([score < point.threshold for score in unsafe]))


@given(SCORES, SCORES)
def test_no_three_neighbours_of_the_curve_lie_on_a_line(unsafe: list[float], benign: list[float]) -> None:
    ends = [(p.false_alarm_rate, p.detection_rate) for p in roc_curve(unsafe, benign)]
    for (x1, y1), (x2, y2), (x3, y3) in zip(ends, ends[1:], ends[2:], strict=False):
        assert (x2 - x1) * (y3 - y2) != pytest.approx((x3 - x2) * (y2 - y1), abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)), max_size=25))
def test_the_front_is_what_nothing_beats_and_beats_the_rest(points: list[tuple[float, float]]) -> None:
    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] <= other[0] and one[1] <= other[1] and one != other

    front = pareto_front(points)
    assert front == sorted(front) and (bool(front) or not points)
    assert not any(beats(points[i], points[j]) for i in range(len(points)) for j in front)
    for position, point in enumerate(points):
        assert position in front or any(beats(points[j], point) for j in front)
