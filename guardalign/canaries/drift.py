"""What the canaries' numbers in the receipts tell at the end: did the models stay the same, and were they the same?

Every worker measures its canaries when they have passed, and again after each of its shards. All are compared with x0,
the median over all shards of what their workers measured when they had just loaded: by name and component, finite
numbers only. No shard is taken at its word, the first as little as any other. x has drifted from x0 when
|x - x0| > t (1 + |x0|), with t by number format, or when it is no number. Of an even number of shards there are two
medians; where these differ by as much, as when one half says this and the other that, no majority tells who is right,
and all are marked. Under one kind of hardware the numbers are equal to the bit; t leaves room for workers on different
kinds. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high, median_low, mode
from typing import Any, Final

from guardalign.canaries import AS_LOADED
from guardalign.config import Dtype
from guardalign.errors import RunFailedError
from guardalign.models.provenance import seal
from guardalign.receipts import Receipt

TOLERANCE: Final[Mapping[str, float]] = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""t by number format"""
NAMED: Final = 5
"""shards that a sentence names"""
UNCHECKED: Final = "self_check is false: no canary passed through the models"


def named(stage: str, dtype: Dtype, settings: Mapping[str, Any]) -> str:
    """A canary's name: numbers under the same name are comparable."""
    return f"{stage}/{dtype}/{seal(settings)[:8]}"


@dataclass(frozen=True)
class Drift:
    """What came of the canaries."""

    canaries: tuple[str, ...]
    """names of those whose numbers were compared"""
    drifted_shards: tuple[str, ...]
    """files of the shards whose numbers differ, or are none"""
    unchecked_shards: tuple[str, ...]
    """files of the shards that were written without self_check"""
    largest_difference: float | None
    """largest |x - x0| / (1 + |x0|); None where a number was not finite"""
    is_undecided: bool = False
    """the shards disagree, and no majority tells which of them are right: all are marked"""

    @property
    def warnings(self) -> tuple[str, ...]:
        """For the summary: which shards are marked, and which were never watched."""
        found = []
        if self.drifted_shards:
            by = "not finite" if self.largest_difference is None else f"off by up to {self.largest_difference:.3g}"
            drifted = f"the models drifted: canaries are {by} in {_listed(self.drifted_shards)}"
            found.append(f"{self._disagreement}: canaries are {by}" if self.is_undecided else drifted)
        if self.unchecked_shards:
            found.append(f"without self_check were written: {_listed(self.unchecked_shards)}")
        return tuple(found)

    def require_steady(self, remedy: str = "remove these files and run the same line again") -> None:
        """Raises `RunFailedError` where the models have drifted; what was written stays."""
        if self.drifted_shards:
            drifted = f"the models drifted in {len(self.drifted_shards)} shards ({_listed(self.drifted_shards)})"
            what = f"the models drifted: {self._disagreement}" if self.is_undecided else drifted
            raise RunFailedError(f"{what}: a damaged accelerator or memory may have made their rows; {remedy}")

    @property
    def _disagreement(self) -> str:
        files = self.drifted_shards
        listed = " and ".join(files) if len(files) == 2 else _listed(files)
        return f"{listed} disagree, and no majority tells which are right"


def _listed(files: Sequence[str]) -> str:
    more = len(files) - NAMED
    return ", ".join(files[:NAMED]) + (f" and {more} more" if more > 0 else "")


def recorded(record: Mapping[str, Any] | None) -> Drift:
    """The inverse of `asdict`; without a record nothing has drifted."""
    return Drift((), (), (), 0.0) if record is None else Drift(**record)


def drift(receipts: Mapping[str, Receipt]) -> Drift:
    """Compares the numbers of all shards, given by file in their order."""
    references = _references(receipts.values())
    gaps = {name: max(_difference(low, high), _difference(high, low)) for name, (low, high) in references.items()}
    off = {file: _off(receipt, references, gaps) for file, receipt in receipts.items() if receipt.canaries}
    largest = max((size for found in off.values() for size in found.values()), default=0.0)
    return Drift(
        tuple(references),
        tuple(file for file, found in off.items() if any(_is_drift(name, size) for name, size in found.items())),
        tuple(file for file, receipt in receipts.items() if not receipt.canaries),
        largest if math.isfinite(largest) else None,
        any(math.isfinite(gap) and _is_drift(name, gap) for name, gap in gaps.items()),
    )


def _references(receipts: Iterable[Receipt]) -> dict[str, tuple[list[float], list[float]]]:
    """By canary: the lower and the upper median of each number as loaded; not a number where none is finite."""
    loaded: dict[str, list[Sequence[float]]] = {}
    for receipt in receipts:
        for name, numbers in receipt.canaries.items():
            if name.endswith(AS_LOADED):
                loaded.setdefault(name.removesuffix(AS_LOADED), []).append(numbers)
    return {name: _medians(found) for name, found in loaded.items()}


def _medians(found: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    length = mode(map(len, found))
    columns = zip(*(numbers for numbers in found if len(numbers) == length), strict=True)
    finite = [[x for x in column if math.isfinite(x)] or [math.nan] for column in columns]
    return list(map(median_low, finite)), list(map(median_high, finite))


def _is_drift(name: str, size: float) -> bool:
    return not size <= TOLERANCE[name.split("/")[1]]


def _off(
    receipt: Receipt, references: Mapping[str, tuple[list[float], list[float]]], gaps: Mapping[str, float]
) -> dict[str, float]:
    """By canary: how far its numbers are off, as loaded or now; infinite where one is no number. Where the medians
    themselves are apart, nobody's are less off than these."""
    found: dict[str, float] = {}
    for name, numbers in receipt.canaries.items():
        own = name.removesuffix(AS_LOADED)
        sizes = [_difference(numbers, reference) for reference in references[own]]
        found[own] = max(found.get(own, 0.0), gaps[own], *sizes)
    return found


def _difference(numbers: Sequence[float], reference: Sequence[float]) -> float:
    if len(numbers) != len(reference) or not all(map(math.isfinite, (*numbers, *reference))):
        return math.inf
    return max((abs(x - x0) / (1 + abs(x0)) for x, x0 in zip(numbers, reference, strict=True)), default=0.0)
