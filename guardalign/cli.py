"""The console command: `guardalign audit | calibrate | fit-casa | ...`. Dispatches, makes errors one line.

Exit codes: 0 done; 1 the run ended, but not as promised; 2 something that the user can mend; 130 interrupted.
Knows nothing of what a command does or takes: `commands/` holds one file each.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from guardalign.commands import COMMANDS
from guardalign.commands.console import with_negatives
from guardalign.ending import to_the_end
from guardalign.errors import ConfigError, RunFailedError, UserError, harmless
from guardalign.signals import INTERRUPTED, interrupt_on_signals
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


def console() -> NoReturn:
    """The command `guardalign`: runs what was typed and ends this process."""
    to_the_end(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    _log_to_stderr()
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except RunFailedError as error:
        return _complain(str(error), 1)
    except UserError as error:
        return _complain(str(error), 2)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that may not be written: the user's to mend
        return _complain(f"{error.filename or 'a file'}: {error.strerror or error}", 2)


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        print(f"guardalign {VERSION}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        raise ConfigError(f"there is no command {words[0]!r}; one of: {', '.join(COMMANDS)}")
    interrupt_on_signals()
    return command(with_negatives(words[1:]))


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


if __name__ == "__main__":
    console()
