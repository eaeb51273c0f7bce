"""The detecting half of the proof: what every score finds, where it points, and what it costs, on held-out scenes.

    1  AUROC of "is an unsafe object in the scene?", by number of objects, per style
    2  pointing of the lowest cell, and masks at thresholds chosen on validation scenes, per style
    3  patch layouts: tokens, values, grids of crops
    4  rates and masked shares against the threshold
    5  thresholds drawn again and again (proof_calibration.py)
    6  attacks (proof_attacks.py)
    7  separation of safe and unsafe cells' scores, as the paper reports it (separation.py)

Notes say what the CLIP was granted by construction. Knows nothing of training, and chooses nothing.
Legend: N scenes, G cells.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from guardalign.config import ClipConfig
from guardalign.core.statistics import compare_aurocs
from guardalign.errors import ConfigError
from guardalign.micro import resolve_clip
from guardalign.micro.chosen import CHOSEN, mask_iou, read_thresholds
from guardalign.micro.proof_attacks import attack_table, attacked_sets
from guardalign.micro.proof_calibration import DRAWN, realised_table, redraw_table
from guardalign.micro.proof_scenes import LEAST_SHARE, Scenes, read_scenes
from guardalign.micro.proof_scores import (
    DEFAULT,
    PATCH_COSINE,
    PATCH_ODDS,
    SCORES,
    Scored,
    granted,
    see,
    transport_name,
)
from guardalign.micro.sample import PROOF
from guardalign.micro.separation import separation_table
from guardalign.micro.tables import NOTHING, Cell, Row, Table, auroc_cell, rate_cell, share_cell, with_note
from guardalign.micro.world import MOST_OBJECTS, PLAIN, SHIFTED
from guardalign.models.clip import PatchEncoder, PatchKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

LAYOUTS: Final[dict[str, tuple[PatchKind, tuple[int, int]]]] = {
    "tokens, 8 x 8": ("tokens", (1, 1)),
    "values, 8 x 8": ("values", (1, 1)),
    **{f"crops, {side} x {side}": ("grid", (side, side)) for side in (2, 3, 4, 6)},
}
LAYOUT_SCORES: Final = tuple(dict.fromkeys((DEFAULT, transport_name("min_cost"), PATCH_COSINE, PATCH_ODDS)))
PRINTED: Final = transport_name("printed", "printed")
PUBLISHED_THRESHOLD: Final = 0.42
"""GuardAlign's own, for its score as printed"""
NUM_THRESHOLDS: Final = 41
EACH: Final = 300
"""scenes of each label in the tables of layouts and attacks"""


def detection_tables(
    clips: Mapping[str, ClipConfig],
    proof: Path = PROOF,
    chosen: Path = CHOSEN,
    each: int = EACH,
    attacks: bool = True,
    calibration: Sequence[bytes] = (),
) -> list[Table]:
    """Every table, CLIP by CLIP; a CLIP's name must hold `taught` or `contrastive`, so that the notes are true.

    With attacks it draws scenes of the test series (the same that `proof` begins with) and needs the emoji font. With
    pictures of benign `calibration` scenes it holds their threshold against the test scenes. `each` scenes of each
    label are in the tables of layouts and attacks, all in the others.
    """
    thresholds = {name: read_thresholds(name, chosen) for name in clips if granted(name)}
    scenes = read_scenes(proof)
    sets = attacked_sets(each) if attacks else {}
    tables: list[Table] = []
    for name, config in clips.items():
        encoder = PatchEncoder.load(resolve_clip(config))
        for table in _tables(name, encoder, scenes, thresholds[name], each, sets, calibration):
            log.info("measured: %s", table.title)
            tables.append(table)
    return tables


