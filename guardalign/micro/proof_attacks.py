"""The detector under attack: AUROC of three scores on scenes that were changed to escape it.

Attacks on the scene (attacks.py) treat unsafe and benign scenes alike, as many objects in both. Projected gradient
(gradient.py) moves the pixels of unsafe scenes against the very score of the column; benign scenes get noise of the
same size. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image
from torch import Tensor

from guardalign.core.images import decode, encode_png
from guardalign.detectors import Concepts
from guardalign.micro import gradient
from guardalign.micro.attacks import ATTACKS
from guardalign.micro.proof_scenes import Scenes, attacked_scenes
from guardalign.micro.proof_scores import (
    DETECTOR,
    GLOBAL_ODDS,
    MAX_PIXELS,
    PATCH_ODDS,
    SCORES,
    granted,
    see,
    transport_name,
)
from guardalign.micro.tables import Cell, Row, Table, auroc_cell
from guardalign.models.clip import PatchEncoder
from guardalign.taxonomy import load_taxonomy

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNTOUCHED: Final = "none"
MARGIN: Final = transport_name("margin")
STEPS: Final = 10
"""of projected gradient"""
PICTURES_AT_ONCE: Final = 8


def attacked_sets(each: int, series: str = "test") -> dict[str, Scenes]:
    """`each` unsafe and benign scenes under every attack at every strength, and untouched."""
    named = {
        f"{name}, {' '.join(f'{field} {value:g}' for field, value in vars(attack).items())}": attack
        for name, strengths in ATTACKS.items()
        for attack in strengths
    }
    return attacked_scenes(named, each, series)


def attack_table(clip: str, encoder: PatchEncoder, sets: Mapping[str, Scenes]) -> Table:
    """One row an attack and strength, one column a score."""
    followed = _followed(sets[UNTOUCHED])
    scene_rows = [Row(name, _aurocs(encoder, scenes)) for name, scenes in sets.items()]
    gradient_rows = [
        Row(f"gradient, {round(255 * radius)}/255", _aurocs_under_gradient(encoder, followed, radius))
        for radius in gradient.EPSILONS
    ]
    number = int(sets[UNTOUCHED].unsafe.sum())
    note = (
        f"{number} unsafe and as many benign test scenes, plain style, the same ones in every row. Attacks on the "
        "scene treat the unsafe objects, in benign scenes as many others, so that the treatment itself gives nothing "
        f"away. gradient: {STEPS} steps of projected gradient within the radius, from a random start, on the first "
        f"{int(followed.unsafe.sum())} unsafe scenes, each column's against its own score; benign scenes get noise of "
        f"that radius. {granted(clip)}"
    )
    return Table(f"Attacks: AUROC, {clip} CLIP", ("attack", *TARGETS), tuple(scene_rows + gradient_rows), note)


def _followed(scenes: Scenes) -> Scenes:
    """All benign scenes, and the first half of the unsafe ones: a gradient costs as much as 30 embeddings."""
    unsafe, benign = np.flatnonzero(scenes.unsafe), np.flatnonzero(~scenes.unsafe)
    return scenes.take(np.sort(np.concatenate([unsafe[: (len(unsafe) + 1) // 2], benign])))


def _aurocs(encoder: PatchEncoder, scenes: Scenes) -> tuple[Cell, ...]:
    seen = see(encoder, scenes.pictures)
    return tuple(auroc_cell(SCORES[name](seen).images.double().numpy(), scenes.unsafe) for name in TARGETS)


def _aurocs_under_gradient(encoder: PatchEncoder, scenes: Scenes, radius: float) -> tuple[Cell, ...]:
    pixels = np.stack([np.asarray(decode(each, MAX_PIXELS, "of the proof").picture) for each in scenes.pictures])
    concepts = Concepts.embed(encoder, load_taxonomy("micro"))
    cells = []
    for name, target in TARGETS.items():
        moved = moved_pictures(pixels, scenes.unsafe, target(encoder, concepts), radius)
        seen = see(encoder, [encode_png(Image.fromarray(each)) for each in moved])
        cells.append(auroc_cell(SCORES[name](seen).images.double().numpy(), scenes.unsafe))
    return tuple(cells)


def moved_pictures(
    pixels: NDArray[np.uint8], unsafe: NDArray[np.bool_], score: gradient.Score, radius: float
) -> NDArray[np.uint8]:
    """Unsafe pictures [N, H, W, 3] moved against the score, benign ones by noise."""
    moved = pixels.copy()
    for steps, kind in ((STEPS, True), (0, False)):
        rows = np.flatnonzero(unsafe == kind)
        for few in (rows[start : start + PICTURES_AT_ONCE] for start in range(0, len(rows), PICTURES_AT_ONCE)):
            moved[few] = gradient.projected_gradient(pixels[few], score, radius, steps)
    return moved


def _against_margin(encoder: PatchEncoder, concepts: Concepts) -> gradient.Score:
    detector = replace(DETECTOR, score="margin", threshold=None)
    return gradient.image_score(encoder, gradient.transport_score(encoder, concepts, detector))


def _against_patch_odds(encoder: PatchEncoder, concepts: Concepts) -> gradient.Score:
    return gradient.image_score(encoder, gradient.safety_log_odds(encoder, concepts))


def _against_global_odds(encoder: PatchEncoder, concepts: Concepts) -> gradient.Score:
    """The picture's own embedding in a patch's place."""
    odds = gradient.safety_log_odds(encoder, concepts)

    def of_picture(g_BD: Tensor, x_BPD: Tensor) -> Tensor:
        return odds(g_BD, g_BD[:, None])

    return gradient.image_score(encoder, of_picture, softness=0)


TARGETS: Final[dict[str, Callable[[PatchEncoder, Concepts], gradient.Score]]] = {
    MARGIN: _against_margin,
    PATCH_ODDS: _against_patch_odds,
    GLOBAL_ODDS: _against_global_odds,
}
"""score -> the same as a differentiable function of pixels"""
