"""What there is to do: shards of every benchmark for every detector and every model, and what the rows depend on.

The samples of all benchmarks are cut into N shards once. Detector d works on the shards d·N .. d·N + N-1, model m
answers the shards m·N .. m·N + N-1. Knows nothing of engines or of tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from guardalign.audit import Prepared
from guardalign.canaries import Canary
from guardalign.canaries.decoding import DecodingCanary
from guardalign.canaries.judging import JudgingCanary
from guardalign.config import AuditConfig, LvlmConfig, to_plain
from guardalign.defenses import Defense, defense_of, fingerprint_of
from guardalign.evaluation.request import Asked, Request
from guardalign.evaluation.stages import (
    EVALUATION,
    AnswerAll,
    AnswerAndJudge,
    DetectOnce,
    Expand,
    JudgeOf,
    Method,
    View,
    with_own_column,
)
from guardalign.fingerprint import refuse_foreign_calibration, science
from guardalign.micro import resolve_clip, resolve_input, resolve_lvlm, resolve_taxonomy
from guardalign.models.clip_weights import clip_fingerprint
from guardalign.models.provenance import COMMIT, seal, weights_fingerprint
from guardalign.pipeline import NONE, Stage, Step, checked, scoring_steps
from guardalign.sanitizers import SANITIZERS
from guardalign.schema import HIDDEN, RESULT_NAMES
from guardalign.sources import INPUT_SCHEMA, Outline, Plan, Shard, Source, make_source
from guardalign.stages import Judge
from guardalign.supervision import PROBLEM
from guardalign.taxonomy import load_taxonomy

OWN = ("expected", "pair", "variant")
"""what a benchmark's source may say of a sample beside an input's usual columns"""


@dataclass(frozen=True)
class Part:
    """A benchmark's shards among those of the run."""

    name: str
    source: Source
    plan: Plan
    first: int
    """number of its first shard"""


@dataclass(frozen=True)
class Samples:
    """The samples of all benchmarks as one source."""

    parts: tuple[Part, ...]
    num_shards: int
    """N"""

    def plan(self, shard_rows: int, limit: int | None) -> Plan:
        """The shards as they were cut; `shard_rows` and `limit` held for each benchmark by itself."""
        shards = [replace(each, index=part.first + each.index) for part in self.parts for each in part.plan.shards]
        files = [replace(file, path=f"{part.name}/{file.path}") for part in self.parts for file in part.plan.files]
        notes = [f"{part.name}: {note}" for part in self.parts for note in part.plan.notes]
        return Plan(tuple(shards), sum(each.num_rows for each in shards), tuple(files), EVALUATION, tuple(notes))

    def read(self, shard: Shard) -> pa.Table:
        """A shard's samples, with the name of their benchmark."""
        part, own = self._part_of(shard)
        return self._as_samples(part.source.read(own), part.name)

    def outline(self, shard: Shard) -> Outline:
        """See `Source.outline`."""
        part, own = self._part_of(shard)
        found = part.source.outline(own)
        return replace(found, rows=self._as_samples(found.rows, part.name))

    def _part_of(self, shard: Shard) -> tuple[Part, Shard]:
        """The benchmark, and the shard as it counts them."""
        number = shard.index % self.num_shards
        part = max((each for each in self.parts if each.first <= number), key=lambda each: each.first)
        return part, replace(shard, index=number - part.first)

    @staticmethod
    def _as_samples(table: pa.Table, benchmark: str) -> pa.Table:
        """A benchmark's rows with its name, and the columns that all benchmarks have."""
        known = [name for name in (*INPUT_SCHEMA.names, *OWN) if name in table.column_names]
        table = with_own_column(table.select(known), "benchmark", [benchmark] * table.num_rows)
        for name in OWN:
            values = table[name].to_pylist() if name in table.column_names else [None] * table.num_rows
            table = with_own_column(table, name, values)
        return table

    def shards_of(self, number: int, shards: Sequence[Shard]) -> list[Shard]:
        """The shards as the detector, or the model, of this number has them."""
        return [replace(each, index=number * self.num_shards + each.index) for each in shards]


