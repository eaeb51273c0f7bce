"""Canaries: sound models pass, damaged ones stop before the first shard, and models that change meanwhile are told."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guardalign.canaries import AS_LOADED, Checked, readiness
from guardalign.canaries.decoding import DecodingCanary
from guardalign.canaries.drift import drift, recorded
from guardalign.canaries.expecting import precision
from guardalign.config import LvlmConfig
from guardalign.defenses.guardalign import GuardAlignDefense
from guardalign.detectors import OtDetector
from guardalign.errors import ModelError, RunFailedError
from guardalign.judges import UNPARSED, Exchange, RefusalJudge
from guardalign.micro import resolve_taxonomy
from guardalign.models import attention
from guardalign.models.clip import PatchEncoder
from guardalign.models.clip_weights import write_random_model
from guardalign.models.lvlm import Lvlm
from guardalign.pipeline import Stage, steps
from guardalign.receipts import Receipt
from guardalign.settings import load_settings
from guardalign.stages import Detect, Generate
from guardalign.taxonomy import load_taxonomy
from guardalign.types import Verdict
from tests.runs import committed, run, table
from tests.small_clip import small_config
from tests.small_lvlms import FAMILIES_BY_TURNS, checkpoint

Damage = Callable[[Any], None]
SLOW = pytest.mark.slow


def stage(name: str, *flags: str, recipe: str = "guardalign") -> Stage:
    """The audit's stage of that name under these settings, as an engine builds it."""
    config = load_settings(recipe, (), flags)
    listed = {step.pool: step for step in reversed(steps(config, load_taxonomy(resolve_taxonomy(config))))}
    return listed[name].make()


def after_loading(monkeypatch: pytest.MonkeyPatch, model: type[Any], damage: Damage) -> None:
    """Every such model is damaged once it is loaded."""
    load = model.load

    def loaded(config: Any) -> Any:
        found = load(config)
        with torch.no_grad():
            damage(found)
        return found

    monkeypatch.setattr(model, "load", loaded)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        pytest.param(("--clip.model", "embedded-contrastive", "--detector.score", "margin"), marks=SLOW),
        pytest.param(("--clip.dtype", "bfloat16", "--detector.patches", "grid"), marks=SLOW),
        ("--detector.score", "printed", "--detector.threshold", "0.4"),
    ],
    ids=" ".join,
)
def test_the_embedded_detectors_pass(flags: tuple[str, ...]) -> None:
    assert isinstance(stage("detect", *flags), Checked)


@pytest.mark.parametrize(
    "flags",
    [
        ("--lvlm.attention", "eager", "--judge.name", "lvlm"),
        pytest.param(("--lvlm.dtype", "bfloat16"), marks=SLOW),
        ("--defense.form", "printed", "--defense.gamma", "1e-7"),
        pytest.param(("--defense.place", "after", "--lvlm.system_prompt", "You are brief."), marks=SLOW),
    ],
    ids=" ".join,
)
def test_the_embedded_lvlm_passes(flags: tuple[str, ...]) -> None:
    assert isinstance(stage("generate", *flags), Checked)


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_every_family_with_random_weights_passes(family: str) -> None:
    config = LvlmConfig(model=str(checkpoint(family)), device="cpu")
    canary = DecodingCanary(Lvlm.load(config), config, [GuardAlignDefense(), GuardAlignDefense(0.01, form="printed")])
    assert canary.check() == () and all(map(math.isfinite, canary.numbers()))


def test_a_clip_of_the_users_own_that_knows_no_colours_is_noted_and_no_more(tmp_path: Path) -> None:
    write_random_model(tmp_path, small_config(), seed=0)
    built = stage("detect", "--clip.model", f"local-dir:{tmp_path}", "--detector.threshold", "0.5")
    assert isinstance(built, Checked)
    assert len(built._notes) == 1 and "calls a red and a blue picture" in built._notes[0]


def test_a_clip_of_a_published_name_must_know_red_from_blue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_model(tmp_path, small_config(), seed=0)
    load = PatchEncoder.load
    here = f"local-dir:{tmp_path}"
    monkeypatch.setattr(PatchEncoder, "load", lambda config: load(dataclasses.replace(config, model=here)))
    with pytest.raises(ModelError, match="'red and blue' failed: expected 'a red picture' and 'a blue picture', got"):
        stage("detect", "--clip.model", "hf-hub:somebody/clip")


