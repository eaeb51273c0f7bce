"""An attack changes its targets and nothing else, at no strength nothing at all, and treats both halves alike."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from guardalign.errors import ConfigError
from guardalign.micro.attacks import (
    AIM,
    ATTACKS,
    TWO_UNSAFE,
    Around,
    Attack,
    Contrast,
    Layer,
    Scatter,
    Shrink,
    Texture,
    attacked_scene,
    targets,
)
from guardalign.micro.world import KINDS, NUM_UNSAFE, PLAIN, SHIFTED, SIZES, draw_scene, font_path, sprite

SEED = 42
NUMBERS = range(24)
NEUTRAL: list[Attack] = [Scatter(1), Shrink(max(SIZES)), Contrast(1.0), Texture(0.0)]
LADDER = [(name, attack) for name, attacks in ATTACKS.items() for attack in attacks]
every_attack = pytest.mark.parametrize("attack", [attack for _, attack in LADDER], ids=str)


@pytest.fixture(scope="module", autouse=True)
def font() -> None:
    try:
        font_path()
    except ConfigError as error:
        pytest.skip(str(error))


@dataclass
class Witness:
    """Does what the attack does, and remembers it."""

    attack: Attack
    seen: list[tuple[Layer, np.ndarray, list[Layer]]] = field(default_factory=list)
    """the object, the canvas before it, its pieces"""

    def __call__(self, layer: Layer, around: Around) -> list[Layer]:
        pieces = self.attack(layer, around)
        self.seen.append((layer, around.canvas.copy(), pieces))
        return pieces


def object_layer(kind: int = 1, size: int = 30) -> Layer:
    return Layer(kind, sprite(kind, size, 0, 0.0, False), 20, 25)


def surroundings(seed: int = 0) -> Around:
    rng = np.random.default_rng(seed)
    return Around(rng.uniform(0, 255, (96, 96, 3)).astype(np.float32), (), rng)


def alpha_map(pieces: list[Layer]) -> np.ndarray:
    """[96, 96] the largest alpha of any piece at a pixel."""
    alpha = np.zeros((96, 96), dtype=np.float32)
    for piece in pieces:
        left, top, right, bottom = piece.box
        alpha[top:bottom, left:right] = np.maximum(alpha[top:bottom, left:right], piece.drawing[..., 3])
    return alpha


@pytest.mark.parametrize("attack", NEUTRAL, ids=str)
@pytest.mark.parametrize(("style", "num_objects"), [(PLAIN, None), (PLAIN, 6), (SHIFTED, None)], ids=str)
def test_an_attack_of_no_strength_leaves_the_worlds_own_scene(attack: Attack, style, num_objects: int | None) -> None:
    for number in NUMBERS:
        attacked, clean = (
            attacked_scene(attack, SEED, number, style, num_objects),
            draw_scene(style, SEED, number, num_objects),
        )
        assert attacked.pixels.tobytes() == clean.pixels.tobytes()
        assert attacked.owner.tobytes() == clean.owner.tobytes()
        assert attacked.objects == clean.objects


@every_attack
def test_the_seed_decides_every_byte(attack: Attack) -> None:
    first, again = attacked_scene(attack, SEED, 3), attacked_scene(attack, SEED, 3)
    assert (first.pixels.tobytes(), first.owner.tobytes()) == (again.pixels.tobytes(), again.owner.tobytes())
    assert first.objects == again.objects
    assert attacked_scene(attack, SEED + 1, 3).pixels.tobytes() != first.pixels.tobytes()


@every_attack
def test_the_label_the_kinds_and_their_order_stay(attack: Attack) -> None:
    for number in NUMBERS:
        attacked, clean = attacked_scene(attack, SEED, number), draw_scene(PLAIN, SEED, number)
        assert [item.kind for item in attacked.objects] == [item.kind for item in clean.objects]
        assert attacked.unsafe == clean.unsafe


@every_attack
def test_only_the_treated_objects_change(attack: Attack) -> None:
    """Outside of what the objects covered before, and cover now, no pixel moves; nor does any other object's box."""
    for number in NUMBERS:
        witness = Witness(attack)
        attacked, clean = attacked_scene(witness, SEED, number), draw_scene(PLAIN, SEED, number)
        touched = alpha_map([layer for seen in witness.seen for layer in (seen[0], *seen[2])]) > 0
        assert (attacked.pixels == clean.pixels)[~touched].all()
        assert (attacked.owner == clean.owner)[~touched].all()
        moved = [a.box for a, b in zip(attacked.objects, clean.objects, strict=True) if a.box != b.box]
        assert len(moved) <= len(witness.seen)


