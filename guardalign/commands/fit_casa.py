"""`guardalign fit-casa`: its flags and its call.

Knows nothing of how the safety attention is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from guardalign.commands.console import (
    CommandParser,
    own_flags,
    say,
    with_values,
    without_effect,
)
from guardalign.errors import require

IDLE: Final = (
    *("taxonomy", "clip", "detector", "calibration", "sanitizer", "generation", "judge", "images", "cluster"),
    *("engine", "max_error_fraction", "self_check"),
)
"""Settings of an audit that a fit makes no use of, `cluster.threads` apart."""
READING: Final = ("input", "limit", "shard_rows")
"""Settings that `--scenes` stands for."""


def fit_casa_command(words: Sequence[str]) -> int:
    """Runs `guardalign fit-casa`; returns the exit code."""
    from guardalign import settings
    from guardalign.core.safety_attention import Fitting
    from guardalign.fit_casa import FitTarget, fit_casa
    from guardalign.models import hide_progress_bars

    parser = _parser()
    given, flags = parser.parse_known_args(list(words))
    flags = with_values(flags)
    with own_flags(parser):
        config = settings.load_settings(given.recipe, given.config, flags)
    require(not config.dry_run, "fit-casa has no dry run; guardalign audit --dry_run checks the same settings")
    fitting = Fitting(size=given.size, max_epochs=given.max_epochs, seed=given.seed)
    target = FitTarget(given.output, given.unsafe_label, given.question, given.scenes, fitting)
    hide_progress_bars()
    idle = (*IDLE, *(READING if given.scenes is not None else ()))
    for line in without_effect([flag for flag in flags if not flag.startswith("--cluster.threads")], idle, "fit-casa"):
        say(line)
    return fit_casa(config, target, say)


def _parser() -> CommandParser:
    """Its own flags; all others are settings of an audit."""
    from guardalign.core.safety_attention import Fitting
    from guardalign.fit_casa import QUESTION

    parser = CommandParser(
        prog="guardalign fit-casa",
        usage="%(prog)s [--output FOLDER] [--unsafe_label LABEL] [--scenes N] [--dotted.flag VALUE]...",
        allow_abbrev=False,
        description="Fits the safety attention of the defense casa to labelled prompts, on the frozen LVLM's hidden "
        "states; writes a folder for --defense.head, with the AUROC on prompts that were held out. Without an input, "
        "the packaged sample is taken.",
        epilog="All settings of guardalign audit are taken, too: the input, the LVLM, and of the defense casa its "
        "labels, prefix and calibration, under which the prompts are read. It runs in this process, without Ray.",
    )
    add = parser.add_argument
    add("--recipe", default="casa", help="the method that the settings begin with (default: %(default)s)")
    add("--config", action="append", default=[], help="YAML with settings; may be given several times")
    add("--output", default="casa-head", help="the folder to write (default: %(default)s)")
    add("--unsafe_label", default="unsafe", help="rows with this label are unsafe (default: %(default)s)")
    add("--question", default=QUESTION, help="the safety question behind the query (default: %(default)s)")
    add("--scenes", type=int, help="fit to so many fresh scenes of the micro world instead (needs the emoji font)")
    add("--size", type=int, default=Fitting.size, help="width of the attention module (default: %(default)s)")
    add("--max_epochs", type=int, default=Fitting.max_epochs, help="most passes (default: %(default)s)")
    add("--seed", type=int, default=Fitting.seed, help="of the split and the first weights (default: %(default)s)")
    return parser
