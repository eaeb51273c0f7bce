"""`guardalign evaluate`: its flags and its call.

Knows nothing of how answers are judged or tables made.
"""

from __future__ import annotations

from collections.abc import Sequence

from guardalign.commands.console import CommandParser, listed, own_flags, say, with_values
from guardalign.errors import require


def evaluate_command(words: Sequence[str]) -> int:
    """Runs `guardalign evaluate`; returns the exit code."""
    parser = _parser()
    given, flags = parser.parse_known_args(list(words))
    from guardalign.evaluation.request import make_request
    from guardalign.evaluation.running import evaluate
    from guardalign.models import hide_progress_bars

    suites, benchmarks = listed(given.suite), listed(given.benchmarks)
    for name in ("defenses", "models"):
        words_given = getattr(given, name)
        require(not words_given or bool(listed(words_given)), f"--{name} is empty; name some, or leave it out")
    flags = [f"--output={given.output}", *with_values(flags)]
    with own_flags(parser):
        request = make_request(suites, benchmarks, listed(given.defenses), listed(given.models), given.config, flags)
    hide_progress_bars()
    return evaluate(request, _say_lines)


def _parser() -> CommandParser:
    """Its own flags; all others are settings of an audit."""
    parser = CommandParser(
        prog="guardalign evaluate",
        usage="%(prog)s [--suite micro] [--benchmarks NAME=PATH,...] [--defenses NAME,...] [--models NAME,...] "
        "[--output OUT] [--dotted.flag VALUE]...",
        allow_abbrev=False,
        description="Answers every sample of the benchmarks under every defense with every model, judges the answers, "
        "and prints one table a metric: counts, 95 % intervals, paired tests against the recipe none, costs. A second "
        "run into the same --output resumes the first.",
        epilog="All settings of guardalign audit are taken, too, but those that recipes make (detector, sanitizer, "
        "defense) and the input; --limit holds for each benchmark.",
    )
    add = parser.add_argument
    add("--suite", action="append", default=[], help="benchmarks that ship with the package: micro")
    add(
        "--benchmarks",
        action="append",
        default=[],
        help="NAME=PATH, with commas between several; NAME:PART=PATH takes one part, NAME=PATH::FOLDER finds the "
        "pictures elsewhere; PATH may be a hub name where the benchmark is a data set of the hub",
    )
    add("--defenses", action="append", default=[], help="recipes, or YAML files of their form (default: all recipes)")
    add("--models", action="append", default=[], help="folders or hub names, or embedded (the default)")
    add("--output", default="guardalign-evaluation", help="folder of the run (default: %(default)s)")
    add("--config", action="append", default=[], help="YAML with settings; may be given several times")
    return parser


def _say_lines(text: str) -> None:
    for line in text.splitlines():
        say(line)
