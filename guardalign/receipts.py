"""What one committed shard holds, counted: it stands in the shard file's footer and flows back to the driver.

Knows nothing of files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import pyarrow as pa

from guardalign.schema import Trace
from guardalign.seals import sha256

RECEIPT_KEY: Final = "guardalign.receipt"
"""Its place in the footer's metadata."""
MOST_LABELS: Final = 8
"""Labels that are counted one by one."""


@dataclass(frozen=True)
class Receipt:
    """What one committed shard holds; it stands in the shard file's footer and flows back to the driver."""

    shard: int
    """index of the shard"""
    num_rows: int
    """rows in the file"""
    errors: dict[str, int] = field(default_factory=dict)
    """error rows by kind"""
    detected: int = 0
    """rows with a detection"""
    flagged: int = 0
    """of these, flagged"""
    masked: int = 0
    """rows whose picture the sanitizer changed"""
    masked_patches: int = 0
    """unsafe patches of these"""
    defense_judged: int = 0
    """rows with a verdict of the defense's own (defense_flagged is not null)"""
    defense_flagged: int = 0
    """of these, flagged by it"""
    judged: int = 0
    """answered rows that a judge decided (refused is not null)"""
    refused: int = 0
    """of these, refused"""
    assessed: int = 0
    """answered rows that a judge called safe or unsafe (unsafe is not null)"""
    unsafe: int = 0
    """of these, unsafe"""
    unparsed: int = 0
    """answered rows whose judge wrote no verdict"""
    num_images: int = 0
    """rows with a picture"""
    num_tokens: int = 0
    """decoded tokens"""
    labels: dict[str, dict[str, int]] = field(default_factory=dict)
    """by the data set's label: rows detected, flagged, judged, refused"""
    counters: dict[str, int] = field(default_factory=dict)
    """model loads and forward calls"""
    seconds: dict[str, float] = field(default_factory=dict)
    """wall seconds by stage"""
    notes: list[str] = field(default_factory=list)
    """what the models had to say, once a worker"""
    canaries: dict[str, list[float]] = field(default_factory=dict)
    """what they said of the canaries, as loaded and after the shard; empty without self_check"""
    run_id: str = ""
    """the run that committed it"""
    num_bytes: int = 0
    """of the file; 0 in the file itself"""
    sha256: str = ""
    """of the file; empty in the file itself"""

    @property
    def num_errors(self) -> int:
        """Rows that ended in an error."""
        return sum(self.errors.values())

    def of(self, file: bytes) -> Receipt:
        """The receipt as it flows back: with the file's size and checksum."""
        return replace(self, num_bytes=len(file), sha256=sha256(file))


def shard_receipt(result: pa.Table, shard: int, run_id: str, trace: Trace) -> Receipt:
    """Counts a shard's result rows."""
    flagged, refused = result["flagged"].to_pylist(), result["refused"].to_pylist()
    verdicts = result["defense_flagged"].to_pylist()
    unsafe, problems = result["unsafe"].to_pylist(), result["verdict_problem"].to_pylist()
    kinds = Counter(kind for kind in result["error_kind"].to_pylist() if kind is not None)
    changed = [bool(share) for share in result["masked_fraction"].to_pylist()]
    patches = [len(found or ()) for found in result["unsafe_patches"].to_pylist()]
    return Receipt(
        shard=shard,
        num_rows=result.num_rows,
        errors=dict(sorted(kinds.items())),
        detected=sum(value is not None for value in flagged),
        flagged=sum(value is True for value in flagged),
        masked=sum(changed),
        masked_patches=sum(count for count, is_masked in zip(patches, changed, strict=True) if is_masked),
        defense_judged=sum(value is not None for value in verdicts),
        defense_flagged=sum(value is True for value in verdicts),
        judged=sum(value is not None for value in refused),
        refused=sum(value is True for value in refused),
        assessed=sum(value is not None for value in unsafe),
        unsafe=sum(value is True for value in unsafe),
        unparsed=problems.count("unparsed"),
        num_images=result.num_rows - result["image_sha256"].null_count,
        num_tokens=sum(value or 0 for value in result["num_tokens"].to_pylist()),
        labels=_by_label(result["label"].to_pylist(), flagged, refused),
        counters=dict(trace.counters),
        seconds=dict(trace.seconds),
        notes=list(trace.notes),
        canaries={name: list(numbers) for name, numbers in trace.canaries.items()},
        run_id=run_id,
    )


def _by_label(
    labels: Sequence[str | None], flagged: Sequence[bool | None], refused: Sequence[bool | None]
) -> dict[str, dict[str, int]]:
    """Counts for each of the shard's labels; a shard of more than `MOST_LABELS` has ids for labels: none is kept."""
    names = sorted({label for label in labels if label is not None})
    if len(names) > MOST_LABELS:
        return {}
    counts: dict[str, dict[str, int]] = {name: Counter() for name in names}
    for label, flag, refusal in zip(labels, flagged, refused, strict=True):
        if label is not None:
            counts[label]["detected"] += flag is not None
            counts[label]["flagged"] += flag is True
            counts[label]["judged"] += refusal is not None
            counts[label]["refused"] += refusal is True
    return {name: dict(count) for name, count in counts.items()}
