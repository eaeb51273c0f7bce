"""The FigStep layout, on the real set."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from guardalign.config import InputConfig
from guardalign.errors import ConfigError, InputError
from guardalign.sources import make_source

FIGSTEP = Path(__file__).parents[3] / "shared" / "data" / "figstep"
needs_figstep = pytest.mark.skipif(not FIGSTEP.is_dir(), reason="the FigStep set is not beside the repository")


@needs_figstep
def test_the_real_set_is_500_distinct_rows_with_their_own_pictures(read_all):
    config = InputConfig(format="figstep", path=str(FIGSTEP), passthrough=["question", "instruction"])
    plan, rows = read_all(config, 90)
    assert (plan.num_rows, len(plan.files), plan.notes) == (500, 501, ())
    assert len({row["sample_id"] for row in rows}) == 500
    assert all(row["error"] is None for row in rows)
    first = rows[0]
    assert (first["sample_id"], first["sample_category"], first["label"]) == (
        "ForbidQI_1_1",
        "Illegal Activity",
        "unsafe",
    )
    assert first["image"] == (FIGSTEP / "images" / "query_ForbidQI_1_1_6.png").read_bytes()
    assert first["source"] == "safebench.csv#0"
    assert first["question"].endswith("?")
    assert {row["prompt"] for row in rows} == {first["prompt"]}
    assert first["prompt"] in " ".join((FIGSTEP / "ORIGIN.md").read_text().split())
    assert len({hashlib.sha256(row["image"]).hexdigest() for row in rows}) > 490


@needs_figstep
def test_limit_and_shards_change_no_row(read_all):
    config = InputConfig(format="figstep", path=str(FIGSTEP))
    assert read_all(config, 7, 20)[1] == read_all(config, 200)[1][:20]


def test_a_missing_picture_and_a_left_over_one(tmp_path, png, read_all):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "query_D_1_1_6.png").write_bytes(png(1))
    (tmp_path / "images" / "query_D_9_9_6.png").write_bytes(png(1))
    table = "dataset,category_id,task_id,category_name,question,instruction\nD,1,1,c,q,i\nD,1,2,c,q,i\n"
    (tmp_path / "safebench.csv").write_text(table)
    plan, rows = read_all(InputConfig(format="figstep", path=str(tmp_path)))
    assert [row["error_kind"] for row in rows] == [None, "image_missing"]
    assert plan.notes == ("1 image file has no line in safebench.csv: images/query_D_9_9_6.png",)


def test_a_folder_without_the_layout_is_named(tmp_path):
    with pytest.raises(InputError, match=r"is no folder with FigStep's safebench\.csv"):
        make_source(InputConfig(format="figstep", path=str(tmp_path))).plan(2, None)
    (tmp_path / "safebench.csv").write_text("dataset,category_id\nD,1\n")
    with pytest.raises(InputError, match="lacks the column task_id"):
        make_source(InputConfig(format="figstep", path=str(tmp_path))).plan(2, None)
    with pytest.raises(ConfigError, match=r"input\.prompt_column has no meaning for format figstep"):
        make_source(InputConfig(format="figstep", path=str(tmp_path), prompt_column="question"))
