"""Sweeps as curves: columns of a table drawn against one of them, as SVG, with the table's note below.

The same table gives the same bytes (of one matplotlib version): ids from a fixed salt, no date, text as text. Needs the
extra `proof`. Knows nothing of what was measured.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from guardalign.errors import ConfigError
from guardalign.micro.tables import Cell, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SETTINGS: Final[dict[str, Any]] = {
    "svg.hashsalt": "guardalign",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
}
SIZE: Final = (6.0, 4.0)
"""width, height [inch]"""
NOTE_WIDTH: Final = 120
"""characters in a line of the note"""


def svg_curves(table: Table, against: str, columns: Sequence[str] | None = None) -> str:
    """Each of the `columns` (all others when left out) against one, a band where figures have intervals.

    The first column can be drawn against where its labels are numbers. `ConfigError` without matplotlib, or when the
    table has no such column.
    """
    names = [name for name in table.columns[1:] if name != against] if columns is None else columns
    figures = {name: table.column(name) for name in names}
    across = _numbers(table, against)
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("curves need matplotlib: pip install 'guardalign[proof]'") from error
    with rc_context(SETTINGS):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        for name, upwards in figures.items():
            _draw(axes, name, across, upwards)
        axes.set(title=table.title, xlabel=against)
        figure.supxlabel(textwrap.fill(table.note, NOTE_WIDTH), fontsize=6)
        axes.grid(alpha=0.3)
        axes.legend()
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _numbers(table: Table, column: str) -> list[float | None]:
    if column != table.columns[0]:
        return [cell.value for cell in table.column(column)]
    try:
        return [float(row.label) for row in table.rows]
    except ValueError as error:
        raise ConfigError(f"table {table.title!r} is no sweep: its labels are no numbers") from error


def _draw(axes: Axes, name: str, across: Sequence[float | None], upwards: Sequence[Cell]) -> None:
    """One curve; points without a figure are left out, and the band has no width where one has no interval."""
    points = [
        (x, y.value, y.value if y.low is None else y.low, y.value if y.high is None else y.high)
        for x, y in zip(across, upwards, strict=True)
        if x is not None and y.value is not None
    ]
    xs, values, lows, highs = ([point[at] for point in points] for at in range(4))
    (line,) = axes.plot(xs, values, label=name)
    axes.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
