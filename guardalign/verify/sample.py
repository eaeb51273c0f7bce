"""Which rows are computed again: drawn by seed, with error rows and flagged rows among them where there are any.

Holds 8 bytes a row of the run. Knows nothing of what a row says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from guardalign.errors import ErrorKind
from guardalign.results import RunFolder

Places: TypeAlias = NDArray[np.int64]
"""rows as shard · 2^32 + position"""
LEFT_OUT: Final[tuple[ErrorKind, ...]] = ("killed_worker", "timed_out", "out_of_memory")
"""Error kinds that are not tried again: they would do to this process what they did to their worker."""
READ_ERRORS: Final[tuple[ErrorKind, ...]] = ("image_missing", "image_unreadable", "image_too_large")
"""Error kinds of reading that the web may have caused, and may not cause again."""
KEPT_SHARE: Final = 4
"""one row in this many is kept for error rows, and as many for flagged ones"""


@dataclass(frozen=True)
class Drawn:
    """The rows to compute again."""

    places: tuple[tuple[int, int], ...]
    """shard and position within it, in order"""
    strata: Mapping[str, int]
    """of these, by what they are"""
    left_out: Mapping[str, int]
    """rows of the run that could not be drawn, by what they ended as"""

    @property
    def num_rows(self) -> int:
        """How many."""
        return len(self.places)


def draw(
    folder: RunFolder, number: int, seed: int, with_judge_errors: bool = True, with_read_errors: bool = True
) -> Drawn:
    """`number` rows of the run, or all of them; without those that only the judge, unasked, could give up again, and
    without pictures that were not to be had, where these may come from the web."""
    strata, left_out = _strata(folder, with_judge_errors, with_read_errors)
    random = np.random.default_rng(seed)
    shuffled = {name: random.permutation(places) for name, places in strata.items()}
    kept = -(-number // KEPT_SHARE)
    chosen = {name: places[: 0 if name == "others" else kept] for name, places in shuffled.items()}
    rest = np.concatenate([places[len(chosen[name]) :] for name, places in shuffled.items()])
    more = random.permutation(rest)[: max(0, number - sum(map(len, chosen.values())))]
    taken = np.sort(np.concatenate([*chosen.values(), more]))[:number]
    counts = {name: int(np.isin(taken, places).sum()) for name, places in strata.items()}
    return Drawn(tuple((int(each >> 32), int(each & 0xFFFFFFFF)) for each in taken), counts, left_out)


def _strata(
    folder: RunFolder, with_judge_errors: bool, with_read_errors: bool
) -> tuple[dict[str, Places], Counter[str]]:
    """Every row that may be drawn, by what it is."""
    found: dict[str, list[Places]] = {"error rows": [], "flagged": [], "others": []}
    left_out: Counter[str] = Counter()
    for shard, name in sorted(folder.committed().items()):
        table = folder.read_table(name, ["error_kind", "error_stage", "flagged"])
        kind, stage, flagged = (np.array(table[column].to_pylist(), object) for column in table.column_names)
        out = np.isin(kind.astype(str), LEFT_OUT)
        if not with_read_errors:
            out |= (stage == "read") & np.isin(kind.astype(str), READ_ERRORS)
        left_out.update(kind[out])
        if not with_judge_errors:
            unasked = ~out & (stage == "judge")
            left_out.update(["errors of the judge"] * int(unasked.sum()))
            out |= unasked
        places = np.arange(table.num_rows, dtype=np.int64) + (shard << 32)
        failed, marked = ~out & (kind != None), ~out & (flagged == True)  # noqa: E711, E712 - elementwise
        found["error rows"].append(places[failed])
        found["flagged"].append(places[marked & ~failed])
        found["others"].append(places[~out & ~failed & ~marked])
    empty = np.empty(0, dtype=np.int64)
    return {name: np.concatenate([empty, *parts]) for name, parts in found.items()}, left_out
