"""Cross-modal attentive calibration: which attention scores are raised, by how much, and in which layers.

Legend: B rows of a batch, H heads, T calibrated query positions, R key positions of the safety prefix, L layers;
Z = s · q·k the plain score with s = 1/sqrt(d_k). GuardAlign, eqs. 13 and 14.

Knows nothing of models, caches or masks: `models/attention.py` adds these numbers to the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Form = Literal["gain", "printed"]
"""gain: positive scores grow by the factor 1 + gamma; printed: eq. 14 to the letter, quadratic in q·k"""


@dataclass(frozen=True)
class Calibration:
    """What is done to the scores, and where."""

    gamma: float
    """strength, 0 or above; 0 changes nothing"""
    form: Form
    """how a raised score depends on q·k"""
    layers: tuple[int, ...]
    """indices of the calibrated layers, ascending, counted from 0"""
    answer: bool
    """the queries that decode the answer are calibrated too, not the instruction's alone"""


def default_layers(num_layers: int) -> tuple[int, ...]:
    """The middle layers round(9L/32) .. round(14L/32), both included, halves up: 9..14 of 32, 2..3 of 6, 1..2 of 4."""
    first, last = ((2 * nth * num_layers + 32) // 64 for nth in (9, 14))
    return tuple(range(first, min(last, num_layers - 1) + 1))


def score_gain(scores_BHTR: Tensor, gamma: float | Tensor, form: Form, scaling: float) -> Tensor:
    """What is added to the plain scores Z of calibrated queries towards prefix keys, gamma · M ∘ Z, same shape.

    gamma is one number, or one a row, [B, 1, 1, 1].

    gain:     M = 1[q·k > 0],  so  gamma · max(0, Z)
    printed:  M = max(0, q·k), so  gamma · max(0, Z) · Z / s                       (GuardAlign, eqs. 13 and 14)

    Departs: `gain` gates with the sign where eq. 14 weighs with the unscaled product, whose size is in the tens.
    """
    raised = scores_BHTR.relu().mul_(gamma)
    return raised if form == "gain" else raised.mul_(scores_BHTR / scaling)
