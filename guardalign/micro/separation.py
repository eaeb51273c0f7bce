"""How far apart safe and unsafe cells' scores lie: the divergence of their histograms, as the paper reports it.

    KL = sum_i p_i ln(p_i / q_i),   p unsafe, q safe cells' shares of bin i     [nats]

The paper (12.49 for transport, 1.12 for cosine) says neither bins nor smoothing. Both decide the figure: wherever
unsafe scores fill a bin that no safe score reaches, q_i is the smoothing alone. So it stands here under two smoothings
and two widths, next to the AUROC of cells, which depends on none of them. Intervals: scenes drawn again, since the
cells of one scene are not independent. Knows nothing of models.

Legend: S scenes, I bins, R redraws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from guardalign.core.statistics import Z_95
from guardalign.micro.proof_scenes import Scenes
from guardalign.micro.proof_scores import PATCH_COSINE, PATCH_ODDS, Scored, granted, transport_name
from guardalign.micro.tables import Cell, Row, Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Counts = NDArray[np.float64]

COMPARED: Final = (
    transport_name("printed", "printed"),
    transport_name("printed"),
    transport_name("min_cost"),
    transport_name("margin"),
    PATCH_COSINE,
    PATCH_ODDS,
)
FLOOR: Final = 1e-10
NUM_REDRAWS: Final = 200
NUM_RANKS: Final = 2000
"""bins of equal content for the AUROC: ties within one count half"""


def add_one(counts: Counts) -> Counts:
    """(n_i + 1) / (n + I)."""
    return (counts + 1) / (counts + 1).sum(-1, keepdims=True)


def floored(counts: Counts) -> Counts:
    """n_i / n + 1e-10."""
    return counts / counts.sum(-1, keepdims=True) + FLOOR


def divergence(unsafe: Counts, safe: Counts, smoothed: Callable[[Counts], Counts]) -> Counts:
    """KL of histograms [..., I] -> [...]; in nats, 0 for equal ones."""
    p, q = smoothed(unsafe), smoothed(safe)
    return np.asarray((p * np.log(p / q)).sum(-1))


def binned_auroc(unsafe: Counts, safe: Counts) -> Counts:
    """P(unsafe bin < safe bin) + P(same bin) / 2 of histograms [..., I] -> [...]."""
    p, q = (counts / counts.sum(-1, keepdims=True) for counts in (unsafe, safe))
    return np.asarray((q * (p.cumsum(-1) - p / 2)).sum(-1))


Measure = Callable[["Counts", "Counts"], "Counts"]
MEASURES: Final[dict[str, tuple[int, Measure]]] = {
    "KL, 50 bins, add one": (50, lambda p, q: divergence(p, q, add_one)),
    "KL, 50 bins, floor 1e-10": (50, lambda p, q: divergence(p, q, floored)),
    "KL, 200 bins, floor 1e-10": (200, lambda p, q: divergence(p, q, floored)),
    "AUROC of cells": (NUM_RANKS, binned_auroc),
}
"""column -> number of bins, and what is made of two histograms"""


def separation_table(clip: str, scored: Mapping[str, Scored], scenes: Scenes) -> Table:
    """Unsafe scenes' unsafe cells against all cells of benign scenes, for the scores in `COMPARED`."""
    rows = []
    for name in COMPARED:
        patches = scored[name].patches
        assert patches is not None, f"{name} has no cells"
        cells = tuple(_cell(patches.double().numpy(), scenes, *measure) for measure in MEASURES.values())
        rows.append(Row(name, cells))
    note = (
        f"{int(scenes.shown.sum())} scenes with unsafe cells, {int((~scenes.unsafe).sum())} benign scenes, plain "
        "style. KL(unsafe || safe) of histograms over equal bins between the lowest and the highest score [nats]. "
        "The paper reports 12.49 for transport and 1.12 for cosine without saying how: as the columns show, smoothing "
        "and bins decide the figure, and so does any monotone change of the score; the AUROC depends on none of them. "
        f"Intervals: 1.96 standard deviations over {NUM_REDRAWS} redraws of scenes. {granted(clip)}"
    )
    return Table(f"Separation of safe and unsafe cells, {clip} CLIP", ("score", *MEASURES), tuple(rows), note)


def _cell(score_NG: Counts, scenes: Scenes, bins: int, measure: Measure) -> Cell:
    """The measure ± 1.96 of its standard deviations over redraws of the scenes, not below 0."""
    place = _ranks(score_NG, bins) if measure is binned_auroc else _bins(score_NG, bins)
    unsafe = _histograms(place[scenes.shown], scenes.unsafe_cells[scenes.shown], bins)
    safe = _histograms(place[~scenes.unsafe], np.ones_like(scenes.unsafe_cells[~scenes.unsafe]), bins)
    rng = np.random.default_rng(0)
    value = float(measure(unsafe.sum(0), safe.sum(0)))
    spread = Z_95 * float(measure(_redrawn(unsafe, rng), _redrawn(safe, rng)).std(ddof=1))
    return Cell(value, max(0.0, value - spread), value + spread)


def _bins(score_NG: Counts, bins: int) -> NDArray[np.int64]:
    low, high = score_NG.min(), score_NG.max()
    return np.minimum((score_NG - low) / max(high - low, np.finfo(float).tiny) * bins, bins - 1).astype(np.int64)


def _ranks(score_NG: Counts, bins: int) -> NDArray[np.int64]:
    return np.quantile(score_NG, np.linspace(0, 1, bins + 1)[1:-1]).searchsorted(score_NG, "right")


def _histograms(place_SG: NDArray[np.int64], counted_SG: NDArray[np.bool_], bins: int) -> Counts:
    """Of each scene, [S, I]."""
    scene_SG = np.broadcast_to(np.arange(len(place_SG))[:, None], place_SG.shape)
    flat = (scene_SG * bins + place_SG)[counted_SG]
    return np.bincount(flat, minlength=len(place_SG) * bins).reshape(-1, bins).astype(np.float64)


def _redrawn(counts_SI: Counts, rng: np.random.Generator) -> Counts:
    """Histograms of as many scenes, drawn with replacement; [R, I]."""
    number = len(counts_SI)
    times_RS: Any = rng.multinomial(number, np.full(number, 1 / number), NUM_REDRAWS)
    return np.asarray(times_RS.astype(np.float64) @ counts_SI)
