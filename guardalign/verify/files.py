"""A run's folder against its own records: every listed file is there and as it was written, and none is beside them.

The counts are taken from the rows again, so that they rest on no footer. One file is in memory at a time. Knows nothing
of models or of what rows say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from guardalign.audit import refuse_double_rows
from guardalign.errors import ResumeError, RunFailedError
from guardalign.evaluation.running import DETECTIONS
from guardalign.receipts import RECEIPT_KEY, Receipt, shard_receipt
from guardalign.results import RunFolder, shard_name
from guardalign.schema import SCHEMA_VERSION, Trace
from guardalign.seals import is_whole_parquet, sha256
from guardalign.summary import totals
from guardalign.verify.rows import row_problems, schema_problem

KEYS: Final = ("schema_version", "run_id", "attempts", "config", "fingerprint", "input", "totals", "files", "records")
"""What run.json must have."""
COUNTED: Final = (
    *("num_rows", "errors", "detected", "flagged", "masked", "masked_patches", "judged", "refused"),
    *("defense_judged", "defense_flagged", "assessed", "unsafe", "unparsed", "num_images", "num_tokens", "labels"),
)
"""What a receipt counts of its rows."""
SUMMED: Final = (
    *("rows", "images", "detected", "flagged", "masked", "masked_patches", "judged", "refused"),
    *("defense_judged", "defense_flagged", "assessed", "unsafe", "unparsed", "tokens", "errors", "labels"),
)
"""What run.json sums over them, in an audit."""


@dataclass(frozen=True)
class Rules:
    """What the rows of a folder of results must obey."""

    attempts: int
    """runs that the folder has seen"""
    answers: bool
    """rows end in an answer or an error; False: they are an evaluation's detections"""
    verdicts: bool
    """every answer has a verdict"""


@dataclass(frozen=True)
class Examined:
    """What a shard's file turned out to be."""

    problems: tuple[str, ...] = ()
    """one sentence each"""
    receipt: Receipt | None = None
    """counted again; None where the file cannot be read"""
    schema: pa.Schema | None = None
    """of its rows"""


def file_problems(folder: RunFolder, manifest: Mapping[str, Any]) -> list[str]:
    """One sentence for everything that is not as run.json has it."""
    compares = "order" in manifest["fingerprint"]
    problems = [*_record_problems(folder, manifest), *_strangers(folder, manifest)]
    judged = not compares and manifest["config"]["judge"]["name"] != "none"
    passed = [each for each in manifest["records"] if each["name"].startswith(f"{DETECTIONS}/results/")]
    answered = _examined(folder, manifest["files"], Rules(manifest["attempts"], True, judged))
    detected = _examined(folder, passed, Rules(manifest["attempts"], False, False))
    problems += [problem for each in (*answered, *detected) for problem in each.problems]
    if problems:
        return problems
    receipts = [each.receipt for each in answered if each.receipt is not None]
    problems += _sum_problems(folder, manifest, receipts, compares)
    problems += _pass_problems(manifest, [each.receipt for each in detected if each.receipt is not None])
    return problems + list(_product_problems(folder, manifest) if compares else _double_rows(folder))


def _record_problems(folder: RunFolder, manifest: Mapping[str, Any]) -> Iterator[str]:
    """plan.json and its like: their checksums, and what plan.json says."""
    damaged = False
    for record in manifest["records"]:
        if record["name"].startswith(f"{DETECTIONS}/results/"):
            continue
        problem = _changed(record, _content(folder, record["name"]))
        damaged |= problem is not None
        if problem is not None:
            yield problem
    if manifest["schema_version"] != SCHEMA_VERSION:
        yield f"run.json is of schema version {manifest['schema_version']}, this is {SCHEMA_VERSION}"
    if not damaged:
        yield from _plan_problems(folder, manifest)


def _plan_problems(folder: RunFolder, manifest: Mapping[str, Any]) -> Iterator[str]:
    try:
        plan = folder.read_json("plan.json", "science", "shape", "attempts", "run_id", "num_rows")
        listed = folder.read_table("inputs.parquet").num_rows
    except ResumeError as error:
        yield str(error)
        return
    if plan["science"] | plan["shape"] != manifest["fingerprint"]:
        yield "plan.json was made for other settings than run.json"
    for name in ("run_id", "attempts"):
        if plan[name] != manifest[name]:
            yield f"plan.json has {name} {plan[name]}, run.json {manifest[name]}"
    if listed != manifest["input"]["num_files"]:
        yield f"inputs.parquet lists {listed:,} files, and run.json says {manifest['input']['num_files']:,}"
    rows = plan["num_rows"] * len(manifest["fingerprint"].get("order", [(), (0,)])[1])
    if rows != manifest["totals"]["rows"]:
        yield f"{rows:,} rows were planned, and run.json counts {manifest['totals']['rows']:,}"


def _changed(record: Mapping[str, Any], content: bytes | None) -> str | None:
    if content is None:
        return f"{record['name']} is missing, or cannot be read"
    same = sha256(content) == record["sha256"]
    return None if same else f"{record['name']} has changed since it was written: its SHA-256 is another"


def _content(folder: RunFolder, name: str) -> bytes | None:
    try:
        return bytes(folder.files.cat_file(folder.path(name)))
    except OSError:
        return None


