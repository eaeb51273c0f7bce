"""One evaluation from plan to tables: detect once, answer model by model, reconcile, compare.

    OUT/plan.json                       what the rows depend on, written before any work
    OUT/detections/results/*.parquet    every sample under every detector
    OUT/results/*.parquet               every sample under every recipe and model, one row each
    OUT/tables.txt, tables.md, tables.json
    OUT/run.json                        the manifest, written last

A shard is done exactly when its file is there, so that an interrupted run goes on where it stopped, and a finished one
does no model work when it is run again: its counters say so. Knows the engines by name, nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Final

from guardalign.audit import Say, absolute, open_run, reconcile, record_start, versions
from guardalign.canaries.drift import UNCHECKED, drift, recorded
from guardalign.config import AuditConfig, to_plain
from guardalign.errors import RunFailedError
from guardalign.evaluation.plan import Comparison, answer_steps, detect_steps, prepare
from guardalign.evaluation.printing import as_json, as_markdown, as_text
from guardalign.evaluation.request import Request
from guardalign.evaluation.stages import EVALUATION
from guardalign.evaluation.tables import COLUMNS, Findings, findings
from guardalign.journal import FOLDER as JOURNAL
from guardalign.lock import Lock
from guardalign.micro import NOTICE, resolve_clip, resolve_lvlm
from guardalign.pipeline import ENGINES, Step
from guardalign.placement import refuse_output_among_inputs
from guardalign.progress import Progress
from guardalign.receipts import Receipt
from guardalign.results import RunFolder, ShardWriter, entries, shard_name
from guardalign.schema import SCHEMA_VERSION, result_schema
from guardalign.sources import Shard
from guardalign.summary import totals
from guardalign.taxonomy import load_taxonomy
from guardalign.typed import typed_line

DETECTIONS: Final = "detections"
COUNTERS: Final = ("clip_loads", "clip_forward_calls", "lvlm_loads", "lvlm_forward_calls")
"""what run.json counts in any case, 0 where nothing was done"""


@dataclass
class _Work:
    """What this run has done so far."""

    detected: list[Receipt] = field(default_factory=list)
    answered: list[Receipt] = field(default_factory=list)


def evaluate(request: Request, say: Say = print) -> int:
    """Runs the evaluation; returns the exit code: 0, or 130 after an interruption. Failures are `UserError`s."""
    if _is_embedded(request):
        say(NOTICE)
    for asked in request.benchmarks.values():
        refuse_output_among_inputs(request.shared.output, asked.input.path)
    comparison = prepare(request)
    folder = RunFolder(request.shared.output)
    with Lock(folder):
        attempts, run_id = open_run(folder, comparison.answers)
        left = [each for each in comparison.answers.plan.shards if each.index not in folder.committed()]
        started = monotonic()
        work = _Work()
        if left or not folder.exists("run.json"):
            record_start(folder, comparison.answers, attempts, run_id)
            say(_announcement(comparison, len(left)))
            try:
                _run(comparison, folder, left, attempts, run_id, work)
            except KeyboardInterrupt:
                done = len(folder.committed())
                say(f"interrupted: {done:,} of {len(comparison.answers.plan.shards):,} shards are committed")
                say(f"to resume, type the same line again: {typed_line()}")
                return 130
        else:
            before = folder.read_sealed("run.json", "attempts", "run_id")
            attempts, run_id = before["attempts"], before["run_id"]
            say(f"nothing to do: {folder.out} is complete")
        found = _finish(comparison, folder, work, attempts, run_id, monotonic() - started)
    say(as_text(found))
    say(f"results   {folder.out}/results/*.parquet, {folder.out}/tables.md, {folder.out}/tables.json")
    models = recorded(folder.read_json("run.json")["self_check"])
    for warning in models.warnings:
        say(f"warning   {warning}")
    models.require_steady()
    return _verdict_on_errors(request.shared, found)


def _is_embedded(request: Request) -> bool:
    clips = (each for each in request.recipes.values() if each.detector.name != "none")
    return any(resolve_lvlm(each) != each for each in request.models.values()) or any(
        resolve_clip(each.clip) != each.clip for each in clips
    )


def _announcement(comparison: Comparison, left: int) -> str:
    request, whole = comparison.request, len(comparison.answers.plan.shards)
    resumed = f"; resuming, {whole - left:,} of {whole:,} shards are done" if left < whole else ""
    return (
        f"plan: {comparison.plan.num_rows:,} samples of {len(request.benchmarks)} benchmarks x {len(request.recipes)} "
        f"recipes x {len(request.models)} models in {whole:,} shards{resumed}"
    )


def _run(
    comparison: Comparison, folder: RunFolder, left: Sequence[Shard], attempts: int, run_id: str, work: _Work
) -> None:
    """Detects what the answers that are left need, then answers, model by model."""
    root = absolute(folder)
    detections = f"{root}/{DETECTIONS}"
    samples = comparison.samples
    needed = {shard.index % samples.num_shards for shard in left}
    kept = RunFolder(detections)
    kept.write_json("plan.json", {"run_id": run_id})
    kept.clear_temporary()
    done = kept.committed()
    writer = ShardWriter(detections, result_schema(), run_id, attempts)
    for number, config in enumerate(comparison.detectors):
        shards = samples.shards_of(number, [each for each in comparison.plan.shards if each.index in needed])
        missing = [each for each in shards if each.index not in done]
        work.detected += _through(comparison, config, missing, writer, detect_steps(config), 1)
    writer = ShardWriter(root, result_schema(EVALUATION), run_id, attempts)
    for number, model in enumerate(comparison.request.models):
        mine = [each for each in left if each.index // samples.num_shards == number]
        listed = answer_steps(comparison, model, detections)
        config = replace(comparison.request.shared, lvlm=comparison.request.models[model])
        for receipt in _through(comparison, config, mine, writer, listed, len(comparison.views)):
            work.answered.append(receipt)


def _through(
    comparison: Comparison,
    config: AuditConfig,
    shards: Sequence[Shard],
    writer: ShardWriter,
    listed: Sequence[Step],
    rows_each: int,
) -> Iterator[Receipt]:
    """These shards through these steps, on the engine of the settings."""
    if not shards:
        return
    engine = ENGINES[config.engine]
    taxonomy = load_taxonomy("micro")  # the listed steps bring their own
    num_rows = rows_each * sum(shard.num_rows for shard in shards)
    with Progress(num_rows, 0, config.cluster.log_seconds) as progress:
        for receipt in engine(config, taxonomy, comparison.samples, shards, writer, listed):
            progress.add(receipt)
            yield receipt


def _finish(
    comparison: Comparison, folder: RunFolder, work: _Work, attempts: int, run_id: str, seconds: float
) -> Findings:
    """Reconciles samples with rows, compares, and writes tables and manifest."""
    for each in (folder, RunFolder(f"{absolute(folder)}/{DETECTIONS}")):
        each.clear_temporary()
        each.remove(JOURNAL)
    answered = _receipts(folder, work.answered)
    plan = comparison.answers.plan
    num_recipes = len(comparison.views)
    expanded = [replace(shard, num_rows=shard.num_rows * num_recipes) for shard in plan.shards]
    reconcile(replace(plan, shards=tuple(expanded)), answered)
    rows = _rows(folder)
    found = findings(rows, comparison.request)
    for name, text in (("txt", as_text(found)), ("md", as_markdown(found)), ("json", as_json(found))):
        folder.write(f"tables.{name}", text.encode())
    detected = _receipts(RunFolder(f"{absolute(folder)}/{DETECTIONS}"), work.detected)
    manifest = _manifest(comparison, detected, answered, work, attempts, run_id, seconds)
    folder.write_sealed("run.json", manifest | {"records": _records(folder, detected)})
    return found


def _records(folder: RunFolder, detected: Sequence[Receipt]) -> list[dict[str, str]]:
    """The checksums of all that is no file of answers."""
    names = ("plan.json", "inputs.parquet", *(f"tables.{kind}" for kind in ("txt", "md", "json")))
    passed = [{"name": f"{DETECTIONS}/{shard_name(each.shard)}", "sha256": each.sha256} for each in detected]
    return [*folder.checksums(*names, f"{DETECTIONS}/plan.json"), *passed]


def _receipts(folder: RunFolder, mine: Sequence[Receipt]) -> list[Receipt]:
    """Of every committed shard."""
    known = {receipt.shard: receipt for receipt in mine}
    files = sorted(folder.committed().items())
    return [known[index] if index in known else folder.receipt(name) for index, name in files]


def _rows(folder: RunFolder) -> list[dict[str, Any]]:
    """Every result row, as far as the tables look at it; each sample stands once for a recipe and a model."""
    rows = [row for table in folder.tables(COLUMNS) for row in table.to_pylist()]
    names = {(row["benchmark"], row["model"], row["recipe"], row["sample_id"]) for row in rows}
    if len(names) != len(rows):
        raise RunFailedError(
            f"{len(rows) - len(names):,} rows stand twice in {folder.out}; the input changed while it was read: name "
            "another --output"
        )
    return rows


def _counters(receipts: Sequence[Receipt]) -> dict[str, int]:
    return dict.fromkeys(COUNTERS, 0) | totals(receipts).counters


def _manifest(
    comparison: Comparison,
    detected: Sequence[Receipt],
    answered: Sequence[Receipt],
    work: _Work,
    attempts: int,
    run_id: str,
    seconds: float,
) -> dict[str, Any]:
    request, whole, mine = comparison.request, totals(answered), [*work.detected, *work.answered]
    receipts = [*detected, *answered]
    notes = [*comparison.plan.notes, *dict.fromkeys(note for each in receipts for note in each.notes)]
    notes += [] if request.shared.self_check else [UNCHECKED]
    shape = {"shard_rows": request.shared.shard_rows, "limit": request.shared.limit}
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "attempts": attempts,
        "finished": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "config": {name: to_plain(config) for name, config in request.recipes.items()},
        "fingerprint": comparison.science | shape,
        "input": {
            "num_samples": comparison.plan.num_rows,
            "num_shards": len(comparison.plan.shards),
            "num_files": len(comparison.plan.files),
        },
        "versions": versions(),
        "totals": {"rows": whole.rows, "errors": whole.errors, "tokens": whole.tokens},
        "counters": _counters(receipts),
        "this_run": {
            "rows": sum(receipt.num_rows for receipt in work.answered),
            "counters": _counters(mine),
            "seconds": seconds,
        },
        "notes": notes,
        "self_check": asdict(drift(_by_file(detected, answered))) if request.shared.self_check else None,
        "files": entries(answered),
    }


def _by_file(detected: Sequence[Receipt], answered: Sequence[Receipt]) -> dict[str, Receipt]:
    found = {f"{DETECTIONS}/{shard_name(each.shard)}": each for each in detected}
    return found | {shard_name(each.shard): each for each in answered}


def _verdict_on_errors(shared: AuditConfig, found: Findings) -> int:
    rows, errors = sum(each.rows for each in found.outcomes), sum(each.num_errors for each in found.outcomes)
    most = shared.max_error_fraction
    if most is not None and errors > most * rows:
        raise RunFailedError(
            f"{errors:,} of {rows:,} rows ended in an error, more than max_error_fraction {most} allows"
        )
    return 0
