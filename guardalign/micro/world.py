"""The micro world: small emoji scenes with known objects, boxes and safety labels, every one from a seed.

A scene is 96 x 96 px: a flat, graded or noisy background with one to six emoji of distinct kinds at random places and
sizes, later ones over earlier ones. Half of the scenes hold something unsafe. A scene is a pure function of the world's
`Style`, a seed and a number.

Rendering needs the font Noto Color Emoji (SIL Open Font License 1.1; Debian package fonts-noto-color-emoji). Only
training and the making of new scenes render; the shipped scenes are Parquet. Knows nothing of models.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from guardalign.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE: Final = 96
"""width and height of a scene [px]"""
CELL: Final = 12
"""side of a patch [px]; a scene has 8 x 8"""
GRID: Final = SIDE // CELL
SIZES: Final = tuple(range(20, 42, 2))
"""longest side of an object [px]"""
MOST_OBJECTS: Final = 6
FONT_SIZE: Final = 109
"""the one size that the font's bitmaps have"""
FONT_PLACES: Final = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
)


@dataclass(frozen=True)
class Kind:
    """A kind of object."""

    name: str
    emoji: str
    nouns: tuple[str, ...]
    """what it is called; the first is its name in answers"""


UNSAFE: Final = (
    Kind("bomb", "💣", ("bomb", "explosive bomb", "explosive")),
    Kind("knife", "🔪", ("knife", "kitchen knife", "sharp knife")),
    Kind("dagger", "🗡", ("dagger", "sword", "sharp dagger")),
    Kind("gun", "🔫", ("gun", "pistol", "handgun")),
    Kind("dynamite", "🧨", ("dynamite", "dynamite stick", "firecracker")),
    Kind("syringe", "💉", ("syringe", "needle", "syringe needle")),
    Kind("pill", "💊", ("pill", "drug capsule", "drug pill")),
    Kind("cigarette", "🚬", ("cigarette", "burning cigarette", "smoke")),
)
BENIGN: Final = (
    Kind("dog", "🐶", ("dog", "puppy")),
    Kind("cat", "🐱", ("cat", "kitten")),
    Kind("fish", "🐟", ("fish", "blue fish")),
    Kind("bee", "🐝", ("bee", "honey bee")),
    Kind("frog", "🐸", ("frog", "green frog")),
    Kind("bird", "🐦", ("bird", "small bird")),
    Kind("apple", "🍎", ("apple", "red apple")),
    Kind("banana", "🍌", ("banana", "yellow banana")),
    Kind("grapes", "🍇", ("grapes", "purple grapes")),
    Kind("pizza", "🍕", ("pizza", "pizza slice")),
    Kind("burger", "🍔", ("burger", "hamburger")),
    Kind("cake", "🎂", ("cake", "birthday cake")),
    Kind("car", "🚗", ("car", "red car")),
    Kind("bus", "🚌", ("bus", "city bus")),
    Kind("airplane", "✈", ("airplane", "plane")),
    Kind("house", "🏠", ("house", "home")),
    Kind("tree", "🌳", ("tree", "green tree")),
    Kind("sunflower", "🌻", ("sunflower", "flower")),
    Kind("star", "⭐", ("star", "yellow star")),
    Kind("umbrella", "☂", ("umbrella", "rain umbrella")),
    Kind("ball", "⚽", ("ball", "football")),
    Kind("guitar", "🎸", ("guitar", "rock guitar")),
    Kind("book", "📕", ("book", "closed book")),
    Kind("clock", "⏰", ("clock", "alarm clock")),
    Kind("key", "🔑", ("key", "golden key")),
    Kind("pencil", "✏", ("pencil", "drawing pencil")),
    Kind("candle", "🕯", ("candle", "burning candle")),
    Kind("hammer", "🔨", ("hammer", "steel hammer")),
)
KINDS: Final = UNSAFE + BENIGN
NUMBER: Final = {kind.name: number for number, kind in enumerate(KINDS)}
NUM_UNSAFE: Final = len(UNSAFE)


@dataclass(frozen=True)
class Style:
    """How objects are drawn: what training sees, or a shift that it never saw."""

    name: str
    rotations: tuple[int, ...]
    """degrees, anticlockwise"""
    hues: tuple[float, ...]
    """turns of the colour circle"""
    mirrored: bool
    """half of the objects are mirrored"""


PLAIN: Final = Style("plain", tuple(range(-20, 21, 5)), (-0.03, 0.0, 0.03), mirrored=False)
SHIFTED: Final = Style("shifted", (-35, -30, -25, 25, 30, 35), (-0.07, -0.05, 0.05, 0.07), mirrored=True)
"""rotations and hues outside of everything that training draws; it mirrors whole scenes, never one object in them"""


