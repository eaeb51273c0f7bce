"""`guardalign rescore`: its flags and its call.

Knows nothing of how a threshold is applied.
"""

from __future__ import annotations

from collections.abc import Sequence

from guardalign.commands.console import CommandParser, say


def rescore_command(words: Sequence[str]) -> int:
    """Runs `guardalign rescore`; returns the exit code."""
    from guardalign.rescore import rescore

    parser = CommandParser(
        prog="guardalign rescore",
        description="Applies another threshold to the stored scores of a finished run; writes "
        "OUT/rescored/threshold-T.parquet and names the rows whose picture the model would now see differently.",
    )
    parser.add_argument("out", help="the run's folder")
    parser.add_argument("--threshold", type=float, required=True, help="scores strictly below it are unsafe")
    given = parser.parse_args(list(words))
    for line in rescore(given.out, given.threshold):
        say(line)
    return 0
