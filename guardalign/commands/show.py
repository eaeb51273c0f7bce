"""`guardalign show`: its flags and its call.

Knows nothing of how a row is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

from guardalign.commands.console import CommandParser, say


def show_command(words: Sequence[str]) -> int:
    """Runs `guardalign show`; returns the exit code."""
    from guardalign.show import show

    parser = CommandParser(
        prog="guardalign show",
        description="Prints one row of a run and writes its picture, heat map and mask side by side as PNG.",
    )
    parser.add_argument("out", help="the run's folder")
    parser.add_argument("sample_id", help="the row's sample_id")
    given = parser.parse_args(list(words))
    for line in show(given.out, given.sample_id):
        say(line)
    return 0
