"""Settings: layers merge in order, flags win, a mistake is one line that names the field and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from guardalign.cli import main
from guardalign.config import EMBEDDED
from guardalign.errors import ConfigError
from guardalign.fingerprint import science
from guardalign.ignored import WITHOUT_REFERENCES, ignored_settings
from guardalign.settings import as_yaml, load_settings, recipe_names
from guardalign.sources import SOURCES


def message(*flags: str, recipe: str | None = None, files: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(recipe, list(files), list(flags))
    text = str(caught.value)
    assert "\n" not in text
    return text


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_loads_with_a_threshold_that_belongs_to_its_score(recipe: str) -> None:
    config = load_settings(recipe, [], [])
    stated = yaml.safe_load((Path(__file__).parents[1] / f"guardalign/recipes/{recipe}.yaml").read_text())
    assert config.detector.name == stated["detector"]["name"]
    assert config.detector.name == "none" or config.detector.options["threshold"] == 0.9
    if config.detector.name == "ot":
        assert load_settings(recipe, [], ["--detector.score", "margin"]).detector.options["threshold"] == 0.0


def test_files_merge_in_order_and_flags_win(tmp_path: Path) -> None:
    first = written(tmp_path, "a.yaml", "shard_rows: 10\ngeneration: {max_new_tokens: 5, temperature: 0.5}\n")
    second = written(tmp_path, "b.yaml", "shard_rows: 20\ngeneration: {max_new_tokens: 6}\n")
    config = load_settings(None, [first, second], ["--generation.max_new_tokens", "7"])
    assert (config.shard_rows, config.generation.max_new_tokens, config.generation.temperature) == (20, 7, 0.5)


def test_another_strategy_drops_what_lower_layers_said_of_the_old_one() -> None:
    config = load_settings("guardalign", [], ["--defense.name", "none"])
    assert config.defense.name == "none"
    assert "gamma" not in config.defense.options


def test_a_key_of_another_class_is_a_mistake_and_changes_no_class() -> None:
    text = message("--defense.name", "none", "--defense.gamma", "1")
    assert "defense.gamma" in text


def test_a_misspelt_flag_names_its_neighbour() -> None:
    assert "did you mean 'detector.threshold'" in message("--detector.treshold", "1")


def test_a_misspelt_key_in_a_file_names_its_neighbour(tmp_path: Path) -> None:
    path = written(tmp_path, "a.yaml", "generation: {max_new_token: 5}\n")
    assert "did you mean 'generation.max_new_tokens'" in message(files=(path,))


def test_a_misspelt_section_in_a_file_is_named(tmp_path: Path) -> None:
    assert "'generations" in message(files=(written(tmp_path, "a.yaml", "generations: {max_new_tokens: 5}\n"),))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--shard_rows", "x"), ("shard_rows", "int", "x")),
        (("--detector.score", "best"), ("detector.score", "margin", "best")),
        (("--shard_rows", "0"), ("shard_rows", "positive")),
        (("--generation.top_p", "1.5"), ("generation.top_p", "(0, 1]")),
        (("--max_error_fraction", "2"), ("max_error_fraction", "[0, 1]")),
        (("--defense.name", "gard"), ("defense.name", "guardalign")),
        (("--input.format", "csv"), ("input.path", "csv")),
        (("--shard_rows",), ("shard_rows", "argument")),
        (("--input.path", "x"), ("input.path", "input.format")),
    ],
)
def test_a_wrong_value_names_the_field_and_what_would_be_right(flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    text = message(*flags)
    assert all(word in text for word in words), text


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    assert "guardalign-detect-only" in message(recipe="guard")


def test_a_missing_or_broken_file_is_one_line(tmp_path: Path) -> None:
    assert "nowhere.yaml" in message(files=(str(tmp_path / "nowhere.yaml"),))
    assert "YAML" in message(files=(written(tmp_path, "a.yaml", "a: [1\n"),))
    assert "list" in message(files=(written(tmp_path, "b.yaml", "- 1\n"),))
    assert "input" in message(files=(written(tmp_path, "c.yaml", "input:\n"),))
    assert "holds no settings" in message(files=(written(tmp_path, "d.yaml", "# nothing\n"),))
    assert "e.yaml: 1 is no name" in message(files=(written(tmp_path, "e.yaml", "1: 2\n"),))
    assert "give --config" in message(files=(written(tmp_path, "f.yaml", "config: g.yaml\n"),))


@pytest.mark.parametrize(
    ("text", "key"), [("limit: 1\nlimit: 2\n", "limit"), ("lvlm:\n  model: a\n  model: b\n", "model")]
)
def test_a_setting_that_a_file_states_twice_is_refused(text: str, key: str, tmp_path: Path) -> None:
    assert f"states {key} twice, in lines" in message(files=(written(tmp_path, "a.yaml", text),))


def test_a_file_may_merge_what_it_has_anchored(tmp_path: Path) -> None:
    path = written(
        tmp_path, "a.yaml", "lvlm: &own\n  batch_size: 3\njudge:\n  name: none\nclip:\n  <<: *own\n  batch_size: 5\n"
    )
    config = load_settings(None, [path], [])
    assert (config.lvlm.batch_size, config.clip.batch_size) == (3, 5)


def test_types_are_named_as_a_user_writes_them() -> None:
    assert "expected one of float, null; got nan" in message("--detector.threshold", "nan")
    assert "guardalign calibrate" in message("--calibration", "5")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--detector.name", "none"), "nothing to blank"),
        (("--detector.name", "clip"), "scores no patches"),
        (("--generation.top_p", "0.5"), "greedily"),
        (("--generation.top_k", "5"), "greedily"),
        (("--detector.name", "none", "--sanitizer.name", "none", "--images.keep", "flagged"), "nothing is flagged"),
        (("--generation.seed", "5"), "generation.seed has no effect at temperature 0"),
        (("--images.thumbnail_size", "5"), "images.keep is none"),
        (("--lvlm.revision", "main"), "one revision"),
        (("--engine", "local", "--cluster.detect_actors", "4"), "cluster.detect_actors: no effect, the local engine"),
        (("--input.url_seconds", "5"), "input.url_seconds has no effect: input.allow_urls is false"),
        (("--input.url_bytes", "5"), "input.url_bytes has no effect: input.allow_urls is false"),
        (("--input.allow_urls", "true"), "input.allow_urls has no effect: rows of input.format embedded name no"),
        (("--input.allow_urls", "true", "--input.format", "micro"), "rows of input.format micro name no pictures"),
    ],
)
def test_a_setting_without_effect_is_told(flags: tuple[str, ...], words: str) -> None:
    (sentence,) = ignored_settings(load_settings("guardalign", [], list(flags)))
    assert words in sentence


def test_settings_of_the_web_that_act_are_passed_over() -> None:
    flags = ["--input.format", "csv", "--input.path", "x.csv", "--input.allow_urls", "true", "--input.url_bytes", "5"]
    assert ignored_settings(load_settings("guardalign", [], flags)) == ()


def test_formats_without_references_are_those_that_refuse_addresses_and_the_embedded_sample() -> None:
    refusing = {name for name, source in SOURCES.items() if "allow_urls" in source.meaningless}
    assert refusing | {EMBEDDED} == WITHOUT_REFERENCES


@pytest.mark.parametrize("recipe", recipe_names())
def test_no_recipe_has_a_setting_without_effect(recipe: str) -> None:
    assert ignored_settings(load_settings(recipe, [], [])) == ()


def test_an_omitted_threshold_is_the_scores_own_number_from_then_on() -> None:
    """So a resume that states the number mixes nothing, and run.json records what was in use."""
    base = ("--detector.name", "clip")
    omitted = load_settings("guardalign", [], base)
    stated = load_settings("guardalign", [], [*base, "--detector.threshold", "0.5"])
    assert omitted == stated and omitted.detector.options["threshold"] == 0.5
    assert science(omitted, {}, {}, "") == science(stated, {}, {}, "")
    ot = load_settings("none", [], ["--detector.name", "ot", "--detector.score", "margin"])
    assert ot.detector.options["threshold"] == 0.0


QUICK = ("--engine", "local", "--cluster.isolated", "false", "--limit", "8", "--generation.max_new_tokens", "2")
BARE = (*QUICK, "--recipe", "none", "--detector.name", "ot", "--detector.score", "min_cost")


@pytest.mark.parametrize("more", [(), ("--dry_run",)])
def test_an_audit_without_a_threshold_ends_in_one_line(
    more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *BARE, "--output", str(tmp_path / "out"), *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == (
        "guardalign: detector.score=min_cost has no threshold of its own: give detector.threshold; guardalign "
        "calibrate finds one"
    )
    assert not list(tmp_path.iterdir())


def test_a_calibration_finds_the_threshold_that_an_audit_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = tmp_path / "t.yaml", ("--unsafe_label", "unsafe", "--false_alarm_rate", "0.5")
    assert main(["calibrate", *BARE, *target, "--output", str(path)]) == 0
    assert capsys.readouterr().err == "", "nobody gave a threshold that could be off the scale"
    assert main(["audit", *BARE, "--config", str(path), "--output", str(tmp_path / "out")]) == 0


def test_printed_settings_read_back_as_themselves(tmp_path: Path) -> None:
    config = load_settings("guardalign", [], ["--shard_rows", "33", "--defense.gamma", "0.25"])
    again = load_settings(None, [written(tmp_path, "a.yaml", as_yaml(config))], [])
    assert again == config


def test_a_file_may_name_the_recipe_and_the_flag_wins(tmp_path: Path) -> None:
    path = written(tmp_path, "a.yaml", "recipe: prefix\n")
    by_file, by_flag = load_settings(None, [path], []), load_settings("none", [path], [])
    assert (by_file.recipe, by_file.defense.name) == ("prefix", "prefix")
    assert (by_flag.recipe, by_flag.defense.name) == ("none", "none")


def test_a_list_flag_says_how_lists_are_written() -> None:
    assert "'[one, two]'" in message("--input.passthrough", "weight")
    assert load_settings(None, [], ["--input.passthrough", "[weight]"]).input.passthrough == ["weight"]


def test_help_tells_every_setting_and_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--shard_rows", "what one commit writes", "--detector.threshold", "--lvlm.dtype", "--recipe NAME"):
        assert words in text, words


def test_the_command_line_ends_in_one_line_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--shard_rows", "x"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("guardalign: shard_rows")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "cluster/profiles").glob("*.yaml")), ids=str)
def test_a_hardware_profile_changes_no_science(path: Path) -> None:
    plain, profiled = load_settings("guardalign", [], []), load_settings("guardalign", [str(path)], [])
    assert plain != profiled
    assert science(plain, {}, {}, "") == science(profiled, {}, {}, "")
