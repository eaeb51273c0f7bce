"""The stages of an audit: plain classes, Arrow table in, Arrow table out; the constructor loads, the call computes.

A table is one shard (a working table of `schema.py`). A row that fails keeps its place, gets its `error` cells and is
passed by from then on. Each stage makes its own micro-batches, as a pure function of the shard, so that a row's numbers
do not depend on who computes it. Knows nothing of Ray, sources or result files.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, TypeVar

import pyarrow as pa

from guardalign.config import ClipConfig, GenerationConfig, LvlmConfig
from guardalign.core.images import Decoded, decode, encode_png, thumbnail
from guardalign.core.patches import patch_boxes
from guardalign.defenses import Defense
from guardalign.detectors import Detector
from guardalign.errors import ErrorKind, RowError, UserError
from guardalign.judges import Judge as JudgeProtocol
from guardalign.models.clip import PatchEncoder
from guardalign.models.lvlm import Lvlm
from guardalign.sanitizers import Sanitizer, masked_fraction
from guardalign.schema import (
    IMAGE,
    RESULT_NAMES,
    Trace,
    detection_columns,
    detection_of_row,
    grid_of_row,
    reply_columns,
    trace_of,
    verdict_columns,
    with_columns,
    with_trace,
)
from guardalign.taxonomy import Taxonomy
from guardalign.types import Case, Detection, Reply, Sample, Verdict

A = TypeVar("A")
B = TypeVar("B")
Size = tuple[int, int, int]
"""width, height [px] of the upright picture, and the frames in its file"""
log = logging.getLogger(__name__)

DECODE_THREADS = 2
"""Pictures decoded at once, ahead of the model; Pillow releases the interpreter's lock while it decodes."""

NOTHING_SEEN: tuple[dict[str, int], tuple[str, ...]] = ({}, ())
"""Counters and notes of a stage without a model."""


@dataclass(frozen=True)
class Failure:
    """Why a row was given up."""

    kind: ErrorKind
    message: str


def admit(table: pa.Table) -> pa.Table:
    """The first step on every shard: hash the pictures, give up rows without a prompt."""
    images, prompts = table[IMAGE].to_pylist(), table["prompt"].to_pylist()
    failures = {
        index: Failure("prompt_missing", f"sample {sample_id} has no prompt, or a blank one")
        for index, (prompt, sample_id, error) in enumerate(
            zip(prompts, table["sample_id"].to_pylist(), table["error"].to_pylist(), strict=True)
        )
        if error is None and not (prompt or "").strip()
    }
    read_failures = [None if error is None else "read" for error in table["error"].to_pylist()]
    hashes = [None if image is None else hashlib.sha256(image).hexdigest() for image in images]
    table = with_columns(table, {"image_sha256": hashes, "error_stage": read_failures})
    return _give_up(table, "read", failures)


