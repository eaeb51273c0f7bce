"""What an evaluation is asked for: benchmarks, recipes and models by name, and the settings that all of them share.

A recipe brings its detector, sanitizer and defense (with the CLIP and the taxonomy of the former); what decides an
answer beside them (system prompt, judge) is the same for all, or the comparison would be none; a recipe that decodes
otherwise is told of. Knows nothing of shards or runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from guardalign.benchmarks import BENCHMARKS, Benchmark
from guardalign.config import (
    EMBEDDED,
    AuditConfig,
    Choice,
    ClusterConfig,
    GenerationConfig,
    InputConfig,
    LvlmConfig,
    to_plain,
)
from guardalign.detectors import DETECTORS
from guardalign.errors import ConfigError, require
from guardalign.evaluation.judging import OWN_JUDGES
from guardalign.ignored import ignored_settings
from guardalign.judges import Judge, judge_of, pinned
from guardalign.settings import load_recipe, recipe_names, refuse_settings, states

SUITES: Final[Mapping[str, tuple[str, ...]]] = {"micro": ("micro",)}
"""benchmarks by the name of the suite that they make up"""
BLIND_JUDGES: Final = ("refusal", "none")
"""judges that say nothing of harm"""
TELLS_HARM: Final = ("usr", "asr")
"""metrics that want to know"""
BASELINE: Final = "none"
"""the recipe that the others are compared with"""
SHARD_ROWS: Final = 32
"""samples a shard where nothing is said: each stands there once for every recipe"""
OF_RECIPES: Final = ("recipe", "detector", "sanitizer", "defense", "calibration")
"""settings that only recipes may make"""
MEANINGLESS: Final = ("images", "dry_run")
_INPUTS: Final = tuple(f"input.{each.name}" for each in fields(InputConfig) if each.name != "max_image_pixels")
SHARED: Final = ("lvlm", "judge", "input", "shard_rows")
"""settings that recipes may not differ in"""


@dataclass(frozen=True)
class Asked:
    """A benchmark of the run."""

    benchmark: Benchmark
    """what it reports"""
    input: InputConfig
    """where its rows come from"""
    judge: Judge | None
    """what is said of its answers"""
    judge_choice: Choice
    """the judge's name and options"""

    @property
    def judged_by(self) -> str:
        """A sentence on who decides; a rate means nothing without it."""
        name = self.judge_choice.name
        blind = name in BLIND_JUDGES and any(metric in TELLS_HARM for metric in self.benchmark.metrics)
        advice = "; it cannot tell harm, so there is no USR or ASR: set judge.name to guard, lvlm or endpoint"
        return f"judged by {name}{advice if blind else ''}"

    @property
    def is_as_published(self) -> bool:
        """Whether it is the part that published numbers speak of."""
        return self.input.split == self.benchmark.split