def _strangers(folder: RunFolder, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Files that readers of the results would take for the run's, and what a killed process has left."""
    known = {each["name"] for each in (*manifest["files"], *manifest["records"])}
    for path in sorted(folder.files.find(folder.root)):
        name = str(path)[len(folder.root) :].lstrip("/")
        last = name.rpartition("/")[2]
        if last.startswith(".") and last.endswith(".tmp"):
            yield f"{name} is a temporary file that a killed process has left; remove it"
        elif name not in known and name.startswith(("results/", f"{DETECTIONS}/")):
            yield f"{name} is foreign: run.json does not name it; remove it"


def _examined(folder: RunFolder, files: Sequence[Mapping[str, Any]], rules: Rules) -> list[Examined]:
    """Every file, one after the other; all must have the schema of the first."""
    found: list[Examined] = []
    for number, file in enumerate(files):
        due = shard_name(number)
        if rules.answers and file["name"] != due:
            found.append(Examined((f"run.json names {file['name']} where {due} should stand",)))
            continue
        first = next((each.schema for each in found if each.schema is not None), None)
        found.append(_one(folder, file, first, rules))
    return found


def _one(folder: RunFolder, file: Mapping[str, Any], first: pa.Schema | None, rules: Rules) -> Examined:
    name = file["name"]
    content = _content(folder, name)
    problem = _changed(file, content)
    if content is None or problem is not None:
        return Examined((str(problem),))
    if not is_whole_parquet(content):
        return Examined((f"{name} is damaged: its bytes are not those of its seal",))
    try:
        table = pq.ParquetFile(BytesIO(content)).read()
        written = Receipt(**json.loads((table.schema.metadata or {})[RECEIPT_KEY.encode()]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return Examined((f"{name} is damaged: it is no result file",))
    problem = schema_problem(table.schema, first)
    if problem is not None:
        return Examined((f"{name}: {problem}",))
    counted = shard_receipt(table, written.shard, written.run_id, Trace())
    problems = list(_miscounted(file, written, counted))
    if rules.answers:
        problems += row_problems(table, written.shard, written.run_id, rules.attempts, rules.verdicts)
    return Examined(tuple(f"{name}: {each}" for each in problems), counted, table.schema)


def _miscounted(file: Mapping[str, Any], written: Receipt, counted: Receipt) -> Iterator[str]:
    """Counts of the rows beside those of the receipt, of run.json and of the file's name."""
    if not file["name"].endswith(shard_name(written.shard)):
        yield f"it holds shard {written.shard}"
    if file.get("rows", counted.num_rows) != counted.num_rows:
        yield f"it holds {counted.num_rows:,} rows, and run.json says {file['rows']:,}"
    for name in COUNTED:
        if getattr(written, name) != getattr(counted, name):
            yield f"its receipt says {name} {getattr(written, name)}, its rows {getattr(counted, name)}"


def _sum_problems(
    folder: RunFolder, manifest: Mapping[str, Any], receipts: Sequence[Receipt], compares: bool
) -> Iterator[str]:
    """The sums over all files beside those of run.json."""
    summed = totals(receipts)
    found: dict[str, Any] = {name: getattr(summed, name) for name in SUMMED}
    if compares:
        found = {"rows": summed.rows, "errors": summed.errors, "tokens": summed.tokens}
    for name, value in found.items():
        if manifest["totals"].get(name) != value:
            yield f"run.json says {name} {manifest['totals'].get(name)}, the rows {value}"
    models = len(manifest["fingerprint"]["order"][2]) if compares else 1
    if len(receipts) != models * manifest["input"]["num_shards"]:
        yield f"there are {len(receipts):,} result files, and {models * manifest['input']['num_shards']:,} were planned"


def _pass_problems(manifest: Mapping[str, Any], detected: Sequence[Receipt]) -> Iterator[str]:
    """An evaluation's detections: every detector has seen every sample."""
    rows, samples = sum(each.num_rows for each in detected), manifest["input"].get("num_samples", 1)
    if rows % samples:
        yield f"{DETECTIONS}/ holds {rows:,} rows, no multiple of the {samples:,} samples"


def _double_rows(folder: RunFolder) -> Iterator[str]:
    try:
        refuse_double_rows(folder)
    except RunFailedError as error:
        yield str(error)


def _product_problems(folder: RunFolder, manifest: Mapping[str, Any]) -> Iterator[str]:
    """An evaluation's rows: every sample once under every recipe with every model."""
    _, recipes, models = manifest["fingerprint"]["order"]
    seen: dict[tuple[str, str], set[tuple[str, str]]] = {(m, r): set() for m in models for r in recipes}
    rows = 0
    for table in folder.tables(["model", "recipe", "benchmark", "sample_id"]):
        for row in table.to_pylist():
            rows += 1
            seen.setdefault((row["model"], row["recipe"]), set()).add((row["benchmark"], row["sample_id"]))
    samples = manifest["input"]["num_samples"]
    for (model, recipe), found in seen.items():
        if len(found) != samples or found != next(iter(seen.values())):
            yield f"model {model}, recipe {recipe}: {len(found):,} samples have a row, of {samples:,}"
    if rows != sum(len(found) for found in seen.values()):
        yield f"{rows - sum(len(found) for found in seen.values()):,} rows stand twice"
