"""The guard: a culprit costs its own row only, what the user can mend stops the run, no content leaks."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from guardalign.config import ClipConfig
from guardalign.detectors import ClipDetector, OtDetector
from guardalign.errors import ModelError, RowError
from guardalign.guard import Failure, guarded
from guardalign.models.clip import PatchEncoder, View
from guardalign.models.clip_weights import write_random_model
from guardalign.reading import admit
from guardalign.schema import IMAGE, with_columns
from guardalign.stages import Detect
from guardalign.taxonomy import Category, Taxonomy
from guardalign.types import Detection
from tests.small_clip import picture, small_config


@given(st.lists(st.booleans(), max_size=40))
def test_every_culprit_fails_alone(bad: list[bool]) -> None:
    def work(items: Sequence[int]) -> list[int]:
        if any(bad[item] for item in items):
            raise KeyError("the content of a row")
        return [item * 10 for item in items]

    items = list(range(len(bad)))
    found = guarded(work, items, [f"s{item}" for item in items], "generation_failed")
    for item, result in zip(items, found, strict=True):
        if bad[item]:
            assert isinstance(result, Failure)
            assert f"s{item}:" in result.message
            assert "content" not in result.message
        else:
            assert result == item * 10


def test_a_row_error_keeps_its_kind_and_its_words() -> None:
    def work(items: Sequence[int]) -> list[int]:
        raise RowError("prompt_too_long", "prompt of sample a has 9 tokens; the model takes 8")

    (failure,) = guarded(work, [1], ["a"], "generation_failed")
    assert failure == Failure("prompt_too_long", "prompt of sample a has 9 tokens; the model takes 8")


def test_what_the_user_can_mend_stops_the_run() -> None:
    def work(items: Sequence[int]) -> list[int]:
        raise ModelError("no such layer")

    with pytest.raises(ModelError):
        guarded(work, [1, 2], ["a", "b"], "generation_failed")


def test_admission_keeps_read_errors_and_gives_up_blank_prompts() -> None:
    table = pa.table(
        {
            "sample_id": ["a", "b", "c"],
            "prompt": ["hi", " \n", None],
            "error": [None, None, "the line is broken"],
            "error_kind": [None, None, "row_unreadable"],
        },
        schema=pa.schema([(n, pa.string()) for n in ("sample_id", "prompt", "error", "error_kind")]),
    )
    admitted = admit(with_columns(table, {IMAGE: [b"x", None, None]}))
    assert admitted["error_kind"].to_pylist() == [None, "prompt_missing", "row_unreadable"]
    assert admitted["error_stage"].to_pylist() == [None, "read", "read"]
    assert admitted["image_sha256"][0].as_py().startswith("2d711642b726b044")


TAXONOMY = Taxonomy("one", (Category("weapons", "Weapons", ("a gun", "a rifle")),), ("a cat", "a bowl"), ("this test",))


def shard(*ids: str) -> pa.Table:
    """A working table of pictures; those called black hold nothing but black."""
    images = []
    for seed, sample_id in enumerate(ids):
        buffer, look = io.BytesIO(), picture(32, 32, seed).picture
        (Image.new("RGB", look.size) if sample_id.startswith("black") else look).save(buffer, "PNG")
        images.append(buffer.getvalue())
    texts = {name: pa.array([None] * len(ids), pa.string()) for name in ("error", "error_kind", "error_stage")}
    return with_columns(pa.table({"sample_id": list(ids), **texts}), {IMAGE: images})


@dataclass(frozen=True)
class BreaksOnBlack(OtDetector):
    """Gives the last patch of a black picture a score that is no number; the picture's own score stays."""

    wrong: float = math.nan
    """that score"""

    def __call__(self, encoder: PatchEncoder, taxonomy: Taxonomy, views: Sequence[View]) -> list[Detection]:
        """The detections, one of them broken."""
        found = super().__call__(encoder, taxonomy, views)
        broken = [replace(one, patch_scores=(*(one.patch_scores or ())[:-1], self.wrong)) for one in found]
        return [broken[row] if not view.pixels.any() else found[row] for row, view in enumerate(views)]


def stage(folder: Path, detector: OtDetector | ClipDetector) -> Detect:
    write_random_model(folder, small_config(), seed=0)
    return Detect(ClipConfig(model=f"local-dir:{folder}", device="cpu", batch_size=2), detector, TAXONOMY, 10**6)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_costs_its_own_row_only(tmp_path: Path, wrong: float) -> None:
    """NaN lies below no threshold: the picture would pass unflagged and unmasked."""
    found = stage(tmp_path, BreaksOnBlack(wrong=wrong))(shard("a", "black", "b")).to_pylist()
    assert [row["error_kind"] for row in found] == [None, "detection_failed", None]
    assert [row["error_stage"] for row in found] == [None, "detect", None]
    assert found[1]["error"] == f"sample black: detection failed: a score is {wrong}, no finite number"
    assert found[1]["flagged"] is None and found[1]["image_score"] is None and found[1]["unsafe_patches"] is None
    whole = stage(tmp_path, OtDetector())(shard("a", "black", "b")).to_pylist()
    assert [found[row]["patch_scores"] == whole[row]["patch_scores"] for row in (0, 2)] == [True, True]


@pytest.mark.parametrize("detector", [OtDetector(), OtDetector("margin"), ClipDetector(), ClipDetector("similarity")])
def test_a_broken_model_passes_no_picture(tmp_path: Path, detector: OtDetector | ClipDetector) -> None:
    detect = stage(tmp_path, detector)
    detect.encoder.encode_texts(["a gun"])
    detect.encoder._texts["a gun"] = torch.full_like(detect.encoder._texts["a gun"], torch.nan)
    found = detect(shard("a", "b", "c")).to_pylist()
    assert [row["error_kind"] for row in found] == ["detection_failed"] * 3
    assert all("no finite number" in row["error"] and row["flagged"] is None for row in found)
