"""A detector's word: lower is less safe, flagged is strict, and no row depends on its neighbours."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from guardalign.core.joint_transport import SHARE_SCORES
from guardalign.core.patches import patch_boxes
from guardalign.core.transport import entropy, transport
from guardalign.detectors import DETECTORS, ClipDetector, Concepts, OtDetector
from guardalign.errors import ConfigError, ModelError
from guardalign.models.clip import PatchEncoder
from guardalign.scales import THRESHOLDS
from guardalign.taxonomy import Category, Taxonomy
from guardalign.types import Detection
from tests.small_clip import Look, picture, small_encoder

SCORES = ("margin", "min_cost", "mean_cost", "printed", "safe_probability", "joint")
ALWAYS = 100.0
"""A threshold that every score is below."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PatchEncoder:
    return small_encoder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    """Three categories of unequally many texts."""
    weapons = Category("weapons", "Weapons", ("a gun", "a knife on a table", "a rifle", "a bomb"))
    drugs = Category("drugs", "Drugs", ("a bag of pills", "a syringe"))
    text = Category("text", "Text", ("an image of text asking for harm",))
    return Taxonomy("three", (weapons, drugs, text), ("a cat", "a landscape", "a bowl of fruit"), ("this test",))


LOOKS = [picture(32, 32, 1), picture(64, 20, 2), picture(9, 50, 3), picture(1, 1, 4), picture(70, 70, 5)]


def detect(detector: Any, encoder: PatchEncoder, taxonomy: Taxonomy, looks: list[Look] = LOOKS) -> list[Detection]:
    return list(detector(encoder, taxonomy, [detector.view(encoder, look) for look in looks]))


def close(one: Detection, other: Detection, tolerance: float = 1e-5) -> bool:
    """Equal in all that is discrete, near in all that is not."""
    numbers = zip(
        (one.image_score, *(one.patch_scores or ()), *one.category_scores.values()),
        (other.image_score, *(other.patch_scores or ()), *other.category_scores.values()),
        strict=True,
    )
    same = (one.flagged, one.unsafe_category, one.patch_grid) == (
        other.flagged,
        other.unsafe_category,
        other.patch_grid,
    )
    return same and all(abs(a - b) <= tolerance for a, b in numbers)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "layout",
    [
        {"patches": "tokens"},
        {"patches": "values", "fit": "squash"},
        {"patches": "tokens", "fit": "tiles"},
        {"patches": "grid", "grid_rows": 2, "grid_columns": 3},
    ],
    ids=str,
)
def test_a_picture_has_a_score_for_each_patch_and_category(
    encoder: PatchEncoder, taxonomy: Taxonomy, score: Any, layout: dict[str, Any]
) -> None:
    for look, found in zip(LOOKS, detect(OtDetector(score=score, **layout), encoder, taxonomy), strict=True):
        assert found.patch_scores is not None and found.patch_grid is not None
        assert len(found.patch_scores) == found.patch_grid.num_patches
        assert len(patch_boxes(found.patch_grid, look.width, look.height)) == len(found.patch_scores)
        assert list(found.category_scores) == ["weapons", "drugs", "text"]
        assert all(0 <= distance <= 2 for distance in found.category_scores.values())
        assert found.image_score == min(found.patch_scores)
        assert found.sinkhorn_iterations is not None and found.sinkhorn_iterations >= 1
        assert found.marginal_error is not None and found.marginal_error < 0.01


