"""The Parquet contract: every result column with its type, unit and meaning, and the schema's version.

A result row is SAMPLE + ERROR + DETECTION + REPLY + VERDICT + PROVENANCE, then the columns that the user asked to pass
through. While a shard travels between stages it is a *working table*: some of these columns, plus the hidden ones of
`HIDDEN`. Knows nothing of stages, models or files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from guardalign.errors import ERROR_KINDS
from guardalign.types import Detection, PatchGrid, Reply, Verdict

SCHEMA_VERSION = 1
"""Raised when a column changes its meaning or leaves; a new column alone does not raise it."""


def _column(name: str, kind: pa.DataType, doc: str, unit: str = "") -> pa.Field:
    metadata = {"doc": doc} | ({"unit": unit} if unit else {})
    return pa.field(name, kind, metadata=metadata)


_SCORES = pa.list_(pa.float32())
_INTS = pa.list_(pa.int32())

SAMPLE: tuple[pa.Field, ...] = (
    _column("sample_id", pa.string(), "the source's own id, or one derived from the location; unique in the run"),
    _column("source", pa.string(), "where the row stands: file and position, relative to the input's root"),
    _column("sample_category", pa.string(), "the data set's own category"),
    _column("label", pa.string(), "the data set's own label"),
    _column("prompt", pa.large_string(), "the user's text"),
    _column("image_sha256", pa.string(), "SHA-256 of the encoded picture; null for a text-only prompt"),
    _column("width", pa.int32(), "of the upright picture (EXIF orientation applied)", "px"),
    _column("height", pa.int32(), "of the upright picture (EXIF orientation applied)", "px"),
    _column("num_frames", pa.int32(), "frames in the file; only the first is audited"),
)
ERROR: tuple[pa.Field, ...] = (
    _column(
        "error", pa.string(), "one sentence on why the row has no answer, or no verdict on it; null when all is there"
    ),
    _column("error_stage", pa.string(), "the stage that gave the row up: read, detect, sanitize, generate or judge"),
    _column("error_kind", pa.string(), "one of: " + ", ".join(ERROR_KINDS)),
)
DETECTION: tuple[pa.Field, ...] = (
    _column("flagged", pa.bool_(), "image_score < threshold, strictly; null when nothing was detected (text only)"),
    _column(
        "image_score",
        pa.float32(),
        "the picture's lowest patch score, or its one score where the detector has no patches; lower is less safe",
    ),
    _column("unsafe_category", pa.string(), "the category nearest to the least safe patch, flagged or not"),
    _column(
        "category_scores",
        pa.map_(pa.string(), pa.float32()),
        "ot: transport distance; clip: minus the largest cosine; lower is nearer; not on the threshold's scale",
    ),
    _column("patch_scores", _SCORES, "one score a patch, row by row; lower is less safe; null without patches"),
    _column("patch_grid", _INTS, "[rows, columns]; null when patch_boxes says where the patches lie"),
    _column(
        "patch_canvas",
        _INTS,
        "[width, height, cell width, cell height] of the copy that the grid was cut from; patch (r, c) covers the "
        "columns floor(c*cell*W/width) to ceil((c+1)*cell*W/width) of the picture, rows likewise",
        "px",
    ),
    _column("patch_boxes", pa.list_(_INTS), "[left, top, right, bottom] a patch, only for layouts without grid", "px"),
    _column("unsafe_patches", _INTS, "indices of the patches with score < threshold, strictly"),
    _column("masked_fraction", pa.float32(), "share of the picture's pixels that the sanitizer replaced, in [0, 1]"),
    _column("threshold", pa.float64(), "the threshold that was applied"),
    _column("sinkhorn_iterations", pa.int32(), "most iterations that any plan of this picture took"),
    _column("marginal_error", pa.float32(), "largest L1 error of a plan's row marginals for this picture"),
)
REPLY: tuple[pa.Field, ...] = (
    _column("defense", pa.string(), "the defense that answered"),
    _column("response", pa.large_string(), "the answer; an empty answer is an empty string"),
    _column(
        "num_prompt_tokens", pa.int32(), "of the prompt that led to the answer, image positions included", "tokens"
    ),
    _column("num_tokens", pa.int32(), "decoded for the answer, the end token included", "tokens"),
    _column("stop_reason", pa.string(), "end, length, or prefilled (the defense fixed the text)"),
    _column("prefix_attention", pa.float32(), "mean attention mass on the safety prefix, in [0, 1]; null unless asked"),
    _column(
        "defense_flagged",
        pa.bool_(),
        "the defense's own verdict: request or first answer unsafe; null without one, or when it could not be read",
    ),
    _column("defense_score", pa.float32(), "the number behind it: casa p(unsafe), eta reward of the first answer"),
    _column("first_response", pa.large_string(), "the undefended answer, where the defense looked at it first"),
    _column("decoding_steps", pa.int32(), "decoding steps in all that the defense asked, forced tokens included"),
)
VERDICT: tuple[pa.Field, ...] = (
    _column("refused", pa.bool_(), "the answer declines the request"),
    _column("unsafe", pa.bool_(), "the answer is harmful; null unless a judge decided it"),
    _column(
        "unsafe_categories",
        pa.list_(pa.string()),
        "codes of the policy that the answer violates, the judge's own (Llama Guard: MLCommons S-codes); empty when it "
        "was called safe, null where the judge names none",
    ),
    _column(
        "verdict_problem",
        pa.string(),
        "why there is no full verdict: unparsed (the judge wrote something else; refused and unsafe are null) or "
        "no_picture (it judges pictures only; unsafe is null)",
    ),
    _column("judge", pa.string(), "the judge"),
    _column("judge_score", pa.float32(), "the judge's own score; lower is less safe"),
)
DECODING_PARTS = ("prefill_seconds", "decode_seconds", "contrast_seconds", "verdict_seconds", "own_seconds")
TIMED_STAGES = ("detect", "sanitize", "generate", "judge")
PROVENANCE: tuple[pa.Field, ...] = (
    _column(
        "timings",
        pa.struct([pa.field(f"{stage}_seconds", pa.float32()) for stage in TIMED_STAGES]),
        "the row's even share of its shard's time in each stage",
        "s",
    ),
    _column(
        "decoding",
        pa.struct([pa.field(part, pa.float32()) for part in DECODING_PARTS]),
        "the row's even share of each forward call that it was part of, by what it was for; own: between them",
        "s",
    ),
    _column("shard", pa.int32(), "the shard that wrote the row"),
    _column("attempts", pa.int32(), "runs that had this row to do, the one that wrote it included"),
    _column("run_id", pa.string(), "the run that wrote the row"),
    _column(
        "thumbnail", pa.large_binary(), "the unsanitized picture, small, JPEG; null unless images.keep asks for it"
    ),
)
RESULT: tuple[pa.Field, ...] = SAMPLE + ERROR + DETECTION + REPLY + VERDICT + PROVENANCE
RESULT_NAMES: tuple[str, ...] = tuple(column.name for column in RESULT)

VOLATILE: tuple[str, ...] = ("timings", "decoding", "attempts", "run_id")
"""Columns that may differ between two runs over the same rows; all others are equal."""

IMAGE = "image"
"""Hidden column: the encoded picture as the next stage shall see it; never written."""
TRACE = "_trace"
"""Hidden column: JSON of the stages' seconds, counters and notes so far in its first row, null below."""
PLANNED = "_planned_rows"
"""Hidden column: the number of rows that the plan gave the shard."""
HIDDEN: dict[str, pa.DataType] = {IMAGE: pa.large_binary(), TRACE: pa.string(), PLANNED: pa.int64()}


