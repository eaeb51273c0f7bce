"""The layouts are exact: every pixel is in a box, boxes stay inside the picture, padding cells are no patches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardalign.core.patches import (
    MAX_TILES_PER_SIDE,
    Canvas,
    crop_grid,
    pad_grid,
    patch_boxes,
    squash_grid,
    tile_boxes,
    tiled_grid,
)
from guardalign.types import Box, PatchGrid

SIDES = st.one_of(st.integers(1, 9), st.integers(1, 6000))
CANVASES = st.builds(
    Canvas, rows=st.integers(1, 24), columns=st.integers(1, 24), cell=st.tuples(st.integers(1, 32), st.integers(1, 32))
)
LAYOUTS = {
    "pad": pad_grid,
    "squash": lambda width, height, canvas: squash_grid(canvas),
    "crops": lambda width, height, canvas: crop_grid(width, height, canvas.rows, canvas.columns),
}
CLIP = Canvas(rows=14, columns=14, cell=(16, 16))


def covered(spans: set[tuple[int, int]], length: int) -> bool:
    """The spans, sorted, leave no gap in 0..length and do not leave it."""
    reached = 0
    for start, end in sorted(spans):
        if start > reached or end <= start:
            return False
        reached = max(reached, end)
    return reached == length and min(start for start, _ in spans) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@given(width=SIDES, height=SIDES, canvas=CANVASES)
def test_boxes_of_a_grid_cover_every_pixel_and_stay_inside(
    layout: str, width: int, height: int, canvas: Canvas
) -> None:
    grid: PatchGrid = LAYOUTS[layout](width, height, canvas)
    boxes = patch_boxes(grid, width, height)
    assert len(boxes) == grid.num_patches
    across, down = {box[0::2] for box in boxes}, {box[1::2] for box in boxes}
    assert covered(across, width) and covered(down, height)
    assert {(*box[0::2], *box[1::2]) for box in boxes} == {(*x, *y) for x in across for y in down}


@given(width=SIDES, height=SIDES, canvas=CANVASES)
def test_boxes_are_rounded_outwards_by_less_than_a_pixel(width: int, height: int, canvas: Canvas) -> None:
    grid = pad_grid(width, height, canvas)
    for index, (left, top, right, bottom) in enumerate(patch_boxes(grid, width, height)):
        row, column = divmod(index, grid.columns)
        exact_left, exact_top = column * canvas.cell[0] * width, row * canvas.cell[1] * height
        exact_right = min((column + 1) * canvas.cell[0], grid.resized[0]) * width
        exact_bottom = min((row + 1) * canvas.cell[1], grid.resized[1]) * height
        assert left * grid.resized[0] <= exact_left < (left + 1) * grid.resized[0]
        assert top * grid.resized[1] <= exact_top < (top + 1) * grid.resized[1]
        assert (right - 1) * grid.resized[0] < exact_right <= right * grid.resized[0]
        assert (bottom - 1) * grid.resized[1] < exact_bottom <= bottom * grid.resized[1]


@given(width=SIDES, height=SIDES, canvas=CANVASES)
def test_padding_cells_are_no_patches(width: int, height: int, canvas: Canvas) -> None:
    grid = pad_grid(width, height, canvas)
    assert grid.resized[0] <= canvas.size[0] and grid.resized[1] <= canvas.size[1]
    assert grid.resized[0] == canvas.size[0] or grid.resized[1] == canvas.size[1]
    assert (grid.columns - 1) * canvas.cell[0] < grid.resized[0] <= grid.columns * canvas.cell[0]
    assert (grid.rows - 1) * canvas.cell[1] < grid.resized[1] <= grid.rows * canvas.cell[1]


@given(width=SIDES, height=SIDES, canvas=CANVASES)
def test_padding_keeps_the_aspect_to_half_a_pixel(width: int, height: int, canvas: Canvas) -> None:
    short, long = sorted(pad_grid(width, height, canvas).resized), sorted((width, height))
    resized = pad_grid(width, height, canvas).resized
    if resized == (canvas.size[0], 1) or resized == (1, canvas.size[1]):
        return  # a side below half a pixel is one pixel all the same
    if resized[0] == canvas.size[0] and width * canvas.size[1] >= height * canvas.size[0]:
        assert abs(resized[1] * width - height * resized[0]) * 2 <= width
    elif resized[1] == canvas.size[1]:
        assert abs(resized[0] * height - width * resized[1]) * 2 <= height
    assert short and long


@given(width=st.integers(1, 400), height=st.integers(1, 400), side=st.integers(8, 60))
def test_tiles_are_disjoint_cover_the_picture_and_fit_the_model(width: int, height: int, side: int) -> None:
    boxes = tile_boxes(width, height, Canvas(rows=1, columns=1, cell=(side, side)))
    assert sum((box[2] - box[0]) * (box[3] - box[1]) for box in boxes) == width * height
    assert union_area(boxes, width, height) == width * height
    if max(width, height) <= side * MAX_TILES_PER_SIDE:
        assert all(max(box[2] - box[0], box[3] - box[1]) <= side for box in boxes)


@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_boxes_of_tiles_cover_every_pixel(width: int, height: int) -> None:
    canvas = Canvas(rows=3, columns=4, cell=(12, 10))
    grid = tiled_grid(width, height, canvas)
    boxes = patch_boxes(grid, width, height)
    assert len(boxes) == grid.num_patches and union_area(boxes, width, height) == width * height
    assert all(0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height for box in boxes)


@given(width=st.integers(1, 48), height=st.integers(1, 30))
def test_a_picture_of_one_tile_is_padded(width: int, height: int) -> None:
    canvas = Canvas(rows=3, columns=4, cell=(12, 10))
    plain = patch_boxes(pad_grid(width, height, canvas), width, height)
    assert patch_boxes(tiled_grid(width, height, canvas), width, height) == plain


def test_one_pixel_is_one_patch_or_shared_by_all() -> None:
    assert set(patch_boxes(pad_grid(1, 1, CLIP), 1, 1)) == {(0, 0, 1, 1)}
    assert patch_boxes(crop_grid(1, 1, 4, 4), 1, 1) == ((0, 0, 1, 1),)


def test_a_line_keeps_its_length() -> None:
    grid = pad_grid(1, 5000, CLIP)
    assert (grid.rows, grid.columns, grid.resized) == (14, 1, (1, 224))
    boxes = patch_boxes(grid, 1, 5000)
    assert boxes[0] == (0, 0, 1, 358) and boxes[-1][3] == 5000


def test_a_picture_of_the_models_size_maps_cell_by_cell() -> None:
    expected = tuple((16 * x, 16 * y, 16 * x + 16, 16 * y + 16) for y in range(14) for x in range(14))
    assert patch_boxes(pad_grid(224, 224, CLIP), 224, 224) == expected
    assert patch_boxes(squash_grid(CLIP), 224, 224) == expected


def test_the_number_of_tiles_is_bounded() -> None:
    assert len(tile_boxes(100_000, 90_000, CLIP)) == MAX_TILES_PER_SIDE**2


def union_area(boxes: tuple[Box, ...], width: int, height: int) -> int:
    """Pixels in at least one box."""
    seen = [bytearray(width) for _ in range(height)]
    for left, top, right, bottom in boxes:
        for row in seen[top:bottom]:
            row[left:right] = b"\1" * (right - left)
    return sum(row.count(1) for row in seen)
