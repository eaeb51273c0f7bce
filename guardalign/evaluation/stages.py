"""The stages of an evaluation: detect once a picture, one row for each recipe, all of a sample answered together.

Like the audit's stages they take and give one shard as an Arrow table. A shard holds samples of one benchmark; after
`Expand` it holds every sample once for each recipe, in the recipes' order. Knows nothing of Ray, sources or tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Final, TypeAlias

import pyarrow as pa

from guardalign.config import GenerationConfig, LvlmConfig
from guardalign.defenses import Defense
from guardalign.errors import RowError
from guardalign.evaluation.sharing import side_by_side
from guardalign.faults import strike
from guardalign.guard import Failure, guarded
from guardalign.in_hand import in_hand
from guardalign.models.asking import Asking
from guardalign.models.decoding import Decoder
from guardalign.results import RunFolder, shard_name
from guardalign.sanitizers import Sanitizer
from guardalign.schema import (
    DETECTION,
    ERROR,
    IMAGE,
    PLANNED,
    RESULT_NAMES,
    TRACE,
    Trace,
    detection_of_row,
    reply_columns,
    trace_of,
    with_columns,
    with_trace,
)
from guardalign.stages import Detect, Generate, Judge, Sanitize
from guardalign.types import Case, Reply
from guardalign.working import Size, ahead, by_row, chunks, closed, rows_alive, with_sizes

EVALUATION: Final = (
    pa.field("benchmark", pa.string(), metadata={"doc": "name of the benchmark that the sample belongs to"}),
    pa.field("model", pa.string(), metadata={"doc": "the model that answered, by its folder or hub name"}),
    pa.field("recipe", pa.string(), metadata={"doc": "detector, sanitizer and defense by the name of their recipe"}),
    pa.field("expected", pa.string(), metadata={"doc": "the right answer; null where there is none"}),
    pa.field("pair", pa.string(), metadata={"doc": "the same for samples that are judged together"}),
    pa.field("variant", pa.string(), metadata={"doc": "the part of the benchmark that the sample belongs to"}),
    pa.field(
        "detection_seconds",
        pa.float32(),
        metadata={"doc": "the row's even share of detecting and sanitizing; 0 without a detector", "unit": "s"},
    ),
)
"""Columns beside an audit's."""
_SIZES: Final = ("width", "height", "num_frames")
_DETECTED: Final = (*_SIZES, *(each.name for each in (*ERROR, *DETECTION) if each.name != "masked_fraction"))
Group: TypeAlias = tuple[int, ...]
"""rows of one sample"""


