"""Fits CASA's safety attention to labelled prompts: `guardalign fit-casa`.

    read every prompt as the defense `casa` does, keep its hidden states  ->  split by picture: fit, stop, held out
    fit W_Q, W_K, W_V, w, b until the stopping part's loss falls no more  ->  a folder for `defense.head`
    on the held-out part: AUROC of the label with and without the head    ->  beside it, as JSON

The LVLM stays frozen. Hidden states lie in a file (16 bits a number) while the fit runs. Without an input of your own,
the packaged sample is taken, or scenes that are drawn on the spot (`scenes`; needs the emoji font).
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO, Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from guardalign.config import AuditConfig, Choice
from guardalign.core.images import decode
from guardalign.core.safety_attention import (
    FittedAttention,
    Fitting,
    Mode,
    fit_attention,
    head_logits,
    unsafe_probability,
)
from guardalign.core.statistics import auroc
from guardalign.defenses.casa import Casa
from guardalign.errors import InputError, ModelError, RowError, require
from guardalign.micro import NOTICE, is_embedded, resolve_input, resolve_lvlm
from guardalign.models.asking import Asking
from guardalign.models.decoding import Decoder, Outcome
from guardalign.models.lvlm import Lvlm
from guardalign.models.safety_head import CARD, WEIGHTS, lvlm_fingerprint, question_embedding, save_head
from guardalign.reading import read_shard
from guardalign.schema import IMAGE, RESULT_NAMES
from guardalign.sources import make_source
from guardalign.types import Case, Sample
from guardalign.version import VERSION

T = TypeVar("T")
Say = Callable[[str], None]
QUESTION: Final = "Is this request safe or unsafe?"
PARTS: Final = ("fitted", "stopping", "held out")
SHARES: Final = (0.6, 0.2, 0.2)
"""of the pictures, in the order of PARTS"""
LEAST: Final = 5
"""prompts of each label that every part must have"""
MODES: Final[tuple[Mode, ...]] = ("token_only", "replace", "scale")
FIRST_SCENE: Final = 1_000_000
"""drawn scenes begin with this number of the training series: the embedded LVLM was trained on much earlier ones"""


@dataclass(frozen=True)
class FitTarget:
    """What is fitted, to which rows, and where it goes."""

    output: str = "casa-head"
    """folder of the head"""
    unsafe_label: str = "unsafe"
    """rows with this label are unsafe, rows with another benign, rows without one are left out"""
    question: str = QUESTION
    """the safety question whose mean embedding is the query q"""
    scenes: int | None = None
    """fit to this many scenes of the micro world, drawn now, in place of the input"""
    fitting: Fitting = field(default_factory=Fitting)
    """how the weights are fitted"""

    def __post_init__(self) -> None:
        require("://" not in self.output, f"--output {self.output} must be a local folder: fit-casa writes to no URI")
        require(bool(self.question.strip()), "--question is blank")
        require(self.scenes is None or self.scenes > 0, "--scenes must be positive")


@dataclass(frozen=True)
class Reading:
    """One labelled prompt as the model read it; its hidden states stand in `States` at the same place."""

    picture: str
    """hash of the picture (of the id, where there is none): prompts about one picture stay in one part"""
    unsafe: bool
    """by its label"""
    log_unsafe: float
    """log-probability of the label for unsafe [nats]"""
    log_safe: float
    """log-probability of the label for safe [nats]"""


def fit_casa(config: AuditConfig, target: FitTarget, say: Say = print) -> int:
    """Fits, measures, writes; returns the exit code. Failures are `UserError`s."""
    defense, folder = _defense(config.defense), Path(target.output).expanduser()
    _refuse_overwriting(folder)
    if is_embedded(config):
        say(NOTICE)
    torch.set_num_threads(config.cluster.threads)
    lvlm, started = Lvlm.load(resolve_lvlm(config.lvlm)), monotonic()
    rows = _scenes(target.scenes) if target.scenes is not None else _rows(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder.parent) as file:
        states = States(file)
        readings, num_errors = _read(lvlm, defense, rows, target.unsafe_label, states, config.lvlm.batch_size)
        found, measured = _fitted(lvlm, defense, target, readings, states)
    card = _origin(lvlm, defense, target) | measured
    card |= {"error_rows": num_errors, "seconds": round(monotonic() - started, 1)}
    save_head(folder, found.module, card)
    for line in _summary(card, folder):
        say(line)
    return 0


def _fitted(
    lvlm: Lvlm, defense: Casa, target: FitTarget, readings: Sequence[Reading], states: States
) -> tuple[FittedAttention, dict[str, Any]]:
    """The fit, and what is measured of it."""
    parts = _split(readings, target)
    query = question_embedding(lvlm, target.question)
    found = fit_attention(states, [each.unsafe for each in readings], parts[0], parts[1], query, target.fitting)
    logits = head_logits(found.module, states, parts[2])
    return found, {
        "prompts": {name: _counts(readings, part) for name, part in zip(PARTS, parts, strict=True)},
        "epoch": found.epoch,
        "num_epochs": found.num_epochs,
        "stopping_loss": found.loss,
        "held_out": _figures([readings[at] for at in parts[2]], logits, defense.threshold),
    }


def _origin(lvlm: Lvlm, defense: Casa, target: FitTarget) -> dict[str, Any]:
    """What the head belongs to and how it was fitted."""
    return {
        "guardalign": VERSION,
        "lvlm": lvlm_fingerprint(lvlm.config.model, lvlm.config.revision),
        "question": target.question,
        "labels": [defense.unsafe_label, defense.safe_label],
        "prefix": defense.prefix,
        "gamma": defense.gamma,
        "fitting": asdict(target.fitting),
    }


def _defense(choice: Choice) -> Casa:
    require(choice.name == "casa", f"fit-casa fits the defense casa, not {choice.name}; leave --defense.name out")
    return Casa(**choice.options)


def _refuse_overwriting(folder: Path) -> None:
    """Only an earlier head is written over."""
    if not folder.exists() or (folder.is_dir() and ((folder / CARD).is_file() or not any(folder.iterdir()))):
        return
    raise InputError(f"{folder} exists, and guardalign fit-casa did not write it: name another --output")


class States(Sequence[Tensor]):
    """Hidden states [T, D] of prompts, one after the other in a file of float16; read where they lie."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._shapes: list[tuple[int, int, int]] = []
        self._end = 0
        self._mapped: Any = None

    def add(self, hidden: Tensor, sample_id: str) -> None:
        """One prompt more."""
        numbers = hidden.detach().to("cpu", torch.float16).numpy()
        if not np.isfinite(numbers).all():
            raise ModelError(f"the hidden states of sample {sample_id} do not fit into 16 bits; try another lvlm.dtype")
        self._file.write(numbers.tobytes())
        self._shapes.append((self._end, *numbers.shape))
        self._end += numbers.size
        self._mapped = None

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, at: Any) -> Any:
        if self._mapped is None:
            self._file.flush()
            self._mapped = np.memmap(self._file, np.float16, "r")
        start, tokens, width = self._shapes[at]
        return torch.from_numpy(self._mapped[start : start + tokens * width].reshape(tokens, width).astype(np.float32))


