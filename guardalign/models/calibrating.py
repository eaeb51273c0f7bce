"""The calibrations of the decoding loop's batches: where each row's prefix stands, and what it drew.

Knows nothing of how a token is chosen, or of what calibration does to the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Self

from guardalign.models.attention import CalibratedBatch, open_to_calibration
from guardalign.models.batches import Padded, shifted
from guardalign.models.prompts import Span
from guardalign.models.streams import Batch, Member


class Calibrating:
    """Makes the calibration of a call; opens the model to it at the first one, until the end of the run."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._stack = ExitStack()
        self._is_open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the model."""
        self._stack.close()
        self._is_open = False

    def of_prompts(self, members: Sequence[Member], padded: Padded) -> CalibratedBatch | None:
        """Of rows whose prompts are read; None where no row is calibrated."""
        return self._made(members, padded.prefixes, padded.instructions, padded.num_columns, 0)

    def of_columns(self, batch: Batch) -> CalibratedBatch | None:
        """The calibration of rows that are being decoded: prefixes stand where padding and joining has put them."""
        if all(member.stream.ask.calibration is None for member in batch.members):
            return None
        width = batch.rows.num_columns
        begins = (width - batch.rows.num_tokens).tolist()
        prefixes = [shifted(member.prompt.prefix, begin) for member, begin in zip(batch.members, begins, strict=True)]
        return self._made(batch.members, prefixes, [(0, 0)] * len(begins), width, width)

    def _made(
        self,
        members: Sequence[Member],
        prefixes: Sequence[Span | None],
        instructions: Sequence[Span],
        num_columns: int,
        past: int,
    ) -> CalibratedBatch | None:
        asks = [member.stream.ask for member in members]
        calibrations = [
            ask.calibration if prefix is not None else None for ask, prefix in zip(asks, prefixes, strict=True)
        ]
        if all(how is None for how in calibrations):
            return None
        if not self._is_open:
            self._stack.enter_context(open_to_calibration(self.model))
            self._is_open = True
        return CalibratedBatch(
            calibrations,
            prefixes,
            instructions,
            num_columns,
            self.model.device,
            record=any(ask.record for ask in asks),
            strengths=[ask.strength for ask in asks],
            past=past,
        )


def note_masses(calibrated: CalibratedBatch | None, placed: Sequence[tuple[int, Member]]) -> None:
    """Adds what each row's calibrated queries gave to the prefix in this call."""
    for mass, num_queries in calibrated.taken_masses() if calibrated is not None else ():
        masses, counts = mass.tolist(), num_queries.tolist()
        for place, member in placed:
            if member.stream.ask.record and not member.is_partner:
                member.stream.mass += masses[place]
                member.stream.num_queries += counts[place]
