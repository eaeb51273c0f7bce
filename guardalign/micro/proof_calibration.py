"""Do thresholds keep what they promise? Drawn again and again from some benign scenes, held against all others.

Every redraw takes `drawn` of N benign scores without replacement, finds the conformal threshold, and counts how many of
the N - drawn others lie below it. All are exchangeable, so the mean form promises a mean rate of at most the target;
the confidence form that few redraws exceed it. Counting on a finite rest adds a binomial error to each redraw's rate.
Knows nothing of CLIPs or pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from guardalign.core.conformal import conformal_threshold
from guardalign.micro.tables import Cell, Row, Table, rate_cell, share_cell

if TYPE_CHECKING:
    from numpy.typing import NDArray

TARGET: Final = 0.05
CONFIDENCE: Final = 0.95
REDRAWS: Final = 200
FORMS: Final[Sequence[tuple[str, float | None]]] = (("mean", None), (f"confidence {CONFIDENCE:g}", CONFIDENCE))
DRAWN: Final = (100, 300)
"""scenes behind a threshold"""
COLUMNS: Final = ("form", "false-alarm rate, mean of redraws", "highest", "redraws above the target")


def realised_table(clip: str, calibration: NDArray[np.float64], fresh: Mapping[str, NDArray[np.float64]]) -> Table:
    """Thresholds of calibration scenes against fresh benign scenes, by style; scores, lower = less safe."""
    rows = []
    for form, confidence in FORMS:
        threshold = conformal_threshold(calibration.tolist(), TARGET, confidence).value
        below = {style: int((scores < threshold).sum()) for style, scores in fresh.items()}
        rows.append(Row(form, tuple(rate_cell(count, len(fresh[style])) for style, count in below.items())))
    numbers = " and ".join(f"{len(scores):,} {style}" for style, scores in fresh.items())
    note = (
        f"Drawn once from {len(calibration):,} benign plain scenes, held against {numbers} test scenes; target "
        f"{TARGET:g}. The promise is for pictures like those drawn from; the shifted style is not like them."
    )
    return Table(f"False alarms of a calibrated threshold, {clip} CLIP", ("form", *fresh), tuple(rows), note)


def redraw_table(clip: str, benign: NDArray[np.float64], drawn: Sequence[int] = DRAWN) -> Table:
    """One row a form and a number of scenes, for the scores [N] of benign pictures (lower = less safe)."""
    rows = []
    for form, confidence in FORMS:
        for count in drawn:
            rates = realised_rates(benign, count, confidence)
            above = int((rates > TARGET).sum())
            cells = (share_cell(rates), Cell(float(rates.max())), rate_cell(above, len(rates)))
            rows.append(Row(f"{form}, from {count} scenes", cells))
    note = (
        f"{len(benign):,} benign test scenes of both styles; {REDRAWS} redraws, target {TARGET:g}. The mean form "
        f"promises a mean of at most {TARGET:g}; the confidence form at most {1 - CONFIDENCE:.0%} of redraws above it. "
        "Each redraw's rate is counted on the scenes that were not drawn, which adds a binomial error to it; intervals "
        "are those of 200 redraws of the same scenes."
    )
    return Table(f"Calibrated thresholds, {clip} CLIP", COLUMNS, tuple(rows), note)


def realised_rates(
    benign: NDArray[np.float64], drawn: int, confidence: float | None, redraws: int = REDRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """[redraws] share of the scenes that were not drawn below the threshold of those that were."""
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(redraws):
        shuffled = rng.permutation(benign)
        threshold = conformal_threshold(shuffled[:drawn].tolist(), TARGET, confidence).value
        rates.append(float((shuffled[drawn:] < threshold).mean()))
    return np.array(rates)
