"""`guardalign fit-casa`: the default needs no font, its label decides held-out scenes, and no row is lost."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from guardalign.cli import main
from guardalign.config import LvlmConfig
from guardalign.core.statistics import auroc
from guardalign.defenses.casa import Casa
from guardalign.errors import InputError
from guardalign.fit_casa import FitTarget, Reading, States, _outcomes, _split
from guardalign.micro import resolve_lvlm
from guardalign.micro.sample import PROOF, SAMPLE
from guardalign.models.asking import Asking
from guardalign.models.decoding import Decoder
from guardalign.models.lvlm import Lvlm
from guardalign.models.safety_head import load_head
from guardalign.types import Case, Sample

COLUMNS = ["sample_id", "image", "prompt", "label"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default run, on the packaged sample."""
    folder = tmp_path_factory.mktemp("fit") / "head"
    assert main(["fit-casa", "--output", str(folder)]) == 0
    return folder


def test_the_default_fit_decides_scenes_that_it_never_saw(fitted: Path) -> None:
    """The AUROC of the label on 200 of the proof's scenes, other scenes than any fit has seen."""
    lvlm, head = Lvlm.load(resolve_lvlm(LvlmConfig(device="cpu"))), load_head(str(fitted), "cpu")
    head.require_fits(lvlm)
    rows = pq.read_table(PROOF, columns=COLUMNS).slice(0, 200).to_pylist()
    defense = Casa(mode="scale", head=str(fitted))

    def score(row: dict[str, object]):  # type: ignore[no-untyped-def]
        picture = Image.open(io.BytesIO(row["image"])).convert("RGB")  # type: ignore[arg-type]
        read = yield from defense.read(lvlm, Case(Sample(str(row["sample_id"]), str(row["prompt"]), None, ""), picture))
        return torch.tensor(read.log_unsafe - read.log_safe + head.module.logit(read.hidden)).sigmoid().item()

    scores = [outcome.value for outcome in Decoder(lvlm, 16).run(score(row) for row in rows)]
    unsafe, benign = (
        [-float(s) for s, row in zip(scores, rows, strict=True) if (row["label"] == "unsafe") is kind]  # type: ignore[arg-type]
        for kind in (True, False)
    )
    assert auroc(unsafe, benign).value >= 0.95


def test_the_figures_stand_beside_the_weights(fitted: Path) -> None:
    card = json.loads((fitted / "head.json").read_text())
    assert card["prompts"]["held out"] == {"unsafe": 20, "benign": 20}
    assert sum(sum(part.values()) for part in card["prompts"].values()) == 200
    for figures in card["held_out"].values():
        assert 0 <= figures["low"] <= figures["auroc"] <= figures["high"] <= 1
        assert 0 <= figures["flagged_benign"] <= figures["flagged_unsafe"] <= 1
    assert set(card["held_out"]) == {"token_only", "replace", "scale"}


@pytest.mark.slow
def test_the_same_command_gives_the_same_weights(fitted: Path, tmp_path: Path) -> None:
    assert main(["fit-casa", "--output", str(tmp_path / "again")]) == 0
    first, again = ((folder / "head.safetensors").read_bytes() for folder in (fitted, tmp_path / "again"))
    assert first == again


def test_rows_that_cannot_be_read_are_counted_and_rows_without_a_label_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = pq.read_table(SAMPLE, columns=COLUMNS).slice(0, 72).to_pylist()
    bad = [
        {"sample_id": "broken", "image": b"no picture", "prompt": "What is this?", "label": "benign"},
        {"sample_id": "long", "image": None, "prompt": "x" * 9000, "label": "benign"},
        {"sample_id": "unlabelled", "image": None, "prompt": "What is this?", "label": None},
    ]
    path = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist([*bad, *good]), path)
    words = ["fit-casa", "--input.format", "parquet", "--input.path", str(path), "--max_epochs", "2"]
    assert main([*words, "--output", str(tmp_path / "head")]) == 0
    assert "left out  2 rows" in capsys.readouterr().out
    card = json.loads((tmp_path / "head" / "head.json").read_text())
    assert card["error_rows"] == 2
    assert sum(sum(part.values()) for part in card["prompts"].values()) == 72


def test_too_few_labels_and_foreign_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["fit-casa", "--limit", "12", "--output"]
    assert main([*quick, str(tmp_path / "head")]) == 2
    assert "are the least" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert main([*quick, str(tmp_path / "mine")]) == 2
    assert "did not write it" in capsys.readouterr().err
    assert main([*quick, str(tmp_path / "head"), "--defense.name", "none"]) == 2
    assert "fits the defense casa" in capsys.readouterr().err


def test_prompts_about_one_picture_stay_in_one_part() -> None:
    readings = [Reading(f"picture-{at // 4}", at % 8 < 4, 0.0, 0.0) for at in range(400)]
    parts = _split(readings, FitTarget())
    assert sorted(at for part in parts for at in part) == list(range(400))
    pictures = [{readings[at].picture for at in part} for part in parts]
    assert not pictures[0] & pictures[1] and not pictures[0] & pictures[2] and not pictures[1] & pictures[2]
    assert [len(part) for part in parts] == [240, 80, 80]
    with pytest.raises(InputError, match=r"the stopping part has \d+ unsafe and \d+ benign prompts"):
        _split(readings[:24], FitTarget())


def test_a_prompt_that_does_not_fit_beside_others_is_read_alone() -> None:
    tried: list[str] = []

    def asking(row: Mapping[str, Any]) -> Asking[str]:
        yield []
        tried.append(row["sample_id"])
        if tried.count("large") == 1:
            raise MemoryError
        return str(row["sample_id"])

    decoder = Decoder(Lvlm.load(resolve_lvlm(LvlmConfig(device="cpu"))), 4)
    outcomes = _outcomes([{"sample_id": name} for name in ("small", "large", "other")], asking, decoder)
    assert [outcome.value for outcome in outcomes] == ["small", "large", "other"]


def test_states_come_back_from_their_file(tmp_path: Path) -> None:
    drawn = [torch.randn(tokens, 6) for tokens in (3, 1, 5)]
    with (tmp_path / "states").open("w+b") as file:
        states = States(file)
        for at, each in enumerate(drawn):
            states.add(each, str(at))
            assert all(torch.allclose(states[back], drawn[back], atol=1e-2) for back in range(at + 1))
        assert len(states) == 3


def test_scenes_are_drawn_where_there_is_a_font(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from guardalign.errors import ConfigError
    from guardalign.micro.world import font_path

    try:
        font_path()
    except ConfigError:
        pytest.skip("no emoji font on this machine")
    words = ["fit-casa", "--scenes", "80", "--max_epochs", "1", "--output"]
    assert main([*words, str(tmp_path / "head")]) == 0
    card = json.loads((tmp_path / "head" / "head.json").read_text())
    assert sum(sum(part.values()) for part in card["prompts"].values()) == 80
