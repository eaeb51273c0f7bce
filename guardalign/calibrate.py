"""A threshold for the detector from benign pictures, so that few of their kind are flagged; with labels, what it costs.

    score every picture as an audit would  ->  the conformal threshold of the benign ones  ->  a file for --config
    with unsafe rows among them            ->  ROC, AUROC, detection rate at that threshold
    with a list of gammas                  ->  the whole audit under each, unsafe answers against over-refusal

The sweep's benign rows are those that the threshold was drawn from, and the threshold is on disk before it begins.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from guardalign.canaries.drift import drift
from guardalign.config import AuditConfig, CalibrationRecord, Choice, ImageKeeping, to_plain
from guardalign.defenses import DEFENSES
from guardalign.errors import ConfigError, InputError, RunFailedError, require
from guardalign.fingerprint import flat, science, scores_fingerprint
from guardalign.judges import JUDGES
from guardalign.micro import CLIPS, NOTICE, is_embedded, resolve_clip, resolve_input, resolve_lvlm, resolve_taxonomy
from guardalign.models.clip_weights import clip_fingerprint
from guardalign.models.provenance import COMMIT, weights_fingerprint
from guardalign.pipeline import ENGINES, NONE, Step, scoring_steps
from guardalign.progress import Progress
from guardalign.receipts import Receipt
from guardalign.rescore import open_finished
from guardalign.results import RunFolder, ShardWriter, shard_name
from guardalign.schema import IMAGE, RESULT_NAMES, result_schema
from guardalign.settings import STRATEGIES, load_settings
from guardalign.sources import Outline, Plan, Shard, Source, make_source
from guardalign.taxonomy import Taxonomy, load_taxonomy
from guardalign.thresholds import (
    COLUMNS,
    HEADER,
    Fitted,
    Scored,
    SweepPoint,
    Target,
    as_threshold_file,
    figures,
    fit,
    record_of,
    summary,
    sweep_lines,
)
from guardalign.typed import program
from guardalign.version import VERSION

Say = Callable[[str], None]
SWEPT = "guardalign"
"""The defense that has a gamma."""
STAND_IN = "-"
"""The prompt of a picture that has none, where no prompt is read."""
THRESHOLD = "--detector.threshold"
IN_THE_FILE = ("detector.", "calibration", "output", "dry_run")
"""Settings of a run that the threshold file holds, or that the next run has of its own."""


def calibrate(config: AuditConfig, target: Target, say: Say = print, given: Sequence[str] = ()) -> int:
    """Scores the input's pictures, writes the threshold; returns the exit code. Failures are `UserError`s.

    `given` are the words (recipe, config files, flags) that the settings came from; the next line repeats them.
    """
    _refuse_overwriting(target)
    config = _checked(config, target)
    if config.clip.model in CLIPS or (target.gammas and is_embedded(config)):
        say(NOTICE)
    with _scratch(target) as scratch:
        bench = Bench.prepare(config, scratch, reads_prompts=bool(target.gammas))
        scored = bench.scored()
        found, record = _conclude(scored, target, say)
        _sweep(bench, scored, found, record, target, say)
    say(_next(_without_threshold(given), target))
    return 0


def calibrate_run(out: str, target: Target, say: Say = print) -> int:
    """Takes the scores of a finished run instead; no model is needed."""
    require(not target.gammas, "--gammas runs the models, and --from runs nothing: leave one of them out")
    require(bool(out), "--from is empty: name the folder of a finished run")
    _refuse_overwriting(target)
    folder = RunFolder(out)
    manifest = open_finished(folder, COLUMNS)
    detector = manifest["config"]["detector"]
    if detector["name"] == NONE:
        raise InputError(f"{out} was made without a detector: it holds no scores")
    given = _as_flags(out, manifest["config"])
    fingerprint = scores_fingerprint(manifest["fingerprint"])
    scored = Scored.read(folder, detector, fingerprint, manifest["versions"]["guardalign"], manifest["notes"])
    _conclude(scored, target, say)
    say(_next(given, target))
    return 0


def _checked(config: AuditConfig, target: Target) -> AuditConfig:
    """The settings, with the LVLM's commit pinned where it is to answer; all that can be told before any scoring."""
    require(config.detector.name != NONE, "calibrate needs a detector; choose one with --detector.name or --recipe")
    require(not config.dry_run, "calibrate has no dry run; guardalign audit --dry_run checks the same settings")
    if not target.gammas:
        return config
    name = config.defense.name
    require(name == SWEPT, f"--gammas sweeps the strength of the defense {SWEPT}; {name} has none")
    require(config.judge.name != NONE, "--gammas needs a judge: it counts refusals")
    JUDGES[config.judge.name](**config.judge.options)
    for gamma in target.gammas:
        DEFENSES[name](**{**config.defense.options, "gamma": gamma})
    weights = weights_fingerprint(resolve_lvlm(config.lvlm).model, config.lvlm.revision)
    return replace(config, lvlm=replace(config.lvlm, revision=weights.get(COMMIT, config.lvlm.revision)))


