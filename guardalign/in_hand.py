"""Which rows a process works on at this moment, told to whoever watches it.

When a worker dies or hangs, the rows that it had in hand are the ones that may have done it. Nobody watches unless
`listen` was called. Knows nothing of workers, tables or stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Tell = Callable[[bool, Sequence[str]], None]
"""called with True and the ids of rows that are taken up, with False when they are laid down; from any thread"""

_listeners: list[Tell] = []


def listen(tell: Tell) -> None:
    """From now on `tell` hears of every row of this process."""
    _listeners[:] = [tell]


@contextmanager
def in_hand(sample_ids: Sequence[str]) -> Iterator[None]:
    """The rows are being worked on meanwhile; the same row may be in hand several times."""
    for tell in _listeners:
        tell(True, sample_ids)
    try:
        yield
    finally:
        for tell in _listeners:
            tell(False, sample_ids)
