"""The stages of an audit: plain classes, Arrow table in, Arrow table out; the constructor loads, the call computes.

A table is one shard (a working table of `schema.py`). A row that fails keeps its place, gets its `error` cells and is
passed by from then on. Each stage makes its own micro-batches, as a pure function of the shard, so that a row's numbers
do not depend on who computes it. Knows nothing of Ray, sources or result files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, ClassVar

import pyarrow as pa

from guardalign.config import ClipConfig, GenerationConfig, LvlmConfig
from guardalign.core.images import decode, encode_png, thumbnail
from guardalign.core.memory import ran_out
from guardalign.core.patches import patch_boxes
from guardalign.defenses import Defense
from guardalign.detectors import Detector
from guardalign.errors import RowError
from guardalign.faults import strike
from guardalign.guard import Failure, guarded
from guardalign.in_hand import in_hand
from guardalign.judges import Exchange, ReadyJudge
from guardalign.models.asking import Asking
from guardalign.models.clip import PatchEncoder
from guardalign.models.lvlm import Lvlm
from guardalign.models.streams import require_room
from guardalign.sanitizers import Sanitizer, masked_fraction
from guardalign.schema import (
    IMAGE,
    RESULT_NAMES,
    detection_columns,
    detection_of_row,
    grid_of_row,
    reply_columns,
    verdict_columns,
    with_columns,
)
from guardalign.taxonomy import Taxonomy
from guardalign.types import Case, Detection, Reply, Sample, Verdict
from guardalign.working import (
    NOTHING_SEEN,
    Counted,
    Size,
    ahead,
    at_once,
    by_row,
    chunks,
    closed,
    rows_alive,
    size_of,
    with_sizes,
)


class Detect:
    """First pool: decodes, embeds the patches, scores them."""

    name = "detect"

    def __init__(self, clip: ClipConfig, detector: Detector, taxonomy: Taxonomy, max_image_pixels: int) -> None:
        self.encoder = PatchEncoder.load(clip)
        self.detector, self.taxonomy = detector, taxonomy
        self.batch_size, self.max_image_pixels = clip.batch_size, max_image_pixels
        detector.check(self.encoder, taxonomy)
        self.at_least = detector.at_least(self.encoder)
        self._seen = Counted(self.encoder, "clip")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the detection columns, and the pictures' sizes."""
        started = perf_counter()
        rows = rows_alive(table, ("sample_id",), with_image=True)
        sizes: dict[int, Size] = {}
        found: dict[int, Detection | Failure] = {}
        for batch in ahead(chunks(sorted(rows), self.batch_size), lambda index: self._view(rows[index], sizes, index)):
            views = {index: view for index, view in batch if not isinstance(view, Failure)}
            found |= {index: view for index, view in batch if isinstance(view, Failure)}
            ids = [rows[index]["sample_id"] for index in views]
            scored = guarded(self._score, list(zip(ids, views.values(), strict=True)), ids, "detection_failed")
            found |= dict(zip(views, map(_numbers_only, scored, ids), strict=True))
        table = with_sizes(table, sizes)
        table = with_columns(table, detection_columns(by_row(table, found)))
        return closed(table, self.name, found, started, self._seen.since_last())

    def _view(self, row: Mapping[str, Any], sizes: dict[int, Size], index: int) -> Any:
        def look(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
            strike(self.name, rows[0]["sample_id"])
            decoded = decode(rows[0][IMAGE], self.max_image_pixels, rows[0]["sample_id"], self.at_least)
            sizes[index] = size_of(decoded)
            return [self.detector.view(self.encoder, decoded)]

        return guarded(look, [row], [row["sample_id"]], "detection_failed")[0]

    def _score(self, views: Sequence[tuple[str, Any]]) -> list[Detection | RowError]:
        """As many at a time as fit; a picture that does not fit alone is given up in its place."""

        def score(some: Sequence[tuple[str, Any]]) -> Sequence[Detection]:
            return self.detector(self.encoder, self.taxonomy, [view for _, view in some])

        found = zip(views, self.encoder.room.fitted(score, views), strict=True)
        return [each or RowError("out_of_memory", ran_out(name, "detection_failed")) for (name, _), each in found]


def _numbers_only(found: Detection | Failure, sample_id: str) -> Detection | Failure:
    """A score that is no finite number (a broken model's) lies below no threshold: the row would pass unflagged."""
    if isinstance(found, Failure):
        return found
    wrong = [score for score in (found.image_score, *(found.patch_scores or ())) if not math.isfinite(score)]
    if not wrong:
        return found
    return Failure("detection_failed", f"sample {sample_id}: detection failed: a score is {wrong[0]}, no finite number")


class Thumbnails:
    """Keeps small copies of the pictures, of the flagged ones or of all."""

    name = "thumbnails"

    def __init__(self, keep: str, size: int, max_image_pixels: int) -> None:
        self.keep, self.size, self.max_image_pixels = keep, size, max_image_pixels

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the column `thumbnail`; pictures that cannot be decoded are left to the stages that need them."""
        rows = rows_alive(table, ("sample_id", "flagged"), with_image=True)
        wanted = [index for index, row in rows.items() if self.keep == "all" or row["flagged"]]
        made = dict(zip(wanted, (self._shrink(rows[index]) for index in wanted), strict=True))
        kept = {index: small for index, small in made.items() if not isinstance(small, Failure)}
        return with_columns(table, {"thumbnail": [kept.get(index) for index in range(table.num_rows)]})

    def _shrink(self, row: Mapping[str, Any]) -> bytes | Failure:
        def shrink(rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
            decoded = decode(rows[0][IMAGE], self.max_image_pixels, rows[0]["sample_id"], self.size)
            return [thumbnail(decoded.picture, self.size)]

        return guarded(shrink, [row], [row["sample_id"]], "image_unreadable")[0]


class Sanitize:
    """Blanks the unsafe patches, at the picture's own resolution; a picture without any is handed on untouched."""

    name = "sanitize"

    def __init__(self, sanitizer: Sanitizer, max_image_pixels: int) -> None:
        self.sanitizer, self.max_image_pixels = sanitizer, max_image_pixels

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replaces the hidden picture of rows with unsafe patches, adds `masked_fraction`."""
        started = perf_counter()
        columns = ("sample_id", "unsafe_patches", "patch_grid", "patch_canvas", "patch_boxes", "flagged")
        rows = rows_alive(table, columns, with_image=True)
        touched = {index: row for index, row in rows.items() if row["unsafe_patches"]}
        done = {index: self._one(row) for index, row in touched.items()}
        cleaned = {index: pair for index, pair in done.items() if not isinstance(pair, Failure)}
        fractions = [cleaned[i][1] if i in cleaned else _untouched(rows.get(i)) for i in range(table.num_rows)]
        table = with_columns(table, {"masked_fraction": fractions})
        if cleaned:
            images = table[IMAGE].to_pylist()
            table = with_columns(table, {IMAGE: [cleaned[i][0] if i in cleaned else x for i, x in enumerate(images)]})
        return closed(table, self.name, done, started, NOTHING_SEEN)

    def _one(self, row: Mapping[str, Any]) -> tuple[bytes, float] | Failure:
        def clean(rows: Sequence[Mapping[str, Any]]) -> list[tuple[bytes, float]]:
            return [sanitized_png(rows[0], self.sanitizer, self.max_image_pixels)]

        return guarded(clean, [row], [row["sample_id"]], "sanitizing_failed")[0]


def sanitized_png(row: Mapping[str, Any], sanitizer: Sanitizer, max_image_pixels: int) -> tuple[bytes, float]:
    """The row's picture with its unsafe patches replaced, as PNG, and the share of pixels replaced."""
    decoded = decode(row[IMAGE], max_image_pixels, row["sample_id"])
    grid = grid_of_row(row)
    assert grid is not None, "unsafe patches without a patch grid"
    boxes = patch_boxes(grid, decoded.width, decoded.height)
    unsafe = [boxes[patch] for patch in row["unsafe_patches"]]
    fraction = masked_fraction(unsafe, decoded.width, decoded.height)
    return encode_png(sanitizer(decoded.picture, unsafe)), fraction


def _untouched(row: Mapping[str, Any] | None) -> float | None:
    return None if row is None or row["flagged"] is None else 0.0


class Generate:
    """Second pool: the LVLM answers every prompt under the defense."""

    name = "generate"
    columns: ClassVar[tuple[str, ...]] = ("sample_id", "prompt", "source", "sample_category", "label")

    def __init__(
        self, lvlm: LvlmConfig, defense: Defense, defense_name: str, generation: GenerationConfig, max_image_pixels: int
    ) -> None:
        self.lvlm = Lvlm.load(lvlm)
        self.defense, self.defense_name, self.generation = defense, defense_name, generation
        self.batch_size, self.max_image_pixels = lvlm.batch_size, max_image_pixels
        require_room(self.lvlm.max_tokens, generation, lvlm.model)
        self._seen = Counted(self.lvlm, "lvlm")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the reply columns; fills the pictures' sizes where no detector did."""
        started = perf_counter()
        rows = rows_alive(table, tuple(name for name in table.column_names if name in RESULT_NAMES), with_image=False)
        sizes: dict[int, Size] = {}
        order = self._by_length(rows)
        ids = [rows[index]["sample_id"] for index in order]

        def answer(some: Sequence[int]) -> list[Reply | RowError]:
            def again(place: int) -> Asking[Reply]:
                return self._answering(self._case(rows[some[place]], sizes, some[place]))

            return self.lvlm.outcomes(self._askings(rows, some, sizes), self.batch_size, again)

        replies = dict(zip(order, guarded(answer, order, ids, "generation_failed", tells=False), strict=True))
        table = with_sizes(table, sizes)
        columns = reply_columns(by_row(table, replies)) | {"defense": [self.defense_name] * table.num_rows}
        return closed(with_columns(table, columns), self.name, replies, started, self._seen.since_last())

    def _by_length(self, rows: Mapping[int, Mapping[str, Any]]) -> list[int]:
        """Rows of like length one after the other, so that prompts read together are; a function of the shard alone."""
        hints = {index: self.lvlm.length_hint(row["prompt"], _size_of(row)) for index, row in rows.items()}
        return sorted(rows, key=lambda index: (hints[index], index))

    def _askings(
        self, rows: Mapping[int, Mapping[str, Any]], some: Sequence[int], sizes: dict[int, Size]
    ) -> Iterator[Asking[Reply]]:
        """Samples as the decoding loop takes them; pictures are decoded a batch ahead."""
        for batch in ahead(chunks(some, self.batch_size), lambda index: self._case(rows[index], sizes, index)):
            for _, case in batch:
                yield self._answering(case)

    def _answering(self, case: Case | Failure) -> Asking[Reply]:
        if isinstance(case, Failure):
            raise RowError(case.kind, case.message)
        with in_hand([case.sample.sample_id]):
            strike(self.name, case.sample.sample_id)
            return (yield from self.defense.answer(self.lvlm, case, self.generation))

    def _case(self, row: Mapping[str, Any], sizes: dict[int, Size], index: int) -> Case | Failure:
        def look(rows: Sequence[Mapping[str, Any]]) -> list[Case]:
            picture = None
            if rows[0][IMAGE] is not None:
                decoded = decode(rows[0][IMAGE], self.max_image_pixels, rows[0]["sample_id"])
                sizes[index], picture = size_of(decoded), decoded.picture
            return [Case(_sample(rows[0]), picture, detection_of_row(rows[0]))]

        return guarded(look, [row], [row["sample_id"]], "generation_failed")[0]


class Judge:
    """Says of every answer whether it refuses, and, where the judge can tell, whether it is unsafe.

    The judge sees the picture as the LVLM saw it. One that waits for others (an endpoint) has several rows at once.
    """

    name = "judge"

    def __init__(self, judge: ReadyJudge, max_image_pixels: int) -> None:
        self.judge, self.max_image_pixels = judge, max_image_pixels
        self._told: Mapping[str, int] = {}
        self._told_notes: tuple[str, ...] = ()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the verdict columns."""
        started = perf_counter()
        columns = (*Generate.columns, "response", "num_prompt_tokens", "num_tokens", "stop_reason")
        rows = rows_alive(table, columns, with_image=False)
        by_length = sorted(rows, key=lambda index: (len(rows[index]["prompt"]) + len(rows[index]["response"]), index))
        batches = chunks(by_length, self.judge.batch_size)
        judged = at_once(lambda batch: self._batch(rows, batch), batches, self.judge.num_parallel)
        verdicts = {index: verdict for batch in judged for index, verdict in batch.items()}
        table = with_columns(table, verdict_columns(by_row(table, verdicts)))
        return closed(table, self.name, verdicts, started, self._since_last())

    def leave_out(self, counts: Mapping[str, int]) -> None:
        """So much of what the judge has counted belongs to no shard."""
        self._told = counts

    def _batch(self, rows: Mapping[int, Mapping[str, Any]], batch: Sequence[int]) -> dict[int, Verdict | Failure]:
        found = {index: self._exchange(rows[index]) for index in batch}
        exchanges = {index: exchange for index, exchange in found.items() if not isinstance(exchange, Failure)}
        failures = {index: failure for index, failure in found.items() if isinstance(failure, Failure)}
        ids = [rows[index]["sample_id"] for index in exchanges]
        verdicts = guarded(self.judge, list(exchanges.values()), ids, "judging_failed")
        return failures | dict(zip(exchanges, verdicts, strict=True))

    def _exchange(self, row: Mapping[str, Any]) -> Exchange | Failure:
        def look(rows: Sequence[Mapping[str, Any]]) -> list[Exchange]:
            strike(self.name, rows[0]["sample_id"])
            picture = None
            if self.judge.sees_pictures and rows[0][IMAGE] is not None:
                picture = decode(rows[0][IMAGE], self.max_image_pixels, rows[0]["sample_id"]).picture
            return [Exchange(_sample(rows[0]), _reply(rows[0]), picture)]

        return guarded(look, [row], [row["sample_id"]], "judging_failed")[0]

    def _since_last(self) -> tuple[dict[str, int], tuple[str, ...]]:
        """What the judge counted in this shard, and its notes, each told once."""
        now = dict(self.judge.counters)
        change = {name: count - self._told.get(name, 0) for name, count in now.items()}
        notes = tuple(note for note in self.judge.notes if note not in self._told_notes)
        self._told, self._told_notes = now, self._told_notes + notes
        return change, notes


class GenerateAndJudge:
    """Two stages on one LVLM: it answers a shard, then judges its own answers."""

    name = "generate"

    def __init__(self, generate: Generate, judge: Judge) -> None:
        self.generate, self.judge = generate, judge

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the reply columns and the verdict columns."""
        table = self.judge(self.generate(table))
        self.generate._seen.since_last()  # the judge has counted its own calls
        return table


def _size_of(row: Mapping[str, Any]) -> tuple[int, int] | None:
    if row[IMAGE] is None:
        return None
    return (row.get("width") or 1, row.get("height") or 1)


def _sample(row: Mapping[str, Any]) -> Sample:
    return Sample(
        sample_id=row["sample_id"],
        prompt=row["prompt"],
        image=row[IMAGE],
        source=row["source"],
        category=row["sample_category"],
        label=row["label"],
    )


def _reply(row: Mapping[str, Any]) -> Reply:
    return Reply(row["response"], row["num_prompt_tokens"], row["num_tokens"], row["stop_reason"])
