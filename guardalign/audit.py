"""One audit from plan to manifest: plans the input, opens or resumes the folder, runs what is left, reconciles.

Every input ends as exactly one row, or the run says that it did not. Knows the engines by name, nothing of Ray.
"""

from __future__ import annotations

import importlib.metadata
import platform
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from time import monotonic
from typing import Any

import pyarrow as pa
import torch

from guardalign.canaries import readiness
from guardalign.canaries.drift import UNCHECKED, drift, recorded
from guardalign.config import AuditConfig, to_plain
from guardalign.defenses import defense_of, fingerprint_of
from guardalign.detectors import DETECTORS
from guardalign.errors import InputError, ResumeError, RunFailedError
from guardalign.faults import reach
from guardalign.fingerprint import changed_files, differences, refuse_foreign_calibration, science
from guardalign.ignored import ignored_settings
from guardalign.journal import FOLDER as JOURNAL
from guardalign.judges import judge_of, pinned
from guardalign.lock import Lock
from guardalign.micro import NOTICE, is_embedded, resolve_clip, resolve_input, resolve_lvlm, resolve_taxonomy
from guardalign.models.clip_weights import clip_fingerprint
from guardalign.models.provenance import COMMIT, weights_fingerprint
from guardalign.pipeline import ENGINES, NONE, steps
from guardalign.placement import refuse_output_among_inputs
from guardalign.progress import Progress
from guardalign.receipts import Receipt
from guardalign.results import RunFolder, ShardWriter, entries, shard_name, sizes_of
from guardalign.schema import HIDDEN, RESULT_NAMES, SCHEMA_VERSION, result_schema
from guardalign.sources import Plan, Shard, Source, make_source
from guardalign.sources.planning import IdLedger
from guardalign.summary import Totals, summary_lines, totals
from guardalign.supervision import PROBLEM
from guardalign.taxonomy import Taxonomy, load_taxonomy
from guardalign.typed import next_line, typed_line
from guardalign.version import VERSION

Say = Callable[[str], None]
PACKAGES = ("ray", "torch", "transformers", "open_clip_torch", "pot", "pyarrow", "datasets", "pillow", "numpy")
"""Libraries whose versions run.json records."""


@dataclass(frozen=True)
class Prepared:
    """An audit that is planned and checked, but not begun."""

    config: AuditConfig
    """its settings"""
    source: Source
    """reads shards"""
    plan: Plan
    """what there is to read"""
    taxonomy: Taxonomy
    """what is looked for"""
    science: dict[str, Any]
    """what its rows depend on"""


def prepare(config: AuditConfig) -> Prepared:
    """Plans the input and seals what the rows depend on; raises a `UserError` where something is missing."""
    detects = config.detector.name != NONE
    if detects:
        DETECTORS[config.detector.name](**config.detector.options).require_threshold()
    taxonomy = load_taxonomy(resolve_taxonomy(config))
    source = make_source(resolve_input(config.input), reserved=(*RESULT_NAMES, *HIDDEN, PROBLEM))
    plan = source.plan(config.shard_rows, config.limit)
    clip_weights = clip_fingerprint(resolve_clip(config.clip)) if detects else {}
    lvlm_weights = weights_fingerprint(resolve_lvlm(config.lvlm).model, config.lvlm.revision)
    if COMMIT in lvlm_weights:  # every node loads this very commit, whatever a branch points to by then
        config = replace(config, lvlm=replace(config.lvlm, revision=lvlm_weights[COMMIT]))
    judge = ""
    if config.judge.name != NONE:
        config = replace(config, judge=pinned(config.judge))
        judge = judge_of(config.judge).fingerprint
    defense = fingerprint_of(defense_of(config))
    sealed = science(config, clip_weights, lvlm_weights, taxonomy.fingerprint if detects else "", judge, defense)
    refuse_foreign_calibration(config.calibration, sealed)
    return Prepared(config, source, plan, taxonomy, sealed)


def audit(config: AuditConfig, say: Say = print) -> int:
    """Runs the audit; returns the exit code: 0, or 130 after an interruption. Failures are `UserError`s."""
    if is_embedded(config):
        say(NOTICE)
    for sentence in ignored_settings(config):
        say(f"warning   {sentence}")
    refuse_output_among_inputs(config.output, config.input.path)
    prepared = prepare(config)
    return _dry_run(prepared, say) if config.dry_run else _audit_into_folder(prepared, say)


def _dry_run(prepared: Prepared, say: Say) -> int:
    """Prints the plan and the columns, loads the models, runs and writes nothing."""
    plan, config = prepared.plan, prepared.config
    for note in plan.notes:
        say(f"note      {note}")
    say(f"plan: {plan.num_rows:,} rows in {len(plan.shards):,} shards from {len(plan.files):,} files")
    for field in result_schema(plan.passthrough_fields):
        doc = (field.metadata or {}).get(b"doc", b"passed through from the input").decode()
        say(f"column {field.name} ({field.type}): {doc}")
    for step in steps(config, prepared.taxonomy):
        stage: Any = step.make()
        say(f"stage {stage.name}: {readiness(stage)}")
    say("dry run: nothing was run, nothing was written")
    return 0


