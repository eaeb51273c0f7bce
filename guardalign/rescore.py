"""Another threshold on stored scores: new flags and masks beside a finished run, without any model.

The scores stay; only what follows from them changes. An answer was given under the old mask, so rows whose picture the
LVLM would now see differently are named: theirs would have to be answered again. Knows nothing of models or Ray.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from guardalign.core.patches import patch_boxes
from guardalign.errors import ConfigError, InputError, ResumeError
from guardalign.results import RunFolder, sizes_of
from guardalign.sanitizers import masked_fraction
from guardalign.scales import SCALES, off_scale
from guardalign.schema import grid_of_row
from guardalign.summary import rate

COLUMNS = (
    "sample_id",
    "flagged",
    "image_score",
    "patch_scores",
    "patch_grid",
    "patch_canvas",
    "patch_boxes",
    "unsafe_patches",
    "masked_fraction",
    "width",
    "height",
)
SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), metadata={"doc": "the row's id in the run"}),
        pa.field("threshold", pa.float64(), metadata={"doc": "the threshold applied here"}),
        pa.field("flagged", pa.bool_(), metadata={"doc": "image_score < threshold; null where nothing was detected"}),
        pa.field("unsafe_patches", pa.list_(pa.int32()), metadata={"doc": "patches with score < threshold"}),
        pa.field("masked_fraction", pa.float32(), metadata={"doc": "share of pixels that would be replaced"}),
        pa.field("flag_changed", pa.bool_(), metadata={"doc": "the flag differs from the run's"}),
        pa.field("picture_changed", pa.bool_(), metadata={"doc": "the LVLM would see another picture than it did"}),
    ]
)
MANIFEST = (
    "config.input",
    "config.detector.name",
    "config.sanitizer.name",
    "fingerprint.clip.weights",
    "fingerprint.detector.name",
    "fingerprint.taxonomy",
    "versions.guardalign",
    "totals",
    "notes",
    "files",
)
"""What a finished run's manifest must have, by dotted name."""
NAMED_ROWS = 10
"""Rows that are named on the screen; the file has them all."""


@dataclass(frozen=True)
class Changes:
    """What a threshold changes in the rows so far."""

    detected: int = 0
    """rows with a flag"""
    flagged: int = 0
    """of these, flagged under the new threshold"""
    flags: int = 0
    """flags that differ from the run's"""
    pictures: int = 0
    """pictures that the LVLM would see differently"""
    named: tuple[str, ...] = ()
    """the first ones' ids, at most `NAMED_ROWS`"""

    def with_rows(self, rows: Sequence[Mapping[str, Any]]) -> Changes:
        """These rows, too."""
        detected = [row for row in rows if row.get("flagged") is not None]
        changed = [row["sample_id"] for row in detected if row["picture_changed"]]
        return Changes(
            self.detected + len(detected),
            self.flagged + sum(row["flagged"] for row in detected),
            self.flags + sum(row["flag_changed"] for row in detected),
            self.pictures + len(changed),
            (*self.named, *changed)[:NAMED_ROWS],
        )


def rescore(out: str, threshold: float) -> list[str]:
    """Writes OUT/rescored/threshold-T.parquet; returns the lines of its summary."""
    if not math.isfinite(threshold):
        raise ConfigError(f"--threshold must be a finite number, not {threshold}")
    folder = RunFolder(out)
    manifest = open_finished(folder, COLUMNS)
    if manifest["config"]["detector"]["name"] == "none":
        raise InputError(f"{out} was made without a detector: there are no scores to apply a threshold to")
    sanitized = manifest["config"]["sanitizer"]["name"] != "none"
    name = f"rescored/threshold-{_exactly(threshold)}.parquet"
    content, changes = io.BytesIO(), Changes()
    with pq.ParquetWriter(content, SCHEMA, compression="zstd") as file:
        for table in folder.tables(COLUMNS):  # a shard at a time: a run can be large
            rows = list(_rescored(table, threshold, sanitized))
            file.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
            changes = changes.with_rows(rows)
    folder.write(name, content.getvalue())
    return [*_warning(manifest["config"]["detector"], threshold), *_lines(changes, folder.out, name, threshold)]


def _warning(detector: Mapping[str, Any], threshold: float) -> list[str]:
    score = detector.get("score")
    said = off_scale(score, threshold) if score in SCALES else None
    return [] if said is None else [f"warning    --threshold {said}"]


def _exactly(threshold: float) -> str:
    """All digits: two thresholds never share a file."""
    return repr(threshold).removesuffix(".0")