def _tables(
    clip: str,
    encoder: PatchEncoder,
    scenes: Scenes,
    thresholds: Mapping[str, float],
    each: int,
    sets: Mapping[str, Scenes],
    calibration: Sequence[bytes],
) -> Iterator[Table]:
    plain, shifted = (scenes.of_style(style.name) for style in (PLAIN, SHIFTED))
    scored = scored_by_all(encoder, plain)
    scored_shifted = scored_by_all(encoder, shifted)
    for style, some, found in ((PLAIN.name, plain, scored), (SHIFTED.name, shifted, scored_shifted)):
        yield auroc_table(clip, style, found, some)
        yield pointing_table(clip, style, found, some, thresholds)
    yield layout_table(clip, encoder, plain.first(each))
    yield threshold_table(clip, DEFAULT, scored[DEFAULT], plain)
    benign = {
        some.styles[0]: _image_scores(found[DEFAULT])[~some.unsafe]
        for some, found in ((plain, scored), (shifted, scored_shifted))
    }
    everything = np.concatenate(list(benign.values()))
    if len(everything) > max(DRAWN):
        yield with_note(redraw_table(clip, everything), granted(clip))
    if calibration:
        fresh = realised_table(clip, _image_scores(SCORES[DEFAULT](see(encoder, calibration))), benign)
        yield with_note(fresh, granted(clip))
    if sets:
        yield attack_table(clip, encoder, sets)
    yield separation_table(clip, scored, plain)


def scored_by_all(encoder: PatchEncoder, scenes: Scenes) -> dict[str, Scored]:
    """The scenes under every score; `ConfigError` unless the CLIP has the scenes' cells for its patches."""
    seen = see(encoder, scenes.pictures)
    cells, known = seen.patches.shape[1], scenes.unsafe_cells.shape[1]
    if cells != known:
        raise ConfigError(f"the CLIP has {cells} patches a scene; the proof's scenes are known in {known} cells")
    return {name: score(seen) for name, score in SCORES.items()}


def auroc_table(clip: str, style: str, scored: Mapping[str, Scored], scenes: Scenes) -> Table:
    """By number of objects, of all scenes, and how far above the best score without transport."""
    counts = range(1, MOST_OBJECTS + 1)
    columns = ("score", *map(str, counts), "all", f"all, minus {PATCH_ODDS}")
    reference = _image_scores(scored[PATCH_ODDS])
    rows = []
    for name, found in scored.items():
        score_N = _image_scores(found)
        above = NOTHING if name == PATCH_ODDS else _difference(score_N, reference, scenes.unsafe)
        rows.append(Row(name, (*_aurocs_by_number(score_N, scenes, counts), above)))
    note = (
        f"{_counted(scenes)}, {_called(style)}; columns are numbers of objects in the scene. AUROC with "
        "DeLong's 95 % interval, the difference by his paired comparison. A patch score's value for a scene is its "
        f"lowest patch. {granted(clip)}"
    )
    return Table(f"AUROC: is an unsafe object in the scene? {clip} CLIP, {style}", columns, tuple(rows), note)


def _aurocs_by_number(score_N: NDArray[np.float64], scenes: Scenes, counts: range) -> Iterator[Cell]:
    """For each number of objects, then for all scenes."""
    for some in (*(scenes.num_objects == number for number in counts), scenes.num_objects > 0):
        yield auroc_cell(score_N[some], scenes.unsafe[some])


def _difference(score_N: NDArray[np.float64], other_N: NDArray[np.float64], unsafe: NDArray[np.bool_]) -> Cell:
    first, second = ((each[unsafe], each[~unsafe]) for each in (score_N, other_N))
    found = compare_aurocs(first, second)
    return Cell(found.value, found.low, found.high)


def pointing_table(
    clip: str, style: str, scored: Mapping[str, Scored], scenes: Scenes, thresholds: Mapping[str, float]
) -> Table:
    """Does the lowest cell show the object, and how well does the mask fit it?"""
    cells = {name: found.patches.double().numpy() for name, found in scored.items() if found.patches is not None}
    rows = [Row(name, _pointing_row(score_NG, scenes, thresholds.get(name))) for name, score_NG in cells.items()]
    rows.append(Row(f"{PRINTED}, threshold as published", _pointing_row(cells[PRINTED], scenes, PUBLISHED_THRESHOLD)))
    chance = float(scenes.unsafe_cells[scenes.shown].mean(1).mean())
    rows.append(Row("chance: a random cell", (Cell(chance), *[NOTHING] * (len(MASK_COLUMNS) - 2))))
    hidden = int(scenes.unsafe.sum() - scenes.shown.sum())
    note = (
        f"{_counted(scenes)}, {_called(style)}. A cell is unsafe when at least {LEAST_SHARE:.0%} of its pixels are; "
        f"{hidden} unsafe scenes without such a cell are left out of pointing and IoU. pointing: the lowest cell is "
        "unsafe. Masked are the cells below a threshold that was chosen on validation scenes for the best IoU. Rates "
        f"with Wilson's 95 % interval, means with the normal one. {granted(clip)}"
    )
    return Table(f"Pointing and masks, {clip} CLIP, {style}", MASK_COLUMNS, tuple(rows), note)