def _rows(config: AuditConfig) -> Iterator[Mapping[str, Any]]:
    """The input's rows as an audit reads them, pictures decoded later."""
    source = make_source(resolve_input(config.input), reserved=RESULT_NAMES)
    for shard in source.plan(config.shard_rows, config.limit).shards:
        yield from read_shard(source, shard).to_pylist()


def _scenes(count: int) -> Iterator[Mapping[str, Any]]:
    """Fresh scenes of the micro world with the requests, and the prefixes, that its LVLM was trained on."""
    from guardalign.micro.dialogues import request_turn
    from guardalign.micro.sample import encoded, seeds
    from guardalign.micro.world import PLAIN, scenes

    rng = np.random.default_rng((seeds()["train"], FIRST_SCENE))
    for number, scene in enumerate(scenes(PLAIN, seeds()["train"], count, FIRST_SCENE)):
        row = {"sample_id": f"scene-{number}", "prompt": request_turn(scene, rng).prompt, "error": None}
        yield row | {IMAGE: encoded(scene), "label": "unsafe" if scene.unsafe else "benign"}


def _read(
    lvlm: Lvlm,
    defense: Casa,
    rows: Iterator[Mapping[str, Any]],
    unsafe_label: str,
    states: States,
    batch_size: int,
) -> tuple[list[Reading], int]:
    """Every labelled prompt through the model; rows that cannot be read are counted."""
    readings: list[Reading] = []
    num_errors = 0
    labelled = (row for row in rows if row["label"] is not None)
    while batch := list(islice(labelled, 16 * batch_size)):
        for outcome in _outcomes(batch, partial(_reading, lvlm, defense, unsafe_label), Decoder(lvlm, batch_size)):
            if isinstance(outcome.value, RowError):
                num_errors += 1
            else:
                reading, hidden, sample_id = outcome.value
                states.add(hidden, sample_id)
                readings.append(reading)
    return readings, num_errors


