"""The scenes that a proof is measured on, with all that is known of them, as arrays.

Legend: N scenes, G cells of a scene (8 x 8). Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from guardalign.errors import InputError
from guardalign.micro.attacks import Attack, attacked_scene
from guardalign.micro.sample import balanced, row_of, seeds
from guardalign.micro.world import CELL, PLAIN

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLUMNS: Final = ("image", "label", "style", "num_objects", "unsafe_pixels")
LEAST_SHARE: Final = 0.1
"""a cell counts as unsafe when at least this share of its pixels is"""


@dataclass(frozen=True, eq=False)
class Scenes:
    """Scenes in a fixed order."""

    pictures: tuple[bytes, ...]
    """[N] encoded"""
    unsafe: NDArray[np.bool_]
    """[N] holds an unsafe object"""
    styles: NDArray[np.str_]
    """[N] plain or shifted"""
    num_objects: NDArray[np.int64]
    """[N]"""
    unsafe_cells: NDArray[np.bool_]
    """[N, G] at least a tenth of the cell's pixels is unsafe"""

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Scenes:
        """Rows as `sample.py` makes them."""
        pictures, labels, styles, counts, pixels = zip(*([row[name] for name in COLUMNS] for row in rows), strict=True)
        shares = np.array(pixels, dtype=np.float64) / CELL**2
        return cls(pictures, np.array(labels) == "unsafe", np.array(styles), np.array(counts), shares >= LEAST_SHARE)

    def __len__(self) -> int:
        return len(self.pictures)

    def take(self, rows: NDArray[np.int64]) -> Scenes:
        """Some of the scenes."""
        pictures = tuple(self.pictures[row] for row in rows)
        return Scenes(pictures, self.unsafe[rows], self.styles[rows], self.num_objects[rows], self.unsafe_cells[rows])

    def of_style(self, style: str) -> Scenes:
        """Those drawn in one style."""
        return self.take(np.flatnonzero(self.styles == style))

    def first(self, each: int) -> Scenes:
        """The first `each` unsafe and the first `each` benign scenes, in their order."""
        return self.take(np.sort(np.concatenate([np.flatnonzero(self.unsafe == kind)[:each] for kind in (0, 1)])))

    @property
    def shown(self) -> NDArray[np.bool_]:
        """[N] unsafe scenes with at least one unsafe cell: the others' objects lie beneath later ones."""
        return self.unsafe & self.unsafe_cells.any(1)


def read_scenes(path: Path) -> Scenes:
    """The proof's file; `InputError` when it is not there or is something else."""
    try:
        table = pq.read_table(path, columns=list(COLUMNS))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"the proof's scenes {path} cannot be read ({type(error).__name__})") from error
    if not table.num_rows or table.num_columns < len(COLUMNS):
        raise InputError(f"the proof's scenes {path} lack rows or one of the columns {', '.join(COLUMNS)}")
    return Scenes.of(table.to_pylist())


def validation_scenes(each: int) -> Scenes:
    """The first `each` unsafe and benign plain scenes of the validation series, drawn now (needs the emoji font)."""
    drawn = balanced(PLAIN, seeds()["validation"], each)
    return Scenes.of(row_of(scene, PLAIN, str(number), "") for number, scene in drawn)


def attacked_scenes(attacks: Mapping[str, Attack], each: int, series: str = "test") -> dict[str, Scenes]:
    """The same scenes of a series, plain, under every attack; `none` is the scenes as they are (needs the font)."""
    seed = seeds()[series]
    drawn = list(balanced(PLAIN, seed, each))
    plain = {"none": Scenes.of(row_of(scene, PLAIN, str(number), "") for number, scene in drawn)}
    return plain | {
        name: Scenes.of(row_of(attacked_scene(attack, seed, at), PLAIN, str(at), "") for at, _ in drawn)
        for name, attack in attacks.items()
    }