def _beside(target: Target) -> tuple[Path, Path]:
    """The threshold file, and the JSON with the figures."""
    output = Path(target.output).expanduser()
    return output, output.with_suffix(".json")


def _refuse_overwriting(target: Target) -> None:
    """Only files of an earlier calibration are written over."""
    output, figures_file = _beside(target)
    if _is_calibration(output):
        return
    for path in (output, figures_file):
        if path.exists() or path.is_symlink():
            raise InputError(f"{path} exists, and guardalign calibrate did not write it: name another --output")


def _is_calibration(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(HEADER.encode())) == HEADER.encode()
    except OSError:
        return False


@contextmanager
def _scratch(target: Target) -> Iterator[Path]:
    """A folder beside the output, which a cluster's nodes see when they see the output; gone in the end."""
    output = Path(target.output).expanduser()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        yield Path(folder).resolve()


@dataclass(frozen=True)
class Bench:
    """A planned input, and a folder to work in."""

    config: AuditConfig
    """the audit's settings"""
    source: Source
    """reads shards"""
    plan: Plan
    """what there is to read"""
    taxonomy: Taxonomy
    """what is looked for"""
    scratch: Path
    """for result files that nobody keeps"""

    @classmethod
    def prepare(cls, config: AuditConfig, scratch: Path, reads_prompts: bool = True) -> Bench:
        """Plans the input; what an audit keeps of pictures and columns is not kept here."""
        bare = replace(config, calibration=None, images=ImageKeeping(), input=replace(config.input, passthrough=[]))
        source = make_source(resolve_input(bare.input), reserved=RESULT_NAMES)
        plan = source.plan(bare.shard_rows, bare.limit)
        reader = source if reads_prompts else PicturesAlone(source)
        return cls(bare, reader, plan, load_taxonomy(resolve_taxonomy(bare)), scratch)

    def scored(self) -> Scored:
        """The scores, by the audit's own first step."""
        weights = clip_fingerprint(resolve_clip(self.config.clip))
        sealed = science(self.config, weights, {}, self.taxonomy.fingerprint)
        folder, notes = self._run(self.config, "scores", scoring_steps(self.config, self.taxonomy))
        told, detector = (*self.plan.notes, *notes), to_plain(self.config.detector)
        scored = Scored.read(folder, detector, scores_fingerprint(sealed), VERSION, told)
        self._require_few(scored.num_errors, "")
        return scored

    def answered(self, gamma: float, threshold: float, unsafe_label: str) -> SweepPoint:
        """What the whole audit gives under this threshold and gamma."""
        detector, defense = self.config.detector, self.config.defense
        config = replace(
            self.config,
            detector=Choice(detector.name, {**detector.options, "threshold": threshold}),
            defense=Choice(defense.name, {**defense.options, "gamma": gamma}),
        )
        folder, notes = self._run(config, f"gamma-{gamma!r}")
        point = SweepPoint.read(folder, gamma, unsafe_label, notes)
        self._require_few(point.num_errors, f"gamma {gamma:g}: ")
        return point

    def _require_few(self, num_errors: int, where: str) -> None:
        most, rows = self.config.max_error_fraction, self.plan.num_rows
        if most is not None and num_errors > most * rows:
            few = f"{where}{num_errors:,} of {rows:,} rows ended in an error"
            raise RunFailedError(f"{few}, more than max_error_fraction {most} allows")

    def _run(
        self, config: AuditConfig, name: str, listed: Sequence[Step] | None = None
    ) -> tuple[RunFolder, tuple[str, ...]]:
        """The shards through these steps (all of the audit's, if none are listed), as an audit runs them; its notes."""
        folder, receipts = RunFolder(str(self.scratch / name)), list[Receipt]()
        writer = ShardWriter(folder.root, result_schema(), run_id=name, attempts=1)
        shards, engine = self.plan.shards, ENGINES[config.engine]
        with Progress(self.plan.num_rows, 0, config.cluster.log_seconds) as progress:
            for receipt in engine(config, self.taxonomy, self.source, shards, writer, listed) if shards else ():
                progress.add(receipt)
                receipts.append(receipt)
        self._require_all(folder, sum(receipt.num_rows for receipt in receipts))
        drift({shard_name(receipt.shard): receipt for receipt in receipts}).require_steady("run it again")
        return folder, tuple(dict.fromkeys(note for receipt in receipts for note in receipt.notes))

    def _require_all(self, folder: RunFolder, rows: int) -> None:
        """Every planned row came back, and can be read here: a cluster's nodes may write where nobody else sees it."""
        planned = self.plan.num_rows
        if rows != planned:
            raise RunFailedError(f"{planned:,} rows were planned and {rows:,} came back; run it again")
        read = sum(table.num_rows for table in folder.tables(["label"]))
        if read != planned:
            sentence = f"{planned:,} rows were planned and {read:,} can be read beside --output"
            raise RunFailedError(f"{sentence}; name an --output in a folder that all nodes of the cluster share")


