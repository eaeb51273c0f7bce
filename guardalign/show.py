"""One row for human eyes: its cells as text, and its picture with heat map and mask as PNG.

The picture is read again from the run's source; where that is gone, the kept thumbnail stands in. Data is escaped: no
control character of a prompt or an answer reaches the terminal. Knows nothing of models or Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from guardalign.config import InputConfig
from guardalign.core.images import decode, encode_png
from guardalign.core.patches import patch_boxes
from guardalign.errors import InputError, RowError, UserError, harmless
from guardalign.micro import resolve_input
from guardalign.rescore import open_finished
from guardalign.results import RunFolder
from guardalign.sanitizers import SANITIZERS
from guardalign.schema import IMAGE, RESULT_NAMES, grid_of_row
from guardalign.sources import make_source

WIDEST_CELL = 300
"""Characters of a cell that are printed; the file has them all."""


def show(out: str, sample_id: str) -> list[str]:
    """The row's cells as lines; writes OUT/shown/....png where there is a picture."""
    folder = RunFolder(out)
    manifest = open_finished(folder)
    sample_id = sample_id.encode("utf-8", "backslashreplace").decode()  # a word that is no UTF-8 is no row's id
    row = _find(folder, sample_id)
    lines = [f"{name:20} {_printable(value)}" for name, value in row.items() if name != "thumbnail"]
    if row["image_sha256"] is None:
        return [*lines, "picture              none: a text-only prompt"]
    try:
        picture, origin = _picture(manifest, row)
    except (RowError, UserError) as error:
        return [*lines, f"picture              {_printable(str(error))}"]
    name = f"shown/{hashlib.sha256(sample_id.encode()).hexdigest()[:16]}.png"
    sheets = panels(picture, row, manifest["config"]["sanitizer"])
    folder.write(name, encode_png(sheets))
    shown = ("as it is", "as it is, heat map", "as it is, heat map, mask")[sheets.width // picture.width - 1]
    return [*lines, f"picture              {folder.out}/{name} ({origin}: {shown})"]


def _find(folder: RunFolder, sample_id: str) -> dict[str, Any]:
    for name in folder.committed().values():
        ids = folder.read_table(name, ["sample_id"])["sample_id"]
        position = pc.index(ids, sample_id).as_py()
        if position >= 0:
            row = folder.read_table(name).slice(position, 1)
            return {column: _value(row[column]) for column in row.column_names}
    raise InputError(f"{folder.out} has no row with the sample_id {_printable(sample_id)}")


def _value(cell: pa.ChunkedArray) -> Any:
    try:
        return cell[0].as_py()
    except (OverflowError, ValueError):  # a passed-through date beyond the year 9999, say
        return f"a {cell.type} that Python cannot hold"


def _printable(value: Any) -> str:
    """A cell as one line of harmless characters, cut where it is long."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and value and isinstance(value[0], float):
        return _printable("[" + ", ".join(f"{number:.4g}" for number in value) + "]")
    text = harmless(str(value))
    return text if len(text) <= WIDEST_CELL else f"{text[:WIDEST_CELL]}... ({len(text):,} characters)"


def _picture(manifest: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[Image.Image, str]:
    """The row's picture at its own resolution from the source, else the kept thumbnail."""
    config = InputConfig(**manifest["config"]["input"])
    try:
        encoded = _from_source(config, manifest, row)
        return decode(encoded, config.max_image_pixels, row["sample_id"]).picture, "from the source"
    except UserError:
        if row["thumbnail"] is None:
            raise
        return decode(row["thumbnail"], config.max_image_pixels, row["sample_id"]).picture, "the kept thumbnail"


def _from_source(config: InputConfig, manifest: Mapping[str, Any], row: Mapping[str, Any]) -> bytes:
    shape = manifest["config"]
    source = make_source(resolve_input(config), reserved=RESULT_NAMES)
    shards = source.plan(shape["shard_rows"], shape["limit"]).shards
    if row["shard"] < len(shards):
        table = source.read(shards[row["shard"]])
        position = pc.index(table["sample_id"], row["sample_id"]).as_py()
        encoded = table[IMAGE][position].as_py() if position >= 0 else None
        if encoded is not None and hashlib.sha256(encoded).hexdigest() == row["image_sha256"]:
            return bytes(encoded)
    raise InputError("the picture in the source is not the one that was audited (its hash differs)")


def panels(picture: Image.Image, row: Mapping[str, Any], sanitizer: Mapping[str, Any]) -> Image.Image:
    """The picture, its heat map (red: least safe) and its sanitized form, side by side."""
    grid = grid_of_row(row)
    sheets = [picture]
    if grid is not None:
        boxes = patch_boxes(grid, picture.width, picture.height)
        sheets.append(heat_map(picture, boxes, row["patch_scores"]))
        if sanitizer["name"] in SANITIZERS:
            options = {key: value for key, value in sanitizer.items() if key != "name"}
            clean = SANITIZERS[sanitizer["name"]](**options)
            sheets.append(clean(picture, [boxes[patch] for patch in row["unsafe_patches"]]))
    wide = Image.new("RGB", (sum(sheet.width for sheet in sheets), picture.height))
    for position, sheet in enumerate(sheets):
        wide.paste(sheet, (position * picture.width, 0))
    return wide


def heat_map(picture: Image.Image, boxes: tuple[tuple[int, int, int, int], ...], scores: list[float]) -> Image.Image:
    """The greyed picture under colours by rank of score: red is the least safe patch, transparent the safest."""
    ranks = np.argsort(np.argsort(scores)) / max(len(scores) - 1, 1)
    heat = np.zeros((picture.height, picture.width, 1), np.float32)
    for (left, top, right, bottom), rank in zip(boxes, ranks, strict=True):
        region = heat[top:bottom, left:right]
        np.maximum(region, np.float32(1 - rank), out=region)
    grey = np.asarray(picture.convert("L"), np.float32)[..., None] / 255 * np.ones(3, np.float32)
    strength = 0.7 * heat**2
    mixed = grey * (1 - strength) + np.array([1.0, 0.1, 0.0], np.float32) * strength
    return Image.fromarray((mixed * 255).astype(np.uint8))
