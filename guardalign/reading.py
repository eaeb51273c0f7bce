"""A shard's beginning: its rows as the first working table, here or as a Ray task.

Light on purpose: whoever reads imports no torch, and so starts in a second and stays small. Knows nothing of models,
of Ray, or of any one data set.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import pyarrow as pa

from guardalign.errors import InputError, UserError
from guardalign.faults import reach, strike
from guardalign.guard import Failure
from guardalign.journal import MOST_DEATHS, Entry, Journal
from guardalign.schema import IMAGE, PLANNED, with_columns
from guardalign.sources import Shard, Source, Span
from guardalign.sources.rows import picked
from guardalign.supervision import as_table
from guardalign.working import give_up

MOST_GIVEN_UP: Final = 4
"""rows of a shard that end whoever reads them, before the rest of it is not tried"""


def read_shard(source: Source, shard: Shard, lost: Mapping[int, str] | None = None) -> pa.Table:
    """A shard's rows as the first working table.

    `lost` says, by position, what became of rows that end whoever reads them: they are error rows, and not touched.
    """
    reach("read.shard")
    rows = shard.num_rows
    table = _read_but(source, shard, lost) if lost else _read(source, shard)
    assert table.num_rows == rows, f"shard {shard.index}: {table.num_rows} rows, {rows} planned"
    return admit(with_columns(table, {"shard": [shard.index] * rows, PLANNED: [rows] * rows}))


def read_noted(source: Source, shard: Shard, journal: Journal) -> pa.Table:
    """`read_shard`, written down in OUT's journal while it lasts: a row may end whoever reads it.

    After three such deaths every row is read alone, and one that ends two more readers is an error row. After four such
    rows those that were not tried yet are error rows, too: in some formats a row cannot be read without what stands
    before it. Where no row alone explains the deaths, `InputError` names the place: Ray would read it for ever.
    """
    with journal.begun(shard.index) as entry:
        if not entry.is_to_be_tried:
            return read_shard(source, shard)
        if entry.unexplained >= MOST_DEATHS:
            raise _deadly(shard, entry.begun - 1)
        outline = source.outline(shard)
        names = outline.rows["sample_id"].to_pylist()
        if sum(entry.gives_up(name) for name in names) < MOST_GIVEN_UP:
            alone = [Shard(shard.index, 1, (span,)) for span in outline.spans]
            journal.try_rows(entry, names, [None] * len(names), lambda at: _read(source, alone[at]))
        lost = {at: _end_of(name, entry) for at, name in enumerate(names) if name not in entry.passed}
        return read_shard(source, shard, lost)


def read_task(source: Source, out: str, run: str, batch: pa.Table) -> pa.Table:
    """The same of a table with one pickled shard; what the user can mend travels on as a value.

    Deaths in other runs do not count: the driver outlives its readers.
    """
    try:
        return read_noted(source, pickle.loads(batch["shard"][0].as_py()), Journal(out, "read", run))
    except UserError as problem:
        return as_table(problem)


def _end_of(name: str, entry: Entry) -> str:
    """What is said of a row that was given up."""
    if entry.gives_up(name):
        return f"sample {name} ended whoever read it {entry.deaths[name]} times"
    return f"sample {name} was not read: {MOST_GIVEN_UP} rows before it ended whoever read them"


def _read_but(source: Source, shard: Shard, lost: Mapping[int, str]) -> pa.Table:
    """The shard's rows, those that are lost as error rows."""
    outline = source.outline(shard)
    kept = [at for at in range(shard.num_rows) if at not in lost]
    cells = {"error": list(lost.values()), "error_kind": ["killed_worker"] * len(lost)}
    tables = [with_columns(picked(outline.rows, list(lost)), cells)]
    if kept:
        tables.append(_read(source, _part(shard, [outline.spans[at] for at in kept])))
    found = pa.concat_tables(tables, promote_options="permissive")
    return picked(found, np.argsort([*lost, *kept]).tolist())


def _read(source: Source, shard: Shard) -> pa.Table:
    """The shard's rows; here strike those that are faults on purpose."""
    table = source.read(shard)
    for sample_id in table["sample_id"].to_pylist():
        strike("read", sample_id)
    return table


def _part(shard: Shard, spans: Sequence[Span]) -> Shard:
    """Some rows of the shard; spans that follow each other are one."""
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last is not None and (last.uri, last.rows.stop) == (span.uri, span.first):
            joined[-1] = replace(last, num_rows=last.num_rows + span.num_rows)
        else:
            joined.append(span)
    return Shard(shard.index, sum(span.num_rows for span in spans), tuple(joined))


def _deadly(shard: Shard, deaths: int) -> InputError:
    first = shard.spans[0]
    rows = f"its {shard.num_rows} rows from row {first.first} on"
    where = (
        f"{first.name}, {rows}," if len(shard.spans) == 1 else f"one of {len(shard.spans)} files from {first.name} on"
    )
    mend = "lower shard_rows, mend it or leave it out"
    return InputError(
        f"{where} ended whoever read it {deaths} times, and no row alone did (shard {shard.index}): {mend}"
    )


def admit(table: pa.Table) -> pa.Table:
    """The first step on every shard: hash the pictures, give up rows without a prompt."""
    images, prompts = table[IMAGE].to_pylist(), table["prompt"].to_pylist()
    failures = {
        index: Failure("prompt_missing", f"sample {sample_id} has no prompt, or a blank one")
        for index, (prompt, sample_id, error) in enumerate(
            zip(prompts, table["sample_id"].to_pylist(), table["error"].to_pylist(), strict=True)
        )
        if error is None and not (prompt or "").strip()
    }
    read_failures = [None if error is None else "read" for error in table["error"].to_pylist()]
    hashes = [None if image is None else hashlib.sha256(image).hexdigest() for image in images]
    table = with_columns(table, {"image_sha256": hashes, "error_stage": read_failures})
    return give_up(table, "read", failures)