class Detect:
    """First pool: decodes, embeds the patches, scores them."""

    name = "detect"

    def __init__(self, clip: ClipConfig, detector: Detector, taxonomy: Taxonomy, max_image_pixels: int) -> None:
        self.encoder = PatchEncoder.load(clip)
        self.detector, self.taxonomy = detector, taxonomy
        self.batch_size, self.max_image_pixels = clip.batch_size, max_image_pixels
        detector.check(self.encoder, taxonomy)
        self.at_least = detector.at_least(self.encoder)
        self._seen = _Counted(self.encoder, "clip")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the detection columns, and the pictures' sizes."""
        started = perf_counter()
        rows = _rows(table, ("sample_id",), with_image=True)
        sizes: dict[int, Size] = {}
        found: dict[int, Detection | Failure] = {}
        for batch in _ahead(
            _chunks(sorted(rows), self.batch_size), lambda index: self._view(rows[index], sizes, index)
        ):
            views = {index: view for index, view in batch if not isinstance(view, Failure)}
            found |= {index: view for index, view in batch if isinstance(view, Failure)}
            ids = [rows[index]["sample_id"] for index in views]
            scored = guarded(self._score, list(views.values()), ids, "detection_failed")
            found |= dict(zip(views, scored, strict=True))
        table = _with_sizes(table, sizes)
        table = with_columns(table, detection_columns(_by_row(table, found)))
        return _closed(table, self.name, found, started, self._seen.since_last())

    def _view(self, row: Mapping[str, Any], sizes: dict[int, Size], index: int) -> Any:
        def look(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
            decoded = decode(rows[0][IMAGE], self.max_image_pixels, rows[0]["sample_id"], self.at_least)
            sizes[index] = _size(decoded)
            return [self.detector.view(self.encoder, decoded)]

        return guarded(look, [row], [row["sample_id"]], "detection_failed")[0]

    def _score(self, views: Sequence[Any]) -> Sequence[Detection]:
        return self.detector(self.encoder, self.taxonomy, views)


class Thumbnails:
    """Keeps small copies of the pictures, of the flagged ones or of all."""

    name = "thumbnails"

    def __init__(self, keep: str, size: int, max_image_pixels: int) -> None:
        self.keep, self.size, self.max_image_pixels = keep, size, max_image_pixels

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the column `thumbnail`; pictures that cannot be decoded are left to the stages that need them."""
        rows = _rows(table, ("sample_id", "flagged"), with_image=True)
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
        rows = _rows(table, columns, with_image=True)
        touched = {index: row for index, row in rows.items() if row["unsafe_patches"]}
        done = {index: self._one(row) for index, row in touched.items()}
        cleaned = {index: pair for index, pair in done.items() if not isinstance(pair, Failure)}
        fractions = [cleaned[i][1] if i in cleaned else _untouched(rows.get(i)) for i in range(table.num_rows)]
        table = with_columns(table, {"masked_fraction": fractions})
        if cleaned:
            images = table[IMAGE].to_pylist()
            table = with_columns(table, {IMAGE: [cleaned[i][0] if i in cleaned else x for i, x in enumerate(images)]})
        return _closed(table, self.name, done, started, NOTHING_SEEN)

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
        self._seen = _Counted(self.lvlm, "lvlm")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the reply columns; fills the pictures' sizes where no detector did."""
        started = perf_counter()
        rows = _rows(table, tuple(name for name in table.column_names if name in RESULT_NAMES), with_image=False)
        sizes: dict[int, Size] = {}
        replies: dict[int, Reply | Failure] = {}
        for batch in _ahead(self._batches(rows), lambda index: self._case(rows[index], sizes, index)):
            cases = {index: case for index, case in batch if not isinstance(case, Failure)}
            replies |= {index: case for index, case in batch if isinstance(case, Failure)}
            ids = [rows[index]["sample_id"] for index in cases]
            answers = guarded(self._answer, list(cases.values()), ids, "generation_failed")
            replies |= dict(zip(cases, answers, strict=True))
        table = _with_sizes(table, sizes)
        columns = reply_columns(_by_row(table, replies)) | {"defense": [self.defense_name] * table.num_rows}
        return _closed(with_columns(table, columns), self.name, replies, started, self._seen.since_last())

    def _batches(self, rows: Mapping[int, Mapping[str, Any]]) -> list[list[int]]:
        """Micro-batches of rows of like length: a function of the shard alone."""
        hints = {index: self.lvlm.length_hint(row["prompt"], _size_of(row)) for index, row in rows.items()}
        return _chunks(sorted(rows, key=lambda index: (hints[index], index)), self.batch_size)

    def _case(self, row: Mapping[str, Any], sizes: dict[int, Size], index: int) -> Case | Failure:
        def look(rows: Sequence[Mapping[str, Any]]) -> list[Case]:
            picture = None
            if rows[0][IMAGE] is not None:
                decoded = decode(rows[0][IMAGE], self.max_image_pixels, rows[0]["sample_id"])
                sizes[index], picture = _size(decoded), decoded.picture
            return [Case(_sample(rows[0]), picture, detection_of_row(rows[0]))]

        return guarded(look, [row], [row["sample_id"]], "generation_failed")[0]

    def _answer(self, cases: Sequence[Case]) -> Sequence[Reply]:
        return self.defense(self.lvlm, cases, self.generation)


class Judge:
    """Says of every answer whether it refuses, and, where the judge can tell, whether it is unsafe."""

    name = "judge"

    def __init__(self, judge: JudgeProtocol) -> None:
        self.judge = judge

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the verdict columns."""
        started = perf_counter()
        columns = (*Generate.columns, "response", "num_prompt_tokens", "num_tokens", "stop_reason")
        rows = _rows(table, columns, with_image=False)
        pairs = [(_sample(row), _reply(row)) for row in rows.values()]
        ids = [row["sample_id"] for row in rows.values()]
        verdicts = dict(zip(rows, guarded(self._judge, pairs, ids, "judging_failed"), strict=True))
        table = with_columns(table, verdict_columns(_by_row(table, verdicts)))
        return _closed(table, self.name, verdicts, started, NOTHING_SEEN)

    def _judge(self, pairs: Sequence[tuple[Sample, Reply]]) -> Sequence[Verdict]:
        return self.judge([sample for sample, _ in pairs], [reply for _, reply in pairs])


def guarded(
    work: Callable[[Sequence[A]], Sequence[B]], items: Sequence[A], ids: Sequence[str], kind: ErrorKind
) -> list[B | Failure]:
    """`work(items)`; if it fails, halves it until each culprit stands alone and becomes a `Failure`.

    This is the one guard of the package. What the user can mend (`UserError`) stops the run instead: it is no row's
    fault. An unforeseen error's text may hold a row's content, so only its type and place are told.
    """
    if not items:
        return []
    try:
        return list(work(items))
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the one guard
        if len(items) == 1:
            return [_failure(error, ids[0], kind)]
        log.debug("a batch of %d rows failed with %s; halving it", len(items), type(error).__name__)
    half = len(items) // 2
    return guarded(work, items[:half], ids[:half], kind) + guarded(work, items[half:], ids[half:], kind)


def _failure(error: Exception, sample_id: str, kind: ErrorKind) -> Failure:
    if isinstance(error, RowError):
        return Failure(error.kind, str(error))
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else ""
    return Failure(kind, f"sample {sample_id}: {kind.replace('_', ' ')}: {type(error).__name__}{place}")


def _ahead(batches: Sequence[list[int]], work: Callable[[int], B]) -> Iterator[list[tuple[int, B]]]:
    """The batches with `work` done on every index, one batch ahead of the consumer."""
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        waiting = [pool.submit(work, index) for index in batches[0]] if batches else []
        for position, batch in enumerate(batches):
            done = [(index, future.result()) for index, future in zip(batch, waiting, strict=True)]
            following = batches[position + 1] if position + 1 < len(batches) else []
            waiting = [pool.submit(work, index) for index in following]
            yield done


def _chunks(items: Sequence[A], size: int) -> list[list[A]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _rows(table: pa.Table, columns: Sequence[str], with_image: bool) -> dict[int, dict[str, Any]]:
    """Rows still alive (no error), by position; `with_image` leaves the text-only ones out."""
    wanted = [name for name in dict.fromkeys((*columns, IMAGE)) if name in table.column_names]
    alive = [error is None for error in table["error"].to_pylist()]
    pylist = table.select(wanted).to_pylist()
    absent = dict.fromkeys(set(columns) - set(wanted))
    return {
        index: row | absent
        for index, row in enumerate(pylist)
        if alive[index] and not (with_image and row[IMAGE] is None)
    }


def _by_row(table: pa.Table, results: Mapping[int, Any]) -> list[Any]:
    """One result a row of the table; None for failures and for rows that were passed by."""
    values = (results.get(index) for index in range(table.num_rows))
    return [None if isinstance(value, Failure) else value for value in values]


def _give_up(table: pa.Table, stage: str, failures: Mapping[int, Failure]) -> pa.Table:
    if not failures:
        return table
    cells = {name: table[name].to_pylist() for name in ("error", "error_stage", "error_kind")}
    for index, failure in failures.items():
        for name, value in zip(cells, (failure.message, stage, failure.kind), strict=True):
            cells[name][index] = value
    return with_columns(table, cells)


def _closed(
    table: pa.Table,
    stage: str,
    results: Mapping[int, Any],
    started: float,
    seen: tuple[dict[str, int], tuple[str, ...]],
) -> pa.Table:
    """The table with the stage's failures, seconds, counters and notes written down."""
    failures = {index: value for index, value in results.items() if isinstance(value, Failure)}
    table = _give_up(table, stage, failures)
    counters, notes = seen
    before = trace_of(table)
    seconds = {**before.seconds, stage: perf_counter() - started}
    return with_trace(table, Trace(seconds, {**before.counters, **counters}, before.notes + notes))


def _size(decoded: Decoded) -> Size:
    return decoded.width, decoded.height, decoded.num_frames


def _with_sizes(table: pa.Table, sizes: Mapping[int, Size]) -> pa.Table:
    """Fills width, height and num_frames where they are not known yet (the sanitized copy has one frame)."""
    names = ("width", "height", "num_frames")
    known: dict[str, list[Any]] = {
        n: table[n].to_pylist() if n in table.column_names else [None] * table.num_rows for n in names
    }
    for index, facts in sizes.items():
        for name, value in zip(names, facts, strict=True):
            if known[name][index] is None:
                known[name][index] = value
    return with_columns(table, known)


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


class _Counted:
    """What a model counted and noted since it was last asked."""

    def __init__(self, model: object, prefix: str) -> None:
        self.model, self.prefix = model, prefix
        self.before = {"num_loads": 0, "num_forward_calls": 0}
        self.untold: tuple[str, ...] = tuple(getattr(model, "notes", ()))

    def since_last(self) -> tuple[dict[str, int], tuple[str, ...]]:
        now = {name: int(getattr(self.model, name)) for name in self.before}
        change = {f"{self.prefix}_{name.removeprefix('num_')}": now[name] - self.before[name] for name in now}
        notes, self.untold, self.before = self.untold, (), now
        return change, notes
