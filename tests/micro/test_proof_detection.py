"""The proof's scores are the detectors' own, its figures are right where the answer is known, its tables whole."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn.functional import normalize

from guardalign.config import ClipConfig
from guardalign.core.images import decode
from guardalign.core.statistics import auroc
from guardalign.core.transport import PATCH_SCORES, EntropySign
from guardalign.detectors import ClipDetector, Concepts, OtDetector
from guardalign.errors import ConfigError, InputError
from guardalign.micro import concepts, proof_scores
from guardalign.micro.chosen import best_threshold, choose_thresholds, mask_iou, read_thresholds, write_thresholds
from guardalign.micro.language import TEMPLATES, texts_of
from guardalign.micro.proof_attacks import TARGETS, attack_table, attacked_sets, moved_pictures
from guardalign.micro.proof_detection import (
    DEFAULT,
    LAYOUTS,
    auroc_table,
    detection_tables,
    pointing_table,
    threshold_table,
)
from guardalign.micro.proof_scenes import Scenes, read_scenes
from guardalign.micro.proof_scores import (
    GLOBAL_ODDS,
    PATCH_COSINE,
    PATCH_ODDS,
    SCORES,
    Scored,
    Seen,
    granted,
    see,
    transport_name,
)
from guardalign.micro.sample import row_of, write
from guardalign.micro.separation import add_one, binned_auroc, divergence, floored, separation_table
from guardalign.micro.tables import as_json, tables_of
from guardalign.micro.world import FONT_PLACES, KINDS, PLAIN, SHIFTED, SIDE, Object, Scene, Style
from guardalign.models.clip import PatchEncoder
from guardalign.taxonomy import load_taxonomy
from tests.small_clip import small_encoder

SIGNS: tuple[EntropySign, ...] = get_args(EntropySign)
NUM_CELLS = 64


def scene_row(number: int, style: Style = PLAIN, unsafe: bool = True) -> dict[str, Any]:
    """Noise with one rectangle; the font is not needed."""
    rng = np.random.default_rng((number, unsafe, style.mirrored))
    pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    left, top = (int(at) for at in rng.integers(0, 60, 2))
    owner = np.full((SIDE, SIDE), -1, np.int8)
    owner[top : top + 30, left : left + 30] = 0
    pixels[owner == 0] = (250, 10, 10) if unsafe else (10, 10, 250)
    objects = (Object(0 if unsafe else 20, (left, top, left + 30, top + 30), 1.0),)
    others = tuple(Object(21 + at, (0, 0, 1, 1), 0.0) for at in range(number % 3))
    return row_of(Scene((*objects, *others), pixels, owner), style, f"{style.name}-{number}-{unsafe}", "")


def rows(each: int = 6, styles: tuple[Style, ...] = (PLAIN, SHIFTED)) -> list[dict[str, Any]]:
    return [scene_row(at, style, kind) for style in styles for at in range(each) for kind in (True, False)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> PatchEncoder:
    return small_encoder(folder, image_size=SIDE, patch_size=12)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes.of(rows(styles=(PLAIN,)))


@pytest.fixture(scope="module")
def seen(encoder: PatchEncoder, scenes: Scenes) -> Seen:
    return see(encoder, scenes.pictures)


def detections(detector: Any, encoder: PatchEncoder, scenes: Scenes) -> list[Any]:
    taken = [decode(each, 10**6, "a") for each in scenes.pictures]
    return list(detector(encoder, load_taxonomy("micro"), [detector.view(encoder, each) for each in taken]))


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("name", PATCH_SCORES)
def test_a_transport_score_is_the_detectors_own(
    name: Any, sign: EntropySign, encoder: PatchEncoder, scenes: Scenes, seen: Seen
) -> None:
    found = SCORES[transport_name(name, sign)](seen)
    own = detections(OtDetector(score=name, entropy_sign=sign), encoder, scenes)
    assert found.patches is not None
    torch.testing.assert_close(found.patches, torch.tensor([each.patch_scores for each in own]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.images, torch.tensor([each.image_score for each in own]), atol=1e-5, rtol=1e-5)
    distance = SCORES[transport_name("image distance", sign)](seen).images
    nearest = torch.tensor([min(each.category_scores.values()) for each in own])
    torch.testing.assert_close(distance, nearest, atol=1e-5, rtol=1e-5)


def test_scores_of_all_texts_at_once_are_the_detectors_own(encoder: PatchEncoder, scenes: Scenes, seen: Seen) -> None:
    for name, found in ((transport_name("joint"), "joint"), (PATCH_ODDS, "safe_probability")):
        own = detections(OtDetector(score=cast(Any, found)), encoder, scenes)
        images = SCORES[name](seen).images
        expected = torch.tensor([each.image_score for each in own])
        torch.testing.assert_close(images.sigmoid() if name == PATCH_ODDS else images, expected, atol=1e-5, rtol=1e-5)


def test_global_scores_are_the_detectors_own(encoder: PatchEncoder, scenes: Scenes, seen: Seen) -> None:
    similarity, safety = (
        torch.tensor([each.image_score for each in detections(ClipDetector(score=name), encoder, scenes)])
        for name in ("similarity", "safe_probability")
    )
    torch.testing.assert_close(SCORES["global similarity"](seen).images, similarity, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(SCORES[GLOBAL_ODDS](seen).images.sigmoid(), safety, atol=1e-5, rtol=1e-5)


def test_scores_without_transport_are_maxima_over_cells_and_texts(encoder: PatchEncoder, seen: Seen) -> None:
    """By plain loops over the taxonomy's texts."""
    taxonomy = load_taxonomy("micro")
    unsafe = encoder.encode_texts([text for category in taxonomy.categories for text in category.texts])
    cosine = (seen.patches[3] @ unsafe.T).flatten().max()
    torch.testing.assert_close(SCORES[PATCH_COSINE](seen).images[3], -cosine)
    texts = torch.cat([seen.concepts.means, seen.concepts.anchors])
    p_unsafe = (seen.logit_scale * seen.patches[3] @ texts.T).softmax(-1)[:, : len(taxonomy.categories)].sum(-1)
    odds = SCORES[PATCH_ODDS](seen)
    torch.testing.assert_close(odds.images[3].sigmoid(), 1 - p_unsafe.max())
    assert odds.patches is not None and int(odds.patches[3].argmin()) == int(p_unsafe.argmax())


