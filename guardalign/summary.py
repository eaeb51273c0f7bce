"""What a finished run says of itself: totals over its receipts, as numbers for run.json and as lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from guardalign.core.statistics import wilson_interval
from guardalign.receipts import MOST_LABELS, Receipt


@dataclass(frozen=True)
class Totals:
    """Sums over shards."""

    rows: int = 0
    """rows written"""
    images: int = 0
    """rows with a picture"""
    detected: int = 0
    """rows with a detection"""
    flagged: int = 0
    """of these, flagged"""
    masked: int = 0
    """rows whose picture the sanitizer changed"""
    masked_patches: int = 0
    """unsafe patches of these"""
    defense_judged: int = 0
    """rows with a verdict of the defense's own"""
    defense_flagged: int = 0
    """of these, flagged by it"""
    judged: int = 0
    """rows with a verdict on refusal"""
    refused: int = 0
    """of these, refused"""
    assessed: int = 0
    """rows that a judge called safe or unsafe"""
    unsafe: int = 0
    """of these, unsafe"""
    unparsed: int = 0
    """rows whose judge wrote no verdict: neither safe nor unsafe"""
    tokens: int = 0
    """decoded tokens"""
    errors: dict[str, int] = field(default_factory=dict)
    """error rows by kind"""
    labels: dict[str, dict[str, int]] = field(default_factory=dict)
    """by the data set's label: rows detected, flagged, judged, refused; empty where there are none or too many"""
    counters: dict[str, int] = field(default_factory=dict)
    """model loads and forward calls"""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """seconds by stage, summed over actors"""

    @property
    def num_errors(self) -> int:
        """Rows that ended in an error."""
        return sum(self.errors.values())

    @property
    def answered(self) -> int:
        """Rows that ended in an answer."""
        return self.rows - self.num_errors


def totals(receipts: Iterable[Receipt]) -> Totals:
    """The sums over these receipts."""
    numbers: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    counters: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    labels: dict[str, Counter[str]] = {}
    for receipt in receipts:
        numbers.update(
            rows=receipt.num_rows,
            images=receipt.num_images,
            detected=receipt.detected,
            flagged=receipt.flagged,
            masked=receipt.masked,
            masked_patches=receipt.masked_patches,
            defense_judged=receipt.defense_judged,
            defense_flagged=receipt.defense_flagged,
            judged=receipt.judged,
            refused=receipt.refused,
            assessed=receipt.assessed,
            unsafe=receipt.unsafe,
            unparsed=receipt.unparsed,
            tokens=receipt.num_tokens,
        )
        for label, counts in receipt.labels.items():
            labels.setdefault(label, Counter()).update(counts)
        errors.update(receipt.errors)
        counters.update(receipt.counters)
        seconds.update(receipt.seconds)
    few = {label: dict(counts) for label, counts in sorted(labels.items())} if len(labels) <= MOST_LABELS else {}
    return Totals(
        **numbers,
        errors=dict(sorted(errors.items())),
        labels=few,
        counters=dict(counters),
        stage_seconds=dict(seconds),
    )


def summary_lines(
    whole: Totals,
    this_run: Totals,
    seconds: float,
    where: str,
    next_command: str,
    notes: Sequence[str],
    warnings: Sequence[str] = (),
) -> list[str]:
    """The closing summary."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in whole.errors.items()) or "none"
    speed = f"{this_run.images / seconds:.1f} images/s, {this_run.tokens / seconds:.0f} tokens/s" if seconds > 0 else ""
    warnings = (*warnings, *(["not one row was answered"] if whole.rows and not whole.answered else []))
    return [
        f"rows      {whole.rows:,}: {whole.answered:,} answered, {whole.num_errors:,} errors",
        f"flagged   {rate(whole.flagged, whole.detected)}",
        f"masked    {whole.masked_patches:,} unsafe patches in {whole.masked:,} pictures",
        *_defense_lines(whole),
        f"refused   {rate(whole.refused, whole.judged)}",
        *_verdict_lines(whole),
        *_label_lines(whole.labels),
        f"errors    {kinds}",
        *_death_lines(whole),
        f"speed     {this_run.rows:,} rows in {seconds:.1f} s: {speed} (model loading included)",
        *(f"note      {note}" for note in notes),
        *(f"warning   {warning}" for warning in warnings),
        f"results   {where}",
        f"next      {next_command}",
    ]


def _defense_lines(whole: Totals) -> Iterator[str]:
    """Only where the defense has a verdict of its own, on the request or on its first answer."""
    if whole.defense_judged:
        yield f"defense   flagged {rate(whole.defense_flagged, whole.defense_judged)}"


def _verdict_lines(whole: Totals) -> Iterator[str]:
    """Only where a judge tells safe from unsafe; what it could not say is never counted as safe."""
    if whole.assessed or whole.unparsed:
        yield f"unsafe    {rate(whole.unsafe, whole.assessed)}"
        yield f"unparsed  {whole.unparsed:,} verdicts: neither safe nor unsafe"


def _death_lines(whole: Totals) -> Iterator[str]:
    """Only where a worker died: its row is among the errors, unless it was somebody from outside."""
    if deaths := whole.counters.get("worker_deaths", 0):
        yield f"workers   {deaths:,} died or were stopped, and were begun again"


def _label_lines(labels: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Flags and refusals against what the data set itself says of its rows; one label tells nothing apart."""
    for label, counts in labels.items() if len(labels) > 1 else ():
        yield f"  label {label}: flagged {rate(counts['flagged'], counts['detected'])}"
        yield f"  label {label}: refused {rate(counts['refused'], counts['judged'])}"


def rate(successes: int, trials: int) -> str:
    """A rate with its counts and its 95 % Wilson interval."""
    if trials == 0:
        return "nothing to count"
    low, high = wilson_interval(successes, trials)
    return f"{successes:,} of {trials:,} ({successes / trials:.1%}, 95 % interval {low:.1%} to {high:.1%})"
