"""The commands of the console, one file each: its parser, its own flags, its call.

Importing them imports neither torch nor Ray: a command imports what it needs when it runs. Knows nothing of how errors
are told: they pass through to `guardalign.cli`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from guardalign.commands.audit import audit_command
from guardalign.commands.calibrate import calibrate_command
from guardalign.commands.evaluate import evaluate_command
from guardalign.commands.fit_casa import fit_casa_command
from guardalign.commands.rescore import rescore_command
from guardalign.commands.show import show_command
from guardalign.commands.verify import verify_command

COMMANDS: Final[Mapping[str, Callable[[Sequence[str]], int]]] = {
    "audit": audit_command,
    "evaluate": evaluate_command,
    "calibrate": calibrate_command,
    "fit-casa": fit_casa_command,
    "verify": verify_command,
    "rescore": rescore_command,
    "show": show_command,
}