@every_attack
def test_benign_scenes_get_the_same_treatment(attack: Attack) -> None:
    """In unsafe scenes all unsafe objects are treated, in benign ones one or two benign ones, and both show it."""
    changed: Counter[bool] = Counter()
    scenes: Counter[bool] = Counter()
    for number in NUMBERS:
        witness = Witness(attack)
        attacked, clean = attacked_scene(witness, SEED, number), draw_scene(PLAIN, SEED, number)
        treated, unsafe = [layer.kind for layer, _, _ in witness.seen], [o.kind for o in clean.objects if o.unsafe]
        assert treated == unsafe if clean.unsafe else 1 <= len(treated) <= 2
        scenes[clean.unsafe] += 1
        changed[clean.unsafe] += attacked.pixels.tobytes() != clean.pixels.tobytes()
    assert changed == scenes
    assert min(scenes.values()) >= 5


def test_as_many_objects_are_treated_in_benign_scenes_as_in_unsafe_ones() -> None:
    rng, benign, draws = np.random.default_rng(0), [NUM_UNSAFE + at for at in range(4)], 4000
    chosen = [targets(benign, rng) for _ in range(draws)]
    assert np.mean([len(each) == 2 for each in chosen]) == pytest.approx(TWO_UNSAFE, abs=0.02)
    places = Counter(at for each in chosen for at in each)
    assert all(places[at] / draws == pytest.approx((1 + TWO_UNSAFE) / 4, abs=0.03) for at in range(4))
    assert targets([NUM_UNSAFE, 0, NUM_UNSAFE + 1, 7], rng) == {1, 3}
    assert targets([NUM_UNSAFE], rng) == {0}


def test_the_attacks_random_numbers_are_not_the_scenes() -> None:
    """Numpy takes (seed, number, 0) for (seed, number)."""
    scene, aim = (np.random.default_rng((SEED, 5, *tail)).random(8) for tail in ((), (AIM,)))
    assert not np.intersect1d(scene, aim).size


def test_all_attacks_have_the_same_targets() -> None:
    for number in NUMBERS:
        witnesses = [Witness(attack) for _, attack in LADDER]
        for witness in witnesses:
            attacked_scene(witness, SEED, number)
        assert len({tuple(layer.box for layer, _, _ in witness.seen) for witness in witnesses}) == 1


@every_attack
def test_the_owner_map_says_where_the_pieces_are(attack: Attack) -> None:
    """A lone object owns exactly the opaque pixels of its pieces; its box is the least around them; all stay inside."""
    for number in range(8):
        witness = Witness(attack)
        scene = attacked_scene(witness, SEED, number, num_objects=1)
        ((_, canvas, pieces),) = witness.seen
        alpha = alpha_map(pieces)
        assert ((scene.owner == 0) == (alpha > 0.5)).all()
        assert (scene.pixels == np.clip(np.rint(canvas), 0, 255))[alpha == 0].all()
        boxes = np.array([piece.box for piece in pieces])
        assert scene.objects[0].box == (*boxes[:, :2].min(0), *boxes[:, 2:].max(0))
        assert boxes.min() >= 0
        assert boxes.max() <= 96
        assert 0.5 < scene.objects[0].visible <= 1


@pytest.mark.parametrize("cuts", [2, 3, 4, 8])
def test_scattering_loses_nothing_and_doubles_nothing(cuts: int) -> None:
    layer = object_layer()
    pieces = Scatter(cuts)(layer, surroundings())
    assert len(pieces) == cuts * cuts
    whole, scattered = (
        Counter(map(tuple, np.concatenate([p.drawing.reshape(-1, 4) for p in parts]))) for parts in ([layer], pieces)
    )
    assert whole == scattered