def open_finished(folder: RunFolder, columns: Sequence[str] = ()) -> dict[str, Any]:
    """The manifest of a finished audit whose files are the manifest's and have these columns; else an `InputError`."""
    if is_evaluation(folder):
        raise InputError(
            f"{folder.out} holds an evaluation, and this command reads the run of an audit; its tables are in "
            f"{folder.out}/tables.md, and guardalign verify checks its files"
        )
    if not folder.exists("run.json"):
        state = "is not finished: run its audit again to resume" if folder.exists("plan.json") else "holds no run"
        raise InputError(f"{folder.out} {state}")
    manifest = _manifest(folder)
    _refuse_other_files(folder, {file["name"]: file["rows"] for file in manifest["files"]}, columns)
    folder.require_sizes(sizes_of(manifest))
    return manifest


def is_evaluation(folder: RunFolder) -> bool:
    """Whether the folder is one of `guardalign evaluate`, finished or not; False where its plan cannot tell."""
    try:
        return folder.exists("plan.json") and _has(folder.read_json("plan.json"), "science", "recipe")
    except ResumeError:
        return False


def _manifest(folder: RunFolder) -> dict[str, Any]:
    manifest = folder.read_json("run.json")
    lacking = [name for name in MANIFEST if not _has(manifest, *name.split("."))]
    if not lacking and not _are_files(manifest["files"]):
        lacking = ["the name and the rows of every file"]
    if lacking:
        raise InputError(f"{folder.out}/run.json was written by another program or version: it lacks {lacking[0]}")
    return manifest


def _has(nested: object, name: str, *deeper: str) -> bool:
    if not isinstance(nested, Mapping) or name not in nested:
        return False
    return _has(nested[name], *deeper) if deeper else True


def _are_files(listed: object) -> bool:
    named = isinstance(listed, list) and all(_has(file, "name") and _has(file, "rows") for file in listed)
    return named and all(isinstance(file["name"], str) for file in listed)  # type: ignore[attr-defined]


def _refuse_other_files(folder: RunFolder, named: Mapping[str, int], columns: Sequence[str]) -> None:
    """The first file that is missing, foreign or changed; by its footer alone, for a run can be large."""
    there = set(folder.committed().values())
    for name in sorted({*named, *there}):
        where = f"{folder.out}/{name}"
        if name not in there:
            raise InputError(f"{where} is missing, and run.json names it: run the audit again")
        if name not in named:
            raise InputError(f"{where} is foreign: run.json does not name it; remove it")
        try:
            with folder.files.open(folder.path(name), "rb") as stream:
                footer = pq.ParquetFile(stream)
                rows, present = footer.metadata.num_rows, footer.schema_arrow.names
        except (pa.ArrowException, OSError, ValueError):
            raise InputError(f"{where} is damaged: remove it and run the audit again") from None
        if rows != named[name]:
            raise InputError(f"{where} has changed: it holds {rows:,} rows, and run.json says {named[name]}")
        absent = [column for column in columns if column not in present]
        if absent:
            raise InputError(f"{where} was written by another program or version: it lacks the column {absent[0]}")


def _rescored(table: pa.Table, threshold: float, sanitized: bool) -> Iterator[dict[str, Any]]:
    for row in table.to_pylist():
        if row["flagged"] is None:
            yield {"sample_id": row["sample_id"], "threshold": threshold}
            continue
        scores = row["patch_scores"]
        unsafe = [] if scores is None else [int(patch) for patch in np.flatnonzero(np.asarray(scores) < threshold)]
        flagged = row["image_score"] < threshold
        yield {
            "sample_id": row["sample_id"],
            "threshold": threshold,
            "flagged": flagged,
            "unsafe_patches": unsafe,
            "masked_fraction": _fraction(row, unsafe) if sanitized else None,
            "flag_changed": flagged != row["flagged"],
            "picture_changed": sanitized and unsafe != list(row["unsafe_patches"] or ()),
        }


def _fraction(row: dict[str, Any], unsafe: list[int]) -> float:
    grid = grid_of_row(row)
    if grid is None or not unsafe:
        return 0.0
    if unsafe == row["unsafe_patches"] and row["masked_fraction"] is not None:
        return float(row["masked_fraction"])
    boxes = patch_boxes(grid, row["width"], row["height"])
    return masked_fraction([boxes[patch] for patch in unsafe], row["width"], row["height"])


def _lines(changes: Changes, out: str, name: str, threshold: float) -> list[str]:
    more = changes.pictures - len(changes.named)
    named = ", ".join(changes.named) + (f" and {more:,} more" if more else "")
    return [
        f"threshold  {_exactly(threshold)}",
        f"flagged    {rate(changes.flagged, changes.detected)}",
        f"flags      {changes.flags:,} changed",
        f"pictures   {changes.pictures:,} would look different to the LVLM" + (f": {named}" if named else ""),
        f"written    {out}/{name}",
    ]
