"""Scenes are what their seed says, objects stand where their boxes and cells say, texts keep to their halves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from guardalign.errors import ConfigError
from guardalign.micro.corpus import BACKGROUND, draw_corpus
from guardalign.micro.language import HELD_OUT_TEMPLATES, TEMPLATES, caption, texts_of, with_article
from guardalign.micro.sample import PROOF, SAMPLE, balanced, row_of, seeds
from guardalign.micro.world import (
    GRID,
    KINDS,
    NUM_UNSAFE,
    PLAIN,
    SHIFTED,
    SIDE,
    Scene,
    draw_scene,
    font_path,
    scenes,
)


def has_font() -> bool:
    try:
        font_path()
    except ConfigError:
        return False
    return True


needs_font = pytest.mark.skipif(not has_font(), reason="the font Noto Color Emoji is not installed")


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return list(scenes(PLAIN, 5, 60))


@needs_font
def test_a_scene_is_a_function_of_style_seed_and_number(drawn: list[Scene]) -> None:
    again = draw_scene(PLAIN, 5, 17)
    assert np.array_equal(again.pixels, drawn[17].pixels) and again.objects == drawn[17].objects
    assert not np.array_equal(draw_scene(PLAIN, 6, 17).pixels, again.pixels)
    assert not np.array_equal(draw_scene(SHIFTED, 5, 17).pixels, again.pixels)


@needs_font
def test_objects_lie_inside_their_boxes_and_cells(drawn: list[Scene]) -> None:
    for scene in drawn:
        assert scene.pixels.shape == (SIDE, SIDE, 3)
        for index, item in enumerate(scene.objects):
            left, top, right, bottom = item.box
            rows, columns = np.nonzero(scene.owner == index)
            assert 0 <= left <= columns.min() and columns.max() < right <= SIDE
            assert 0 <= top <= rows.min() and rows.max() < bottom <= SIDE
        assert scene.coverage.sum() * 144 == pytest.approx((scene.owner >= 0).sum())


@needs_font
def test_outside_of_objects_lies_the_background_alone() -> None:
    empty, scene = (draw_scene(PLAIN, 8, number, count) for number, count in ((3, 1), (3, 1)))
    outside = scene.owner < 0
    assert outside.any() and np.array_equal(empty.pixels[outside], scene.pixels[outside])


@needs_font
def test_half_of_the_scenes_are_unsafe_and_kinds_never_repeat() -> None:
    many = list(scenes(PLAIN, 9, 400))
    assert 150 < sum(scene.unsafe for scene in many) < 250
    for scene in many:
        kinds = [item.kind for item in scene.objects]
        assert len(set(kinds)) == len(kinds)
        assert sum(kind < NUM_UNSAFE for kind in kinds) <= 2


@needs_font
def test_the_shifted_style_lies_outside_of_everything_trained() -> None:
    assert not set(PLAIN.rotations) & set(SHIFTED.rotations)
    assert max(map(abs, PLAIN.rotations)) < min(map(abs, SHIFTED.rotations))
    assert max(map(abs, PLAIN.hues)) < min(map(abs, SHIFTED.hues))
    assert SHIFTED.mirrored and not PLAIN.mirrored


def test_held_out_templates_share_no_text_with_training() -> None:
    for kind in KINDS:
        assert not set(texts_of(kind)) & set(texts_of(kind, HELD_OUT_TEMPLATES))
    words = {word for form in TEMPLATES for word in form.split()}
    assert all(word in words for form in HELD_OUT_TEMPLATES for word in form.split() if word != "with")


def test_captions_name_every_object_once() -> None:
    rng = np.random.default_rng(0)
    said = caption([0, 9, 30], rng)
    for kind in (0, 9, 30):
        assert any(with_article(noun) in said for noun in KINDS[kind].nouns), said


@needs_font
def test_a_corpus_is_the_series_and_its_targets_sum_to_one(tmp_path: Path) -> None:
    corpus = draw_corpus(tmp_path, 5, 60)
    first = draw_scene(PLAIN, 5, 41)
    assert np.array_equal(corpus.pixels[41], first.pixels)
    assert [item.kind for item in corpus.layout(41).objects] == [item.kind for item in first.objects]
    targets = corpus.targets(np.arange(60))
    assert targets.shape == (60, GRID * GRID, BACKGROUND + 1)
    assert np.allclose(targets.sum(-1), 1) and targets.min() > -1e-6
    for index, item in enumerate(first.objects):
        assert np.allclose(targets[41, :, item.kind], first.coverage[index], atol=1e-3)


@needs_font
def test_the_shipped_scenes_are_what_the_seeds_say() -> None:
    shipped = pq.read_table(PROOF, filters=[("style", "=", "plain")]).slice(0, 3).to_pylist()
    drawn = balanced(PLAIN, seeds()["test"], 1000)
    for row, (number, scene) in zip(shipped, drawn, strict=False):
        expected = row_of(scene, PLAIN, f"plain-{number:05d}", row["prompt"])
        assert {key: value for key, value in row.items() if key != "image"} == {
            key: value for key, value in expected.items() if key != "image"
        }


def test_shipped_files_are_balanced_and_disjoint_from_training() -> None:
    proof, sample = pq.read_table(PROOF).to_pylist(), pq.read_table(SAMPLE).to_pylist()
    for style in ("plain", "shifted"):
        labels = [row["label"] for row in proof if row["style"] == style]
        assert labels.count("unsafe") == labels.count("benign") == 1000
    assert len(sample) == 200 and sum(row["label"] == "unsafe" for row in sample) == 100
    assert len({row["image"] for row in proof} | {row["image"] for row in sample if row["image"]}) == 4192
    assert len(set(seeds().values())) == len(seeds())
    for row in (*proof, *sample):
        if row["image"] is not None:
            assert (row["label"] == "unsafe") == any(row["unsafe_pixels"]), row["sample_id"]