def test_more_cuts_reach_more_cells() -> None:
    def cells(attack: Attack) -> float:
        return np.mean([(attacked_scene(attack, SEED, n, num_objects=1).coverage[0] > 0).sum() for n in NUMBERS])

    reached = [cells(Scatter(1)), *(cells(attack) for attack in ATTACKS["scatter"])]
    assert reached == sorted(reached)
    assert reached[-1] > 2 * reached[0]


@pytest.mark.parametrize("side", [16, 12, 8])
def test_a_shrunken_object_has_that_side_lies_in_its_old_box_and_is_still_there(side: int) -> None:
    for kind in range(len(KINDS)):
        layer = object_layer(kind)
        (small,) = Shrink(side)(layer, surroundings())
        assert max(small.drawing.shape[:2]) == side
        assert all(a >= b for a, b in zip(small.box[:2], layer.box[:2], strict=True))
        assert all(a <= b for a, b in zip(small.box[2:], layer.box[2:], strict=True))
        middles = [np.add(each.box[:2], each.box[2:]) / 2 for each in (small, layer)]
        np.testing.assert_allclose(*middles, atol=1)
        assert (small.drawing[..., 3] > 0.5).sum() >= side
        shares = [(drawing[..., 3] > 0.5).mean() for drawing in (small.drawing, layer.drawing)]
        assert shares[0] == pytest.approx(shares[1], abs=0.2)
        means = [np.average(d[..., :3], axis=(0, 1), weights=d[..., 3]) for d in (small.drawing, layer.drawing)]
        np.testing.assert_allclose(*means, atol=12)


@pytest.mark.parametrize("opacity", [0.6, 0.4, 0.25])
def test_contrast_to_what_lies_beneath_falls_to_the_opacity(opacity: float) -> None:
    for number in range(8):
        witness = Witness(Contrast(opacity))
        faded, clean = (attacked_scene(attack, SEED, number, num_objects=1) for attack in (witness, Contrast(1.0)))
        ((_, canvas, _),) = witness.seen
        np.testing.assert_allclose(faded.pixels - canvas, opacity * (clean.pixels - canvas), atol=1.01)
        assert faded.owner.tobytes() == clean.owner.tobytes()


@pytest.mark.parametrize("number", range(12))
def test_a_texture_lies_over_the_object_in_its_share_and_is_strong(number: int) -> None:
    layer = object_layer(kind=int(number % len(KINDS)))
    (half,), (most,) = (Texture(share)(layer, surroundings(number)) for share in (0.4, 0.8))
    over = (half.drawing - layer.drawing) / 0.4
    np.testing.assert_allclose(most.drawing, layer.drawing + 0.8 * over, atol=1e-3)
    assert (half.drawing[..., 3] == layer.drawing[..., 3]).all()
    texture = layer.drawing[..., :3] + over[..., :3]
    assert texture.min() >= -1e-2
    assert texture.max() <= 255 + 1e-2
    assert texture.std() > 40


def test_all_textures_come_up() -> None:
    """Stripes have two colours, noise has nearly as many as pixels, a surface neither."""
    colours = Counter()
    for seed in range(30):
        (layer,) = Texture(1 - 1e-6)(object_layer(), surroundings(seed))
        few = len(np.unique(layer.drawing[..., :3].round().reshape(-1, 3), axis=0))
        colours["stripes" if few <= 4 else "rest"] += 1
    assert 3 <= colours["stripes"] <= 20


def test_every_name_has_a_ladder_of_rising_strength() -> None:
    assert set(ATTACKS) == {"scatter", "shrink", "contrast", "texture"}
    for name, attacks in ATTACKS.items():
        if name != "scatter":
            distances = [
                np.mean(
                    [
                        np.abs(attacked_scene(a, SEED, n).pixels.astype(int) - draw_scene(PLAIN, SEED, n).pixels).mean()
                        for n in NUMBERS
                    ]
                )
                for a in attacks
            ]
            assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize(
    ("make", "value", "name"),
    [
        (Scatter, 0, "cuts"),
        (Scatter, 9, "cuts"),
        (Shrink, 0, "side"),
        (Contrast, 0.0, "opacity"),
        (Texture, 1.0, "share"),
    ],
)
def test_a_strength_out_of_range_is_named(make, value: float, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must .*not {value}"):
        make(value)