@dataclass(frozen=True)
class Request:
    """One evaluation."""

    shared: AuditConfig
    """what holds for all; its detector, sanitizer and defense are the first recipe's and mean nothing"""
    benchmarks: Mapping[str, Asked]
    """by name: `figstep`, or `mm-safetybench:TYPO` where a part was asked for"""
    recipes: Mapping[str, AuditConfig]
    """by name, in the tables' order"""
    models: Mapping[str, LvlmConfig]
    """by the name that rows and tables give them"""

    def runs_as_published(self, asked: Asked, recipe: str) -> bool:
        """Whether published numbers may stand beside: the whole part that they speak of, under the packaged recipe."""
        whole = asked.is_as_published and self.shared.limit is None
        return (
            whole and recipe in recipe_names() and _method(self.recipes[recipe]) == _method(load_recipe(recipe, (), ()))
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be known to read the tables: the benchmarks' notes, and recipes that decode otherwise."""
        kinds = [f"{name}: {each.judged_by}" for name, each in self.benchmarks.items()]
        kinds += [f"{name}: {each.benchmark.note}" for name, each in self.benchmarks.items() if each.benchmark.note]
        kinds += [] if BASELINE in self.recipes else [f"without the recipe {BASELINE}: no paired tests, no cost ratios"]
        base, first = self.recipes.get(BASELINE, self.shared), BASELINE if BASELINE in self.recipes else "the first"
        usual = to_plain(base.generation)
        for name, config in self.recipes.items():
            own = {key: value for key, value in to_plain(config.generation).items() if value != usual[key]}
            told = ", ".join(f"generation.{key} {value}" for key, value in own.items())
            kinds += [f"recipe {name} decodes with {told}, unlike {first}"] if own else []
        return tuple(kinds)


def make_request(
    suites: Sequence[str],
    benchmarks: Sequence[str],
    recipes: Sequence[str],
    models: Sequence[str],
    files: Sequence[str],
    flags: Sequence[str],
) -> Request:
    """From the command line's words; every mistake is a one-line `ConfigError`."""
    refuse_settings(files, flags, OF_RECIPES, "belongs to the recipes: name recipes, or YAML files of their form")
    refuse_settings(files, flags, MEANINGLESS, "has no meaning for an evaluation")
    refuse_settings(files, flags, _INPUTS, "is no setting here: --benchmarks names the inputs")
    refuse_settings(files, flags, ("lvlm.model",), "is no setting here: --models names the models")
    every = sorted(recipe_names(), key=lambda name: (name != BASELINE, name))
    loaded = _recipes(recipes or every, files, flags)
    shared = next(iter(loaded.values()))
    if not states("shard_rows", files, flags):
        shared = replace(shared, shard_rows=SHARD_ROWS)
    has_judge = states("judge", files, flags)
    named = [*(each for suite in suites for each in _suite(suite)), *benchmarks]
    require(bool(named), f"nothing to evaluate: name --suite ({', '.join(SUITES)}) or --benchmarks NAME=PATH")
    asked = _unique([_asked(words, shared, has_judge) for words in named], "benchmark")
    return Request(shared, asked, loaded, _models(models or [EMBEDDED], shared.lvlm))


def _suite(name: str) -> tuple[str, ...]:
    require(name in SUITES, f"there is no suite {name!r}; one of: {', '.join(SUITES)}")
    return SUITES[name]


def _unique(pairs: Iterable[tuple[str, Any]], kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in pairs:
        require(name not in found, f"two of the {kind}s are called {name}; rename one, or leave it out")
        found[name] = each
    return found


def _recipes(named: Sequence[str], files: Sequence[str], flags: Sequence[str]) -> dict[str, AuditConfig]:
    loaded = _unique(((_recipe_name(word), load_recipe(word, files, flags)) for word in named), "recipe")
    first, shared = next(iter(loaded.items()))
    for name, config in loaded.items():
        _refuse_impossible(name, config)
        for section in SHARED:
            same = to_plain(getattr(config, section)) == to_plain(getattr(shared, section))
            require(same, f"recipes {first} and {name} differ in {section}; a comparison has one, stated beside them")
    return loaded


def _method(config: AuditConfig) -> list[Any]:
    """What a recipe is about; a threshold of the user's own is the user's."""
    return [to_plain(config.detector), to_plain(config.sanitizer), to_plain(config.defense)]


def _recipe_name(word: str) -> str:
    return Path(word).stem if word.endswith((".yaml", ".yml")) else word


def _refuse_impossible(name: str, config: AuditConfig) -> None:
    """A combination that leaves a part of the recipe without effect."""
    model = replace(config.lvlm, revision=None)
    alone = replace(config, generation=GenerationConfig(), cluster=ClusterConfig(), lvlm=model)
    for sentence in ignored_settings(alone):
        raise ConfigError(f"recipe {name}: {sentence}")
    if config.detector.name != "none":
        try:
            DETECTORS[config.detector.name](**config.detector.options).require_threshold()
        except ConfigError as error:
            raise ConfigError(f"recipe {name}: {error}") from None


def _asked(words: str, shared: AuditConfig, has_judge: bool) -> tuple[str, Asked]:
    """`NAME=PATH`, `NAME:PART=PATH`, `NAME=PATH::PICTURES`, or `NAME` alone where the files ship with the package."""
    name, _, place = words.partition("=")
    kind, _, part = name.partition(":")
    benchmark = BENCHMARKS.get(kind)
    require(benchmark is not None, f"there is no benchmark {kind!r}; one of: {', '.join(BENCHMARKS)}")
    assert benchmark is not None
    sentence = f"where is {kind}? write --benchmarks {name}=PATH"
    require(bool(place) or benchmark.ships, sentence)
    path, _, pictures = place.partition("::")
    source = benchmark.input(path, part or None, pictures or None)
    source = replace(source, max_image_pixels=shared.input.max_image_pixels)
    own = None if has_judge else OWN_JUDGES.get(kind)
    if own is not None:
        return name, Asked(benchmark, source, own, own.choice)
    if shared.judge.name == "none":
        return name, Asked(benchmark, source, None, shared.judge)
    choice = pinned(shared.judge)
    return name, Asked(benchmark, source, judge_of(choice), choice)


def _models(named: Sequence[str], shared: LvlmConfig) -> dict[str, LvlmConfig]:
    require(len(named) == 1 or shared.revision is None, "lvlm.revision cannot hold for several models")
    require(EMBEDDED not in named or shared.revision is None, "lvlm.revision has no effect on the embedded model")
    return _unique(((_model_name(word), replace(shared, model=word)) for word in named), "model")


def _model_name(word: str) -> str:
    """A folder's own name, or a hub name as it is; the place of a folder is no part of a result."""
    is_folder = word.startswith((".", "~", "/")) or Path(word).expanduser().is_dir()
    return Path(word).expanduser().resolve().name if is_folder else word
