"""`guardalign calibrate`: its flags and its call.

Knows nothing of how a threshold is found.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Final

from guardalign.commands.console import (
    CommandParser,
    numbers,
    own_flags,
    say,
    with_values,
    without_effect,
)
from guardalign.errors import require

ANSWERING: Final = ("sanitizer", "lvlm", "defense", "generation", "judge", "images")
"""Settings that matter only where pictures are answered, for `--gammas`, or where rows are kept."""


def calibrate_command(words: Sequence[str]) -> int:
    """Runs `guardalign calibrate`; returns the exit code."""
    from guardalign import settings
    from guardalign.calibrate import calibrate, calibrate_run
    from guardalign.models import hide_progress_bars
    from guardalign.thresholds import Target

    parser = _parser()
    given, flags = parser.parse_known_args(list(words))
    flags = with_values(flags)
    asked = {field.name: getattr(given, field.name) for field in dataclasses.fields(Target)}
    if given.run is not None:
        spare = [*flags, *(["--recipe"] if given.recipe else []), *(["--config"] if given.config else [])]
        require(not spare, f"--from takes the run's own settings; leave out {' '.join(spare)}")
        return calibrate_run(given.run, Target(**asked), say)
    with own_flags(parser):
        config = settings.load_settings(given.recipe, given.config, flags)
    clustered = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if not clustered and not settings.is_stated("engine", given.config, flags):
        config = dataclasses.replace(config, engine="local")
    hide_progress_bars()
    for line in without_effect(flags, ANSWERING if not given.gammas else ("images",), "calibrate without --gammas"):
        say(line)
    layers = [f"--recipe={given.recipe}"] if given.recipe else []
    return calibrate(config, Target(**asked), say, [*layers, *(f"--config={path}" for path in given.config), *flags])


def _parser() -> CommandParser:
    """Its own flags; all others are settings of an audit."""
    parser = CommandParser(
        prog="guardalign calibrate",
        usage="%(prog)s [--from OUT] [--false_alarm_rate A] [--confidence C] [--output FILE] [--dotted.flag VALUE]...",
        allow_abbrev=False,
        description="Scores benign pictures and writes the threshold below which few of their kind lie, as a file that "
        "guardalign audit --config takes and checks; figures go beside it as JSON.",
        epilog="All settings of guardalign audit are taken, too: the input, the detector, its model, the taxonomy. The "
        "engine is local unless a cluster or --engine is named.",
    )
    add = parser.add_argument
    add("--recipe", help="the method that the settings begin with (default: guardalign)")
    add("--config", action="append", default=[], help="YAML with settings; may be given several times")
    add("--from", dest="run", metavar="OUT", help="take the scores of a finished run; no model is needed")
    add("--output", default="thresholds.yaml", help="the file to write (default: %(default)s)")
    add("--false_alarm_rate", type=float, default=0.05, help="share of benign pictures flagged (default: %(default)s)")
    add("--confidence", type=float, help="keep that rate in this share of draws; without it: on average over draws")
    add("--unsafe_label", help="rows with this label are unsafe: calibrate on the others, report ROC and AUROC")
    add("--all_benign", action="store_true", help="every row counts as benign, whatever its label")
    add("--gammas", type=numbers, default=(), help="with labels: answer under each gamma, such as 0,0.5,1,2")
    return parser
