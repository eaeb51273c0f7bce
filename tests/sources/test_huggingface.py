"""Hugging Face data sets saved to disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import datasets.config
import pyarrow as pa
import pytest

from guardalign.config import InputConfig
from guardalign.errors import ConfigError, InputError
from guardalign.sources import make_source


def _config(path: Path | str, **options) -> InputConfig:
    return InputConfig(format="huggingface", path=str(path), **options)


def _pictures(png, count: int = 7, **columns) -> datasets.Dataset:
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["safe", "unsafe"]),
            "score": datasets.Value("float32"),
        }
    )
    rows = {
        "prompt": [f"p{i}" for i in range(count)],
        "image": [{"bytes": png(i), "path": None} for i in range(count)],
        "label": [i % 2 for i in range(count - 1)] + [-1],
        "score": [i / 2 for i in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_pictures_stay_encoded_and_class_labels_become_names(tmp_path, png, read_all):
    _pictures(png).save_to_disk(tmp_path / "set")
    for shard_rows in (1, 3, 100):
        plan, rows = read_all(_config(tmp_path / "set", passthrough=["score"]), shard_rows)
        assert [row["image"] for row in rows] == [png(i) for i in range(7)]
        assert [row["label"] for row in rows] == ["safe", "unsafe"] * 3 + [None]
        assert [row["sample_id"] for row in rows] == [f"rows#{i}" for i in range(7)]
        assert [row["score"] for row in rows] == [i / 2 for i in range(7)]
        assert plan.passthrough_fields == (pa.field("score", pa.float32()),)
    assert any(file.path.endswith(".arrow") for file in plan.files)
    assert len(read_all(_config(tmp_path / "set"), 2, 5)[1]) == 5


def test_a_saved_selection_keeps_its_order(tmp_path, png, read_all):
    _pictures(png).select([5, 1, 3]).save_to_disk(tmp_path / "set")
    assert [row["prompt"] for row in read_all(_config(tmp_path / "set"), 2)[1]] == ["p5", "p1", "p3"]


def test_a_split_is_named_unless_there_is_one(tmp_path, png, read_all):
    datasets.DatasetDict({"test": _pictures(png, 2), "train": _pictures(png, 4)}).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"test": _pictures(png, 2)}).save_to_disk(tmp_path / "one")
    assert read_all(_config(tmp_path / "one"))[1][0]["source"] == "test#0"
    assert read_all(_config(tmp_path / "two", split="train"))[1][3]["source"] == "train#3"
    with pytest.raises(InputError, match=r"several splits; name one by input\.split: test, train"):
        make_source(_config(tmp_path / "two")).plan(2, None)
    with pytest.raises(InputError, match=r"input\.split dev does not exist in .*; its splits: test, train"):
        make_source(_config(tmp_path / "two", split="dev")).plan(2, None)


def test_duplicates_are_named(tmp_path):
    datasets.Dataset.from_dict({"prompt": ["a", "b"], "sample_id": ["x", "x"]}).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match=r"sample id 'x' stands twice: rows#0 and rows#1"):
        make_source(_config(tmp_path / "set")).plan(2, None)


def test_what_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, sentence in ((tmp_path / "gone", "does not exist"), (tmp_path / "empty", "written by save_to_disk")):
        with pytest.raises(InputError, match=f"{path.name} .*{sentence}"):
            make_source(_config(path)).plan(2, None)
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"input\.revision has no meaning for a data set saved to disk"):
        make_source(_config(tmp_path / "set", revision="main")).plan(2, None)
    with pytest.raises(ConfigError, match="not a list"):
        make_source(InputConfig(format="huggingface", path=[str(tmp_path / "set")]))


def test_picture_paths_start_from_the_image_root(tmp_path, png, read_all):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "a.png").write_bytes(png(1))
    datasets.Dataset.from_dict({"prompt": ["a", "b"], "image": ["a.png", "b.png"]}).save_to_disk(tmp_path / "set")
    plan, rows = read_all(_config(tmp_path / "set", image_root=str(tmp_path / "pics")))
    assert [row["image"] for row in rows] == [png(1), None]
    assert rows[1]["error_kind"] == "image_missing"
    assert "image_root/a.png" in {file.path for file in plan.files}


def test_a_hub_data_set_is_pinned_to_its_commit(tmp_path, png, read_all, monkeypatch):
    """From a cache such as a download leaves it; the network stays off."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "set").mkdir()
    _pictures(png).to_parquet(tmp_path / "set" / "train.parquet")
    datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "made"))
    [prepared] = [path.parent for path in (tmp_path / "made").rglob("set-train.arrow")]
    shutil.copytree(prepared, tmp_path / "cache" / "org___set" / "default" / "0.0.0" / commit)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plan, rows = read_all(_config("org/set"), 3)
    assert plan.shards[0].spans[0].uri == f"org/set@{commit}"
    assert [row["image"] for row in rows] == [png(i) for i in range(7)]
    assert [(file.path, file.etag) for file in plan.files] == [(f"default/0.0.0/{commit}/set-train.arrow", commit)]
    with pytest.raises(InputError, match=r"no/such is no folder, and the hub gives no such data set"):
        make_source(_config("no/such")).plan(2, None)
