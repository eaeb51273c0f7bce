"""How many rows a model's memory has room for: a batch that does not fit is halved, and the size that fits is kept.

    fits        whether a call went through, or ran out of memory
    Room        what failures have shown so far; lives as long as its model
    release     gives back what a failed call has left behind

A row that fails alone tells nothing about batches: what it broke is not held against the room. Knows nothing of
decoding, stages or tables.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from guardalign.core.memory import is_out_of_memory

A = TypeVar("A")
B = TypeVar("B")
log = logging.getLogger(__name__)


def fits(work: Callable[[], object]) -> bool:
    """Does the work; False where memory ran out. Other errors are raised.

    When it returns, neither the error nor its traceback is left, which would keep the failed call's tensors alive.
    """
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def release() -> None:
    """Frees what young cycles alone hold, such as an error that its own frame knows; gives cached blocks back."""
    gc.collect(1)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Room:
    """How many rows fit at a time, as far as failures have shown."""

    def __init__(self, name: str) -> None:
        self.name = name
        """of the model, for notes"""
        self.most: int | None = None
        """working size [rows]; None: nothing has failed yet"""
        self.num_failures = 0
        """calls that ran out of memory"""

    def of(self, wanted: int) -> int:
        """As many of the wanted rows as may be tried at a time, at least one."""
        return wanted if self.most is None else min(wanted, self.most)

    def learn(self, most: int) -> None:
        """From now on no more than this, nor more than before."""
        before, self.most = self.most, max(1, self.of(most))
        if self.most != before:
            log.warning("%s", self.notes[0])

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for run.json once something did not fit."""
        if self.most is None:
            return ()
        return (f"{self.name}: larger batches did not fit into memory; at most {self.most} at a time since then",)

    def fitted(self, work: Callable[[Sequence[A]], Sequence[B]], items: Sequence[A]) -> list[B | None]:
        """`work` on all items in order, as many at a time as fit; None for an item that does not fit alone."""
        found: list[B | None] = []
        while len(found) < len(items):
            found += self._halved(work, items[len(found) : len(found) + self.of(len(items))])
        return found

    def all_fitted(self, work: Callable[[Sequence[A]], Sequence[B]], items: Sequence[A]) -> list[B]:
        """As `fitted`; `MemoryError` where an item does not fit alone."""
        found = [each for each in self.fitted(work, items) if each is not None]
        if len(found) < len(items):
            raise MemoryError(f"{self.name}: {len(items) - len(found)} of {len(items)} do not fit, even alone")
        return found

    def _halved(self, work: Callable[[Sequence[A]], Sequence[B]], items: Sequence[A]) -> list[B | None]:
        made: list[B | None] = []
        if fits(lambda: made.extend(work(items))):
            return made
        release()
        self.num_failures += 1
        if len(items) == 1:
            return [None]
        half = (len(items) + 1) // 2
        found = self.fitted(work, items[:half]) + self.fitted(work, items[half:])
        if all(each is not None for each in found):
            self.learn(half)
        return found
