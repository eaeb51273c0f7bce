"""Tables of measured figures: one small value, rendered as text, Markdown and JSON.

Every figure carries its 95 % interval where it has one: Wilson's for rates, DeLong's for AUROCs, the normal one for
means. Knows nothing of what was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from guardalign.core.statistics import Z_95, auroc, wilson_interval
from guardalign.errors import InputError, require

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Cell:
    """One figure."""

    value: float | None
    """None where nothing could be measured"""
    low: float | None = None
    """lower end of the 95 % interval"""
    high: float | None = None
    """upper end of the 95 % interval"""
    digits: int = 3
    """decimals to show"""

    def __post_init__(self) -> None:
        numbers = [number for number in (self.value, self.low, self.high) if number is not None]
        assert all(math.isfinite(number) for number in numbers), "a figure is a finite number, or None"
        assert (self.low is None) == (self.high is None), "an interval has two ends"

    def __str__(self) -> str:
        """`0.914 [0.902, 0.925]`, `0.914`, or a dash."""
        if self.value is None:
            return "–"
        shown = f"{self.value:.{self.digits}f}"
        if self.low is None or self.high is None:
            return shown
        return f"{shown} [{self.low:.{self.digits}f}, {self.high:.{self.digits}f}]"


NOTHING = Cell(None)


def rate_cell(successes: int, trials: int) -> Cell:
    """A rate in [0, 1]; a dash without trials."""
    return Cell(successes / trials, *wilson_interval(successes, trials)) if trials else NOTHING


def share_cell(values: NDArray[np.float64]) -> Cell:
    """The mean of independent shares, all in [0, 1], ± 1.96 standard errors, cut to [0, 1].

    A dash for none; no interval where the values do not differ, and so tell nothing of their spread.
    """
    if not len(values) or values.min() == values.max():
        return Cell(float(values[0])) if len(values) else NOTHING
    mean, spread = float(values.mean()), Z_95 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Cell(mean, max(0.0, mean - spread), min(1.0, mean + spread))


def auroc_cell(scores: NDArray[np.float64], unsafe: NDArray[np.bool_]) -> Cell:
    """AUROC of scores of which lower means less safe; a dash unless there are samples of both kinds."""
    if unsafe.all() or not unsafe.any():
        return NOTHING
    found = auroc(scores[unsafe], scores[~unsafe])
    return Cell(found.value, found.low, found.high)


@dataclass(frozen=True)
class Row:
    """One line."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Figures with a title, and what must be known to read them."""

    title: str
    columns: tuple[str, ...]
    """the first heads the labels"""
    rows: tuple[Row, ...]
    note: str = ""
    """how it was measured, and what was granted by construction"""

    def __post_init__(self) -> None:
        width = len(self.columns) - 1
        assert all(len(row.cells) == width for row in self.rows), f"every row of {self.title!r} has {width} cells"

    def cell(self, label: str, column: str) -> Cell:
        """The figure of a row and a column."""
        return self.column(column)[[row.label for row in self.rows].index(label)]

    def column(self, name: str) -> tuple[Cell, ...]:
        """The figures of a column, from top to bottom."""
        require(name in self.columns[1:], f"table {self.title!r} has no column {name!r}; it has {self.columns[1:]}")
        at = self.columns.index(name, 1) - 1
        return tuple(row.cells[at] for row in self.rows)


def with_note(table: Table, sentence: str) -> Table:
    """The same figures, with one sentence more to be known."""
    return replace(table, note=f"{table.note} {sentence}".strip())


def as_text(table: Table) -> str:
    """For a terminal: aligned columns under the title, the note below."""
    lines = [table.columns, *((row.label, *map(str, row.cells)) for row in table.rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(table.columns))]
    body = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([table.title, "", body[0], rule, *body[1:], *(["", table.note] if table.note else [])]) + "\n"


def as_markdown(table: Table) -> str:
    """For a README: the title in bold, a pipe table, the note below."""
    head = [_piped(table.columns), _piped(["---", *["---:"] * (len(table.columns) - 1)])]
    body = [_piped([row.label, *map(str, row.cells)]) for row in table.rows]
    note = ["", _escaped(table.note)] if table.note else []
    return "\n".join([f"**{_escaped(table.title)}**", "", *head, *body, *note]) + "\n"


def _piped(words: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(word) for word in words) + " |"


def _escaped(word: str) -> str:
    return word.replace("|", "\\|").replace("\n", " ")


def as_json(tables: Sequence[Table]) -> str:
    """For programs; `tables_of` reads it back without loss."""
    return json.dumps([asdict(table) for table in tables], indent=1, ensure_ascii=False) + "\n"


def tables_of(text: str) -> list[Table]:
    """What `as_json` wrote; `InputError` when it is something else."""
    try:
        return [_table(content) for content in json.loads(text)]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"the text holds no tables as as_json writes them ({type(error).__name__})") from error


def _table(content: dict[str, Any]) -> Table:
    rows = tuple(Row(row["label"], tuple(Cell(**cell) for cell in row["cells"])) for row in content["rows"])
    return Table(content["title"], tuple(content["columns"]), rows, content["note"])