@dataclass(frozen=True)
class Comparison:
    """An evaluation that is planned and checked, but not begun."""

    request: Request
    """what was asked for, hub models pinned"""
    samples: Samples
    """every benchmark's"""
    plan: Plan
    """of the samples, once"""
    detectors: tuple[AuditConfig, ...]
    """settings with every distinct detector once"""
    views: dict[str, View]
    """by recipe: what its pictures come to"""
    methods: dict[str, Method]
    """by recipe: how it answers"""
    science: dict[str, Any]
    """what the rows depend on"""

    @property
    def answers(self) -> Prepared:
        """All shards of answers as an audit knows them."""
        shards = [each for m in range(len(self.request.models)) for each in self.samples.shards_of(m, self.plan.shards)]
        rows = len(self.request.models) * self.plan.num_rows
        plan = replace(self.plan, shards=tuple(shards), num_rows=rows)
        shared = self.request.shared
        return Prepared(shared, self.samples, plan, load_taxonomy(resolve_taxonomy(shared)), self.science)


def prepare(request: Request) -> Comparison:
    """Plans the inputs and seals what the rows depend on; raises a `UserError` where something is missing."""
    models = {name: _pinned(config) for name, config in request.models.items()}
    request = replace(request, models=models)
    samples = _samples(request)
    plan = samples.plan(request.shared.shard_rows, request.shared.limit)
    detectors = {_detector_key(each): each for each in request.recipes.values() if each.detector.name != NONE}
    numbers = {key: number for number, key in enumerate(detectors)}
    views = _views(request, numbers)
    methods = {name: _method(each) for name, each in request.recipes.items()}
    sealed = _sealed(request, methods)
    return Comparison(request, samples, plan, tuple(detectors.values()), views, methods, sealed)


def _method(config: AuditConfig) -> Method:
    return Method(config.defense.name, defense_of(config), config.generation)


def _pinned(config: LvlmConfig) -> LvlmConfig:
    """With a hub model's commit: every node loads this very one, whatever a branch points to by then."""
    found = weights_fingerprint(resolve_lvlm(config).model, config.revision)
    return replace(config, revision=found[COMMIT]) if COMMIT in found else config


def _samples(request: Request) -> Samples:
    reserved = {*RESULT_NAMES, *HIDDEN, PROBLEM, *(each.name for each in EVALUATION)} - set(OWN)
    parts: list[Part] = []
    first = 0
    for name, asked in request.benchmarks.items():
        source = make_source(resolve_input(asked.input), reserved=tuple(reserved))
        plan = source.plan(request.shared.shard_rows, request.shared.limit)
        parts.append(Part(name, source, plan, first))
        first += len(plan.shards)
    return Samples(tuple(parts), first)


def _detector_key(config: AuditConfig) -> str:
    """Equal for recipes whose detection gives the same."""
    return seal({"clip": to_plain(config.clip), "taxonomy": config.taxonomy, "detector": to_plain(config.detector)})


def _views(request: Request, numbers: dict[str, int]) -> dict[str, View]:
    """Recipes with the same detector and sanitizer have the very same view."""
    views: dict[str, View] = {}
    made: dict[str, View] = {}
    for name, config in request.recipes.items():
        detector = numbers.get(_detector_key(config)) if config.detector.name != NONE else None
        key = seal({"detector": detector, "sanitizer": to_plain(config.sanitizer)})
        if key not in made:
            none = config.sanitizer.name == NONE
            sanitizer = None if none else SANITIZERS[config.sanitizer.name](**config.sanitizer.options)
            made[key] = View(detector, sanitizer)
        views[name] = made[key]
    return views


def _sealed(request: Request, methods: dict[str, Method]) -> dict[str, Any]:
    """Recipes, models, judges and benchmarks by what decides their rows; places are none of it."""
    recipes = {name: _recipe_science(config, methods[name].defense) for name, config in request.recipes.items()}
    models = {
        name: weights_fingerprint(resolve_lvlm(each).model, each.revision) for name, each in request.models.items()
    }
    shared = science(request.shared, {}, {}, "")
    benchmarks = {name: _benchmark_science(request.shared, asked) for name, asked in request.benchmarks.items()}
    kept = {name: shared[name] for name in ("lvlm", "guardalign")}
    order = {"order": [list(request.benchmarks), list(request.recipes), list(request.models)]}
    return {**kept, **order, "benchmark": benchmarks, "model": models, "recipe": recipes}


