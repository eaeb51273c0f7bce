"""Attacks on a detector of unsafe objects that change the scene before it is drawn. Table at the end.

    scatter    the object is cut into k x k pieces that lie all over the scene
    shrink     the object is drawn smaller
    contrast   the object's colours are blended into what lies beneath
    texture    stripes, noise or another object's surface lie over the object

`attacked_scene` redraws scene (seed, number) of the world and treats its unsafe objects; in a benign scene it treats
benign ones, as many and as often, so that the treatment itself gives nothing away. Everything else stays as it was.
Knows nothing of models; the attack on pixels is in gradient.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from PIL import Image

from guardalign.errors import require
from guardalign.micro.world import (
    KINDS,
    MOST_OBJECTS,
    NUM_UNSAFE,
    PLAIN,
    SIDE,
    SIZES,
    Object,
    Scene,
    Style,
    _any_sprite,
    _place,
    background,
    paste,
    sprite,
)
from guardalign.types import Box

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALPHA_TO_LEVELS: Final = np.array((1, 1, 1, 255), dtype=np.float32)
AIM: Final = 1
"""sets an attack's random numbers apart from its scene's, which stay as they were"""
TWO_UNSAFE: Final = 0.15
"""how often the world puts two unsafe objects into an unsafe scene of more than one"""


@dataclass(frozen=True)
class Layer:
    """A drawing and its place in a scene; an object, or a piece of one."""

    kind: int
    """index into KINDS"""
    drawing: NDArray[np.float32]
    """[height, width, RGBA], colours in 0..255, alpha in [0, 1]"""
    left: int
    """[px]"""
    top: int
    """[px]"""

    @property
    def box(self) -> Box:
        """left, top, right, bottom [px]."""
        return self.left, self.top, self.left + self.drawing.shape[1], self.top + self.drawing.shape[0]

    def beneath(self, canvas: NDArray[np.float32]) -> NDArray[np.float32]:
        """[height, width, 3] what the canvas shows where the drawing will lie."""
        left, top, right, bottom = self.box
        return canvas[top:bottom, left:right]

    def blended(self, over: NDArray[np.float32], share: float) -> Layer:
        """The same silhouette in the colours (1 - share) · own + share · over, `over` being [height, width, 3]."""
        own, alpha = self.drawing[..., :3], self.drawing[..., 3:]
        colours = np.float32(1 - share) * own + np.float32(share) * over
        return replace(self, drawing=np.concatenate([colours, alpha], axis=-1))


@dataclass(frozen=True)
class Around:
    """What an attack may look at besides the object."""

    canvas: NDArray[np.float32]
    """[SIDE, SIDE, 3] in 0..255: what was drawn before the object; not to be written to"""
    others: tuple[Box, ...]
    """where the other objects lie, later ones too"""
    rng: np.random.Generator


class Attack(Protocol):
    """What is drawn instead of an object."""

    def __call__(self, layer: Layer, around: Around) -> list[Layer]:
        """The object's pieces, lowest first."""


@dataclass(frozen=True)
class Scatter:
    """Cut the object into cuts x cuts pieces, each at a random place that spares the other objects."""

    cuts: int
    """in 1..8; 1 leaves the object alone"""

    def __post_init__(self) -> None:
        require(1 <= self.cuts <= 8, f"scatter.cuts must lie in 1..8, not {self.cuts}")

    def __call__(self, layer: Layer, around: Around) -> list[Layer]:
        """cuts² pieces; nothing is lost, nothing doubled."""
        if self.cuts == 1:
            return [layer]
        rows = np.array_split(layer.drawing, self.cuts, axis=0)
        pieces: list[Layer] = []
        for drawing in (piece for row in rows for piece in np.array_split(row, self.cuts, axis=1)):
            taken = [*around.others, *(earlier.box for earlier in pieces)]
            left, top = _place(drawing.shape[1], drawing.shape[0], taken, around.rng)
            pieces.append(Layer(layer.kind, drawing, left, top))
        return pieces


@dataclass(frozen=True)
class Shrink:
    """Draw the object smaller, about the same middle."""

    side: int
    """its longest side [px]; at or above its own, the object stays as it is"""

    def __post_init__(self) -> None:
        require(self.side >= 1, f"shrink.side must be positive, not {self.side}")

    def __call__(self, layer: Layer, around: Around) -> list[Layer]:
        """One smaller layer inside the object's box."""
        height, width = layer.drawing.shape[:2]
        if self.side >= max(height, width):
            return [layer]
        scale = self.side / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        levels = np.rint(layer.drawing * ALPHA_TO_LEVELS).astype(np.uint8)
        small = np.asarray(Image.fromarray(levels, "RGBA").resize(size), dtype=np.float32)
        left, top = layer.left + (width - size[0]) // 2, layer.top + (height - size[1]) // 2
        return [Layer(layer.kind, small / ALPHA_TO_LEVELS, left, top)]


@dataclass(frozen=True)
class Contrast:
    """Blend the object's colours into what lies beneath; its silhouette keeps its owner."""

    opacity: float
    """share of the object's own colours, in (0, 1]; 1 leaves the object alone"""

    def __post_init__(self) -> None:
        require(0 < self.opacity <= 1, f"contrast.opacity must lie in (0, 1], not {self.opacity}")

    def __call__(self, layer: Layer, around: Around) -> list[Layer]:
        """opacity · colours + (1 - opacity) · canvas."""
        return [layer.blended(layer.beneath(around.canvas), 1 - self.opacity)]


