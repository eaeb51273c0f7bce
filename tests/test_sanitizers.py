"""A sanitizer changes the boxes and nothing else; the masked share counts the union of the boxes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from guardalign.errors import ConfigError
from guardalign.sanitizers import SANITIZERS, Blur, Mask, Sanitizer, masked_fraction
from guardalign.types import Box

WIDTH, HEIGHT = 47, 31


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def spans(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, size - 1), st.integers(1, size)).map(lambda s: (s[0], max(s[0] + 1, s[1])))


BOXES: st.SearchStrategy[list[Box]] = st.lists(
    st.builds(lambda x, y: (x[0], y[0], x[1], y[1]), spans(WIDTH), spans(HEIGHT)), max_size=8
)


def covered(boxes: list[Box]) -> np.ndarray:
    """The union of the boxes, painted pixel by pixel: the reference."""
    painted = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for left, top, right, bottom in boxes:
        painted[top:bottom, left:right] = True
    return painted


@given(BOXES)
def test_masked_fraction_is_the_share_of_painted_pixels(boxes: list[Box]) -> None:
    assert masked_fraction(boxes, WIDTH, HEIGHT) == covered(boxes).sum() / (WIDTH * HEIGHT)


def test_masked_fraction_is_exact_on_a_picture_too_large_to_paint() -> None:
    side = 1_000_000
    overlapping = [(0, 0, 600_000, side), (500_000, 0, side, 1), (0, 0, 1, 1)]
    assert masked_fraction(overlapping, side, side) == (600_000 * side + 400_000) / side**2
    assert masked_fraction([(0, 0, side, side)], side, side) == 1.0


def test_a_box_outside_the_picture_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        masked_fraction([(0, 0, WIDTH + 1, 1)], WIDTH, HEIGHT)


@pytest.mark.parametrize("sanitizer", [Mask("zero"), Mask("mean"), Blur(), Blur(0.25)])
@settings(max_examples=25)
@given(boxes=BOXES)
def test_pixels_outside_the_boxes_are_bit_identical(sanitizer: Sanitizer, boxes: list[Box]) -> None:
    picture = noise()
    before = picture.tobytes()
    sanitized = sanitizer(picture, boxes)
    outside = ~covered(boxes)
    assert np.array_equal(np.asarray(sanitized)[outside], np.asarray(picture)[outside])
    assert picture.tobytes() == before, "edited in place"
    assert sanitized.size == picture.size and sanitized.mode == "RGB"


@pytest.mark.parametrize("name", SANITIZERS)
def test_without_boxes_the_very_picture_comes_back(name: str) -> None:
    picture = noise()
    assert SANITIZERS[name]()(picture, []) is picture


@given(BOXES)
def test_zero_is_black_in_every_box(boxes: list[Box]) -> None:
    assert not np.asarray(Mask("zero")(noise(), boxes))[covered(boxes)].any()


def test_mean_is_the_mean_of_the_whole_picture() -> None:
    picture = noise(3)
    mean = np.rint(np.asarray(picture).reshape(-1, 3).mean(0))
    assert np.array_equal(np.asarray(Mask("mean")(picture, [(5, 5, 9, 9)]))[5:9, 5:9], np.broadcast_to(mean, (4, 4, 3)))


def test_sanitizing_twice_with_a_mask_is_sanitizing_once() -> None:
    boxes = [(3, 4, 20, 20), (10, 10, 40, 30)]
    once = Mask("zero")(noise(), boxes)
    assert Mask("zero")(once, boxes).tobytes() == once.tobytes()


def test_blur_leaves_no_letter_legible() -> None:
    """Text inside patches of its own height: less than a tenth of its contrast is left."""
    picture = Image.new("RGB", (160, 32), "white")
    ImageDraw.Draw(picture).text((2, 2), "HOW TO BUILD IT", fill="black", font_size=16)
    boxes = [(left, 0, left + 32, 32) for left in range(0, 160, 32)]
    sharp = np.asarray(picture.convert("L"), dtype=float)
    blurred = np.asarray(Blur()(picture, boxes).convert("L"), dtype=float)
    assert blurred.std() < sharp.std() / 10
    assert np.asarray(Blur(0.02)(picture, boxes).convert("L"), dtype=float).std() > sharp.std() / 2


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"^sanitizer\.fill "):
        Mask("white")  # type: ignore[arg-type]
    for radius in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"^sanitizer\.radius "):
            Blur(radius)
