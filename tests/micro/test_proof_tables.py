"""A table says the same in every form, a figure keeps its interval, and the same table gives the same drawing."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from guardalign.core.statistics import wilson_interval
from guardalign.errors import ConfigError, InputError
from guardalign.micro.curves import svg_curves
from guardalign.micro.tables import (
    NOTHING,
    Cell,
    Row,
    Table,
    as_json,
    as_markdown,
    as_text,
    auroc_cell,
    rate_cell,
    share_cell,
    tables_of,
)

TABLE = Table(
    "What | is found",
    ("score", "AUROC", "pointing"),
    (
        Row("with a|pipe", (Cell(0.9144, 0.902, 0.9251), Cell(1.0))),
        Row("plain", (Cell(0.5, 0.25, 0.75), NOTHING)),
    ),
    "granted: nothing",
)
SWEEP = Table(
    "Sweep",
    ("threshold", "false alarms", "detected"),
    tuple(Row(str(at / 4), (Cell(at / 8, at / 16, at / 6), Cell(at / 4) if at else NOTHING)) for at in range(5)),
    "granted: a little",
)


def test_json_gives_back_the_very_tables() -> None:
    assert tables_of(as_json([TABLE, SWEEP])) == [TABLE, SWEEP]


@pytest.mark.parametrize("text", ["", "{", "{}x", '[{"title": "t"}]', "[1]", '[{"rows": [{"label": 1}]}]'])
def test_what_is_no_table_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError, match="holds no tables"):
        tables_of(text)


def test_text_aligns_its_columns_and_keeps_every_word() -> None:
    title, _, head, rule, *body, _, note = as_text(TABLE).splitlines()
    assert title == TABLE.title and note == TABLE.note
    starts = [0, *(match.end() for match in re.finditer("  ", rule))]
    for line, words in zip(
        [head, *body], [TABLE.columns, *((r.label, *map(str, r.cells)) for r in TABLE.rows)], strict=True
    ):
        assert [line[start:].startswith(word) for start, word in zip(starts, words, strict=True)] == [True] * 3


def test_markdown_is_one_pipe_table_whose_pipes_are_all_separators() -> None:
    lines = [line for line in as_markdown(TABLE).splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
    assert "| 0.914 [0.902, 0.925] | 1.000 |" in lines[2] and "| – |" in lines[3]


def test_a_figure_shows_its_digits_and_interval() -> None:
    assert str(Cell(0.12346, digits=4)) == "0.1235" and str(Cell(1.0)) == "1.000"
    assert str(Cell(0.5, 0.4, 0.6, digits=1)) == "0.5 [0.4, 0.6]"
    for wrong in (
        {"value": float("nan")},
        {"value": 0.5, "low": 0.1},
        {"value": 0.5, "low": 0.1, "high": float("inf")},
    ):
        with pytest.raises(AssertionError):
            Cell(**wrong)


def test_every_row_has_every_column() -> None:
    with pytest.raises(AssertionError, match="has 2 cells"):
        Table("t", ("a", "b", "c"), (Row("r", (NOTHING,)),))


def test_a_figure_is_found_by_its_row_and_column() -> None:
    assert TABLE.cell("plain", "AUROC") == Cell(0.5, 0.25, 0.75)
    with pytest.raises(ConfigError, match="no column 'score'"):
        TABLE.column("score")


def test_figures_come_with_their_intervals() -> None:
    assert rate_cell(3, 4) == Cell(0.75, *wilson_interval(3, 4)) and rate_cell(0, 0) == NOTHING
    values = np.array([0.1, 0.2, 0.3, 0.6])
    mean = share_cell(values)
    half = 1.959963984540054 * np.sqrt(0.14 / 3) / 2
    assert mean.value == pytest.approx(0.3) and mean.low == pytest.approx(0.3 - half)
    assert mean.high == pytest.approx(0.3 + half) and share_cell(np.array([0.0, 0.0, 0.1])).low == 0.0
    assert share_cell(values[:1]) == Cell(0.1) == share_cell(np.full(3, 0.1)) and share_cell(values[:0]) == NOTHING


def test_an_auroc_counts_low_scores_as_unsafe() -> None:
    unsafe = np.array([True, True, False, False])
    assert auroc_cell(np.array([0.0, 0.1, 0.2, 0.3]), unsafe).value == 1.0
    assert auroc_cell(np.array([0.2, 0.3, 0.0, 0.1]), unsafe).value == 0.0
    assert auroc_cell(np.zeros(2), unsafe[:2]) == NOTHING


def test_a_sweep_is_drawn_the_same_way_twice_and_holds_its_words() -> None:
    drawn = svg_curves(SWEEP, "threshold")
    assert drawn == svg_curves(SWEEP, "threshold")
    words = set(ElementTree.fromstring(drawn).itertext())
    assert {"Sweep", "threshold", "false alarms", "detected", "granted: a little"} <= words
    assert not re.search(r"\d{4}-\d\d-\d\d", drawn), "a date"


def test_only_the_columns_asked_for_are_drawn() -> None:
    words = set(ElementTree.fromstring(svg_curves(SWEEP, "threshold", ["detected"])).itertext())
    assert "detected" in words and "false alarms" not in words
    with pytest.raises(ConfigError, match="no column 'tau'"):
        svg_curves(SWEEP, "tau")
    with pytest.raises(ConfigError, match="is no sweep"):
        svg_curves(TABLE, "score")


def test_a_sweep_can_be_drawn_against_its_labels_or_against_a_column() -> None:
    """The same numbers in both places draw the same curve."""
    doubled = Table(
        SWEEP.title,
        ("at", "threshold", *SWEEP.columns[1:]),
        tuple(Row("x", (Cell(float(row.label)), *row.cells)) for row in SWEEP.rows),
        SWEEP.note,
    )
    assert svg_curves(doubled, "threshold") == svg_curves(SWEEP, "threshold")


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"guardalign\[proof\]") as caught:
        svg_curves(SWEEP, "threshold")
    assert "\n" not in str(caught.value)
