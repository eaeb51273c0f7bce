"""The one guard: work on some rows, in which each culprit costs its own row only.

Knows nothing of stages, tables or models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from guardalign.core.memory import is_out_of_memory, ran_out
from guardalign.errors import ErrorKind, RowError, UserError
from guardalign.in_hand import in_hand

A = TypeVar("A")
B = TypeVar("B")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why a row was given up."""

    kind: ErrorKind
    """for the column `error_kind`"""
    message: str
    """one sentence that names the sample and none of its content"""


def guarded(
    work: Callable[[Sequence[A]], Sequence[B | RowError]],
    items: Sequence[A],
    ids: Sequence[str],
    kind: ErrorKind,
    tells: bool = True,
) -> list[B | Failure]:
    """`work(items)`; if it fails, halves it until each culprit stands alone and becomes a `Failure`.

    Where the work itself gives a row's `RowError` in its place, nothing is done twice. The rows are in hand meanwhile;
    work that `tells` not says by itself which rows are (`in_hand.py`).

    This is the one guard of the package. What the user can mend (`UserError`) stops the run instead: it is no row's
    fault. An unforeseen error's text may hold a row's content, so only its type and place are told.
    """
    if not items:
        return []
    try:
        with in_hand(ids) if tells else nullcontext():
            found = zip(work(items), ids, strict=True)
        return [_failure(each, id_, kind) if isinstance(each, RowError) else each for each, id_ in found]
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the one guard
        if len(items) == 1:
            return [_failure(error, ids[0], kind)]
        log.debug("a batch of %d rows failed with %s; halving it", len(items), type(error).__name__)
    half = len(items) // 2
    halves = (items[:half], ids[:half]), (items[half:], ids[half:])
    return [each for some, theirs in halves for each in guarded(work, some, theirs, kind, tells)]


def _failure(error: Exception, sample_id: str, kind: ErrorKind) -> Failure:
    if isinstance(error, RowError):
        return Failure(error.kind, str(error))
    if is_out_of_memory(error):
        return Failure("out_of_memory", ran_out(sample_id, kind))
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else ""
    return Failure(kind, f"sample {sample_id}: {kind.replace('_', ' ')}: {type(error).__name__}{place}")