def _audit_into_folder(prepared: Prepared, say: Say) -> int:
    folder = RunFolder(prepared.config.output)
    with Lock(folder):
        attempts, run_id = open_run(folder, prepared)
        done = folder.committed()
        left = [shard for shard in prepared.plan.shards if shard.index not in done]
        if not left and folder.exists("run.json"):
            return _nothing_to_do(folder, prepared, say)
        if done:
            say(f"resuming: {len(done):,} of {len(prepared.plan.shards):,} shards are done")
        earlier = [folder.receipt(name) for name in done.values()]  # before any work: a damaged one ends the run
        record_start(folder, prepared, attempts, run_id)
        started = monotonic()
        schema = result_schema(prepared.plan.passthrough_fields)
        writer = ShardWriter(absolute(folder), schema, run_id, attempts)
        receipts, interrupted = _work(prepared, left, writer)
        if interrupted:
            say(f"interrupted: {len(folder.committed()):,} of {len(prepared.plan.shards):,} shards are committed")
            say(f"to resume, type the same line again: {typed_line()}")
            return 130
        whole = _finish(folder, prepared, earlier, receipts, run_id, attempts, monotonic() - started)
        seconds = monotonic() - started
        where = f"{folder.out}/results/*.parquet ({len(prepared.plan.shards):,} files), {folder.out}/run.json"
        told = ignored_settings(prepared.config)
        manifest = folder.read_json("run.json")
        notes = [note for note in manifest["notes"] if note not in told]
        found = recorded(manifest["self_check"])
        shown = next_line(folder)
        for line in summary_lines(whole, totals(receipts), seconds, where, shown, notes, found.warnings):
            say(line)
    found.require_steady()
    return _verdict_on_errors(prepared.config, whole)


def _nothing_to_do(folder: RunFolder, prepared: Prepared, say: Say) -> int:
    """Says so once run.json was read whole and every shard has its size; their contents are not read."""
    before = folder.read_sealed("run.json", "totals", "files")
    folder.require_sizes(sizes_of(before))
    say(f"nothing to do: {folder.out} is complete ({prepared.plan.num_rows:,} rows)")
    recorded(before.get("self_check")).require_steady()
    return _verdict_on_errors(prepared.config, Totals(**before["totals"]))


def open_run(folder: RunFolder, prepared: Prepared) -> tuple[int, str]:
    """Refuses a folder that holds another run; returns the number of attempts, this one included, and the run's id.

    An audit that has committed nothing is none: who mends a setting that it failed by may take its folder.
    """
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    if not folder.exists("plan.json"):
        if folder.committed():
            raise ResumeError(f"{folder.out} holds result files but no plan.json; name another --output")
        return 1, run_id
    before = folder.read_sealed("plan.json", "science", "shape", "attempts")
    kinds = ["an evaluation" if "recipe" in each else "an audit" for each in (before["science"], prepared.science)]
    if kinds[0] != kinds[1]:
        raise ResumeError(f"{folder.out} holds {kinds[0]}, and this is {kinds[1]}; name another --output")
    changes = differences(before["science"] | before["shape"], prepared.science | _shape(prepared))
    files = changed_files(folder.read_table("inputs.parquet").to_pylist(), _listing(prepared.plan).to_pylist())
    is_empty = kinds[1] == "an audit" and not folder.committed() and not folder.exists("run.json")
    if (changes or files) and is_empty:
        folder.remove(JOURNAL)
        return 1, run_id
    if changes or files:
        named = "; ".join(changes[:5] + files[:5])
        more = max(len(changes) - 5, 0) + max(len(files) - 5, 0)
        rest = f"; and {more} more" if more else ""
        raise ResumeError(
            f"{folder.out} holds a run that this one would mix with: {named}{rest}; name another --output"
        )
    _refuse_foreign_shards(folder, prepared.plan)
    return int(before["attempts"]) + 1, run_id


def _refuse_foreign_shards(folder: RunFolder, plan: Plan) -> None:
    planned = {shard.index for shard in plan.shards}
    foreign = [name for index, name in folder.committed().items() if index not in planned]
    if foreign:
        raise ResumeError(f"{folder.out}/{foreign[0]} belongs to no shard of this run; remove it")


def _shape(prepared: Prepared) -> dict[str, Any]:
    """The shape of the plan; rows and shards come last, so that what caused their change is named first."""
    return {"shard_rows": prepared.config.shard_rows, "limit": prepared.config.limit}


def _listing(plan: Plan) -> pa.Table:
    names = ("path", "size", "etag")
    rows = {name: [getattr(file, name) for file in plan.files] for name in names}
    return pa.table(rows, schema=pa.schema([("path", pa.string()), ("size", pa.int64()), ("etag", pa.string())]))


