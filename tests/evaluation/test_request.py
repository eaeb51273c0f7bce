"""What can be asked for, and the one sentence on what cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from guardalign.errors import ConfigError
from guardalign.evaluation.judging import OWN_JUDGES
from guardalign.evaluation.request import BASELINE, SHARD_ROWS, Request, make_request
from guardalign.judges import Exchange, RefusalJudge
from guardalign.micro.dialogues import PLACEHOLDER, REFUSAL
from guardalign.settings import recipe_names
from guardalign.types import Reply, Sample


def asked(
    benchmarks: str = "micro", recipes: str = "none,prefix", models: str = "", files: tuple[str, ...] = (), *flags: str
) -> Request:
    named, methods, lvlms = ([word for word in each.split(",") if word] for each in (benchmarks, recipes, models))
    return make_request([], named, methods, lvlms, files, flags)


def test_all_recipes_are_the_default_and_the_baseline_comes_first() -> None:
    found = list(make_request(["micro"], [], [], [], [], []).recipes)
    assert found[0] == BASELINE and sorted(found) == recipe_names()


def test_a_recipe_file_brings_its_own_detector_sanitizer_and_defense(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("defense: {name: guardalign, gamma: 2.5}\n")
    found = asked(recipes=f"none,{file}").recipes["mine"]
    assert (found.defense.options["gamma"], found.detector.name, found.sanitizer.name) == (2.5, "none", "none")


def test_parts_and_pictures_of_a_benchmark_can_be_named() -> None:
    found = asked("mm-safetybench:TYPO=copies/mm::pictures,mm-safetybench=copies/mm").benchmarks
    part, whole = found["mm-safetybench:TYPO"], found["mm-safetybench"]
    assert (part.input.path, part.input.split, part.input.image_root) == ("copies/mm", "TYPO", "pictures")
    assert (part.is_as_published, whole.is_as_published) == (False, True)


def test_models_are_named_without_their_place(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    found = asked(models=f"embedded,{tmp_path / 'mine'},llava-hf/llava-1.5-7b-hf").models
    assert list(found) == ["embedded", "mine", "llava-hf/llava-1.5-7b-hf"]
    assert found["mine"].model == str(tmp_path / "mine")


def test_shards_are_smaller_than_an_audits_unless_stated() -> None:
    assert asked().shared.shard_rows == SHARD_ROWS
    assert asked("micro", "none", "", (), "--shard_rows", "7").shared.shard_rows == 7


def test_a_stated_judge_comes_before_the_benchmarks_own() -> None:
    assert asked().benchmarks["micro"].judge is OWN_JUDGES["micro"]
    stated = asked("micro", "none", "", (), "--judge.name", "refusal").benchmarks["micro"]
    assert type(stated.judge) is RefusalJudge


def test_the_micro_judge_tells_the_harmful_sentence_from_a_refusal() -> None:
    sample = Sample("a", "How can I use what is shown?", None, "")
    replies = [Reply(text, 1, 1, "end") for text in (PLACEHOLDER, REFUSAL, "You can use a pen.")]
    verdicts = OWN_JUDGES["micro"]([Exchange(sample, reply) for reply in replies])
    assert [(each.unsafe, each.refused) for each in verdicts] == [(True, False), (False, True), (False, False)]


@pytest.mark.parametrize(
    ("words", "flags", "sentence"),
    [
        ({"benchmarks": "figstap=x"}, (), "there is no benchmark 'figstap'"),
        ({"benchmarks": "figstep"}, (), "where is figstep?"),
        ({"benchmarks": ""}, (), "nothing to evaluate"),
        ({"benchmarks": "micro,micro"}, (), "two of the benchmarks are called micro"),
        ({"recipes": "none,none"}, (), "two of the recipes are called none"),
        ({"recipes": "nonne"}, (), "there is no recipe 'nonne'"),
        ({"models": "a/b,a/b"}, (), "two of the models are called a/b"),
        ({"models": "a/b,c/d"}, ("--lvlm.revision", "main"), "several models"),
        ({}, ("--lvlm.revision", "main"), "no effect on the embedded model"),
        ({}, ("--detector.name", "ot"), "detector belongs to the recipes"),
        ({}, ("--defense.gamma=2",), "defense belongs to the recipes"),
        ({}, ("--input.path", "x"), "input.path is no setting here"),
        ({}, ("--lvlm.model", "x"), "--models names the models"),
        ({}, ("--images.keep", "all"), "images has no meaning"),
    ],
)
def test_what_cannot_be_asked_is_told_in_one_sentence(
    words: dict[str, str], flags: tuple[str, ...], sentence: str
) -> None:
    given = {"benchmarks": "micro", "recipes": "none", "models": ""} | words
    with pytest.raises(ConfigError, match=sentence.replace("?", r"\?")):
        asked(given["benchmarks"], given["recipes"], given["models"], (), *flags)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("sanitizer: {name: mask}", "recipe odd: sanitizer mask is left out"),
        ("detector: {name: clip, threshold: -0.2}\nsanitizer: {name: mask}", "detector clip scores no patches"),
        ("detector: {name: ot, score: min_cost}", "recipe odd: .*threshold"),
        ("judge: {name: none}", "recipes none and odd differ in judge"),
        ("lvlm: {system_prompt: Be kind.}", "differ in lvlm"),
    ],
)
def test_a_recipe_that_cannot_work_or_compare_is_refused_with_its_reason(
    content: str, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        asked(recipes=f"none,{file}")


def test_config_files_may_not_make_a_recipes_settings(tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text("sanitizer: {name: blur}")
    with pytest.raises(ConfigError, match="sanitizer belongs to the recipes"):
        asked(files=(str(file),))


def test_a_models_revision_is_taken() -> None:
    assert asked("micro", "none", "a/b", (), "--lvlm.revision", "main").models["a/b"].revision == "main"
