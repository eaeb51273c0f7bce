"""A threshold for the detector from benign pictures, so that few of their kind are flagged; with labels, what it costs.

    score every picture as an audit would  ->  the conformal threshold of the benign ones  ->  a file for --config
    with unsafe rows among them            ->  ROC, AUROC, detection rate at that threshold
    with a list of gammas                  ->  the whole audit under each, unsafe answers against over-refusal

The sweep's benign rows are those that the threshold was drawn from. Knows nothing of flags.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from guardalign.config import AuditConfig, Choice, ImageKeeping, to_plain
from guardalign.errors import InputError, RunFailedError, require
from guardalign.fingerprint import science, scores_fingerprint
from guardalign.micro import CLIPS, NOTICE, is_embedded, resolve_clip, resolve_input, resolve_taxonomy
from guardalign.models.clip_weights import clip_fingerprint
from guardalign.pipeline import ENGINES, NONE, Step, scoring_steps
from guardalign.progress import Progress
from guardalign.rescore import open_finished
from guardalign.results import RunFolder, ShardWriter
from guardalign.schema import RESULT_NAMES, result_schema
from guardalign.sources import Plan, Source, make_source
from guardalign.taxonomy import Taxonomy, load_taxonomy
from guardalign.thresholds import (
    Fitted,
    Scored,
    SweepPoint,
    Target,
    as_threshold_file,
    figures,
    fit,
    record_of,
    summary,
)
from guardalign.version import VERSION

Say = Callable[[str], None]
SWEPT = "guardalign"
"""The defense that has a gamma."""


def calibrate(config: AuditConfig, target: Target, say: Say = print) -> int:
    """Scores the input's pictures, writes the threshold; returns the exit code. Failures are `UserError`s."""
    _check(config, target)
    if config.clip.model in CLIPS or (target.gammas and is_embedded(config)):
        say(NOTICE)
    with _scratch(target) as scratch:
        bench = Bench.prepare(config, scratch)
        scored = bench.scored()
        found = fit(scored, target)
        points = [bench.answered(gamma, found.threshold.value, str(target.unsafe_label)) for gamma in target.gammas]
    _conclude(scored, found, points, target, say)
    return 0


def calibrate_run(out: str, target: Target, say: Say = print) -> int:
    """Takes the scores of a finished run instead; no model is needed."""
    require(not target.gammas, "--gammas runs the models, and --from runs nothing: leave one of them out")
    folder = RunFolder(out)
    open_finished(folder)
    manifest = folder.read_json("run.json", "config", "fingerprint", "versions")
    detector = manifest["config"]["detector"]
    if detector["name"] == NONE:
        raise InputError(f"{out} was made without a detector: it holds no scores")
    fingerprint = scores_fingerprint(manifest["fingerprint"])
    scored = Scored.read(folder, detector, fingerprint, manifest["versions"]["guardalign"])
    _conclude(scored, fit(scored, target), [], target, say)
    return 0


def _check(config: AuditConfig, target: Target) -> None:
    require(config.detector.name != NONE, "calibrate needs a detector; choose one with --detector.name or --recipe")
    require(not config.dry_run, "calibrate has no dry run; guardalign audit --dry_run checks the same settings")
    if target.gammas:
        name = config.defense.name
        require(name == SWEPT, f"--gammas sweeps the strength of the defense {SWEPT}; {name} has none")
        require(config.judge.name != NONE, "--gammas needs a judge: it counts refusals")


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
    def prepare(cls, config: AuditConfig, scratch: Path) -> Bench:
        """Plans the input; what an audit keeps of pictures and columns is not kept here."""
        bare = replace(config, calibration=None, images=ImageKeeping(), input=replace(config.input, passthrough=[]))
        source = make_source(resolve_input(bare.input), reserved=RESULT_NAMES)
        plan = source.plan(bare.shard_rows, bare.limit)
        return cls(bare, source, plan, load_taxonomy(resolve_taxonomy(bare)), scratch)

    def scored(self) -> Scored:
        """The scores, by the audit's own first step."""
        weights = clip_fingerprint(resolve_clip(self.config.clip))
        sealed = science(self.config, weights, {}, self.taxonomy.fingerprint)
        folder = self._run(self.config, "scores", scoring_steps(self.config, self.taxonomy))
        scored = Scored.read(folder, to_plain(self.config.detector), scores_fingerprint(sealed), VERSION)
        most = self.config.max_error_fraction
        if most is not None and scored.num_errors > most * scored.num_rows:
            few = f"{scored.num_errors:,} of {scored.num_rows:,} rows ended in an error"
            raise RunFailedError(f"{few}, more than max_error_fraction {most} allows")
        return scored

    def answered(self, gamma: float, threshold: float, unsafe_label: str) -> SweepPoint:
        """What the whole audit gives under this threshold and gamma."""
        detector, defense = self.config.detector, self.config.defense
        config = replace(
            self.config,
            detector=Choice(detector.name, {**detector.options, "threshold": threshold}),
            defense=Choice(defense.name, {**defense.options, "gamma": gamma}),
        )
        return SweepPoint.read(self._run(config, f"gamma-{gamma!r}"), gamma, unsafe_label)

    def _run(self, config: AuditConfig, name: str, listed: Sequence[Step] | None = None) -> RunFolder:
        """The shards through these steps (all of the audit's, if none are listed), as an audit runs them."""
        folder, rows = RunFolder(str(self.scratch / name)), 0
        writer = ShardWriter(folder.root, result_schema(), run_id=name, attempts=1)
        shards, engine = self.plan.shards, ENGINES[config.engine]
        with Progress(self.plan.num_rows, 0, config.cluster.log_seconds) as progress:
            for receipt in engine(config, self.taxonomy, self.source, shards, writer, listed) if shards else ():
                progress.add(receipt)
                rows += receipt.num_rows
        if rows != self.plan.num_rows:
            raise RunFailedError(f"{self.plan.num_rows:,} rows were planned and {rows:,} came back; run it again")
        return folder


def _conclude(scored: Scored, found: Fitted, points: Sequence[SweepPoint], target: Target, say: Say) -> None:
    """Writes both files, each whole or not at all, and says what stands in them."""
    record = record_of(scored, found, target)
    output = Path(target.output).expanduser()
    folder, beside = RunFolder(str(output.parent)), output.with_suffix(".json")
    content = json.dumps(figures(scored, found, points, record), indent=1, ensure_ascii=False, allow_nan=False)
    folder.write(beside.name, content.encode())
    folder.write(output.name, as_threshold_file(scored, record).encode())
    for line in summary(scored, found, points, target):
        say(line)
    say(f"written   {output}, {beside}")
    say(f"next      {shlex.join(['guardalign', 'audit', '--config', str(output)])}")
