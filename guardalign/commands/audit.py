"""`guardalign audit`: its few flags of its own, its help and its call; all other words are settings.

Knows nothing of how an audit runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from guardalign.commands.console import say, with_values
from guardalign.errors import ConfigError
from guardalign.version import VERSION

AUDIT_HELP = """usage: guardalign audit [--recipe NAME] [--config FILE]... [--dotted.flag VALUE]...

A recipe holds a method, files merge over it in their order, flags win. Without any setting the embedded sample is
audited by embedded models. A second run into the same --output resumes the first.

  --recipe NAME     one of: {recipes} (default: {default})
  --config FILE     YAML with settings; may be given several times
  --print_config    print the settings that result, as YAML, and stop
  --version         print the version and stop

The settings below are those of the strategies that the command line chooses; --defense.name none --help shows others.
"""


def audit_command(words: Sequence[str]) -> int:
    """Runs `guardalign audit`; returns the exit code."""
    from guardalign import settings

    parser = argparse.ArgumentParser(prog="guardalign audit", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", default=None)
    parser.add_argument("--config", action="append", default=[])
    for flag in ("--help", "-h", "--print_config", "--version"):
        parser.add_argument(flag, action="store_true")
    try:
        layers, flags = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None
    flags = with_values(flags)
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
    return audit(config, say)
