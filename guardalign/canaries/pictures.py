"""What canaries look at: plain and drawn pictures for every model, and packaged scenes for the embedded ones.

Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Final

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from guardalign.core.images import Decoded, decode
from guardalign.errors import ModelError

SIZE: Final = (112, 84)
"""width, height of drawn pictures [px]"""
SCENES: Final = {
    "scene-013": "pill",
    "scene-034": "syringe",
    "scene-094": "gun",
    "scene-029": "clock",
    "scene-044": "fish",
    "scene-051": "star",
}
"""Scenes of the packaged sample with a single object, and what it is; both embedded CLIPs name all of them rightly, and
none when red and blue are swapped."""
UNSAFE: Final = frozenset({"pill", "syringe", "gun"})


@dataclass(frozen=True)
class KnownScene:
    """A scene whose content is known."""

    kind: str
    """the object"""
    unsafe: bool
    """it is one of the micro world's unsafe kinds"""
    decoded: Decoded
    """the picture"""


def plain(colour: tuple[int, int, int]) -> Decoded:
    """A picture of one colour."""
    return _decoded(Image.new("RGB", SIZE, colour))


@lru_cache(maxsize=1)
def drawn() -> tuple[Decoded, Decoded]:
    """Two pictures of many colours that have little in common: rings about a corner, and stripes."""
    width, height = SIZE
    y, x = np.mgrid[:height, :width] / height
    far = np.hypot(x - 0.2, y - 0.3)
    rings = np.stack([np.sin(18 * far), np.cos(11 * far), y - x], -1)
    stripes = np.stack([np.sign(np.sin(9 * x + 4 * y)), x * y, np.sign(np.cos(14 * y))], -1)
    first, second = (Image.fromarray(np.uint8(127.5 + 127.5 * np.clip(each, -1, 1))) for each in (rings, stripes))
    return _decoded(first), _decoded(second)


@lru_cache(maxsize=1)
def known_scenes() -> tuple[KnownScene, ...]:
    """The packaged scenes, in the order of `SCENES`."""
    sample = resources.files("guardalign").joinpath("micro/sample.parquet")
    with resources.as_file(sample) as path:
        wanted = pq.read_table(path, columns=["sample_id", "image"], filters=[("sample_id", "in", list(SCENES))])
    found = {row["sample_id"]: row["image"] for row in wanted.to_pylist()}
    if found.keys() != SCENES.keys():
        raise ModelError("the packaged sample has lost its scenes; install the package again")
    scenes = ((kind, decode(found[name], 10**6, name)) for name, kind in SCENES.items())
    return tuple(KnownScene(kind, kind in UNSAFE, decoded) for kind, decoded in scenes)


def _decoded(picture: Image.Image) -> Decoded:
    return Decoded(picture, *picture.size, num_frames=1)
