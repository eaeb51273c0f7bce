"""How a command ends its process: exit handlers, what was said, the exit code; the interpreter is not taken down.

A native thread that still holds a Python object while the interpreter takes itself down, such as one of Arrow's pools
with the rest of a read, is unwound there and aborts the process: exit code 134 after a run that is whole
(https://github.com/apache/arrow/issues/34314). Knows nothing of what a command does.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import Final, NoReturn, TextIO

UNSAID: Final = 2
"""exit code of a command whose last words could not be written, such as to a full disk"""


def to_the_end(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and ends this process with the exit code that it returns, None being 0.

    Threads that are no daemons are awaited and exit handlers run, as ever, but for those that were registered before
    this module was imported: import it before what computes. An exception ends the process as Python would.
    """
    try:
        sys.exit(main())
    except SystemExit as last:
        _END.code = 0 if last.code is None else last.code if isinstance(last.code, int) else 1
        raise


class _End:
    """The last exit handler."""

    def __init__(self) -> None:
        self.code: int | None = None

    def __call__(self) -> None:
        if self.code is None:
            return
        code = self.code
        try:
            if unsaid := _unsaid(sys.stdout):
                code = UNSAID
            if sys.stderr is not None:
                if unsaid and self.code != UNSAID:  # whoever ends so has told it
                    print(f"guardalign: standard output: {unsaid}", file=sys.stderr)
                sys.stderr.flush()
        finally:
            os._exit(code)


def _unsaid(stream: TextIO | None) -> str | None:
    """Writes what is buffered; why not, where that failed. A reader who has gone wants no more."""
    try:
        if stream is not None and not stream.closed:
            stream.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        return error.strerror or str(error)
    return None


_END: Final = _End()
atexit.register(_END)  # here, before whoever is imported later registers his: runs after theirs
