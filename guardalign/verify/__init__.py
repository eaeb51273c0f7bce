"""A finished run, checked: its files by checksum and count, its rows by computing some of them again.

    files       every file that run.json lists is there and as it was written, none is beside them; counts, ids, schema
    input       the input still is what was audited
    recompute   some rows, read and worked on again, in other batches than the run's, column by column; not those whose
                pictures the web gives otherwise now

Each thing that is wrong is one line. Knows nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from guardalign.audit import Say
from guardalign.canaries.drift import recorded
from guardalign.errors import InputError, ResumeError, RunFailedError, require
from guardalign.rescore import is_evaluation
from guardalign.results import RunFolder
from guardalign.verify.agreement import Agreement, agreement_lines
from guardalign.verify.files import KEYS, file_problems
from guardalign.verify.recompute import Recomputation, input_problems, planned, recomputed, settings
from guardalign.verify.sample import Drawn, draw


@dataclass(frozen=True)
class Asked:
    """What is to be verified, and how thoroughly."""

    out: str
    """the run's folder"""
    sample: int = 100
    """rows that are computed again; 0: files only"""
    seed: int = 0
    """of the draw"""
    files: tuple[str, ...] = ()
    """YAML files over the run's own settings"""
    flags: tuple[str, ...] = ()
    """settings over those: where things lie and run, nothing that rows depend on"""
    most_differing: float | None = None
    """largest share of rows that may differ, in [0, 1]; None: 0 where all models round as fp32, else 0.02"""
    judge: bool = False
    """a judge behind an endpoint is asked again"""

    def __post_init__(self) -> None:
        require(bool(self.out), "the run's folder is empty; name one")
        require(self.sample >= 0, "--sample must be 0 (files only) or above")
        require(self.seed >= 0, "--seed must be 0 or above")
        most = self.most_differing
        require(most is None or 0 <= most <= 1, "--most_differing must lie in [0, 1]")


def verify(asked: Asked, say: Say = print) -> int:
    """Checks the run and says what it found; returns 0. Raises `RunFailedError` where something is wrong."""
    folder = RunFolder(asked.out)
    manifest = _manifest(folder)
    _check_settings(folder, manifest, asked)
    _refuse("the files are not those of the run; nothing was recomputed", file_problems(folder, manifest), folder, say)
    rows, num_files = manifest["totals"]["rows"], len(manifest["files"])
    say(f"files      {num_files:,} files, {rows:,} rows: checksums, counts, ids and schema hold")
    canaries = recorded(manifest.get("self_check"))
    for warning in canaries.warnings:
        say(f"warning    {warning}")
    if is_evaluation(folder):
        say("recompute  not done: an evaluation's folder does not say where its benchmarks lie; audits are recomputed")
    elif asked.sample:
        _verify_rows(folder, manifest, asked, say)
    canaries.require_steady()
    return 0


def _manifest(folder: RunFolder) -> dict[str, Any]:
    """run.json; `InputError` where there is none, `RunFailedError` where it is not what was written."""
    if not folder.exists("run.json"):
        state = "is not finished: run the same line again to resume" if folder.exists("plan.json") else "holds no run"
        raise InputError(f"{folder.out} {state}")
    try:
        found = folder.read_json("run.json")
        is_intact = folder.is_intact("run.json")
    except ResumeError:
        raise RunFailedError(f"{folder.out}/run.json has changed since it was written: it is no JSON object") from None
    if lacking := [key for key in KEYS if key not in found]:
        sentence = "it has changed, or was written by another program or version"
        raise RunFailedError(f"{folder.out}/run.json lacks {lacking[0]}: {sentence}")
    if not is_intact:
        raise RunFailedError(f"{folder.out}/run.json has changed since it was written: its checksum is another")
    return found


def _check_settings(folder: RunFolder, manifest: Mapping[str, Any], asked: Asked) -> None:
    """`ConfigError` for a setting that is no setting, or has no use, before files are read for hours."""
    if asked.sample and not is_evaluation(folder):
        if asked.files or asked.flags:
            settings(manifest, asked.files, asked.flags)
        return
    given = [f"--config {file}" for file in asked.files] + ([" ".join(asked.flags)] if asked.flags else [])
    given += ["--judge"] if asked.judge else []
    given += ["--most_differing"] if asked.most_differing is not None else []
    require(not given, f"settings ({', '.join(given)}) have no effect: nothing is recomputed")


def _refuse(sentence: str, problems: list[str], folder: RunFolder, say: Say) -> None:
    """One line a problem, then the end."""
    for problem in problems:
        say(f"wrong      {problem}")
    if problems:
        things = "1 thing is" if len(problems) == 1 else f"{len(problems):,} things are"
        raise RunFailedError(f"{folder.out}: {things} wrong: {sentence}")


def _verify_rows(folder: RunFolder, manifest: dict[str, Any], asked: Asked, say: Say) -> None:
    work = planned(manifest, asked.files, asked.flags, asked.judge)
    _refuse("rows cannot be recomputed", input_problems(folder, manifest, work), folder, say)
    say(f"input      {len(work.prepared.plan.files):,} files, as they were; models and settings, too")
    drawn = draw(folder, asked.sample, asked.seed, work.asks_judge, not work.prepared.config.input.allow_urls)
    for line in _plan_lines(drawn, work, manifest["totals"]["rows"], asked.seed):
        say(line)
    if not drawn.num_rows:
        return
    changed: list[str] = []
    found = Agreement.between(recomputed(folder, work, drawn, asked.seed, changed), work.tolerances)
    if changed:
        say(f"left out   pictures that changed on the web: {len(changed):,}")
    most = asked.most_differing
    most = (0.0 if work.is_exact else MOST_DIFFERING) if most is None else most
    for line in agreement_lines(found, most):
        say(line)
    if found.num_strange or len(found.differing) > most * found.num_rows:
        raise RunFailedError(f"{folder.out}: {len(found.differing):,} of {found.num_rows:,} recomputed rows differ")


MOST_DIFFERING = 0.02
"""Share of rows that may differ where a model computes in bf16 or fp16: rounding moves a token now and then."""


def _plan_lines(drawn: Drawn, work: Recomputation, rows: int, seed: int) -> list[str]:
    kinds = ", ".join(f"{count:,} {name}" for name, count in drawn.strata.items() if count)
    lines = [
        f"recompute  {drawn.num_rows:,} of {rows:,} rows, drawn with seed {seed}" + (f": {kinds}" if kinds else "")
    ]
    if drawn.left_out:
        listed = ", ".join(f"{kind} {count:,}" for kind, count in sorted(drawn.left_out.items()))
        lines.append(f"left out   rows that are not tried again: {listed}")
    lines += [f"rounding   {doubt}" for doubt in work.doubts]
    if not work.asks_judge:
        lines.append("verdicts   not compared: the judge is behind an endpoint; --judge asks it again")
    return lines
