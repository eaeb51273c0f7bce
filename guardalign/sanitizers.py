"""What is done to the pixels of unsafe patches: blanked, or blurred beyond recognition.

A sanitizer gets the upright picture at its original resolution and the boxes of the unsafe patches, and gives back a
new picture; outside the boxes not one bit differs. Without boxes it gives back the very picture it got. A recipe
without sanitizing leaves the stage out, so "none" is no class here.

Knows nothing of detectors, thresholds or how boxes come from a patch grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
from PIL import Image, ImageFilter, ImageStat

from guardalign.errors import require
from guardalign.types import Box


class Sanitizer(Protocol):
    """Picture and boxes in, sanitized picture out."""

    def __call__(self, picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
        """A picture of the same size, changed in `boxes` only; the same object when there are none."""
        ...


@dataclass(frozen=True)
class Mask:
    """Blanks the boxes with one colour."""

    fill: Literal["zero", "mean"] = "mean"
    """colour of the blanked pixels: zero is black, mean is the picture's own mean colour (on the micro world a black
    box is itself taken for an object, and masks of the mean colour protect far better)"""

    def __post_init__(self) -> None:
        require(self.fill in ("zero", "mean"), f"sanitizer.fill must be zero or mean, not {self.fill!r}")

    def __call__(self, picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
        """The boxes in one colour; the mean is taken over the whole picture, the boxes included."""
        if not boxes:
            return picture
        colour = (0, 0, 0) if self.fill == "zero" else _mean_colour(picture)
        masked = picture.copy()
        for box in boxes:
            masked.paste(colour, box)
        return masked


@dataclass(frozen=True)
class Blur:
    """Blurs the boxes (Gaussian)."""

    radius: float = 1.0
    """standard deviation of the Gaussian, as a share of the longest side of the largest box, above 0; at 1 nothing
    of a patch's inside is left but its tint, though coarse shapes that span several patches may still be guessed"""

    def __post_init__(self) -> None:
        holds = math.isfinite(self.radius) and self.radius > 0
        require(holds, f"sanitizer.radius must be above 0 (a share of the patch's side), not {self.radius}")

    def __call__(self, picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
        """Each box cut from the blurred picture, so that neighbouring boxes join without a seam."""
        if not boxes:
            return picture
        longest = max(max(right - left, bottom - top) for left, top, right, bottom in boxes)
        blurred = picture.filter(ImageFilter.GaussianBlur(self.radius * longest))
        sanitized = picture.copy()
        for box in boxes:
            sanitized.paste(blurred.crop(box), box)
        return sanitized


def _mean_colour(picture: Image.Image) -> tuple[int, ...]:
    return tuple(round(mean) for mean in ImageStat.Stat(picture).mean)


def masked_fraction(boxes: Sequence[Box], width: int, height: int) -> float:
    """Share of the picture's pixels in the union of the boxes, in [0, 1]; counted in integers, overlaps once.

    The boxes' edges cut the picture into few cells (coordinate compression), each wholly inside or outside.
    """
    if not boxes:
        return 0.0
    edges = np.asarray(boxes, dtype=np.int64)
    assert edges.min() >= 0 and edges[:, 2].max() <= width and edges[:, 3].max() <= height, "a box leaves the picture"
    columns, rows = np.unique(edges[:, [0, 2]]), np.unique(edges[:, [1, 3]])
    covered = np.zeros((len(rows) - 1, len(columns) - 1), dtype=np.int64)
    lefts, rights = (np.searchsorted(columns, edges[:, side]) for side in (0, 2))
    tops, bottoms = (np.searchsorted(rows, edges[:, side]) for side in (1, 3))
    for left, top, right, bottom in zip(lefts, tops, rights, bottoms, strict=True):
        covered[top:bottom, left:right] = 1
    return int(np.diff(rows) @ covered @ np.diff(columns)) / (width * height)


SANITIZERS: Final[Mapping[str, type[Mask] | type[Blur]]] = {"mask": Mask, "blur": Blur}