MASK_COLUMNS: Final = (
    "score",
    "pointing",
    "mask IoU",
    "masked share, unsafe scenes",
    "masked share, benign scenes",
    "unsafe scenes flagged",
    "benign scenes flagged",
)


def _pointing_row(score_NG: NDArray[np.float64], scenes: Scenes, threshold: float | None) -> tuple[Cell, ...]:
    shown, unsafe = scenes.shown, scenes.unsafe
    hits = scenes.unsafe_cells[np.arange(len(scenes)), score_NG.argmin(1)][shown]
    pointing = rate_cell(int(hits.sum()), int(shown.sum()))
    if threshold is None:
        return (pointing, *[NOTHING] * (len(MASK_COLUMNS) - 2))
    masked_NG = score_NG < threshold
    fit = share_cell(mask_iou(masked_NG[shown], scenes.unsafe_cells[shown]))
    kinds = (unsafe, ~unsafe)
    return (pointing, fit, *(share_cell(masked_NG[kind].mean(1)) for kind in kinds), *_flagged(masked_NG, kinds))


def _flagged(masked_NG: NDArray[np.bool_], kinds: tuple[NDArray[np.bool_], ...]) -> Iterator[Cell]:
    """The share of scenes of each kind with a masked cell."""
    for kind in kinds:
        yield rate_cell(int(masked_NG[kind].any(1).sum()), int(kind.sum()))


def layout_table(clip: str, encoder: PatchEncoder, scenes: Scenes) -> Table:
    """What patches are: the last block's tokens, its value path, or crops that are encoded like pictures."""
    rows = []
    for name, (patches, crops) in LAYOUTS.items():
        seen = see(encoder, scenes.pictures, patches, crops)
        found = (_image_scores(SCORES[score](seen)) for score in LAYOUT_SCORES)
        rows.append(Row(name, tuple(auroc_cell(score_N, scenes.unsafe) for score_N in found)))
    note = f"{_counted(scenes)}, plain style. AUROC with DeLong's 95 % interval. {granted(clip)}"
    return Table(f"Patch layouts: AUROC, {clip} CLIP", ("patches", *LAYOUT_SCORES), tuple(rows), note)


def threshold_table(clip: str, name: str, scored: Scored, scenes: Scenes) -> Table:
    """Rates and masked shares at thresholds from the lowest to above the highest picture; drawn by curves.py."""
    assert scored.patches is not None, "the sweep masks patches"
    score_NG, image_N = scored.patches.double().numpy(), _image_scores(scored)
    kinds = (~scenes.unsafe, scenes.unsafe)
    rows = []
    for tau in np.linspace(image_N.min(), np.nextafter(image_N.max(), np.inf), NUM_THRESHOLDS):
        masked_NG = score_NG < tau
        cells = (*_flagged(masked_NG, kinds), *(share_cell(masked_NG[kind].mean(1)) for kind in kinds))
        rows.append(Row(f"{tau:.4f}", cells))
    masked = ("masked fraction, benign", "masked fraction, unsafe")
    note = (
        f"{_counted(scenes)}, plain style. A scene is flagged when a cell's score lies below the threshold; the masked "
        f"fraction is the share of such cells, mean over scenes. {granted(clip)}"
    )
    columns = ("threshold", "false-alarm rate", "detection rate", *masked)
    return Table(f"{name} against its threshold, {clip} CLIP", columns, tuple(rows), note)


def _image_scores(scored: Scored) -> NDArray[np.float64]:
    return np.asarray(scored.images.double().numpy())


def _counted(scenes: Scenes) -> str:
    return f"{int(scenes.unsafe.sum())} unsafe and {int((~scenes.unsafe).sum())} benign held-out scenes"


def _called(style: str) -> str:
    if style == PLAIN.name:
        return "drawn as in training"
    return "in rotations and hues that training never drew, half of their objects mirrored"