def with_own_column(table: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    """The table with one of the columns of `EVALUATION` set."""
    (field,) = (each for each in EVALUATION if each.name == name)
    place, array = table.schema.get_field_index(name), pa.array(values, field.type)
    return table.append_column(field, array) if place < 0 else table.set_column(place, field, array)


class DetectOnce:
    """Detection on every distinct picture of a shard; samples that share one share what was found."""

    name = "detect"

    def __init__(self, detect: Detect) -> None:
        self.detect = detect

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the detection columns, and the pictures' sizes."""
        stands_for = _first_with_same_picture(table)
        firsts = sorted(set(stands_for))
        done = self.detect(table.take(firsts))
        spread = done.take([firsts.index(first) for first in stands_for])
        found = {name: spread[name].to_pylist() for name in _DETECTED if name in spread.column_names}
        ids = table["sample_id"].to_pylist()
        pairs = zip(found["error"], ids, stands_for, strict=True)
        found["error"] = [error and _renamed(error, ids[first], own) for error, own, first in pairs]
        return with_trace(with_columns(table, found), trace_of(done))


def _renamed(sentence: str, first: str, own: str) -> str:
    """The sentence about another sample; numbers in it that look like its id stay."""
    return sentence.replace(f"sample {first}", f"sample {own}", 1)


def _first_with_same_picture(table: pa.Table) -> list[int]:
    """For every row the first one with its picture; itself where it has none, or has failed already."""
    seen: dict[str, int] = {}
    rows = zip(table["image_sha256"].to_pylist(), table["error"].to_pylist(), strict=True)
    return [
        at if sha is None or error is not None else seen.setdefault(sha, at) for at, (sha, error) in enumerate(rows)
    ]


@dataclass(frozen=True)
class View:
    """What a recipe makes of a picture before the model sees it."""

    detector: int | None
    """number of its detector among those of the run; None without one"""
    sanitizer: Sanitizer | None
    """blanks what was detected"""


class Expand:
    """One row for each recipe, with what its detector said and its sanitizer made of the picture."""

    name = "expand"

    def __init__(
        self, model: str, views: Mapping[str, View], detections: str, num_shards: int, max_image_pixels: int
    ) -> None:
        self.model, self.views, self.detections = model, views, detections
        self.num_shards, self.max_image_pixels = num_shards, max_image_pixels

    def __call__(self, table: pa.Table) -> pa.Table:
        """Samples x recipes, recipe by recipe."""
        made: dict[tuple[int | None, int], pa.Table] = {}
        seconds = 0.0
        parts = []
        for recipe, view in self.views.items():
            key = (view.detector, id(view.sanitizer))
            if key not in made:
                made[key], sanitizing = self._seen(table, view)
                seconds += sanitizing
            parts.append(with_own_column(made[key], "recipe", [recipe] * table.num_rows))
        whole = pa.concat_tables(parts, promote_options="default").combine_chunks()
        whole = with_own_column(whole, "model", [self.model] * whole.num_rows)
        whole = with_columns(whole, {PLANNED: [whole.num_rows] * whole.num_rows})
        return with_trace(whole, Trace(seconds={"sanitize": seconds}))

    def _seen(self, table: pa.Table, view: View) -> tuple[pa.Table, float]:
        """The samples under a view, and the seconds of sanitizing."""
        if view.detector is None:
            return with_own_column(table, "detection_seconds", [0.0] * table.num_rows), 0.0
        found = self._found(table, view.detector)
        spent = [each["detect_seconds"] or 0.0 for each in found["timings"].to_pylist()]
        table = with_columns(table, _unless_failed(table, {name: found[name].to_pylist() for name in _DETECTED}))
        if view.sanitizer is not None:
            table = Sanitize(view.sanitizer, self.max_image_pixels)(table)
        seconds = trace_of(table).seconds.get("sanitize", 0.0)
        if TRACE in table.column_names:
            table = table.drop_columns([TRACE])
        return with_own_column(table, "detection_seconds", [own + seconds / len(spent) for own in spent]), seconds

    def _found(self, table: pa.Table, detector: int) -> pa.Table:
        """What the detector's own pass has written about these samples."""
        shard = table["shard"][0].as_py() % self.num_shards
        name = shard_name(detector * self.num_shards + shard)
        found = RunFolder(self.detections).read_table(name, ["sample_id", "timings", *_DETECTED])
        places = {sample_id: at for at, sample_id in enumerate(found["sample_id"].to_pylist())}
        wanted = table["sample_id"].to_pylist()  # all of the shard, or a row of it that is tried alone
        assert places.keys() >= set(wanted), f"{name} holds other samples"
        return found.take([places[sample_id] for sample_id in wanted])


def _unless_failed(table: pa.Table, cells: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The cells, but own ones in rows that could not be read this time: the detector's pass may have read them."""
    failed = [error is not None for error in table["error"].to_pylist()]
    kept = {}
    for name, seen in cells.items():
        own = table[name].to_pylist() if name in table.column_names else [None] * len(seen)
        kept[name] = [mine if lost else other for mine, other, lost in zip(own, seen, failed, strict=True)]
    return kept


@dataclass(frozen=True)
class Method:
    """How a recipe answers."""

    name: str
    """the defense's"""
    defense: Defense
    generation: GenerationConfig
    """the decoding that it takes as the run's"""


class AnswerAll(Generate):
    """The LVLM answers every sample under every recipe; equal asks of a sample's defenses are decoded once."""

    def __init__(self, lvlm: LvlmConfig, methods: Mapping[str, Method], max_image_pixels: int) -> None:
        first = next(iter(methods.values()))
        super().__init__(lvlm, first.defense, first.name, first.generation, max_image_pixels)
        self.methods = methods

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the reply columns; fills the pictures' sizes where no detector did."""
        started = perf_counter()
        rows = rows_alive(table, (*(name for name in table.column_names if name in RESULT_NAMES), "recipe"), False)
        sizes: dict[int, Size] = {}
        groups = self._groups(rows)
        found = self._answers(rows, groups, sizes)
        spoilt = [(index,) for group, each in zip(groups, found, strict=True) for index in group if each is None]
        again = self._answers(rows, spoilt, sizes)  # an unforeseen failure costs the row of its own defense alone
        replies = {index: reply for each in (*found, *again) if each is not None for index, reply in each.items()}
        names = [self.methods[recipe].name for recipe in table["recipe"].to_pylist()]
        table = with_columns(with_sizes(table, sizes), reply_columns(by_row(table, replies)) | {"defense": names})
        return closed(table, self.name, replies, started, self._seen.since_last())

    def _groups(self, rows: Mapping[int, Mapping[str, Any]]) -> list[Group]:
        """The rows of each sample, samples of like length one after the other."""
        groups: dict[str, list[int]] = {}
        for index in self._by_length(rows):
            groups.setdefault(rows[index]["sample_id"], []).append(index)
        return [tuple(sorted(group)) for group in groups.values()]

    def _answers(
        self, rows: Mapping[int, Mapping[str, Any]], groups: Sequence[Group], sizes: dict[int, Size]
    ) -> list[dict[int, Reply | Failure] | None]:
        """One reply or failure a row of each group; None for a group of several rows that failed as a whole."""

        def answer(some: Sequence[Group]) -> list[list[Reply | RowError] | RowError]:
            def again(place: int) -> Asking[list[Reply | RowError]]:
                return next(self._side_by_side(rows, [some[place]], sizes))

            ended = Decoder(self.lvlm, self.batch_size).run(self._side_by_side(rows, some, sizes), again)
            return [each.value for each in ended]

        ids = [rows[group[0]]["sample_id"] for group in groups]
        found = guarded(answer, groups, ids, "generation_failed", tells=False)
        return [self._by_row(group, each) for group, each in zip(groups, found, strict=True)]

    @staticmethod
    def _by_row(group: Group, found: list[Reply | RowError] | Failure) -> dict[int, Reply | Failure] | None:
        if isinstance(found, Failure):
            return dict.fromkeys(group, found) if len(group) == 1 else None
        ended = [Failure(each.kind, str(each)) if isinstance(each, RowError) else each for each in found]
        return dict(zip(group, ended, strict=True))

    def _side_by_side(
        self, rows: Mapping[int, Mapping[str, Any]], groups: Sequence[Group], sizes: dict[int, Size]
    ) -> Iterator[Asking[list[Reply | RowError]]]:
        """Samples as the decoding loop takes them; pictures are decoded a batch ahead."""
        places = chunks(range(len(groups)), self.batch_size)
        for batch in ahead(places, lambda place: self._cases(rows, groups[place], sizes)):
            for _, cases in batch:
                yield side_by_side([self._asking(rows[index]["recipe"], case) for index, case in cases.items()])

    def _cases(
        self, rows: Mapping[int, Mapping[str, Any]], group: Group, sizes: dict[int, Size]
    ) -> dict[int, Case | Failure]:
        """Every recipe's case; a picture that several of them see is decoded once."""
        cases: dict[int, Case | Failure] = {}
        first: dict[bytes | None, int] = {}
        for index in group:
            like = first.setdefault(rows[index][IMAGE], index)
            seen = cases.get(like)
            if isinstance(seen, Case):
                cases[index] = replace(seen, detection=detection_of_row(rows[index]))
                sizes |= {index: sizes[like]} if like in sizes else {}
            else:
                cases[index] = self._case(rows[index], sizes, index)
        return cases

    def _asking(self, recipe: str, case: Case | Failure) -> Asking[Reply]:
        if isinstance(case, Failure):
            raise RowError(case.kind, case.message)
        method = self.methods[recipe]
        with in_hand([case.sample.sample_id]):
            strike(self.name, case.sample.sample_id)
            return (yield from method.defense.answer(self.lvlm, case, method.generation))


class JudgeOf:
    """A judge for the shards of some benchmarks; others pass by."""

    name = "judge"

    def __init__(self, judge: Judge, benchmarks: Sequence[str]) -> None:
        self.judge, self.benchmarks = judge, frozenset(benchmarks)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the verdict columns where the shard is one of its benchmarks'."""
        return self.judge(table) if table["benchmark"][0].as_py() in self.benchmarks else table


class AnswerAndJudge:
    """The stages on one LVLM: it answers, then judges whose model it is, or who have none."""

    name = "generate"

    def __init__(self, answer: AnswerAll, judges: Sequence[JudgeOf]) -> None:
        self.answer, self.judges = answer, judges

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the reply columns and the verdict columns."""
        table = self.answer(table)
        for judge in self.judges:
            table = judge(table)
        self.answer._seen.since_last()  # a judge on the same model has counted its own calls
        return table
