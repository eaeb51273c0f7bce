"""How SIGINT and SIGTERM end this process: the first interrupts, the second is passed over, the third ends it at once.

Whoever is interrupted says so and cleans up; no impatience shall disturb that, and a clean-up that hangs shall not need
SIGKILL. Knows nothing of what is interrupted.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NoReturn

INTERRUPTED: Final = 130
"""exit code of a process that was interrupted"""
ENDING: Final = (signal.SIGINT, signal.SIGTERM)
"""the signals that ask a process to end"""
MOST_ASKED: Final = 2
"""such signals that leave a process the time to clean up"""


def interrupt_on_signals() -> None:
    """From here on SIGINT and SIGTERM raise one `KeyboardInterrupt`; one that the caller had ignored stays ignored."""
    if not _in_main_thread():
        return
    atexit.register(_pass_over)  # before whoever is imported later registers his: runs after theirs
    asked = _Asked()
    for each in ENDING:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, asked)


class _Asked:
    """A signal handler that counts; what comes when the work is over, and only the clean-up left, interrupts nobody."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, *_: object) -> None:
        self.times += 1
        if self.times > MOST_ASKED:
            _end_at_once()
        if self.times == 1 and threading.main_thread().is_alive():
            raise KeyboardInterrupt


def _end_at_once() -> NoReturn:
    with suppress(OSError, RuntimeError):  # RuntimeError: the signal came in the middle of a print
        sys.stdout.flush()
    os._exit(INTERRUPTED)


def _pass_over() -> None:
    """The interpreter takes itself down from here on, and handlers in Python with it: a signal could only kill it."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[None]:
    """SIGINT and SIGTERM that come meanwhile are heard at the end, by the handlers from before; the third still ends
    this process at once. No handler is installed meanwhile, and native ones are taken away again.

    `ray.init` needs both. Interrupted half-way, it may end in a segmentation fault. And it installs handlers of its own
    for SIGTERM: one exits with code 15; a native one before it prints a stack, and aborts after three seconds
    (https://github.com/ray-project/ray/pull/64830).
    """
    before = {each: found for each in ENDING if (found := signal.getsignal(each)) not in (None, signal.SIG_IGN)}
    if not _in_main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, _: object) -> None:
        signal.alarm(0)  # those three seconds
        came.append(number)
        if len(came) > MOST_ASKED:
            _end_at_once()

    for each in before:
        signal.signal(each, note)
    try:
        with _none_installed(before):
            yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _none_installed(numbers: Container[int]) -> Iterator[None]:
    """Whoever installs a handler for one of these signals meanwhile installs none."""
    install = signal.signal

    def pass_over(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in numbers else install(number, handler)

    signal.signal = pass_over  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = install


def _in_main_thread() -> bool:
    """Python lets no other thread set a handler."""
    return threading.current_thread() is threading.main_thread()
