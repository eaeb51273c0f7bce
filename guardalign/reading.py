"""A shard's beginning: its rows as the first working table, here or as a Ray task.

Light on purpose: whoever reads imports no torch, and so starts in a second and stays small. Knows nothing of models,
of Ray, or of any one data set.
"""

from __future__ import annotations

import hashlib
import pickle

import pyarrow as pa

from guardalign.errors import InputError, UserError
from guardalign.faults import reach
from guardalign.guard import Failure
from guardalign.journal import FOLDER, MOST_DEATHS
from guardalign.results import RunFolder
from guardalign.schema import IMAGE, PLANNED, with_columns
from guardalign.sources import Shard, Source
from guardalign.supervision import as_table
from guardalign.working import give_up


def read_shard(source: Source, shard: Shard) -> pa.Table:
    """A shard's rows as the first working table."""
    reach("read.shard")
    table = source.read(shard)
    assert table.num_rows == shard.num_rows, f"shard {shard.index}: {table.num_rows} rows, {shard.num_rows} planned"
    rows = shard.num_rows
    return admit(with_columns(table, {"shard": [shard.index] * rows, PLANNED: [rows] * rows}))


def read_task(source: Source, out: str, run: str, batch: pa.Table) -> pa.Table:
    """The same of a table with one pickled shard; what the user can mend travels on as a value.

    It is written down in OUT's journal while it lasts: Ray repeats a read whose worker died for ever, and a file may
    be what kills whoever reads it. Deaths in other runs do not count, and whoever raises is not dead.
    """
    shard: Shard = pickle.loads(batch["shard"][0].as_py())
    folder, note = RunFolder(out), f"{FOLDER}/read-{shard.index:06d}.json"
    try:
        begun = _begun(folder, note, run)
        if begun >= MOST_DEATHS:
            return as_table(_deadly(shard))
        folder.write_json(note, {"begun": begun + 1, "run": run})
        return read_shard(source, shard)
    except UserError as problem:
        return as_table(problem)
    finally:
        folder.remove(note)


def _begun(folder: RunFolder, note: str, run: str) -> int:
    """How often this run has begun to read the shard."""
    before = folder.read_json(note, "begun", "run") if folder.exists(note) else {}
    return int(before["begun"]) if before.get("run") == run else 0


def _deadly(shard: Shard) -> InputError:
    first = shard.spans[0]
    rows = f"its {shard.num_rows} rows from row {first.first} on"
    where = (
        f"{first.name}, {rows}," if len(shard.spans) == 1 else f"one of {len(shard.spans)} files from {first.name} on"
    )
    return InputError(f"{where} ended whoever read it {MOST_DEATHS} times (shard {shard.index}); mend or leave it out")


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