@pytest.mark.parametrize("score", SCORES)
def test_flagged_and_unsafe_are_strictly_below_the_threshold(
    encoder: PatchEncoder, taxonomy: Taxonomy, score: Any
) -> None:
    (free,) = detect(OtDetector(score=score, threshold=-ALWAYS), encoder, taxonomy, LOOKS[:1])
    assert free.patch_scores is not None and not free.flagged and free.unsafe_patches == ()
    lowest, *_, highest = ordered = sorted(set(free.patch_scores))
    for threshold, unsafe in ((lowest, 0), (ordered[1], 1), (highest, 15), (ALWAYS, 16)):
        (found,) = detect(OtDetector(score=score, threshold=threshold), encoder, taxonomy, LOOKS[:1])
        assert found.threshold == threshold and found.patch_scores == free.patch_scores
        assert found.flagged is (unsafe > 0) and len(found.unsafe_patches) == unsafe
        assert found.unsafe_patches == tuple(i for i, s in enumerate(free.patch_scores) if s < threshold)


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("options", [{}, {"fit": "squash"}], ids=str)
def test_a_row_does_not_depend_on_its_batch(
    encoder: PatchEncoder, taxonomy: Taxonomy, name: str, options: dict[str, Any]
) -> None:
    detector = DETECTORS[name](**options)
    together = detect(detector, encoder, taxonomy)
    assert all(
        close(detect(detector, encoder, taxonomy, [look])[0], found)
        for look, found in zip(LOOKS, together, strict=True)
    )
    backwards = detect(detector, encoder, taxonomy, LOOKS[::-1])
    assert all(close(one, other) for one, other in zip(backwards[::-1], together, strict=True))
    assert detect(detector, encoder, taxonomy) == together
    assert detect(detector, encoder, taxonomy, []) == []


