"""Every error the package raises on purpose.

    GuardAlignError
    +-- UserError (also ValueError)      the user can mend it: printed as one line, without a traceback; exit code 2
    |   +-- ConfigError                  a setting is misspelt, of a wrong type, out of range or contradicts another
    |   |   +-- UnknownSettingError      there is no such setting
    |   +-- InputError                   the data set cannot be planned: no such file, no such column, a duplicate id
    |   +-- ModelError                   weights or processor missing, or of a kind that a setting cannot work with
    |   +-- ResumeError                  the output folder belongs to another run, or is in use
    |   +-- RunFailedError               the run ended, but not as promised (rows missing, too many error rows)
    +-- RowError                         one row cannot be worked on: it becomes a result row with an `error` cell

A message is a sentence: what is wrong, which one, what would be right. It never holds a row's content, only its id.
Knows nothing of torch or Ray.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal, get_args

ErrorKind = Literal[
    "row_unreadable",
    "image_missing",
    "image_unreadable",
    "image_too_large",
    "prompt_missing",
    "prompt_too_long",
    "detection_failed",
    "sanitizing_failed",
    "generation_failed",
    "judging_failed",
    "out_of_memory",
    "killed_worker",
    "timed_out",
]
ERROR_KINDS: tuple[str, ...] = get_args(ErrorKind)
"""The closed list of the result column `error_kind`."""


class GuardAlignError(Exception):
    """The root of the tree."""


class UserError(GuardAlignError, ValueError):
    """Something that the user can mend; shown as one line."""


class ConfigError(UserError):
    """A setting is misspelt, of a wrong type, out of range or contradicts another."""


class UnknownSettingError(ConfigError):
    """A setting that there is not; names the nearest one that a command knows."""

    def __init__(self, name: str, known: Sequence[str], command: str = "guardalign audit") -> None:
        super().__init__(f"there is no setting {name!r}{meant(name, known)}; see {command} --help")
        self.name, self.known = name, tuple(known)


class InputError(UserError):
    """The data set cannot be planned."""


class ModelError(UserError):
    """A model cannot be loaded, or cannot do what a setting asks of it."""


class ResumeError(UserError):
    """The output folder belongs to another run, or another process works in it."""


class RunFailedError(UserError):
    """The run ended, but not as promised."""


class RowError(GuardAlignError):
    """One row cannot be worked on; `kind` is one of `ERROR_KINDS`."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind

    def __reduce__(self) -> tuple[type[RowError], tuple[ErrorKind, str]]:
        """Pickles with both arguments, so that it crosses processes whole."""
        return type(self), (self.kind, str(self))


def harmless(text: str) -> str:
    """`text` on one line of printable characters: what data holds can neither steer a terminal nor fake a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def meant(word: str, known: Sequence[str]) -> str:
    """The nearest of the known words, as part of a sentence; empty where none is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require(holds: bool, sentence: str) -> None:
    """Raise `ConfigError(sentence)` unless `holds`."""
    if not holds:
        raise ConfigError(sentence)