def record_start(folder: RunFolder, prepared: Prepared, attempts: int, run_id: str) -> None:
    folder.clear_temporary()
    if folder.exists("run.json"):
        folder.files.rm_file(folder.path("run.json"))
    if attempts == 1:
        folder.write_table("inputs.parquet", _listing(prepared.plan))
    record = {"science": prepared.science, "shape": _shape(prepared), "attempts": attempts, "run_id": run_id}
    folder.write_sealed("plan.json", record | {"num_rows": prepared.plan.num_rows})


def _work(prepared: Prepared, left: Sequence[Shard], writer: ShardWriter) -> tuple[list[Receipt], bool]:
    """Runs the shards that are left; tells what was committed and whether somebody interrupted."""
    config = prepared.config
    done_rows = prepared.plan.num_rows - sum(shard.num_rows for shard in left)
    receipts: list[Receipt] = []
    if not left:
        return receipts, False
    engine = ENGINES[config.engine]
    with Progress(prepared.plan.num_rows, done_rows, config.cluster.log_seconds) as progress:
        try:
            for receipt in engine(config, prepared.taxonomy, prepared.source, left, writer):
                receipts.append(receipt)
                progress.add(receipt)
        except KeyboardInterrupt:
            return receipts, True
    return receipts, False


def _finish(
    folder: RunFolder,
    prepared: Prepared,
    earlier: Sequence[Receipt],
    receipts: Sequence[Receipt],
    run_id: str,
    attempts: int,
    seconds: float,
) -> Totals:
    """Reconciles inputs with rows, then writes the manifest."""
    folder.clear_temporary()
    folder.remove(JOURNAL)
    mine = {receipt.shard: receipt for receipt in (*earlier, *receipts)}
    files = folder.committed()
    every = [mine[index] if index in mine else folder.receipt(name) for index, name in sorted(files.items())]
    reconcile(prepared.plan, every)
    refuse_double_rows(folder)
    whole = totals(every)
    reach("manifest.begin")
    manifest = _manifest(prepared, every, whole, totals(receipts), run_id, attempts, seconds)
    folder.write_sealed("run.json", manifest | {"records": folder.checksums("plan.json", "inputs.parquet")})
    return whole


def reconcile(plan: Plan, receipts: Sequence[Receipt]) -> None:
    planned = {shard.index: shard.num_rows for shard in plan.shards}
    written = {receipt.shard: receipt.num_rows for receipt in receipts}
    if planned == written:
        return
    wrong = sorted(index for index in planned | written if planned.get(index) != written.get(index))
    raise RunFailedError(
        f"{sum(planned.values()):,} rows were planned and {sum(written.values()):,} written; "
        f"{len(wrong)} shards differ, the first is {wrong[0]}; run the same line again"
    )


def refuse_double_rows(folder: RunFolder) -> None:
    """Every id stands once; else the input was changed while it was read, after its plan was made."""

    def walk() -> Iterator[tuple[str, str]]:
        for table in folder.tables(["sample_id", "shard"]):
            rows = zip(table["sample_id"].to_pylist(), table["shard"].to_pylist(), strict=True)
            yield from ((sample_id, f"shard {shard}") for sample_id, shard in rows)

    ledger = IdLedger()
    for sample_id, _ in walk():
        ledger.add(sample_id)
    try:
        ledger.refuse_duplicates(walk)
    except InputError as error:
        raise RunFailedError(f"{error}; the input changed while it was read: name another --output") from None


def _manifest(
    prepared: Prepared,
    receipts: Sequence[Receipt],
    whole: Totals,
    this_run: Totals,
    run_id: str,
    attempts: int,
    seconds: float,
) -> dict[str, Any]:
    plan = prepared.plan
    notes = [
        *ignored_settings(prepared.config),
        *plan.notes,
        *dict.fromkeys(note for receipt in receipts for note in receipt.notes),
        *([] if prepared.config.self_check else [UNCHECKED]),
    ]
    found = drift({shard_name(receipt.shard): receipt for receipt in receipts})
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "attempts": attempts,
        "finished": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "config": to_plain(prepared.config),
        "fingerprint": prepared.science | _shape(prepared),
        "input": {"num_rows": plan.num_rows, "num_shards": len(plan.shards), "num_files": len(plan.files)},
        "versions": versions(),
        "cuda": torch.cuda.is_available(),
        "totals": asdict(whole),
        "counters": whole.counters,
        "this_run": {"totals": asdict(this_run), "seconds": seconds},
        "notes": notes,
        "self_check": asdict(found) if prepared.config.self_check else None,
        "files": entries(receipts),
    }


def versions() -> dict[str, str]:
    found = {"guardalign": VERSION, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _verdict_on_errors(config: AuditConfig, whole: Totals) -> int:
    most = config.max_error_fraction
    if most is not None and whole.num_errors > most * whole.rows:
        raise RunFailedError(
            f"{whole.num_errors:,} of {whole.rows:,} rows ended in an error, more than max_error_fraction {most} allows"
        )
    return 0


def absolute(folder: RunFolder) -> str:
    return folder.root if folder.is_local else folder.out