def _recipe_science(config: AuditConfig, defense: Defense) -> dict[str, Any]:
    """Detector, sanitizer and defense with what they rest on; a calibrated threshold must be of these scores."""
    detects = config.detector.name != NONE
    clip = clip_fingerprint(resolve_clip(config.clip)) if detects else {}
    taxonomy = load_taxonomy(resolve_taxonomy(config)).fingerprint if detects else ""
    found = science(config, clip, {}, taxonomy)
    refuse_foreign_calibration(config.calibration, found)
    kept = {
        name: found[name]
        for name in ("detector", "sanitizer", "defense", "generation", *(("clip", "taxonomy") if detects else ()))
    }
    return {**kept, "fingerprint": fingerprint_of(defense)}


def _benchmark_science(shared: AuditConfig, asked: Asked) -> dict[str, Any]:
    judge = "" if asked.judge is None else asked.judge.fingerprint
    found = science(replace(shared, input=asked.input, judge=asked.judge_choice), {}, {}, "", judge)
    return {"input": found["input"], "judge": found["judge"]}


def detect_steps(config: AuditConfig) -> list[Step]:
    """The one stage of a detector's pass."""
    (step,) = scoring_steps(config, load_taxonomy(resolve_taxonomy(config)))
    return [Step(step.pool, partial(_detect_once, step))]


def _detect_once(step: Step) -> DetectOnce:
    return DetectOnce(step.make())  # type: ignore[arg-type]


def answer_steps(comparison: Comparison, model: str, detections: str) -> list[Step]:
    """The stages of a model's pass: expand, answer, judge; judges with a model of their own have their own pool."""
    listed = [
        Step("generate", partial(_expand, comparison, model, detections)),
        Step("generate", partial(_answer_and_judge, comparison, model)),
    ]
    apart = [asked for asked in _judges(comparison) if asked[0].pool == "judge"]
    return [*listed, *(Step("judge", partial(_judge, comparison, *each)) for each in apart)]


def _judges(comparison: Comparison) -> list[tuple[Any, tuple[str, ...]]]:
    """Every distinct judge with the benchmarks whose answers it judges."""
    found: dict[str, tuple[Any, tuple[str, ...]]] = {}
    for name, asked in comparison.request.benchmarks.items():
        if asked.judge is not None:
            key = seal(to_plain(asked.judge_choice))
            judge, names = found.get(key, (asked.judge, ()))
            found[key] = (judge, (*names, name))
    return list(found.values())


def _expand(comparison: Comparison, model: str, detections: str) -> Expand:
    max_pixels = comparison.request.shared.input.max_image_pixels
    return Expand(model, comparison.views, detections, comparison.samples.num_shards, max_pixels)


def _answer_and_judge(comparison: Comparison, model: str) -> Stage:
    shared = comparison.request.shared
    lvlm = resolve_lvlm(comparison.request.models[model])
    answer = AnswerAll(lvlm, comparison.methods, shared.input.max_image_pixels)
    near = [each for each in _judges(comparison) if each[0].pool != "judge"]
    judges = [(_ready(comparison, judge, answer), judge, names) for judge, names in near]
    defenses = [method.defense for method in comparison.methods.values()]
    canaries: list[Canary] = [DecodingCanary(answer.lvlm, comparison.request.models[model], defenses)]
    canaries += [JudgingCanary(stage, judge, answer.lvlm) for stage, judge, _ in judges]
    return checked(shared, AnswerAndJudge(answer, [JudgeOf(stage, names) for stage, _, names in judges]), *canaries)


def _judge(comparison: Comparison, judge: Any, benchmarks: tuple[str, ...]) -> Stage:
    """A judge in a pool of its own."""
    stage = _ready(comparison, judge)
    return checked(comparison.request.shared, JudgeOf(stage, benchmarks), JudgingCanary(stage, judge))


def _ready(comparison: Comparison, judge: Any, answer: AnswerAll | None = None) -> Judge:
    shared = comparison.request.shared
    target = answer.lvlm if answer is not None and judge.shares_target else None
    return Judge(judge.ready(target, num_actors=shared.cluster.judge_actors), shared.input.max_image_pixels)
