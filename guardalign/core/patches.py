"""How patches lie on a picture, in integers: layouts for a model's input, and the way back to picture pixels.

A layout says how a picture of width x height is brought to a model's canvas of cells, and which cells are its patches:

    pad      aspect kept, top left, the rest of the canvas is padding; padding cells are no patches
    squash   the whole canvas, aspect not kept
    crops    rows x columns crops of the picture itself, each embedded as a picture of its own
    tiles    a large picture is cut into tiles without overlap, each laid out like `pad` on a canvas of its own

The way back is rounded outwards: every pixel of the picture belongs to at least one patch's box.
Knows nothing of tensors, models or image files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from guardalign.types import Box, PatchGrid

MAX_TILES_PER_SIDE = 8
"""A picture is cut into at most this many tiles a side; beyond that the tiles are shrunk instead."""

Fit = Literal["pad", "squash", "tiles"]


@dataclass(frozen=True)
class Canvas:
    """What a model looks at: `rows` x `columns` cells."""

    rows: int
    """cells from top to bottom"""
    columns: int
    """cells from left to right"""
    cell: tuple[int, int]
    """width, height [px] of one cell"""

    @property
    def size(self) -> tuple[int, int]:
        """Width, height [px] that the cells cover."""
        return self.columns * self.cell[0], self.rows * self.cell[1]


def pad_grid(width: int, height: int, canvas: Canvas) -> PatchGrid:
    """The picture scaled to fit the canvas, in its top left corner; only cells that overlap it are patches."""
    resized = _fit_inside(width, height, *canvas.size)
    columns = -(-resized[0] // canvas.cell[0])
    rows = -(-resized[1] // canvas.cell[1])
    return PatchGrid(rows=rows, columns=columns, resized=resized, cell=canvas.cell)


def squash_grid(canvas: Canvas) -> PatchGrid:
    """The picture stretched or shrunk to the whole canvas; every cell is a patch."""
    return PatchGrid(rows=canvas.rows, columns=canvas.columns, resized=canvas.size, cell=canvas.cell)


def crop_grid(width: int, height: int, rows: int, columns: int) -> PatchGrid:
    """`rows` x `columns` equal shares of the picture, one cell each; fewer where it has fewer pixels than that."""
    rows, columns = min(rows, height), min(columns, width)
    return PatchGrid(rows=rows, columns=columns, resized=(columns, rows), cell=(1, 1))


def tile_boxes(width: int, height: int, canvas: Canvas) -> tuple[Box, ...]:
    """The tiles, row by row: as few as keep each within the canvas size [px], disjoint, covering the picture."""
    columns = min(-(-width // canvas.size[0]), MAX_TILES_PER_SIDE)
    rows = min(-(-height // canvas.size[1]), MAX_TILES_PER_SIDE)
    lefts = [width * column // columns for column in range(columns + 1)]
    tops = [height * row // rows for row in range(rows + 1)]
    return tuple(
        (lefts[column], tops[row], lefts[column + 1], tops[row + 1]) for row in range(rows) for column in range(columns)
    )


def tiled_grid(width: int, height: int, canvas: Canvas) -> PatchGrid:
    """The patches of all tiles, tile by tile and row by row within a tile, as explicit boxes."""
    boxes = []
    for left, top, right, bottom in tile_boxes(width, height, canvas):
        grid = pad_grid(right - left, bottom - top, canvas)
        inner = patch_boxes(grid, right - left, bottom - top)
        boxes += [(left + box[0], top + box[1], left + box[2], top + box[3]) for box in inner]
    return PatchGrid(rows=0, columns=0, resized=(width, height), cell=canvas.cell, boxes=tuple(boxes))


def patch_boxes(grid: PatchGrid, width: int, height: int) -> tuple[Box, ...]:
    """One box [px] a patch on the upright picture of width x height, row by row; left and top rounded down, right and
    bottom up, so that the boxes cover every pixel and neighbours may share a pixel row."""
    if grid.boxes is not None:
        return grid.boxes
    across = _spans(grid.columns, grid.cell[0], grid.resized[0], width)
    down = _spans(grid.rows, grid.cell[1], grid.resized[1], height)
    return tuple((left, top, right, bottom) for top, bottom in down for left, right in across)


def _spans(count: int, cell: int, resized: int, length: int) -> list[tuple[int, int]]:
    """Start and exclusive end [px] on a side of `length` of each cell of a side of `resized`."""
    return [
        (index * cell * length // resized, -(-min((index + 1) * cell, resized) * length // resized))
        for index in range(count)
    ]


def _fit_inside(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[int, int]:
    """The largest size of the same aspect inside the canvas, halves rounded up, no side below 1."""
    if width * canvas_height >= height * canvas_width:
        return canvas_width, max(1, (2 * height * canvas_width + width) // (2 * width))
    return max(1, (2 * width * canvas_height + height) // (2 * height)), canvas_height
