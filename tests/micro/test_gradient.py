"""The gradient attack keeps to its ball and box in whole levels, and raises the detector's own score."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from guardalign.detectors import Concepts, OtDetector
from guardalign.errors import ConfigError, ModelError
from guardalign.micro.gradient import EPSILONS, image_score, projected_gradient, safety_log_odds, transport_score
from guardalign.models.clip import PatchEncoder
from guardalign.taxonomy import Category, Taxonomy
from tests.small_clip import Look, small_encoder

SCORES = ("margin", "min_cost", "mean_cost", "printed")


def pictures(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """Noise that reaches both ends of the box."""
    drawn = np.random.default_rng(seed).integers(-60, 316, (count, side, side, 3))
    return drawn.clip(0, 255).astype(np.uint8)


WEIGHTS = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 32, 32))).float()


def linear(pixels: Tensor) -> Tensor:
    return (pixels * WEIGHTS).sum((1, 2, 3))


def wavy(pixels: Tensor) -> Tensor:
    """No picture's score depends on another's, in any bit."""
    return torch.stack([(40 * picture * WEIGHTS).sin().sum() for picture in pixels])


def levels_moved(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    return np.abs(after.astype(int) - before.astype(int))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PatchEncoder:
    return small_encoder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    """Three categories of unequally many texts."""
    weapons = Category("weapons", "Weapons", ("a gun", "a knife on a table", "a rifle"))
    drugs = Category("drugs", "Drugs", ("a bag of pills", "a syringe"))
    text = Category("text", "Text", ("an image of text asking for harm",))
    return Taxonomy("three", (weapons, drugs, text), ("a cat", "a landscape", "a bowl of fruit"), ("this test",))


@pytest.fixture(scope="module")
def concepts(encoder: PatchEncoder, taxonomy: Taxonomy) -> Concepts:
    return Concepts.embed(encoder, taxonomy)


def as_floats(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def detected(detector: OtDetector, encoder: PatchEncoder, taxonomy: Taxonomy, pixels: np.ndarray) -> list[float]:
    height, width = pixels.shape[1:3]
    looks: list[Any] = [Look(Image.fromarray(picture), width, height) for picture in pixels]
    found = detector(encoder, taxonomy, [detector.view(encoder, look) for look in looks])
    return [each.image_score for each in found]


@given(
    epsilon=st.one_of(st.sampled_from(EPSILONS), st.floats(0, 0.2)),
    steps=st.integers(0, 5),
    step_size=st.one_of(st.none(), st.floats(0, 1)),
    seed=st.integers(0, 2**32),
)
def test_ball_and_box_hold_in_whole_levels(epsilon: float, steps: int, step_size: float | None, seed: int) -> None:
    before = pictures(2, seed=seed % 97)
    after = projected_gradient(before, linear, epsilon, steps, step_size, seed)
    assert after.dtype == np.uint8  # so the box holds
    assert levels_moved(after, before).max() <= 255 * epsilon + 1e-6


def test_the_box_is_kept_where_the_ball_reaches_beyond_it() -> None:
    """uint8 would wrap round: black must not turn white."""
    ends = np.concatenate([np.zeros((1, 32, 32, 3)), np.full((1, 32, 32, 3), 255)]).astype(np.uint8)
    for score in (linear, lambda pixels: -linear(pixels)):
        assert levels_moved(projected_gradient(ends, score, 8 / 255), ends).max() == 8


@pytest.mark.parametrize("epsilon", [0.0, 0.9 / 255])
def test_less_than_a_level_gives_back_the_same_bytes(epsilon: float) -> None:
    before = pictures(3)
    assert projected_gradient(before, linear, epsilon).tobytes() == before.tobytes()


def test_the_input_is_not_written_to() -> None:
    before = pictures(2)
    kept = before.copy()
    projected_gradient(before, linear, 8 / 255)
    assert (before == kept).all()


@pytest.mark.parametrize(("steps", "step_size"), [(10, None), (1, 1.0)])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_a_linear_score_is_driven_to_its_corner(epsilon: float, steps: int, step_size: float | None) -> None:
    before = pictures(3)
    corner = before.astype(int) + round(255 * epsilon) * torch.sign(WEIGHTS).permute(1, 2, 0).int().numpy()
    after = projected_gradient(before, linear, epsilon, steps, step_size)
    assert (after == corner.clip(0, 255)).all()


def test_the_seed_decides_every_byte() -> None:
    before = pictures(2)
    first, again, other = (projected_gradient(before, wavy, 8 / 255, seed=seed) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_a_picture_is_attacked_alike_alone_and_in_company() -> None:
    before = pictures(4)
    together = projected_gradient(before, wavy, 8 / 255)
    for index in range(4):
        assert (projected_gradient(before[index : index + 1], wavy, 8 / 255)[0] == together[index]).all()


def test_no_steps_are_noise_of_the_same_size() -> None:
    before = pictures(2)
    after = projected_gradient(before, linear, 8 / 255, steps=0)
    assert levels_moved(after, before).max() == 8
    assert 0.1 < (after == before).mean() < 0.4  # a sixteenth by rounding, the rest where the box cut it off


def test_what_comes_back_was_scored_and_was_the_best() -> None:
    points: list[Tensor] = []

    def spied(pixels: Tensor) -> Tensor:
        points.append(pixels.detach())
        return wavy(pixels)

    after = as_floats(projected_gradient(pictures(1), spied, 8 / 255))
    assert any(torch.equal(after, point) for point in points)
    assert wavy(after) == max(wavy(point) for point in points)


def test_more_steps_never_do_worse() -> None:
    """Not even where every step overshoots."""
    before = pictures(3)

    def reached(steps: int) -> Tensor:
        return wavy(as_floats(projected_gradient(before, wavy, 8 / 255, steps, step_size=8 / 255)))

    scores = [reached(steps) for steps in range(8)]
    for fewer, more in itertools.pairwise(scores):
        assert (more >= fewer).all()
    assert (scores[-1] > scores[0]).all()


@pytest.mark.parametrize("patches", ["tokens", "values"])
@pytest.mark.parametrize("score", SCORES)
def test_the_score_is_the_detectors_own(
    encoder: PatchEncoder, taxonomy: Taxonomy, concepts: Concepts, score: Any, patches: Any
) -> None:
    detector, pixels = OtDetector(score=score, patches=patches), pictures(3)
    ours = image_score(encoder, transport_score(encoder, concepts, detector), patches)(as_floats(pixels))
    np.testing.assert_allclose(ours.detach().numpy(), detected(detector, encoder, taxonomy, pixels), atol=1e-6)


@pytest.mark.parametrize("score", ["margin", "min_cost", "mean_cost"])
def test_the_attack_raises_the_detectors_score_and_noise_of_its_size_does_not(
    encoder: PatchEncoder, taxonomy: Taxonomy, concepts: Concepts, score: Any
) -> None:
    detector, pixels = OtDetector(score=score), pictures(4)
    own = image_score(encoder, transport_score(encoder, concepts, detector))
    clean, noisy, attacked = (
        np.array(detected(detector, encoder, taxonomy, each))
        for each in (pixels, projected_gradient(pixels, own, 8 / 255, 0), projected_gradient(pixels, own, 8 / 255))
    )
    assert (attacked > clean).all()
    assert ((attacked - clean) > 2 * np.abs(noisy - clean)).all()


def test_a_larger_ball_lets_the_score_rise_further(encoder: PatchEncoder, concepts: Concepts) -> None:
    pixels, own = pictures(4), image_score(encoder, safety_log_odds(encoder, concepts))
    reached = [own(as_floats(projected_gradient(pixels, own, epsilon))).mean().item() for epsilon in (0, *EPSILONS)]
    assert reached == sorted(reached)
    assert reached[0] < reached[-1]


def test_log_odds_rank_as_the_probability_does(encoder: PatchEncoder, concepts: Concepts) -> None:
    g_BD, x_BPD = (torch.nn.functional.normalize(torch.randn(shape), dim=-1) for shape in ((2, 24), (2, 5, 24)))
    texts_ND = torch.cat([concepts.means, concepts.anchors])
    safe_BP = (encoder.logit_scale * x_BPD @ texts_ND.T).softmax(-1)[..., len(concepts.means) :].sum(-1)
    torch.testing.assert_close(safety_log_odds(encoder, concepts)(g_BD, x_BPD).sigmoid(), safe_BP)


def test_the_gradient_is_exact_where_a_category_has_one_text(encoder: PatchEncoder, taxonomy: Taxonomy) -> None:
    single = Taxonomy("single", taxonomy.categories[2:], taxonomy.benign_anchors, taxonomy.sources)
    concepts = Concepts.embed(encoder, single)
    score = transport_score(encoder, concepts, OtDetector(score="margin"))
    x_BPD = torch.nn.functional.normalize(torch.randn(2, 5, 24), dim=-1).requires_grad_()
    (ours,) = torch.autograd.grad(score(x_BPD[:, 0].detach(), x_BPD).sum(), x_BPD)
    direct = (x_BPD @ concepts.anchors.clone().T).amax(-1) - (x_BPD @ concepts.means.clone().T).amax(-1)
    (wanted,) = torch.autograd.grad(direct.sum(), x_BPD)
    torch.testing.assert_close(ours, wanted)


def test_softness_moves_the_gradient_and_not_the_value(encoder: PatchEncoder) -> None:
    theta_P, pixels = torch.linspace(0, 1, 16).requires_grad_(), as_floats(pictures(1))
    for softness, num_moved in ((0.0, 1), (0.2, 16)):
        value_B = image_score(encoder, lambda g, x: theta_P[None], softness=softness)(pixels)
        (gradient,) = torch.autograd.grad(value_B.sum(), theta_P)
        assert value_B.item() == 0
        assert (gradient > 0).sum() == num_moved
        assert gradient.sum().item() == pytest.approx(1, abs=1e-5)


def test_what_the_attack_cannot_do_is_refused(encoder: PatchEncoder, concepts: Concepts) -> None:
    own = image_score(encoder, safety_log_odds(encoder, concepts))
    with pytest.raises(ModelError, match="40 x 40 px; the gradient wants the model's own size, 32 x 32"):
        projected_gradient(pictures(1, side=40), own, 2 / 255)
    with pytest.raises(ConfigError, match="epsilon"):
        projected_gradient(pictures(1), linear, 2.0)
    with pytest.raises(ConfigError, match="steps"):
        projected_gradient(pictures(1), linear, 0.1, steps=-1)


def test_the_model_keeps_no_gradient(encoder: PatchEncoder, concepts: Concepts, tmp_path: Path) -> None:
    own = image_score(encoder, safety_log_odds(encoder, concepts))
    projected_gradient(pictures(1), own, 2 / 255, steps=1)
    assert all(weight.grad is None for weight in encoder._visual.parameters())