@dataclass(frozen=True)
class Texture:
    """Lay stripes or noise about the background's colour, or a benign object's surface, over the object."""

    share: float
    """share of the texture in the object's colours, in [0, 1); 0 leaves the object alone"""

    def __post_init__(self) -> None:
        require(0 <= self.share < 1, f"texture.share must lie in [0, 1), not {self.share}")

    def __call__(self, layer: Layer, around: Around) -> list[Layer]:
        """(1 - share) · colours + share · texture."""
        texture = TEXTURES[int(around.rng.integers(len(TEXTURES)))]
        return [layer.blended(texture(layer, around), self.share)]


def _stripes(layer: Layer, around: Around) -> NDArray[np.float32]:
    """Stripes of 2 to 4 px in one of four directions: the mean colour beneath, and one half the range from it."""
    colour = layer.beneath(around.canvas).mean((0, 1))
    down, across = ((0, 1), (1, 0), (1, 1), (1, -1))[int(around.rng.integers(4))]
    rows, columns = np.indices(layer.drawing.shape[:2])
    odd = (down * rows + across * columns) // int(around.rng.integers(2, 5)) % 2 == 1
    return np.where(odd[..., None], (colour + 127.5) % 255, colour).astype(np.float32)


def _noise(layer: Layer, around: Around) -> NDArray[np.float32]:
    """Normal noise of 80 levels about the mean colour beneath, independent in every pixel and channel."""
    beneath = layer.beneath(around.canvas)
    return np.clip(beneath.mean((0, 1)) + around.rng.normal(0, 80, beneath.shape), 0, 255).astype(np.float32)


def _surface(layer: Layer, around: Around) -> NDArray[np.float32]:
    """A benign object of another kind, at the world's largest size, repeated where it ends."""
    kinds = [kind for kind in range(NUM_UNSAFE, len(KINDS)) if kind != layer.kind]
    other = sprite(kinds[int(around.rng.integers(len(kinds)))], max(SIZES), 0, 0.0, False)
    rows, columns = (
        np.arange(side) % period for side, period in zip(layer.drawing.shape[:2], other.shape, strict=False)
    )
    tiled, beneath = other[rows][:, columns], layer.beneath(around.canvas)
    return beneath + tiled[..., 3:] * (tiled[..., :3] - beneath)


TEXTURES: Final = (_stripes, _noise, _surface)


def attacked_scene(
    attack: Attack, seed: int, number: int, style: Style = PLAIN, num_objects: int | None = None
) -> Scene:
    """`world.draw_scene(style, seed, number, num_objects)` with its `targets` under attack.

    All attacks have the same targets. The owner map tells where the pieces are; an object's box is the least around
    all of them. The area that `Object.visible` refers to is that of the pieces.
    """
    canvas, layers = _layers(style, np.random.default_rng((seed, number)), num_objects)
    rng = np.random.default_rng((seed, number, AIM))
    chosen = targets([layer.kind for layer in layers], rng)
    owner = np.full((SIDE, SIDE), -1, dtype=np.int8)
    drawn: list[list[Layer]] = []
    for index, layer in enumerate(layers):
        around = Around(canvas, tuple(other.box for other in layers if other is not layer), rng)
        drawn.append(attack(layer, around) if index in chosen else [layer])
        for piece in drawn[-1]:
            paste(canvas, owner, piece.drawing, piece.left, piece.top, index)
    objects = tuple(_object(pieces, int((owner == index).sum())) for index, pieces in enumerate(drawn))
    return Scene(objects=objects, pixels=np.clip(np.rint(canvas), 0, 255).astype(np.uint8), owner=owner)


def targets(kinds: Sequence[int], rng: np.random.Generator) -> frozenset[int]:
    """Which objects an attack treats: all unsafe ones; in a benign scene as many as an unsafe one would hold."""
    unsafe = frozenset(index for index, kind in enumerate(kinds) if kind < NUM_UNSAFE)
    several = 2 if len(kinds) > 1 and rng.random() < TWO_UNSAFE else 1
    anyone = frozenset(int(index) for index in rng.permutation(len(kinds))[:several])
    return unsafe or anyone


def _layers(style: Style, rng: np.random.Generator, num_objects: int | None) -> tuple[NDArray[np.float32], list[Layer]]:
    """Background and objects just as `world.draw_scene` lays them out; a test holds the two equal."""
    count = int(rng.integers(1, MOST_OBJECTS + 1)) if num_objects is None else num_objects
    kinds = list(rng.permutation(np.arange(NUM_UNSAFE, len(KINDS)))[:count])
    if rng.random() < 0.5:
        several = 2 if count > 1 and rng.random() < TWO_UNSAFE else 1
        kinds[:several] = rng.permutation(NUM_UNSAFE)[:several]
        kinds = [kinds[at] for at in rng.permutation(count)]
    canvas = background(rng)
    layers: list[Layer] = []
    for kind in map(int, kinds):
        drawing = _any_sprite(kind, style, rng)
        left, top = _place(drawing.shape[1], drawing.shape[0], [layer.box for layer in layers], rng)
        layers.append(Layer(kind, drawing, left, top))
    return canvas, layers


def _object(pieces: Sequence[Layer], seen: int) -> Object:
    lefts, tops, rights, bottoms = zip(*(piece.box for piece in pieces), strict=True)
    area = sum(int((piece.drawing[..., 3] > 0.5).sum()) for piece in pieces)
    return Object(pieces[0].kind, (min(lefts), min(tops), max(rights), max(bottoms)), seen / max(area, 1))


ATTACKS: Final[dict[str, tuple[Attack, ...]]] = {
    "scatter": (Scatter(2), Scatter(3), Scatter(4)),
    "shrink": (Shrink(16), Shrink(12), Shrink(8)),
    "contrast": (Contrast(0.6), Contrast(0.4), Contrast(0.25)),
    "texture": (Texture(0.3), Texture(0.5), Texture(0.7)),
}
"""name -> the attack at rising strength"""
