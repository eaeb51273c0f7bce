"""Thresholds keep their promises over redraws; and the table would show it if they did not."""

from __future__ import annotations

import numpy as np
import pytest

from guardalign.micro import proof_calibration
from guardalign.micro.proof_calibration import CONFIDENCE, TARGET, realised_rates, realised_table, redraw_table

SCORES = np.random.default_rng(3).normal(size=5_000)


@pytest.mark.parametrize("drawn", [100, 300])
def test_the_mean_form_keeps_its_mean(drawn: int) -> None:
    rates = realised_rates(SCORES, drawn, None)
    assert rates.mean() <= TARGET + 3 * rates.std() / len(rates) ** 0.5
    assert (rates > TARGET).mean() > 0.2, "on average, not in every draw"


@pytest.mark.parametrize("drawn", [100, 300])
def test_the_confidence_form_is_rarely_exceeded(drawn: int) -> None:
    exceeded = (realised_rates(SCORES, drawn, CONFIDENCE) > TARGET).mean()
    assert exceeded <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


def test_a_threshold_one_place_too_high_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = redraw_table("taught", SCORES)
    right = proof_calibration.conformal_threshold

    def careless(scores: list[float], alpha: float, confidence: float | None) -> object:
        return right(scores, 1.5 * alpha, confidence)

    monkeypatch.setattr(proof_calibration, "conformal_threshold", careless)
    wrong = redraw_table("taught", SCORES)
    for row, other in zip(honest.rows, wrong.rows, strict=True):
        assert row.cells[0].value is not None and other.cells[0].value is not None
        assert row.cells[0].value <= TARGET + 0.005 and other.cells[0].value > row.cells[0].value + 0.01


def test_a_threshold_is_held_against_fresh_scenes_by_style() -> None:
    found = realised_table("taught", SCORES[:1000], {"plain": SCORES[1000:], "shifted": SCORES[1000:] - 5.0})
    plain, shifted = (found.cell("mean", style).value or 0.0 for style in ("plain", "shifted"))
    assert plain == pytest.approx(TARGET, abs=0.025) and shifted > 0.9
    assert (found.cell(f"confidence {CONFIDENCE:g}", "plain").value or 0.0) < plain


def test_rates_are_counted_on_scenes_that_were_not_drawn() -> None:
    """Of two scores one is drawn: nothing lies strictly below the lower, everything left below the higher."""
    with_two = realised_rates(np.array([0.0] + [1.0] * 19), 19, None)
    assert set(with_two) <= {0.0, 1.0} and 0 < with_two.mean() < 0.2
