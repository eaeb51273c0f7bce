"""Training scenes by the ten thousand, drawn once by several processes and kept as arrays.

Legend: N scenes, O places for objects (six), G cells of a scene, K kinds and the background last.
Knows nothing of models.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from guardalign.micro.world import CELL, GRID, KINDS, MOST_OBJECTS, PLAIN, Layout, Object, scenes

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIXELS_A_CELL: Final = CELL * CELL
BACKGROUND: Final = len(KINDS)
"""the class of cells that show no object"""


@dataclass(frozen=True)
class Corpus:
    """Scenes as arrays."""

    pixels: NDArray[np.uint8]
    """[N, SIDE, SIDE, 3]"""
    kinds: NDArray[np.int8]
    """[N, O] index into KINDS, -1 where there is no object"""
    boxes: NDArray[np.int16]
    """[N, O, 4] left, top, right, bottom [px]"""
    cells: NDArray[np.uint8]
    """[N, O, G] pixels of each cell that belong to each object, 0 to 144"""

    def __len__(self) -> int:
        return len(self.pixels)

    def layout(self, index: int) -> Layout:
        """What stands where in one scene; `visible` is not kept and reads 1."""
        present = [at for at in range(MOST_OBJECTS) if self.kinds[index, at] >= 0]
        rows = ((int(self.kinds[index, at]), self.boxes[index, at].tolist()) for at in present)
        return Layout(tuple(Object(kind, tuple(box), 1.0) for kind, box in rows))

    def targets(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """[len(indices), G, K + 1] share of each cell that belongs to each kind; rows sum to 1."""
        shares = np.zeros((len(indices), GRID * GRID, len(KINDS) + 1), dtype=np.float32)
        rows = np.arange(len(indices))
        for at in range(MOST_OBJECTS):
            kinds = self.kinds[indices, at]
            shown = kinds >= 0
            shares[rows[shown], :, kinds[shown]] += self.cells[indices[shown], at] / PIXELS_A_CELL
        shares[..., BACKGROUND] = 1 - shares.sum(-1)
        return shares


def draw_corpus(folder: Path, seed: int, count: int, processes: int = 2) -> Corpus:
    """The first `count` plain scenes of a series; drawn once, later calls read the file."""
    path = folder / f"corpus-{seed}-{count}.npz"
    if not path.exists():
        _draw_in_processes(path, seed, count, processes)
    arrays: Any = np.load(path)
    return Corpus(arrays["pixels"], arrays["kinds"], arrays["boxes"], arrays["cells"])


def _draw_in_processes(path: Path, seed: int, count: int, processes: int) -> None:
    """Fresh interpreters: a fork of a process that runs torch threads may hang."""
    bounds = np.linspace(0, count, processes + 1).astype(int).tolist()
    parts = [path.with_suffix(f".part{at}.npz") for at in range(processes)]
    commands = [
        [sys.executable, "-m", "guardalign.micro.corpus", str(part), str(seed), str(start), str(stop)]
        for part, start, stop in zip(parts, bounds, bounds[1:], strict=False)
    ]
    running = [subprocess.Popen(command) for command in commands]
    failed = [part.name for part, each in zip(parts, running, strict=True) if each.wait() != 0]
    if failed:
        raise RuntimeError(f"drawing scenes failed: {failed[0]}")
    loaded: list[Any] = [np.load(part) for part in parts]
    joined = {name: np.concatenate([part[name] for part in loaded]) for name in loaded[0].files}
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, allow_pickle=False, **joined)
    temporary.replace(path)
    for part in parts:
        part.unlink()


def _draw_part(path: str, seed: int, start: int, stop: int) -> None:
    count = stop - start
    pixels = np.zeros((count, GRID * CELL, GRID * CELL, 3), np.uint8)
    kinds = np.full((count, MOST_OBJECTS), -1, np.int8)
    boxes = np.zeros((count, MOST_OBJECTS, 4), np.int16)
    cells = np.zeros((count, MOST_OBJECTS, GRID * GRID), np.uint8)
    for row, scene in enumerate(scenes(PLAIN, seed, count, start)):
        pixels[row] = scene.pixels
        number = len(scene.objects)
        kinds[row, :number] = [item.kind for item in scene.objects]
        boxes[row, :number] = [item.box for item in scene.objects]
        cells[row, :number] = np.rint(scene.coverage * PIXELS_A_CELL)
    np.savez(path, pixels=pixels, kinds=kinds, boxes=boxes, cells=cells)


if __name__ == "__main__":
    _draw_part(sys.argv[1], *(int(word) for word in sys.argv[2:]))
