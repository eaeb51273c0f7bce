"""The contract: what is written reads back as what it was."""

from __future__ import annotations

import pyarrow as pa

from guardalign.schema import (
    DETECTION,
    RESULT_NAMES,
    detection_columns,
    detection_of_row,
    result_schema,
    to_result,
    with_columns,
)
from guardalign.types import Detection, PatchGrid

GRID = Detection(
    flagged=True,
    image_score=-0.5,
    threshold=0.1,
    unsafe_category="S1",
    category_scores={"S1": 0.5, "S2": 0.75},
    patch_scores=(-0.5, 0.25, 0.5, 1.0, 2.0, 4.0),
    patch_grid=PatchGrid(rows=2, columns=3, resized=(90, 60), cell=(30, 30)),
    unsafe_patches=(0,),
    sinkhorn_iterations=7,
    marginal_error=0.0,
)
BOXES = Detection(
    flagged=False,
    image_score=0.5,
    threshold=0.0,
    unsafe_category=None,
    category_scores={},
    patch_scores=(0.5, 1.0),
    patch_grid=PatchGrid(rows=0, columns=0, resized=(0, 0), cell=(0, 0), boxes=((0, 0, 5, 5), (5, 0, 10, 5))),
)


def test_a_detection_reads_back_as_itself() -> None:
    table = with_columns(pa.table({"sample_id": ["a", "b", "c"]}), detection_columns([GRID, None, BOXES]))
    rows = table.to_pylist()
    assert [detection_of_row(row) for row in rows] == [GRID, None, BOXES]


def test_column_names_are_unique() -> None:
    assert len(set(RESULT_NAMES)) == len(RESULT_NAMES)
    assert {column.name for column in DETECTION} <= set(RESULT_NAMES)


def test_missing_columns_become_null_and_hidden_ones_go() -> None:
    schema = result_schema()
    result = to_result(pa.table({"sample_id": ["a"], "image": [b"x"]}), schema)
    assert result.schema.equals(schema, check_metadata=True)
    assert result["response"].null_count == 1