@dataclass(frozen=True)
class PicturesAlone:
    """A source whose pictures need no prompt: a detector reads none, and a row without one would be given up."""

    source: Source
    """reads the rows"""

    def plan(self, shard_rows: int, limit: int | None) -> Plan:
        """See `Source.plan`."""
        return self.source.plan(shard_rows, limit)

    def outline(self, shard: Shard) -> Outline:
        """See `Source.outline`."""
        return self.source.outline(shard)

    def read(self, shard: Shard) -> pa.Table:
        """See `Source.read`; where a picture has no prompt, a word stands for it."""
        table = self.source.read(shard)
        pairs = zip(table["prompt"].to_pylist(), table[IMAGE].is_valid().to_pylist(), strict=True)
        prompts = [STAND_IN if pictured and not (prompt or "").strip() else prompt for prompt, pictured in pairs]
        place = table.schema.get_field_index("prompt")
        kind = table.schema.field(place)
        return table.set_column(place, kind, pa.array(prompts, kind.type))


def _conclude(scored: Scored, target: Target, say: Say) -> tuple[Fitted, CalibrationRecord]:
    """Draws the threshold, writes both files, and says what stands in them."""
    found = fit(scored, target)
    record = record_of(scored, found, target)
    output, figures_file = _beside(target)
    RunFolder(str(output.parent)).write(output.name, as_threshold_file(scored, record).encode())
    _write_figures(figures(scored, found, [], record), target)
    for line in summary(scored, found, target):
        say(line)
    say(f"written   {output}, {figures_file}")
    return found, record


def _write_figures(written: Mapping[str, Any], target: Target) -> None:
    """The JSON, whole or not at all."""
    _, path = _beside(target)
    content = json.dumps(written, indent=1, ensure_ascii=False, allow_nan=False)
    RunFolder(str(path.parent)).write(path.name, content.encode())


def _sweep(bench: Bench, scored: Scored, found: Fitted, record: CalibrationRecord, target: Target, say: Say) -> None:
    """Answers under one strength after the other; the JSON holds each as soon as it is there."""
    points: list[SweepPoint] = []
    for gamma in target.gammas:
        points.append(bench.answered(gamma, found.threshold.value, str(target.unsafe_label)))
        _write_figures(figures(scored, found, points, record), target)
    for line in sweep_lines(points):
        say(line)
    for note in dict.fromkeys(note for point in points for note in point.notes if note not in scored.notes):
        say(f"note      {note}")


def _next(given: Sequence[str], target: Target) -> str:
    """The audit under the found threshold; the file comes last and wins over earlier ones."""
    output, _ = _beside(target)
    return f"next      {shlex.join([program(), 'audit', *given, f'--config={output}'])}"


def _without_threshold(given: Sequence[str]) -> list[str]:
    """The words but for a threshold: a flag would win over the file."""
    kept: list[str] = []
    skips = False
    for word in given:
        is_flag = word.partition("=")[0] == THRESHOLD
        if not is_flag and not skips:
            kept.append(word)
        skips = word == THRESHOLD
    return kept


def _as_flags(out: str, config: Mapping[str, Any]) -> list[str]:
    """The settings of a run as flags, where they differ from its recipe's; the detector stands in the file."""
    ours = {name: value for name, value in flat(config) if not name.startswith(IN_THE_FILE)}
    recipe = str(ours.get("recipe"))
    try:
        plain = load_settings(recipe, [], [])
        chosen = {f"{part}.name": getattr(plain, part).name for part in STRATEGIES}
        names = [f"--{name}={ours[name]}" for name, theirs in chosen.items() if ours.get(name, theirs) != theirs]
        default = dict(flat(to_plain(load_settings(recipe, [], names))))
        changed = [name for name, value in default.items() if ours.get(name, value) != value]
        flags = [f"--recipe={recipe}", *names, *(f"--{name}={_word(ours[name])}" for name in changed)]
        load_settings(recipe, [], flags[1:])
    except ConfigError as error:
        raise InputError(f"{out}/run.json was written by another program or version: {error}") from None
    return flags


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