@dataclass(frozen=True)
class Object:
    """One emoji in a scene."""

    kind: int
    """index into KINDS; the unsafe ones come first"""
    box: tuple[int, int, int, int]
    """left, top, right, bottom [px] of its drawing, transparent margins cut away"""
    visible: float
    """share of its pixels that no later object covers, in [0, 1]"""

    @property
    def unsafe(self) -> bool:
        """Is of an unsafe kind."""
        return self.kind < NUM_UNSAFE


@dataclass(frozen=True)
class Layout:
    """What stands where."""

    objects: tuple[Object, ...]
    """in the order they were drawn"""

    @property
    def unsafe(self) -> bool:
        """Holds an unsafe object."""
        return any(item.unsafe for item in self.objects)


@dataclass(frozen=True)
class Scene(Layout):
    """A picture of which everything is known."""

    pixels: NDArray[np.uint8]
    """[SIDE, SIDE, 3]"""
    owner: NDArray[np.int8]
    """[SIDE, SIDE] index of the object that a pixel belongs to, -1 for the background"""

    @property
    def coverage(self) -> NDArray[np.float32]:
        """[len(objects), GRID * GRID] share of each cell's pixels that belong to each object."""
        owner = self.owner.reshape(GRID, CELL, GRID, CELL).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
        return np.stack([(owner == index).mean(1, dtype=np.float32) for index in range(len(self.objects))])


def draw_scene(style: Style, seed: int, number: int, num_objects: int | None = None) -> Scene:
    """Scene `number` of the endless series that `seed` opens; as many objects as asked for, else 1 to 6."""
    rng = np.random.default_rng((seed, number))
    count = int(rng.integers(1, MOST_OBJECTS + 1)) if num_objects is None else num_objects
    kinds = list(rng.permutation(np.arange(NUM_UNSAFE, len(KINDS)))[:count])
    if rng.random() < 0.5:
        several = 2 if count > 1 and rng.random() < 0.15 else 1
        kinds[:several] = rng.permutation(NUM_UNSAFE)[:several]
        kinds = [kinds[at] for at in rng.permutation(count)]
    return compose([int(kind) for kind in kinds], style, rng)


def compose(kinds: Sequence[int], style: Style, rng: np.random.Generator) -> Scene:
    """Draw objects of these kinds, in this order, on a fresh background."""
    canvas, owner = background(rng), np.full((SIDE, SIDE), -1, dtype=np.int8)
    boxes: list[tuple[int, int, int, int]] = []
    areas: list[int] = []
    for index, kind in enumerate(kinds):
        sprite = _any_sprite(kind, style, rng)
        left, top = _place(sprite.shape[1], sprite.shape[0], boxes, rng)
        boxes.append(paste(canvas, owner, sprite, left, top, index))
        areas.append(int((sprite[..., 3] > 0.5).sum()))
    shown = [int((owner == index).sum()) for index in range(len(kinds))]
    objects = tuple(
        Object(kind, box, seen / max(area, 1)) for kind, box, seen, area in zip(kinds, boxes, shown, areas, strict=True)
    )
    return Scene(objects, np.clip(np.rint(canvas), 0, 255).astype(np.uint8), owner)


def paste(
    canvas: NDArray[np.float32], owner: NDArray[np.int8], sprite: NDArray[np.float32], left: int, top: int, index: int
) -> tuple[int, int, int, int]:
    """Lay a sprite [height, width, RGBA] over the canvas, in place; gives its box."""
    height, width = sprite.shape[:2]
    window = slice(top, top + height), slice(left, left + width)
    alpha = sprite[..., 3:]
    canvas[window] += alpha * (sprite[..., :3] - canvas[window])
    owner[window][alpha[..., 0] > 0.5] = index
    return left, top, left + width, top + height


