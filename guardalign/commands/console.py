"""What the commands share at the console: the words they are given, and the lines they say.

Knows nothing of any one command, of settings or of runs.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from guardalign.errors import ConfigError, UnknownSettingError, harmless


class CommandParser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def with_negatives(words: Sequence[str]) -> list[str]:
    """`--threshold -1e-3` as `--threshold=-1e-3`: argparse takes a negative number with an exponent for a flag."""
    joined: list[str] = []
    for word in words:
        if re.fullmatch(r"-(\d+\.?\d*|\.\d+)e[+-]?\d+", word, re.IGNORECASE) and joined and joined[-1][:2] == "--":
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def with_values(flags: Sequence[str]) -> list[str]:
    """The flags with `--dry_run` allowed to stand alone."""
    following = [*flags[1:], "--"]
    alone = [flag == "--dry_run" and after.startswith("--") for flag, after in zip(flags, following, strict=False)]
    return ["--dry_run=true" if bare else flag for flag, bare in zip(flags, alone, strict=True)]


@contextmanager
def own_flags(parser: CommandParser) -> Iterator[None]:
    """A misspelt flag in here may have meant one of the command's own, beside the settings of an audit."""
    own = [option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")]
    try:
        yield
    except UnknownSettingError as error:
        raise UnknownSettingError(error.name, [*own, *error.known], parser.prog) from None


def without_effect(flags: Sequence[str], names: Sequence[str], command: str) -> Iterator[str]:
    """A line on flags whose setting, or whose group of settings, the command makes no use of; files are shared between
    commands, and may say more than one of them wants."""
    typed = [flag.partition("=")[0].removeprefix("--") for flag in flags if flag.startswith("--")]
    idle = dict.fromkeys(f"--{name}" for name in typed if {name, name.partition(".")[0]} & set(names))
    if idle:
        yield f"note      without effect on {command}: {', '.join(idle)}"


def listed(given: Sequence[str]) -> list[str]:
    """The words, also those with commas between them, without blanks."""
    return [word.strip() for words in given for word in words.split(",") if word.strip()]


def numbers(text: str) -> tuple[float, ...]:
    """A type of a flag: numbers with commas between them."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas between them, such as 0,0.5,1; got {text}"
        ) from None


def say(line: str) -> None:
    """Prints one line, harmless whatever it holds."""
    print(harmless(line))