@pytest.mark.parametrize("name", [name for name in SCORES if "printed" not in name and "mean_cost" not in name])
def test_a_picture_of_an_unsafe_text_is_less_safe_than_one_of_an_anchor(name: str) -> None:
    """Texts in all directions, as a trained model has them."""
    draw = torch.Generator().manual_seed(0)
    z_KVD, anchors_AD = normalize(torch.randn(8, 3, 64, generator=draw), dim=-1), torch.eye(64)[:5]
    meant = Concepts(z_KVD, normalize(z_KVD.mean(1), dim=-1), anchors_AD, torch.ones(8, 3, dtype=torch.bool))
    images = torch.stack([z_KVD[2, 1], anchors_AD[3]])
    less, more = SCORES[name](Seen(images, images[:, None].repeat(1, 4, 1), meant, 20.0)).images
    assert less < more


def test_a_new_formulation_appears_by_itself_where_it_takes_what_the_others_take(
    monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    monkeypatch.setitem(PATCH_SCORES, "largest_cost", lambda cost_BKP, a_BP, anchor_cost_BAP: cost_BKP.amax(1))
    monkeypatch.setitem(PATCH_SCORES, "of_its_own", lambda cost_BKP: cost_BKP.amax(1))  # type: ignore[dict-item]
    found = proof_scores._transport_scores()
    assert found.keys() >= {transport_name("largest_cost", sign) for sign in SIGNS}
    assert transport_name("of_its_own") not in found
    patches = found[transport_name("largest_cost")](seen).patches
    assert patches is not None and patches.shape == (len(seen.images), NUM_CELLS)


def test_the_default_is_the_detectors_default() -> None:
    own = OtDetector()
    assert (PATCH_ODDS if own.score == "safe_probability" else transport_name(own.score, own.entropy_sign)) == DEFAULT
    assert DEFAULT in SCORES and {DEFAULT, PATCH_ODDS, GLOBAL_ODDS} <= TARGETS.keys()


# -- concepts ----------------------------------------------------------------------------------------------------------


def test_the_taxonomy_file_is_what_its_generator_writes() -> None:
    assert concepts.PATH.read_text("utf-8") == concepts.written(concepts.micro_taxonomy())
    taxonomy = load_taxonomy("micro")
    assert [category.name for category in taxonomy.categories] == [kind.name for kind in KINDS if kind in KINDS[:8]]
    assert yaml.safe_load(concepts.PATH.read_text("utf-8")) == concepts.micro_taxonomy()


def test_no_text_of_the_taxonomy_was_trained_on() -> None:
    taxonomy = load_taxonomy("micro")
    texts = {text for category in taxonomy.categories for text in category.texts} | set(taxonomy.benign_anchors)
    assert not texts & {text for kind in KINDS for text in texts_of(kind, TEMPLATES)}


# -- figures whose answer is known -------------------------------------------------------------------------------------


def known(scenes: Scenes, sign: float) -> dict[str, Scored]:
    """Every score 0 in unsafe cells and `sign` elsewhere, with a little noise."""
    noise = torch.rand(len(scenes), NUM_CELLS, generator=torch.Generator().manual_seed(0)) / 10
    score = sign * ~torch.from_numpy(scenes.unsafe_cells) + noise
    return dict.fromkeys(SCORES, Scored(score.amin(1), score))


def test_a_perfect_score_fills_the_tables_with_ones(scenes: Scenes) -> None:
    scored = known(scenes, 1.0)
    table = auroc_table("taught", "plain", scored, scenes)
    assert [cell.value for cell in table.column("all")] == [1.0] * len(SCORES)
    assert all(cell.low is not None and cell.low < 1 for cell in table.column("all"))
    assert {cell.value for cell in table.column("6")} == {None}, "no scene has six objects"
    assert {cell.value for cell in table.column(table.columns[-1])} == {0.0, None}, "None: the reference itself"
    masks = pointing_table("taught", "plain", scored, scenes, {DEFAULT: 0.5})
    row = next(row for row in masks.rows if row.label == DEFAULT)
    share = scenes.unsafe_cells[scenes.unsafe].mean()
    assert [cell.value for cell in row.cells] == pytest.approx([1.0, 1.0, share, 0.0, 1.0, 0.0])
    assert masks.cell("chance: a random cell", "pointing").value == pytest.approx(share)


def test_a_reversed_score_fills_them_with_zeros(scenes: Scenes) -> None:
    scored = known(scenes, -1.0)
    assert pointing_table("taught", "plain", scored, scenes, {}).cell(DEFAULT, "pointing").value == 0.0
    assert pointing_table("taught", "plain", scored, scenes, {DEFAULT: -0.5}).cell(DEFAULT, "mask IoU").value == 0.0


def test_a_column_is_of_the_scenes_with_that_number_of_objects(scenes: Scenes) -> None:
    """Right where there is one object, wrong where there are two."""
    wrong = scenes.num_objects == 2
    image = torch.from_numpy(np.where(scenes.unsafe ^ wrong, 0.0, 1.0))
    table = auroc_table("taught", "plain", dict.fromkeys(SCORES, Scored(image)), scenes)
    assert [table.cell(DEFAULT, column).value for column in ("1", "2", "3")] == [1.0, 0.0, 1.0]


def test_a_score_without_a_chosen_threshold_still_points(scenes: Scenes) -> None:
    row = next(r for r in pointing_table("taught", "plain", known(scenes, 1.0), scenes, {}).rows if r.label == DEFAULT)
    assert row.cells[0].value == 1.0 and {cell.value for cell in row.cells[1:]} == {None}


def test_rates_rise_with_the_threshold_from_none_to_all(scenes: Scenes) -> None:
    score = torch.rand(len(scenes), NUM_CELLS, generator=torch.Generator().manual_seed(1))
    table = threshold_table("taught", DEFAULT, Scored(score.amin(1), score), scenes)
    for name in table.columns[1:]:
        values = [cell.value for cell in table.column(name)]
        assert values == sorted(values, key=lambda value: value or 0.0)
    for name in ("false-alarm rate", "detection rate"):
        values = [cell.value for cell in table.column(name)]
        assert values[0] == 0.0 and values[-1] == 1.0, "strictly below: none at the lowest score, all above the highest"


def test_an_unsafe_cell_holds_a_tenth_of_unsafe_pixels() -> None:
    row = scene_row(0) | {"unsafe_pixels": [14, 15] + [0] * 62}
    assert Scenes.of([row]).unsafe_cells[0].tolist() == [False, True] + [False] * 62
    covered = scene_row(0) | {"unsafe_pixels": [14] + [0] * 63}
    assert not Scenes.of([covered]).shown.any() and Scenes.of([covered]).unsafe.all()


def test_the_best_threshold_is_the_planted_one() -> None:
    rng = np.random.default_rng(0)
    unsafe = np.zeros((50, NUM_CELLS), np.bool_)
    unsafe[:, :9] = True
    score = np.where(unsafe, rng.uniform(0, 0.4, unsafe.shape), rng.uniform(0.6, 1, unsafe.shape))
    found = best_threshold(score, unsafe)
    assert 0.39 < found <= 0.61 and mask_iou(score < found, unsafe).mean() > 0.99
    reversed_mask = -score < best_threshold(-score, unsafe)
    assert reversed_mask.mean() > 0.95, "the best that a reversed score can do is to mask nearly everything"


def test_mask_iou_counts_cells() -> None:
    masked = np.array([[True, True, False, False], [False] * 4])
    unsafe = np.array([[False, True, True, False], [True] * 4])
    assert mask_iou(masked, unsafe).tolist() == [1 / 3, 0.0]


def test_chosen_thresholds_are_read_back_and_other_sections_stay(tmp_path: Path) -> None:
    path = tmp_path / "chosen.yaml"
    path.write_text("gamma: 3\n")
    write_thresholds({"taught": {DEFAULT: 0.25}}, path)
    write_thresholds({"taught": {DEFAULT: 0.5}, "contrastive": {}}, path)
    assert read_thresholds("taught", path) == {DEFAULT: 0.5} and read_thresholds("contrastive", path) == {}
    assert yaml.safe_load(path.read_text())["gamma"] == 3
    with pytest.raises(ConfigError, match="of the CLIP 'other'"):
        read_thresholds("other", path)
    with pytest.raises(ConfigError, match="is missing"):
        read_thresholds("taught", tmp_path / "absent.yaml")


# -- separation --------------------------------------------------------------------------------------------------------


def test_divergence_is_zero_for_equal_histograms_and_right_by_hand() -> None:
    counts = np.array([3.0, 0.0, 1.0])
    assert divergence(counts, counts, add_one) == 0 and divergence(counts, 5 * counts, floored) == pytest.approx(0)
    by_hand = 2 / 3 * np.log((2 / 3) / (1 / 3)) + 1 / 3 * np.log((1 / 3) / (2 / 3))
    assert divergence(np.array([1.0, 0.0]), np.array([0.0, 1.0]), add_one) == pytest.approx(by_hand)


def test_the_paper_s_figure_is_made_by_its_smoothing() -> None:
    """The same two disjoint histograms: ln 2.. of one observation each, or ln 1e10."""
    apart = np.array([100.0, 0.0]), np.array([0.0, 100.0])
    assert divergence(*apart, add_one) < 5 < 20 < divergence(*apart, floored)


def test_the_auroc_of_histograms_is_that_of_their_members() -> None:
    unsafe, safe = np.array([0, 0, 1, 2]), np.array([1, 2, 2, 3, 3])
    counts = [np.bincount(values, minlength=4).astype(float) for values in (unsafe, safe)]
    assert binned_auroc(*counts) == pytest.approx(auroc(unsafe.tolist(), safe.tolist()).value)


def test_separation_finds_cells_apart_and_cells_alike(scenes: Scenes) -> None:
    apart = separation_table("taught", known(scenes, 1.0), scenes)
    alike = separation_table("taught", known(scenes, 0.0), scenes)
    assert apart.cell(PATCH_COSINE, "AUROC of cells").value == pytest.approx(1.0, abs=0.01)
    chance = alike.cell(PATCH_COSINE, "AUROC of cells")
    assert chance.low is not None and chance.high is not None and chance.low < 0.5 < chance.high
    column = "KL, 50 bins, floor 1e-10"
    assert (apart.cell(PATCH_COSINE, column).value or 0) > 10 * (alike.cell(PATCH_COSINE, column).value or 0)


# -- attacks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_what_the_gradient_climbs_is_the_score_of_its_column(
    name: str, encoder: PatchEncoder, scenes: Scenes, seen: Seen
) -> None:
    pixels = np.stack([np.asarray(decode(each, 10**6, "a").picture) for each in scenes.pictures])
    levels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    climbed = TARGETS[name](encoder, seen.concepts)(levels).detach()
    torch.testing.assert_close(climbed, SCORES[name](seen).images, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_the_gradient_raises_the_very_score_of_its_column_within_the_radius(
    name: str, encoder: PatchEncoder, scenes: Scenes, seen: Seen
) -> None:
    pixels = np.stack([np.asarray(decode(each, 10**6, "a").picture) for each in scenes.pictures])
    moved = moved_pictures(pixels, scenes.unsafe, TARGETS[name](encoder, seen.concepts), 8 / 255)
    change = np.abs(moved.astype(int) - pixels)
    assert 0 < change.max() <= 8 and all(each.any() for each in change)
    after = SCORES[name](see(encoder, [png(each) for each in moved])).images
    assert (after > SCORES[name](seen).images)[torch.from_numpy(scenes.unsafe)].all()


def png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_the_gradient_lowers_the_auroc_of_its_column(encoder: PatchEncoder, scenes: Scenes) -> None:
    """A random CLIP may see the two kinds the wrong way round: one of the two labellings has an AUROC to lose."""
    few = scenes.first(3)
    both = [dataclasses.replace(few, unsafe=few.unsafe ^ turned) for turned in (False, True)]
    tables = [attack_table("contrastive", encoder, {"none": each}) for each in both]
    assert [row.label for row in tables[0].rows] == ["none", *(f"gradient, {each}/255" for each in (2, 4, 8))]
    for name in TARGETS:
        first, *_, last = max(([cell.value or 0.0 for cell in each.column(name)] for each in tables), key=max)
        assert first >= 0.5 and last < first


@pytest.mark.skipif(not any(Path(place).is_file() for place in FONT_PLACES), reason="needs the emoji font")
def test_every_attack_treats_the_same_scenes() -> None:
    sets = attacked_sets(1, "validation")
    assert len(sets) == 13 and "scatter, cuts 2" in sets and "contrast, opacity 0.25" in sets
    assert all((each.unsafe == sets["none"].unsafe).all() for each in sets.values())
    assert all(each.pictures[0] != sets["none"].pictures[0] for name, each in sets.items() if name != "none")


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_tables_come_out_of_one_call_twice_the_same(encoder: PatchEncoder, folder: Path, tmp_path: Path) -> None:
    write(rows(), tmp_path / "proof.parquet")
    clips = {"contrastive": ClipConfig(model=f"local-dir:{folder}", device="cpu", batch_size=4)}
    write_thresholds(choose_thresholds(clips, Scenes.of(rows(3, (PLAIN,)))), tmp_path / "chosen.yaml")
    assert read_thresholds("contrastive", tmp_path / "chosen.yaml").keys() >= {DEFAULT, PATCH_COSINE, PATCH_ODDS}
    tables = detection_tables(clips, tmp_path / "proof.parquet", tmp_path / "chosen.yaml", each=2, attacks=False)
    again = detection_tables(clips, tmp_path / "proof.parquet", tmp_path / "chosen.yaml", each=2, attacks=False)
    assert as_json(tables) == as_json(again) and tables_of(as_json(tables)) == tables
    assert len(tables) == 7 and all(granted("contrastive") in table.note for table in tables)
    assert [row.label for row in tables[4].rows] == list(LAYOUTS)
    assert {row.label for row in tables[0].rows} == set(SCORES)


def test_a_clip_must_say_how_it_was_trained(folder: Path) -> None:
    assert "Granted by construction" in granted("taught, seed 1") and "Less granted" in granted("contrastive")
    with pytest.raises(ConfigError, match="must say how it was trained"):
        detection_tables({"mine": ClipConfig(model=f"local-dir:{folder}")})


def test_a_missing_proof_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_scenes(tmp_path / "absent.parquet")


def test_a_clip_of_other_cells_is_refused(tmp_path: Path) -> None:
    small_encoder(tmp_path)
    write(rows(2), tmp_path / "proof.parquet")
    write_thresholds({"taught": {}}, tmp_path / "chosen.yaml")
    clips = {"taught": ClipConfig(model=f"local-dir:{tmp_path}", device="cpu")}
    with pytest.raises(ConfigError, match="16 patches a scene"):
        detection_tables(clips, tmp_path / "proof.parquet", tmp_path / "chosen.yaml", attacks=False)