def background(rng: np.random.Generator) -> NDArray[np.float32]:
    """[SIDE, SIDE, 3] in 0..255: one colour, a linear gradient between two, or noise around one."""
    form = rng.integers(3)
    first, second = rng.uniform(30, 255, (2, 3)).astype(np.float32)
    if form == 0:
        return np.broadcast_to(first, (SIDE, SIDE, 3)).copy()
    if form == 1:
        angle = rng.uniform(0, 2 * np.pi)
        steps = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)
        slope = np.float32(np.cos(angle)) * steps[None] + np.float32(np.sin(angle)) * steps[:, None]
        share = ((slope / 1.42) + 0.5)[..., None]
        return first + share * (second - first)
    coarse = int(rng.choice((1, 2, 4, 8)))
    grains = rng.normal(0, rng.uniform(5, 30), (SIDE // coarse, SIDE // coarse, 3)).astype(np.float32)
    return np.clip(first + grains.repeat(coarse, 0).repeat(coarse, 1), 0, 255)


def _any_sprite(kind: int, style: Style, rng: np.random.Generator) -> NDArray[np.float32]:
    mirrored = style.mirrored and bool(rng.random() < 0.5)
    size, rotation, hue = (float(rng.choice(values)) for values in (SIZES, style.rotations, style.hues))
    return sprite(kind, int(size), int(rotation), hue, mirrored)


def _place(
    width: int, height: int, taken: Sequence[tuple[int, int, int, int]], rng: np.random.Generator
) -> tuple[int, int]:
    """The first of 20 places that overlaps no earlier box by more than a fifth of the smaller; else the best one."""
    best, least = (0, 0), float("inf")
    for _ in range(20):
        left, top = int(rng.integers(0, SIDE - width + 1)), int(rng.integers(0, SIDE - height + 1))
        overlap = max((_overlap((left, top, left + width, top + height), box) for box in taken), default=0.0)
        if overlap < least:
            best, least = (left, top), overlap
        if overlap <= 0.2:
            break
    return best


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Common area over the smaller area."""
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(across, 0) * max(down, 0) / smaller


@functools.lru_cache(maxsize=40_000)
def sprite(kind: int, size: int, rotation: int, hue: float, mirrored: bool) -> NDArray[np.float32]:
    """[height, width, RGBA], colours in 0..255, alpha in [0, 1]; its longest side is `size` [px]. Read only."""
    picture = glyph(kind)
    if mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rotation:
        picture = picture.rotate(rotation, Image.Resampling.BICUBIC, expand=True)
    picture = _trimmed(picture)
    scale = size / max(picture.size)
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    drawn = np.asarray(picture, dtype=np.float32)
    alpha = drawn[..., 3:] / 255
    colours = drawn[..., :3] / np.maximum(alpha, 1 / 255)  # the drawing is premultiplied
    return np.concatenate([_turned_hue(np.clip(colours, 0, 255), hue), alpha], axis=-1)


def _turned_hue(colours: NDArray[np.float32], turn: float) -> NDArray[np.float32]:
    """Rotate the colours about the grey axis, which keeps their brightness."""
    if turn == 0:
        return colours
    cos, sin = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)
    grey = (1 - cos) / 3
    side = np.sqrt(1 / 3) * sin
    matrix = np.array(
        [
            [cos + grey, grey - side, grey + side],
            [grey + side, cos + grey, grey - side],
            [grey - side, grey + side, cos + grey],
        ],
        dtype=np.float32,
    )
    return np.clip(colours @ matrix.T, 0, 255)


@functools.lru_cache(maxsize=len(KINDS))
def glyph(kind: int) -> Image.Image:
    """The font's drawing of a kind, premultiplied RGBA, margins cut away."""
    font = _font(str(font_path()))
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((FONT_SIZE // 2, FONT_SIZE // 2), KINDS[kind].emoji, font=font, embedded_color=True)
    pixels = np.asarray(_trimmed(canvas), dtype=np.float32)
    premultiplied = np.concatenate([pixels[..., :3] * pixels[..., 3:] / 255, pixels[..., 3:]], axis=-1)
    return Image.fromarray(np.rint(premultiplied).astype(np.uint8), "RGBA")


def _trimmed(picture: Image.Image) -> Image.Image:
    box = picture.getchannel("A").point(lambda value: 255 if value > 8 else 0).getbbox()
    assert box is not None, "the font drew nothing"
    return picture.crop(box)


@functools.lru_cache(maxsize=1)
def _font(path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, FONT_SIZE)


def font_path() -> Path:
    """Where the emoji font lies: $GUARDALIGN_EMOJI_FONT, else the distributions' places."""
    named = os.environ.get("GUARDALIGN_EMOJI_FONT")
    for place in (named,) if named else FONT_PLACES:
        if Path(place).is_file():
            return Path(place)
    raise ConfigError(
        f"the font Noto Color Emoji is not at {named or FONT_PLACES[0]}; "
        "install the package fonts-noto-color-emoji, or name the file in GUARDALIGN_EMOJI_FONT"
    )


def scenes(style: Style, seed: int, count: int, start: int = 0) -> Iterator[Scene]:
    """The scenes start .. start + count - 1 of a series."""
    return (draw_scene(style, seed, number) for number in range(start, start + count))