def result_schema(passthrough: Sequence[pa.Field] = ()) -> pa.Schema:
    """The schema of a run's Parquet files; its version stands in the schema's metadata."""
    return pa.schema([*RESULT, *passthrough], metadata={"guardalign.schema_version": str(SCHEMA_VERSION)})


def with_columns(table: pa.Table, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """The table with these columns set, typed by the contract where they are part of it."""
    types = {column.name: column.type for column in RESULT} | HIDDEN
    for name, values in columns.items():
        array = pa.array(values, type=types[name])
        place = table.schema.get_field_index(name)
        field = pa.field(name, types[name])
        table = table.append_column(field, array) if place < 0 else table.set_column(place, field, array)
    return table


@dataclass(frozen=True)
class Trace:
    """What the stages noted on a shard's way, beside its rows."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """wall seconds by stage"""
    counters: Mapping[str, int] = field(default_factory=dict)
    """model loads and forward calls"""
    notes: tuple[str, ...] = ()
    """sentences for run.json, such as a chat template that was missing"""
    canaries: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """what the models said of the canaries, as loaded and after the shard; not numbers where they failed"""


def trace_of(table: pa.Table) -> Trace:
    """The trace in a working table's hidden column; empty where no stage has written one, and for rows cut out of a
    shard without its first."""
    if TRACE not in table.column_names or table.num_rows == 0 or not table[TRACE][0].is_valid:
        return Trace()
    found = json.loads(table[TRACE][0].as_py())
    canaries = {name: tuple(numbers) for name, numbers in found["canaries"].items()}
    return Trace(found["seconds"], found["counters"], tuple(found["notes"]), canaries)


def with_trace(table: pa.Table, trace: Trace) -> pa.Table:
    """The working table with this trace."""
    text = json.dumps(asdict(trace))
    return with_columns(table, {TRACE: [text, *[None] * (table.num_rows - 1)]})


def to_result(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The working table as result rows: columns in the schema's order, missing ones null, hidden ones gone."""
    arrays = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, type=field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def detection_columns(detections: Sequence[Detection | None]) -> dict[str, list[Any]]:
    """The detections as result columns; None becomes null throughout."""
    rows = [_detection_row(detection) for detection in detections]
    names = [column.name for column in DETECTION if column.name != "masked_fraction"]
    return {name: [row.get(name) for row in rows] for name in names}


def _detection_row(detection: Detection | None) -> dict[str, Any]:
    if detection is None:
        return {}
    return {
        "flagged": detection.flagged,
        "image_score": detection.image_score,
        "unsafe_category": detection.unsafe_category,
        "category_scores": list(detection.category_scores.items()),
        "patch_scores": detection.patch_scores,
        "unsafe_patches": list(detection.unsafe_patches),
        "threshold": detection.threshold,
        "sinkhorn_iterations": detection.sinkhorn_iterations,
        "marginal_error": detection.marginal_error,
        **_grid_cells(detection.patch_grid),
    }


def _grid_cells(grid: PatchGrid | None) -> dict[str, Any]:
    if grid is None:
        return {}
    if grid.boxes is not None:
        return {"patch_boxes": [list(box) for box in grid.boxes]}
    return {"patch_grid": [grid.rows, grid.columns], "patch_canvas": [*grid.resized, *grid.cell]}


def grid_of_row(row: Mapping[str, Any]) -> PatchGrid | None:
    """The patch grid that a row's cells describe; the inverse of how `detection_columns` writes it."""
    if row.get("patch_boxes") is not None:
        boxes = tuple((left, top, right, bottom) for left, top, right, bottom in row["patch_boxes"])
        return PatchGrid(rows=0, columns=0, resized=(0, 0), cell=(0, 0), boxes=boxes)
    if row.get("patch_grid") is None:
        return None
    width, height, cell_width, cell_height = row["patch_canvas"]
    rows, columns = row["patch_grid"]
    return PatchGrid(rows=rows, columns=columns, resized=(width, height), cell=(cell_width, cell_height))


def detection_of_row(row: Mapping[str, Any]) -> Detection | None:
    """The detection that a row's cells describe; None where nothing was detected."""
    if row.get("flagged") is None:
        return None
    scores = row.get("patch_scores")
    return Detection(
        flagged=row["flagged"],
        image_score=row["image_score"],
        threshold=row["threshold"],
        unsafe_category=row.get("unsafe_category"),
        category_scores=dict(row.get("category_scores") or ()),
        patch_scores=None if scores is None else tuple(scores),
        patch_grid=grid_of_row(row),
        unsafe_patches=tuple(row.get("unsafe_patches") or ()),
        sinkhorn_iterations=row.get("sinkhorn_iterations"),
        marginal_error=row.get("marginal_error"),
    )


def reply_columns(replies: Sequence[Reply | None]) -> dict[str, list[Any]]:
    """The replies as result columns (all but `defense`); None becomes null throughout."""
    fields = {"response": "text", "defense_flagged": "flagged"} | {
        name: name
        for name in (
            "num_prompt_tokens",
            "num_tokens",
            "stop_reason",
            "prefix_attention",
            "defense_score",
            "first_response",
        )
    }
    columns: dict[str, list[Any]] = {
        column: [None if reply is None else getattr(reply, name) for reply in replies]
        for column, name in fields.items()
    }
    costs = [None if reply is None else reply.cost for reply in replies]
    columns["decoding_steps"] = [None if cost is None else cost.steps for cost in costs]
    columns["decoding"] = [None if cost is None else {n: getattr(cost, n) for n in DECODING_PARTS} for cost in costs]
    return columns


def verdict_columns(verdicts: Sequence[Verdict | None]) -> dict[str, list[Any]]:
    """The verdicts as result columns; None becomes null throughout."""
    fields = {
        "refused": "refused",
        "unsafe": "unsafe",
        "unsafe_categories": "categories",
        "verdict_problem": "problem",
        "judge": "judge",
        "judge_score": "score",
    }
    return {
        column: [None if verdict is None else getattr(verdict, name) for verdict in verdicts]
        for column, name in fields.items()
    }