def scaled(block: int, factor: float) -> Damage:
    def damage(encoder: Any) -> None:
        for weight in encoder._visual.transformer.resblocks[block].parameters():
            weight.mul_(factor)

    return damage


def red_for_blue(encoder: Any) -> None:
    forward = encoder._forward
    encoder._forward = lambda pixels, kind: forward(np.ascontiguousarray(pixels[..., ::-1]), kind)


def not_normalised(encoder: Any) -> None:
    encoder._mean, encoder._std = torch.zeros(3), torch.full((3,), 255.0)


def swapped_words(encoder: Any) -> None:
    rows = encoder._model.token_embedding.weight
    rows.copy_(rows.roll(1, 0))


def not_a_number(encoder: Any) -> None:
    encoder._visual.proj[3, 5] = math.nan


CLIP_DAMAGES: dict[str, tuple[Damage, str]] = {
    "a weight is nan": (not_a_number, "gave a non-finite embedding"),
    "a layer is doubled": (scaled(1, 2.0), "'packaged scenes' failed: expected the objects pill, syringe, gun, clock"),
    "a layer is halved": (scaled(0, 0.5), "'packaged scenes' failed"),
    "text rows are swapped": (swapped_words, "'packaged scenes' failed"),
    "red stands for blue": (red_for_blue, "'packaged scenes' failed"),
    "normalisation is dropped": (not_normalised, "'packaged scenes' failed"),
}


