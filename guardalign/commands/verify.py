"""`guardalign verify`: its flags and its call.

Knows nothing of how a run is checked.
"""

from __future__ import annotations

from collections.abc import Sequence

from guardalign.commands.console import CommandParser, say, with_values
from guardalign.errors import ConfigError


def verify_command(words: Sequence[str]) -> int:
    """Runs `guardalign verify`; returns the exit code."""
    parser = _parser()
    if not words or words[0].startswith("-"):
        if not {"-h", "--help"} & set(words):
            raise ConfigError(
                "guardalign verify needs the run's folder, before all flags; see guardalign verify --help"
            )
        parser.parse_args(["--help"])
    given, flags = parser.parse_known_args(list(words))
    from guardalign.models import hide_progress_bars
    from guardalign.verify import Asked, verify

    hide_progress_bars()
    files, flags = tuple(given.config), with_values(flags)
    asked = Asked(given.out, given.sample, given.seed, files, tuple(flags), given.most_differing, given.judge)
    return verify(asked, say)


def _parser() -> CommandParser:
    """Its own flags; all others are settings of an audit."""
    parser = CommandParser(
        prog="guardalign verify",
        usage="%(prog)s OUT [--sample N] [--seed N] [--most_differing SHARE] [--judge] [--config FILE] "
        "[--dotted.flag VALUE]...",
        allow_abbrev=False,
        description="Checks a finished run: every file by its checksum, counts, ids and schema; that the input is "
        "still the one audited; and rows drawn at random, computed again in other batches and compared by column. "
        "Exit code 1 where something is wrong.",
        epilog="The run's own settings are taken. Those that say where things lie or run may be given anew, such as "
        "--input.path, --lvlm.model, --lvlm.device; one that changes what is computed is refused. It runs in this "
        "process, without Ray.",
    )
    add = parser.add_argument
    add("out", metavar="OUT", help="the run's folder; it comes first")
    add("--sample", type=int, default=100, help="rows to compute again; 0: check the files only (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    add(
        "--most_differing",
        type=float,
        help="largest share of rows that may differ (default: 0 where all models round as fp32, else 0.02)",
    )
    add("--judge", action="store_true", help="ask a judge behind an endpoint again")
    add("--config", action="append", default=[], help="YAML with settings; may be given several times")
    return parser