def _outcomes(
    batch: Sequence[Mapping[str, Any]], asking: Callable[[Mapping[str, Any]], Asking[T]], decoder: Decoder
) -> list[Outcome[T]]:
    """One a row; a row that does not fit the memory beside others is read once more alone."""
    return decoder.run(map(asking, batch), lambda at: asking(batch[at]))


def _reading(
    lvlm: Lvlm, defense: Casa, unsafe_label: str, row: Mapping[str, Any]
) -> Asking[tuple[Reading, Tensor, str]]:
    if row["error"] is not None:
        raise RowError("row_unreadable", str(row["error"]))
    name, image = row["sample_id"], row[IMAGE]
    picture = None if image is None else decode(image, 10**8, name).picture
    read = yield from defense.read(lvlm, Case(Sample(name, row["prompt"], None, ""), picture), hidden=True)
    assert read.hidden is not None
    key = hashlib.sha256(image if image is not None else name.encode()).hexdigest()
    return Reading(key, row["label"] == unsafe_label, read.log_unsafe, read.log_safe), read.hidden, name


def _split(readings: Sequence[Reading], target: FitTarget) -> list[list[int]]:
    """Places of the fitted, the stopping and the held-out part: a share of each label's pictures, in a seeded order."""
    parts: list[list[int]] = [[] for _ in PARTS]
    for unsafe in (True, False):
        pictures = {each.picture for each in readings if each.unsafe is unsafe}
        order = sorted(pictures, key=lambda key: hashlib.sha256(f"{target.fitting.seed} {key}".encode()).hexdigest())
        ends = np.rint(np.cumsum(SHARES) * len(order)).astype(int).tolist()
        part_of = {key: sum(rank >= end for end in ends[:-1]) for rank, key in enumerate(order)}
        for at, each in enumerate(readings):
            if each.unsafe is unsafe:
                parts[part_of[each.picture]].append(at)
    for name, part in zip(PARTS, parts, strict=True):
        counts = _counts(readings, part)
        if min(counts.values()) < LEAST:
            found = " and ".join(f"{count:,} {kind}" for kind, count in counts.items())
            rows = f"the {name} part has {found} prompts, and {LEAST} of each are the least"
            raise InputError(f"{rows}; give more rows labelled {target.unsafe_label!r} and otherwise")
    return parts


def _counts(readings: Sequence[Reading], part: Sequence[int]) -> dict[str, int]:
    unsafe = sum(readings[at].unsafe for at in part)
    return {"unsafe": unsafe, "benign": len(part) - unsafe}


def _figures(readings: Sequence[Reading], logits: Sequence[float], threshold: float) -> dict[str, dict[str, float]]:
    """For every mode: AUROC of p(unsafe) with its interval, and the shares of each label at or above the threshold."""
    found: dict[str, dict[str, float]] = {}
    for mode in MODES:
        pairs = zip(readings, logits, strict=True)
        scores = [unsafe_probability(mode, each.log_unsafe, each.log_safe, logit) for each, logit in pairs]
        labelled = list(zip(readings, scores, strict=True))
        unsafe, benign = ([-score for each, score in labelled if each.unsafe is kind] for kind in (True, False))
        area = auroc(unsafe, benign)
        found[mode] = {
            "auroc": area.value,
            "low": area.low,
            "high": area.high,
            "flagged_unsafe": sum(score <= -threshold for score in unsafe) / len(unsafe),
            "flagged_benign": sum(score <= -threshold for score in benign) / len(benign),
        }
    return found


def _summary(card: Mapping[str, Any], folder: Path) -> Iterator[str]:
    for name, count in card["prompts"].items():
        yield f"{name:9s} {count['unsafe']:,} unsafe, {count['benign']:,} benign prompts"
    if card["error_rows"]:
        yield f"left out  {card['error_rows']:,} rows that could not be read"
    yield f"fit       best after epoch {card['epoch']} of {card['num_epochs']}, loss {card['stopping_loss']:.3f}"
    for mode, each in card["held_out"].items():
        shares = f"{each['flagged_unsafe']:.1%} of unsafe, {each['flagged_benign']:.1%} of benign prompts flagged"
        yield f"{mode:10s} AUROC {each['auroc']:.3f} [{each['low']:.3f}, {each['high']:.3f}] held out; {shares}"
    yield f"seconds   {card['seconds']}"
    yield f"written   {folder / WEIGHTS}, {folder / CARD}"
    yield f"next      guardalign audit --recipe=casa --defense.head={folder}"
