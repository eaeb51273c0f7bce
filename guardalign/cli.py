"""The console command: `guardalign audit | calibrate | fit-casa | ...`. Parses, dispatches, makes errors one line.

Exit codes: 0 done; 1 the run ended, but not as promised; 2 something that the user can mend; 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from guardalign.errors import ConfigError, RunFailedError, UserError, harmless, require
from guardalign.version import VERSION

USAGE = """usage: guardalign COMMAND ...

commands:
  audit     audit a data set: detect, blank, answer, judge; one Parquet row an input   (guardalign audit --help)
  evaluate  benchmarks x defenses x models, and the tables that compare them         (guardalign evaluate --help)
  calibrate find the threshold that flags few benign pictures; a file for --config    (guardalign calibrate --help)
  fit-casa  fit the safety attention of the defense casa to labelled prompts           (guardalign fit-casa --help)
  verify    check a finished run: files, counts, and some rows computed again        (guardalign verify --help)
  rescore   write the flags and masks of another threshold beside a finished run       (guardalign rescore --help)
  show      print one row and write its picture with heat map and mask                 (guardalign show --help)

guardalign --version prints the version. Without settings, `guardalign audit` runs on the embedded sample.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _log_to_stderr()
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        print(f"guardalign {VERSION}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        return _complain(f"there is no command {words[0]!r}; one of: {', '.join(COMMANDS)}", 2)
    try:
        return command(_with_negatives(words[1:]))
    except RunFailedError as error:
        return _complain(str(error), 1)
    except UserError as error:
        return _complain(str(error), 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that may not be written: the user's to mend
        return _complain(f"{error.filename or 'a file'}: {error.strerror or error}", 2)


class _HarmlessFormatter(logging.Formatter):
    """One line a message, whatever it holds; a traceback keeps its lines, set in."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - so logging calls it
        return harmless(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join(f"  {harmless(line)}" for line in super().formatException(ei).split("\n"))


def _log_to_stderr() -> None:
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(_HarmlessFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[to_stderr])


def _complain(sentence: str, code: int) -> int:
    print(f"guardalign: {harmless(' '.join(sentence.split()))}", file=sys.stderr)
    return code


def _say(line: str) -> None:
    print(harmless(line))


def _with_negatives(words: Sequence[str]) -> list[str]:
    """`--threshold -1e-3` as `--threshold=-1e-3`: argparse takes a negative number with an exponent for a flag."""
    joined: list[str] = []
    for word in words:
        if re.fullmatch(r"-(\d+\.?\d*|\.\d+)e[+-]?\d+", word, re.IGNORECASE) and joined and joined[-1][:2] == "--":
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _audit(words: Sequence[str]) -> int:
    from guardalign import settings

    parser = argparse.ArgumentParser(prog="guardalign audit", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", default=None)
    parser.add_argument("--config", action="append", default=[])
    for flag in ("--help", "-h", "--print_config", "--version"):
        parser.add_argument(flag, action="store_true")
    try:
        layers, flags = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        return _complain(str(error), 2)
    flags = _with_values(flags)
    if layers.version:
        print(f"guardalign {VERSION}")
        return 0
    if layers.help or layers.h:
        print(AUDIT_HELP.format(recipes=", ".join(settings.recipe_names()), default=settings.DEFAULT_RECIPE))
        print(settings.help_text(layers.recipe, layers.config, flags))
        return 0
    config = settings.load_settings(layers.recipe, layers.config, flags)
    if layers.print_config:
        print(settings.as_yaml(config), end="")
        return 0
    from guardalign.audit import audit
    from guardalign.models import hide_progress_bars

    hide_progress_bars()
    signal.signal(signal.SIGTERM, _interrupt)
    return audit(config, _say)


def _with_values(flags: Sequence[str]) -> list[str]:
    """The flags with `--dry_run` allowed to stand alone."""
    following = [*flags[1:], "--"]
    alone = [flag == "--dry_run" and after.startswith("--") for flag, after in zip(flags, following, strict=False)]
    return ["--dry_run=true" if bare else flag for flag, bare in zip(flags, alone, strict=True)]


AUDIT_HELP = """usage: guardalign audit [--recipe NAME] [--config FILE]... [--dotted.flag VALUE]...

A recipe holds a method, files merge over it in their order, flags win. Without any setting the embedded sample is
audited by embedded models. A second run into the same --output resumes the first.

  --recipe NAME     one of: {recipes} (default: {default})
  --config FILE     YAML with settings; may be given several times
  --print_config    print the settings that result, as YAML, and stop
  --version         print the version and stop

The settings below are those of the strategies that the command line chooses; --defense.name none --help shows others.
"""


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _calibrate(words: Sequence[str]) -> int:
    from guardalign import settings
    from guardalign.calibrate import calibrate, calibrate_run
    from guardalign.models import hide_progress_bars
    from guardalign.thresholds import Target

    given, flags = _calibrate_parser().parse_known_args(list(words))
    flags = _with_values(flags)
    asked = {field.name: getattr(given, field.name) for field in dataclasses.fields(Target)}
    if given.run is not None:
        spare = [*flags, *(["--recipe"] if given.recipe else []), *(["--config"] if given.config else [])]
        require(not spare, f"--from takes the run's own settings; leave out {' '.join(spare)}")
        return calibrate_run(given.run, Target(**asked), _say)
    config = settings.load_settings(given.recipe, given.config, flags)
    clustered = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if not clustered and not settings.is_stated("engine", given.config, flags):
        config = dataclasses.replace(config, engine="local")
    hide_progress_bars()
    signal.signal(signal.SIGTERM, _interrupt)
    layers = [f"--recipe={given.recipe}"] if given.recipe else []
    return calibrate(config, Target(**asked), _say, [*layers, *(f"--config={path}" for path in given.config), *flags])


def _calibrate_parser() -> _Parser:
    """Its own flags; all others are settings of an audit."""
    parser = _Parser(
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
    add("--gammas", type=_numbers, default=(), help="with labels: answer under each gamma, such as 0,0.5,1,2")
    return parser


def _fit_casa(words: Sequence[str]) -> int:
    from guardalign import settings
    from guardalign.core.safety_attention import Fitting
    from guardalign.fit_casa import FitTarget, fit_casa
    from guardalign.models import hide_progress_bars

    given, flags = _fit_casa_parser().parse_known_args(list(words))
    config = settings.load_settings(given.recipe, given.config, flags)
    fitting = Fitting(size=given.size, max_epochs=given.max_epochs, seed=given.seed)
    target = FitTarget(given.output, given.unsafe_label, given.question, given.scenes, fitting)
    hide_progress_bars()
    signal.signal(signal.SIGTERM, _interrupt)
    return fit_casa(config, target, _say)


def _fit_casa_parser() -> _Parser:
    """Its own flags; all others are settings of an audit."""
    from guardalign.core.safety_attention import Fitting
    from guardalign.fit_casa import QUESTION

    parser = _Parser(
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


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas between them, such as 0,0.5,1; got {text}"
        ) from None


def _evaluate(words: Sequence[str]) -> int:
    given, flags = _evaluate_parser().parse_known_args(list(words))
    from guardalign.evaluation.request import make_request
    from guardalign.evaluation.running import evaluate
    from guardalign.models import hide_progress_bars

    suites, benchmarks = _listed(given.suite), _listed(given.benchmarks)
    for name in ("defenses", "models"):
        words_given = getattr(given, name)
        require(not words_given or bool(_listed(words_given)), f"--{name} is empty; name some, or leave it out")
    flags = [f"--output={given.output}", *_with_values(flags)]
    request = make_request(suites, benchmarks, _listed(given.defenses), _listed(given.models), given.config, flags)
    hide_progress_bars()
    signal.signal(signal.SIGTERM, _interrupt)
    return evaluate(request, _say_lines)


def _evaluate_parser() -> _Parser:
    """Its own flags; all others are settings of an audit."""
    parser = _Parser(
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


def _listed(given: Sequence[str]) -> list[str]:
    return [word.strip() for words in given for word in words.split(",") if word.strip()]


def _say_lines(text: str) -> None:
    for line in text.splitlines():
        _say(line)


def _verify(words: Sequence[str]) -> int:
    parser = _verify_parser()
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
    files, flags = tuple(given.config), _with_values(flags)
    asked = Asked(given.out, given.sample, given.seed, files, tuple(flags), given.most_differing, given.judge)
    return verify(asked, _say)


def _verify_parser() -> _Parser:
    """Its own flags; all others are settings of an audit."""
    parser = _Parser(
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


def _rescore(words: Sequence[str]) -> int:
    from guardalign.rescore import rescore

    parser = _Parser(
        prog="guardalign rescore",
        description="Applies another threshold to the stored scores of a finished run; writes "
        "OUT/rescored/threshold-T.parquet and names the rows whose picture the model would now see differently.",
    )
    parser.add_argument("out", help="the run's folder")
    parser.add_argument("--threshold", type=float, required=True, help="scores strictly below it are unsafe")
    given = parser.parse_args(list(words))
    for line in rescore(given.out, given.threshold):
        _say(line)
    return 0


def _show(words: Sequence[str]) -> int:
    from guardalign.show import show

    parser = _Parser(
        prog="guardalign show",
        description="Prints one row of a run and writes its picture, heat map and mask side by side as PNG.",
    )
    parser.add_argument("out", help="the run's folder")
    parser.add_argument("sample_id", help="the row's sample_id")
    given = parser.parse_args(list(words))
    for line in show(given.out, given.sample_id):
        _say(line)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "audit": _audit,
    "evaluate": _evaluate,
    "calibrate": _calibrate,
    "fit-casa": _fit_casa,
    "verify": _verify,
    "rescore": _rescore,
    "show": _show,
}

if __name__ == "__main__":
    sys.exit(main())