def test_rows_do_not_depend_on_how_many_costs_are_held(
    encoder: PatchEncoder, taxonomy: Taxonomy, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = detect(OtDetector(fit="tiles"), encoder, taxonomy)
    monkeypatch.setattr("guardalign.detectors.ot.LARGEST_COST_TENSOR", 1)
    apart = detect(OtDetector(fit="tiles"), encoder, taxonomy)
    assert all(close(one, other) for one, other in zip(together, apart, strict=True))


def test_a_missing_variant_is_no_variant(encoder: PatchEncoder, taxonomy: Taxonomy) -> None:
    """The ragged batch of categories gives each category the costs that it has alone among equally long ones."""
    concepts = Concepts.embed(encoder, taxonomy)
    assert concepts.mask.sum(1).tolist() == [4, 2, 1]
    texts = [text for category in taxonomy.categories for text in category.texts]
    torch.testing.assert_close(concepts.variants[concepts.mask], encoder.encode_texts(texts))
    torch.testing.assert_close(concepts.means.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("score", SCORES)
def test_a_detection_is_the_method_done_by_hand(encoder: PatchEncoder, taxonomy: Taxonomy, score: Any) -> None:
    """One category at a time, its own texts only, the patches of the picture only: nothing is padded."""
    look = LOOKS[1]
    (found,) = detect(OtDetector(score=score, tolerance=1e-5), encoder, taxonomy, [look])
    (seen,) = encoder.encode([encoder.view(look)])
    assert not seen.valid.all(), "the picture must leave padding cells"
    x_P, s = seen.patches[seen.valid], encoder.logit_scale
    texts = [encoder.encode_texts(category.texts) for category in taxonomy.categories]
    means = normalize(torch.stack([group.mean(0) for group in texts]), dim=-1)
    a = (-entropy(s * x_P @ means.T) / 0.5).softmax(0)
    costs = []
    for k, group in enumerate(texts):
        logits = (s * means @ seen.image).repeat(len(group), 1)
        logits[:, k] = s * group @ seen.image
        b = (-entropy(logits) / 0.5).softmax(0)
        solved = transport((1 - group @ x_P.T)[None, None], a[None], b[None, None], 0.1, 500, 1e-5)
        costs.append(solved.conditional_cost[0, 0])
        distance = found.category_scores[taxonomy.categories[k].name]
        assert distance == pytest.approx(float(solved.distance), abs=1e-5)
    stacked, anchors = torch.stack(costs), 1 - encoder.encode_texts(taxonomy.benign_anchors) @ x_P.T
    logits = s * torch.cat([means, encoder.encode_texts(taxonomy.benign_anchors)]) @ x_P.T
    log_c = torch.zeros(len(logits))
    for _ in range(50):
        log_mass = ((logits + log_c[:, None]).log_softmax(0) + a.log()).logsumexp(1)
        log_c = 0.2 * (-torch.tensor(len(logits)).log() - log_mass + log_c)
    by_hand = {
        "safe_probability": logits.softmax(0)[3:].sum(0),
        "joint": (logits + log_c[:, None]).softmax(0)[3:].sum(0),
        "margin": stacked.amin(0) - anchors.amin(0),
        "min_cost": stacked.amin(0),
        "mean_cost": stacked.mean(0),
        "printed": a * stacked.sum(0),
    }
    torch.testing.assert_close(torch.tensor(found.patch_scores), by_hand[score], rtol=1e-4, atol=1e-5)


def towards(look: Look, encoder: PatchEncoder, aim: str, taxonomy: Taxonomy) -> Taxonomy:
    """The taxonomy with a text standing for the very picture: its embedding is put under that text's name."""
    (seen,) = encoder.encode([encoder.view(look)])
    encoder._texts[aim] = seen.patches[5]
    return taxonomy


@pytest.mark.parametrize("score", SCORES)
def test_a_patch_that_is_what_an_unsafe_text_says_scores_lowest(tmp_path: Path, taxonomy: Taxonomy, score: Any) -> None:
    encoder = small_encoder(tmp_path)
    (before,) = detect(OtDetector(score=score), encoder, taxonomy, LOOKS[:1])
    towards(LOOKS[0], encoder, "a syringe", taxonomy)
    (after,) = detect(OtDetector(score=score), encoder, taxonomy, LOOKS[:1])
    assert before.patch_scores is not None and after.patch_scores is not None
    assert after.patch_scores[5] < before.patch_scores[5]
    if score not in ("mean_cost", "printed"):
        assert after.image_score < before.image_score and after.unsafe_category == "drugs"
        assert min(after.category_scores, key=after.category_scores.__getitem__) == "drugs"


def test_a_patch_that_is_what_an_anchor_says_scores_highest(tmp_path: Path, taxonomy: Taxonomy) -> None:
    encoder = small_encoder(tmp_path)
    towards(LOOKS[0], encoder, "a cat", taxonomy)
    for score in ("margin", "safe_probability"):
        (found,) = detect(OtDetector(score), encoder, taxonomy, LOOKS[:1])
        assert found.patch_scores is not None and found.patch_scores[5] > 0
        assert found.threshold == THRESHOLDS["ot"][score]
        assert found.patch_scores[5] == pytest.approx(max(found.patch_scores))


def test_the_joint_plan_without_strength_is_the_safe_probability(encoder: PatchEncoder, taxonomy: Taxonomy) -> None:
    plain = detect(OtDetector(score="safe_probability"), encoder, taxonomy)
    assert detect(OtDetector(score="joint", marginal_strength=0.0), encoder, taxonomy) == plain
    joint = detect(OtDetector(score="joint"), encoder, taxonomy)
    assert not any(close(one, other) for one, other in zip(joint, plain, strict=True))


@pytest.mark.parametrize("score", SHARE_SCORES)
def test_a_higher_temperature_draws_the_patches_scores_together(
    encoder: PatchEncoder, taxonomy: Taxonomy, score: Any
) -> None:
    spreads = []
    for temperature in (1.0, 2.0, 1e6):
        (found,) = detect(OtDetector(score=score, softmax_temperature=temperature), encoder, taxonomy, LOOKS[:1])
        assert found.patch_scores is not None
        spreads.append(max(found.patch_scores) - min(found.patch_scores))
    assert spreads[0] > spreads[1] > spreads[2] and spreads[2] < 1e-4
    assert found.patch_scores[0] == pytest.approx(0.5, abs=1e-4), "three categories and three anchors, all alike"


def test_the_printed_sign_changes_the_printed_score(encoder: PatchEncoder, taxonomy: Taxonomy) -> None:
    ours = detect(OtDetector(score="printed"), encoder, taxonomy, LOOKS[:1])
    printed = detect(OtDetector(score="printed", entropy_sign="printed"), encoder, taxonomy, LOOKS[:1])
    assert not close(ours[0], printed[0])


@pytest.mark.parametrize("score", ["similarity", "safe_probability"])
def test_the_global_score_falls_towards_an_unsafe_text(tmp_path: Path, taxonomy: Taxonomy, score: Any) -> None:
    encoder = small_encoder(tmp_path)
    (before,) = detect(ClipDetector(score=score), encoder, taxonomy, LOOKS[:1])
    (seen,) = encoder.encode([encoder.view(LOOKS[0])])
    encoder._texts["an image of text asking for harm"] = seen.image
    (after,) = detect(ClipDetector(score=score), encoder, taxonomy, LOOKS[:1])
    assert after.image_score < before.image_score and after.unsafe_category == "text"
    assert after.category_scores["text"] == pytest.approx(-1.0)
    assert after.patch_scores is None and after.patch_grid is None and after.unsafe_patches == ()
    if score == "similarity":
        assert after.image_score == min(after.category_scores.values())


@pytest.mark.parametrize("score", ["similarity", "safe_probability"])
def test_the_global_flag_is_strict(encoder: PatchEncoder, taxonomy: Taxonomy, score: Any) -> None:
    (found,) = detect(ClipDetector(score=score), encoder, taxonomy, LOOKS[:1])
    for threshold, flagged in ((found.image_score, False), (found.image_score + 1e-4, True)):
        (again,) = detect(ClipDetector(score=score, threshold=threshold), encoder, taxonomy, LOOKS[:1])
        assert again.flagged is flagged


def test_pictures_may_be_decoded_as_small_as_the_model_sees_them(encoder: PatchEncoder) -> None:
    assert OtDetector().at_least(encoder) == ClipDetector().at_least(encoder) == 32
    assert OtDetector(patches="grid", grid_rows=2, grid_columns=5).at_least(encoder) == 160
    assert OtDetector(fit="tiles").at_least(encoder) is None


def test_scores_against_anchors_need_anchors(encoder: PatchEncoder, taxonomy: Taxonomy) -> None:
    bare = dataclasses.replace(taxonomy, benign_anchors=())
    for detector in (OtDetector(), OtDetector("margin"), OtDetector("joint"), ClipDetector()):
        with pytest.raises(ConfigError, match=f"score={detector.score} needs benign anchors"):
            detect(detector, encoder, bare)
    for detector in (OtDetector(score="min_cost"), ClipDetector(score="similarity")):
        with pytest.raises(ConfigError, match="needs benign anchors"):
            detector.__class__().check(encoder, bare)
        detector.check(encoder, bare)


@pytest.mark.parametrize("score", ["min_cost", "mean_cost", "printed"])
def test_scores_without_anchors_do_not_see_them(encoder: PatchEncoder, taxonomy: Taxonomy, score: Any) -> None:
    bare = dataclasses.replace(taxonomy, benign_anchors=())
    detector = OtDetector(score=score)
    assert all(
        close(one, other)
        for one, other in zip(detect(detector, encoder, bare), detect(detector, encoder, taxonomy), strict=True)
    )


def test_a_tower_without_tokens_is_refused_before_the_first_picture(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path, layers=[1, 1, 1, 1], width=8)
    with pytest.raises(ModelError, match=r"use detector\.patches=grid"):
        OtDetector().at_least(encoder)
    assert OtDetector(patches="grid").at_least(encoder) == 128


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threshold": float("nan")}, "detector.threshold must be a finite number"),
        ({"epsilon": 0.0}, "detector.epsilon must be above 0"),
        ({"patch_temperature": -1.0}, "detector.patch_temperature must be above 0"),
        ({"text_temperature": float("inf")}, "detector.text_temperature must be above 0"),
        ({"max_iterations": 0}, "detector.max_iterations must be positive"),
        ({"tolerance": 1.0}, "detector.tolerance must lie in (0, 1)"),
        ({"patches": "grid", "grid_rows": 0}, "detector.grid_rows must lie in 1..64"),
        ({"grid_rows": 2}, "detector.grid_rows has no effect"),
        ({"patches": "values", "grid_columns": 3}, "detector.grid_columns has no effect"),
        ({"patches": "grid", "fit": "tiles"}, "detector.fit=tiles has no effect"),
        ({"score": "joint", "softmax_temperature": 0.0}, "detector.softmax_temperature must be above 0"),
        ({"score": "joint", "marginal_strength": 1.0}, "detector.marginal_strength must lie in [0, 1)"),
        ({"score": "joint", "marginal_strength": float("nan")}, "detector.marginal_strength must lie in [0, 1)"),
        ({"score": "margin", "softmax_temperature": 2.0}, "detector.softmax_temperature has no effect: score=margin"),
        ({"score": "safe_probability", "marginal_strength": 0.1}, "detector.marginal_strength has no effect"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_out_of_range_or_ignored_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        OtDetector(**options)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("detector", "score", "threshold", "says"),
    [
        (OtDetector, "min_cost", 0.0, "flags no picture"),
        (OtDetector, "mean_cost", 2.1, "flags every picture"),
        (OtDetector, "printed", 0.0, "flags no picture"),
        (OtDetector, "margin", -2.0, "flags no picture"),
        (ClipDetector, "similarity", 0.5, "flags every picture"),
        (ClipDetector, "safe_probability", 0.0, "flags no picture"),
        (OtDetector, "safe_probability", 0.0, "flags no picture"),
        (OtDetector, "joint", 1.1, "flags every picture"),
        (OtDetector, "joint", 0.5, None),
        (OtDetector, "printed", 0.42, None),
        (OtDetector, "margin", 0.0, None),
        (OtDetector, "min_cost", 0.7, None),
        (ClipDetector, "similarity", -0.2, None),
        (ClipDetector, "safe_probability", 0.5, None),
    ],
)
def test_a_threshold_of_another_score_is_warned_of(
    detector: Any, score: str, threshold: float, says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    detector(score=score, threshold=threshold).require_threshold()
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [] if says is None else says in warnings[0] and f"detector.score={score}" in warnings[0]


@pytest.mark.parametrize(
    ("kind", "score", "own"),
    [
        (OtDetector, "margin", 0.0),
        (OtDetector, "safe_probability", 0.9),
        (OtDetector, "joint", 0.9),
        (ClipDetector, "safe_probability", 0.5),
    ],
)
def test_without_a_threshold_the_scores_own_holds(
    encoder: PatchEncoder, taxonomy: Taxonomy, kind: Any, score: str, own: float, caplog: pytest.LogCaptureFixture
) -> None:
    detector = kind(score=score)
    detector.require_threshold()
    assert detector == kind(score=score, threshold=own) and not caplog.records
    for found in detect(detector, encoder, taxonomy):
        assert found.threshold == own and found.flagged == (found.image_score < own)


@pytest.mark.parametrize(
    ("kind", "score"),
    [(OtDetector, "min_cost"), (OtDetector, "mean_cost"), (OtDetector, "printed"), (ClipDetector, "similarity")],
)
def test_a_score_without_a_threshold_of_its_own_scores_but_does_not_flag(
    encoder: PatchEncoder, taxonomy: Taxonomy, kind: Any, score: str, caplog: pytest.LogCaptureFixture
) -> None:
    detector = kind(score=score)
    with pytest.raises(ConfigError) as caught:
        detector.require_threshold()
    sentence = f"detector.score={score} has no threshold of its own: give detector.threshold; guardalign calibrate"
    assert str(caught.value) == f"{sentence} finds one" and not caplog.records
    scores = [found.image_score for found in detect(kind(score=score, threshold=ALWAYS), encoder, taxonomy)]
    bare = detect(detector, encoder, taxonomy)
    assert [found.image_score for found in bare] == scores and not any(found.flagged for found in bare)
    kind(score=score, threshold=scores[0]).require_threshold()


def test_a_global_threshold_is_a_number() -> None:
    with pytest.raises(ConfigError, match=r"detector\.threshold"):
        ClipDetector(threshold=float("inf"))


@pytest.mark.parametrize("detector", DETECTORS.values())
def test_every_setting_is_explained(detector: type[Any]) -> None:
    source = Path(__import__("inspect").getsourcefile(detector)).read_text("utf-8")
    for field in dataclasses.fields(detector):
        line = source.index(f"    {field.name}: ")
        assert source[source.index("\n", line) + 1 :].lstrip().startswith('"""')
