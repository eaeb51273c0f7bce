"""Progress of a run: a bar for people, a line every so often for logs. Knows only receipts."""

from __future__ import annotations

import sys
from collections import Counter
from time import monotonic
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

from guardalign.receipts import Receipt


class Progress:
    """Counts rows as shards are committed and says so; rates are of this run, not of what it found done."""

    def __init__(self, total_rows: int, done_rows: int, log_seconds: float, stream: TextIO | None = None) -> None:
        self.total_rows, self.done_rows, self.log_seconds = total_rows, done_rows, log_seconds
        self.stream = sys.stderr if stream is None else stream
        self.started = self.last_line = monotonic()
        self.rows = self.errors = 0
        self.stage_seconds: Counter[str] = Counter()
        self.bar: Any = None

    def __enter__(self) -> Self:
        """Shows the bar on a terminal."""
        if self.stream.isatty():
            self.bar = tqdm(total=self.total_rows, initial=self.done_rows, unit="row", file=self.stream, leave=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.close()

    def add(self, receipt: Receipt) -> None:
        """One more shard is on disk."""
        self.rows += receipt.num_rows
        self.errors += receipt.num_errors
        self.stage_seconds.update(receipt.seconds)
        if self.bar is not None:
            self.bar.set_postfix_str(self._details())
            self.bar.update(receipt.num_rows)
        elif monotonic() - self.last_line >= self.log_seconds:
            self.last_line = monotonic()
            print(self.line(), file=self.stream, flush=True)

    def line(self) -> str:
        """Rows so far, rate, time left, errors, stage rates."""
        done = self.done_rows + self.rows
        seconds = max(monotonic() - self.started, 1e-9)
        left = (self.total_rows - done) * seconds / self.rows if self.rows else float("inf")
        share = done / self.total_rows if self.total_rows else 1.0
        return (
            f"{done:,}/{self.total_rows:,} rows ({share:.0%}), {self.rows / seconds:.1f} rows/s, "
            f"{_duration(left)} left, {self._details()}"
        )

    def _details(self) -> str:
        rates = (
            f"{stage} {self.rows / seconds:.1f}/s"
            for stage, seconds in self.stage_seconds.items()
            if seconds > 0 and stage in ("detect", "generate")
        )
        return ", ".join([f"{self.errors} errors", *rates])


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