@pytest.mark.parametrize("clip", ["embedded", pytest.param("embedded-contrastive", marks=SLOW)])
@pytest.mark.parametrize("damage", CLIP_DAMAGES)
def test_a_damaged_clip_is_stopped(clip: str, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how, said = CLIP_DAMAGES[damage]
    after_loading(monkeypatch, PatchEncoder, how)
    with pytest.raises(ModelError, match=said) as stopped:
        stage("detect", "--clip.model", clip)
    told = str(stopped.value)
    assert told.startswith("self-check of stage detect: ") and "--self_check false" in told and "\n" not in told


def test_a_clip_that_sees_nothing_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its weights: all pictures come out alike."""

    def blind(encoder: Any) -> None:
        forward = encoder._forward
        encoder._forward = lambda pixels, kind: forward(np.zeros_like(pixels), kind)

    write_random_model(tmp_path, small_config(), seed=0)
    after_loading(monkeypatch, PatchEncoder, blind)
    with pytest.raises(ModelError, match="'two pictures' failed: expected different embeddings"):
        stage("detect", "--clip.model", f"local-dir:{tmp_path}", "--detector.threshold", "0.5")


def test_a_clip_whose_pictures_hang_on_their_neighbours_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(encoder: Any) -> None:
        forward = encoder._forward

        def mixed(pixels: Any, kind: Any) -> Any:
            images, tokens = forward(pixels, kind)
            return torch.nn.functional.normalize(images + 0.1 * images.mean(0), dim=-1), tokens

        encoder._forward = mixed

    after_loading(monkeypatch, PatchEncoder, leaking)
    with pytest.raises(ModelError, match="'alone and in a batch' failed: expected the same embedding within"):
        stage("detect")


def test_a_detector_that_takes_unsafe_for_safe_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    detect = OtDetector._scores
    monkeypatch.setattr(OtDetector, "_scores", lambda *given: 1 - detect(*given))
    with pytest.raises(ModelError, match="'unsafe and benign scenes' failed"):
        stage("detect")


def words_swapped(lvlm: Any) -> None:
    rows = lvlm.model.get_input_embeddings().weight
    rows.copy_(rows.roll(1, 0))


def layer_doubled(lvlm: Any) -> None:
    for weight in lvlm.model.get_decoder().layers[2].parameters():
        weight.mul_(2)


def nan_weight(lvlm: Any) -> None:
    lvlm.model.get_decoder().layers[1].mlp.up_proj.weight[0, 0] = math.nan


def picture_lost(lvlm: Any) -> None:
    processed = lvlm.writer._processed

    def without(rendered: str, picture: Any) -> Any:
        made = processed(rendered, picture)
        return {name: torch.zeros_like(x) if name == "pixel_values" else x for name, x in made.items()}

    lvlm.writer._processed = without


def padding_seen(lvlm: Any) -> None:
    prefill = lvlm.prefill

    def unmasked(tensors: Any, hidden: bool) -> Any:
        return prefill({**tensors, "attention_mask": torch.ones_like(tensors["attention_mask"])}, hidden)

    lvlm.prefill = unmasked


LVLM_DAMAGES: dict[str, tuple[Damage, str]] = {
    "a weight is nan": (nan_weight, "logits are not finite"),
    "a layer is doubled": (layer_doubled, "'answers about packaged scenes' failed: expected"),
    "words are swapped": (words_swapped, "'answers about packaged scenes' failed: expected"),
    "the picture is lost": (picture_lost, "'two pictures' failed: expected logits that depend on the picture"),
    "padding is seen": (padding_seen, "'alone and beside a longer prompt, with a picture' failed"),
}


@pytest.mark.parametrize("damage", LVLM_DAMAGES)
def test_a_damaged_lvlm_is_stopped(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how, said = LVLM_DAMAGES[damage]
    after_loading(monkeypatch, Lvlm, how)
    with pytest.raises(ModelError, match=said) as stopped:
        stage("generate")
    assert str(stopped.value).startswith("self-check of stage generate: ") and "\n" not in str(stopped.value)


@pytest.mark.parametrize("damage", ["the picture is lost", "padding is seen"])
def test_invariants_need_no_known_answers(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how, said = LVLM_DAMAGES[damage]
    after_loading(monkeypatch, Lvlm, how)
    with pytest.raises(ModelError, match=said):
        stage("generate", "--lvlm.model", str(checkpoint("llava")), "--lvlm.device", "cpu")


def test_a_calibration_that_is_not_applied_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(attention, "score_gain", lambda scores, *_: torch.zeros_like(scores))
        with pytest.raises(
            ModelError, match="'calibration' failed: expected attention to the safety prefix that rises"
        ):
            stage("generate")
        assert readiness(stage("generate", "--defense.gamma", "0")) == "ready, canaries passed"
    plain = attention.CalibratedBatch, "attend", lambda self, kernel, *given: kernel(*given[:-1], **given[-1])
    monkeypatch.setattr(*plain)
    with pytest.raises(ModelError, match="no calibrated attention at all"):
        stage("generate")


def test_a_calibration_that_acts_at_gamma_zero_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    gain = attention.score_gain
    monkeypatch.setattr(attention, "score_gain", lambda scores, gamma, *more: gain(scores, gamma + 0.5, *more))
    with pytest.raises(ModelError, match="'gamma 0' failed: expected the plain model's log-probabilities"):
        stage("generate")


class Nonsense(RefusalJudge):
    def __call__(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [Verdict(None, None, "nonsense", problem=UNPARSED) for _ in exchanges]


class Agreeable(RefusalJudge):
    def refuses(self, answer: str) -> bool:
        return False


@pytest.mark.parametrize(("judge", "said"), [(Nonsense, "2 of 2 unparsed"), (Agreeable, "'a refusal is known' failed")])
def test_a_judge_that_cannot_judge_is_stopped(judge: type[Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RefusalJudge, "ready", lambda self, *_, **__: judge())
    config = load_settings("guardalign", (), ())
    with pytest.raises(ModelError, match=said):
        steps(config, load_taxonomy("micro"))[-1].make()


def test_a_damaged_model_ends_the_audit_before_its_first_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    after_loading(monkeypatch, PatchEncoder, swapped_words)
    assert run("--limit", 4, "--output", tmp_path / "out") == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert "self-check of stage detect: canary 'packaged scenes' failed" in told
    assert committed(tmp_path / "out") == 0


def test_a_dry_run_checks_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--limit", 4, "--dry_run", "true", "--output", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "stage generate: ready, canaries passed" in told and "stage sanitize: ready\n" in told


def test_canaries_change_neither_rows_nor_counters_and_false_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--limit", 6, "--shard_rows", 2, "--judge.name", "lvlm")
    assert run(*flags, "--output", tmp_path / "with") == 0
    assert run(*flags, "--self_check", "false", "--output", tmp_path / "without") == 0
    assert "note      self_check is false" in capsys.readouterr().out
    checked, plain = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("with", "without"))
    assert plain["self_check"] is None and "self_check is false" in plain["notes"][-1]
    assert checked["counters"] == plain["counters"] and checked["totals"]["tokens"] == plain["totals"]["tokens"]
    kept = [each["decoding_steps"].to_pylist() for each in (table(tmp_path / "with"), table(tmp_path / "without"))]
    assert kept[0] == kept[1]
    assert [name.split("/")[0] for name in checked["self_check"]["canaries"]] == ["detect", "generate"]
    assert checked["self_check"]["largest_difference"] == 0 and not checked["self_check"]["drifted_shards"]


def perturbed_after(monkeypatch: pytest.MonkeyPatch, stage: type[Any], num_shards: int, damage: Damage) -> None:
    """The stage's model is damaged when that many shards have passed."""
    call, seen = stage.__call__, [0]

    def counting(self: Any, given: Any) -> Any:
        if seen[0] == num_shards:
            with torch.no_grad():
                damage(self)
        seen[0] += 1
        return call(self, given)

    monkeypatch.setattr(stage, "__call__", counting)


def nudged(stage: Generate) -> None:
    for weight in stage.lvlm.model.get_decoder().layers[3].parameters():
        weight.mul_(1.1)


def nudged_clip(stage: Detect) -> None:
    for weight in stage.encoder._visual.transformer.resblocks[1].parameters():
        weight.mul_(1.1)


@pytest.mark.parametrize(("kind", "damage"), [(Generate, nudged), pytest.param(Detect, nudged_clip, marks=SLOW)])
def test_a_model_that_changes_after_the_third_shard_marks_the_run(
    kind: type[Any], damage: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--limit", 5, "--shard_rows", 1, "--output", tmp_path / "out")
    with monkeypatch.context() as patched:
        perturbed_after(patched, kind, 3, damage)
        assert run(*flags) == 1
    told = capsys.readouterr()
    names = ["results/shard-000003.parquet", "results/shard-000004.parquet"]
    assert "warning   the models drifted: canaries are off by up to" in told.out and names[0] in told.out
    assert told.err.count("\n") == 1 and names[1] in told.err
    found = json.loads((tmp_path / "out/run.json").read_text())["self_check"]
    assert found["drifted_shards"] == names and found["largest_difference"] > 1e-3
    assert table(tmp_path / "out").num_rows == 5
    assert run(*flags) == 1, "a marked run stays marked"
    for name in names:  # as the error says
        (tmp_path / "out" / name).unlink()
    assert run(*flags) == 0
    assert json.loads((tmp_path / "out/run.json").read_text())["self_check"]["drifted_shards"] == []


def receipt(shard: int, loaded: Sequence[float], now: Sequence[float], dtype: str = "float32") -> Receipt:
    name = f"generate/{dtype}/0"
    return Receipt(shard, 2, canaries={name + AS_LOADED: list(loaded), name: list(now)})


def drifted(*receipts: Receipt) -> tuple[str, ...]:
    return drift({str(each.shard): each for each in receipts}).drifted_shards


@pytest.mark.parametrize("bad", range(8))
def test_one_bad_device_among_good_ones_is_named_alone_wherever_it_stands(bad: int) -> None:
    numbers = [[-1.1, -2.0, -3.0] if at == bad else [-1.0, -2.0, -3.0] for at in range(8)]
    found = drift({str(at): receipt(at, each, each) for at, each in enumerate(numbers)})
    assert found.drifted_shards == (str(bad),) and not found.is_undecided
    assert found.largest_difference == pytest.approx(0.1 / 2)


def test_components_are_judged_apart_and_only_finite_ones_set_the_reference() -> None:
    rows = [[math.nan, -2.0], [math.inf, -2.0], [-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0]]
    assert drifted(*(receipt(at, row, row) for at, row in enumerate(rows))) == ("0", "1")
    rows = [[-1.1, -2.0], [-1.0, -2.2], [-1.0, -2.0], [-1.0, -2.0]]
    assert drifted(*(receipt(at, row, row) for at, row in enumerate(rows))) == ("0", "1")
    assert drifted(receipt(0, [math.nan], [math.nan]), receipt(1, [math.nan], [math.nan])) == ("0", "1")


@pytest.mark.parametrize("apart", [0.0045, 0.006, 0.1, 3.0])
def test_without_a_majority_all_are_marked_and_none_is_taken_for_the_right_one(apart: float) -> None:
    one, other = [-3.0], [-3.0 - apart]
    pair = drift({"s0": receipt(0, one, one), "s1": receipt(1, other, other)})
    assert pair.drifted_shards == ("s0", "s1") and pair.is_undecided
    assert pair.warnings[0].startswith("s0 and s1 disagree, and no majority tells which are right: canaries are off by")
    with pytest.raises(RunFailedError, match=r"the models drifted: s0 and s1 disagree, .*; remove these files"):
        pair.require_steady()
    assert drifted(*(receipt(at, each, each) for at, each in enumerate([one, one, other, other]))) == tuple("0123")
    assert drifted(*(receipt(at, each, each) for at, each in enumerate([other, one, one]))) == ("0",)


def test_what_came_of_the_canaries_is_read_back_from_older_records_too() -> None:
    found = drift({"s0": receipt(0, [1.0], [1.0]), "s1": receipt(1, [2.0], [2.0])})
    plain = json.loads(json.dumps(dataclasses.asdict(found)))
    assert recorded(plain).warnings == found.warnings
    del plain["is_undecided"]
    assert not recorded(plain).is_undecided


def test_drift_is_told_from_what_the_workers_measured_when_they_had_loaded() -> None:
    sound = [receipt(0, [-3.0], [-3.0]), receipt(1, [-3.0], [-3.003])]
    assert drifted(*sound) == ()
    assert drifted(receipt(0, [-3.0], [-3.1]), *sound[1:]) == ("0",), "in the very first shard"
    assert drifted(*sound, receipt(2, [-3.1], [-3.1])) == ("2",), "a worker whose model was another from the start"
    assert drifted(*sound, Receipt(2, 2)) == () and drift({"2": Receipt(2, 2)}).unchecked_shards == ("2",)


def test_the_tolerance_of_drift_depends_on_the_number_format() -> None:
    for dtype, small, large in (("float32", 3e-3, 5e-3), ("float16", 6e-2, 9e-2), ("bfloat16", 0.3, 0.5)):
        assert drifted(receipt(0, [-3], [-3], dtype), receipt(1, [-3], [-3 - small], dtype)) == ()
        assert drifted(receipt(0, [-3], [-3], dtype), receipt(1, [-3], [-3 - large], dtype)) == ("1",)
        loaded = [receipt(at, [-3 - large] if at == 0 else [-3], [-3], dtype) for at in range(3)]
        assert drifted(*loaded) == ("0",)


def test_fp32_on_a_gpu_that_rounds_to_tf32_is_held_to_the_bounds_of_fp16() -> None:
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert precision("float32", "cuda") == "float16" and precision("float32", "cpu") == "float32"
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert precision("float32", "cuda") == "float32" and precision("bfloat16", "cuda") == "bfloat16"


def test_what_is_no_number_is_drift() -> None:
    found = drift({"0": receipt(0, [1.0, 2.0], [1.0, math.nan]), "1": receipt(1, [1.0, 2.0], [math.nan])})
    assert found.drifted_shards == ("0", "1") and found.largest_difference is None
    with pytest.raises(RunFailedError, match=r"the models drifted in 2 shards \(0, 1\)"):
        found.require_steady()


def test_a_canary_that_fails_after_a_shard_marks_it_and_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers, calls = DecodingCanary.numbers, [0]

    def breaking(self: DecodingCanary) -> tuple[float, ...]:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("device-side assert")
        return numbers(self)

    monkeypatch.setattr(DecodingCanary, "numbers", breaking)
    assert run("--recipe", "none", "--limit", 3, "--shard_rows", 1, "--output", tmp_path / "out") == 1
    found = json.loads((tmp_path / "out/run.json").read_text())["self_check"]
    assert found["drifted_shards"] == ["results/shard-000001.parquet"] and found["largest_difference"] is None
    assert table(tmp_path / "out").num_rows == 3 and "not finite" in capsys.readouterr().out
