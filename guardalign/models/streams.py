"""Rows on their way through the decoding loop: samples, their asks as streams, members of a batch, what is noted.

Mutable on purpose, and private to the loop. Knows nothing of models or of how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from guardalign.config import GenerationConfig
from guardalign.core.memory import ran_out
from guardalign.errors import RowError, require
from guardalign.models.asking import Answer, Ask, Asking, Phase, Saved, Stop
from guardalign.models.attention import CalibratedBatch
from guardalign.models.cached_rows import CachedRows
from guardalign.models.prompts import Prompt
from guardalign.models.sampling import uniform_numbers
from guardalign.types import Cost

T = TypeVar("T")
NO_COST = Cost()


@dataclass(eq=False)
class Owner(Generic[T]):
    """A sample being answered."""

    position: int
    asking: Asking[T]
    streams: list[Stream] = field(default_factory=list)
    cost: Cost = NO_COST


@dataclass(eq=False)
class Stream:
    """An ask on its way."""

    owner: Owner[Any]
    ask: Ask
    uniform: list[float] = field(default_factory=list)
    """its random numbers, one a step"""
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    cost: Cost = NO_COST
    mass: float = 0.0
    num_queries: float = 0.0
    saved: Saved | None = None
    hidden: Tensor | None = None
    logits: Tensor | None = None
    ended: Stop | None = None
    error: RowError | None = None
    num_restarts: int = 0
    """times that it was begun again because memory ran out"""
    room_before: int | None = None
    """the working size before the first of these"""

    def __post_init__(self) -> None:
        if any(phase.temperature > 0 for phase in self.ask.phases):
            self.uniform = uniform_numbers(self.ask.seed, self.ask.max_new_tokens)

    @property
    def prompt(self) -> Prompt:
        """What it began with."""
        return self.ask.prompt.prompt if isinstance(self.ask.prompt, Saved) else self.ask.prompt

    @property
    def is_done(self) -> bool:
        """Nothing is left to decode."""
        return self.ended is not None or self.error is not None

    @property
    def num_rows(self) -> int:
        """Rows that it takes at first: its own, and its second view's."""
        return 1 + (self.ask.partner is not None)

    def begin_again(self) -> None:
        """Forgets what was decoded and what was kept of it; its random numbers and what it took so far stay."""
        self.tokens, self.log_probabilities = [], []
        self.mass = self.num_queries = 0.0
        self.saved = self.hidden = self.logits = self.ended = self.error = None


@dataclass(frozen=True, eq=False)
class Member:
    """A row of the batch: a stream's own, or its second view."""

    stream: Stream
    prompt: Prompt
    is_partner: bool = False

    @property
    def is_needed(self) -> bool:
        """It is decoded on: not done, and a second view only as long as it is contrasted."""
        stream = self.stream
        return not stream.is_done and (not self.is_partner or len(stream.tokens) < stream.ask.contrasted_steps)


@dataclass(frozen=True)
class Batch:
    """Rows that are decoded together, and the token that each is fed next."""

    rows: CachedRows
    members: list[Member]
    tokens: list[int]
    calibrated: CalibratedBatch | None = None
    """fits as long as the members stay the same"""


def by_phase(members: Sequence[Member], rows: Sequence[int]) -> dict[Phase, list[int]]:
    """Which of these rows choose a token now, by their phase."""
    found: dict[Phase, list[int]] = {}
    for row in rows:
        stream = members[row].stream
        if not stream.is_done:
            found.setdefault(stream.ask.phase_at(len(stream.tokens)), []).append(row)
    return found


def share_seconds(members: Sequence[Member], seconds: float, read: Sequence[float] | None) -> None:
    """Books a call's seconds on its rows: evenly for a decoding step, by the shares `read` for a prefill."""
    shares = read or [1.0] * len(members)
    for member, part in zip(members, shares, strict=True):
        share = seconds * part / sum(shares)
        if member.stream.ask.purpose == "verdict":
            cost = Cost(verdict_seconds=share)
        elif member.is_partner:
            cost = Cost(contrast_seconds=share)
        else:
            cost = Cost(decode_seconds=share) if read is None else Cost(prefill_seconds=share)
        member.stream.cost += cost


def keep(stream: Stream, rows: CachedRows, row: int, logits: Tensor) -> None:
    if stream.error is not None or not stream.ask.keep:
        return
    pending = stream.tokens[-1] if stream.tokens else None
    stream.logits = None if stream.tokens else logits[row].clone()
    stream.saved = Saved(stream.prompt, rows.row(row), stream.logits, pending)


def too_long(stream: Stream, most: int | None) -> RowError | None:
    """The error of a row whose prompt and answer are more tokens than the model takes, if it is one."""
    prompt = stream.prompt
    saved = stream.ask.prompt if isinstance(stream.ask.prompt, Saved) else None
    said = 0 if saved is None else saved.rows.num_columns + (saved.pending is not None) - prompt.num_tokens
    new = stream.ask.max_new_tokens + said
    room = None if most is None else most - new
    if room is None or prompt.num_tokens <= room:
        return None
    return RowError(
        "prompt_too_long",
        f"prompt of sample {prompt.sample_id} has {prompt.num_tokens:,} tokens; the model takes {room:,} "
        f"({most:,} less {new:,} for the answer)",
    )


def require_room(most: int | None, generation: GenerationConfig, model: str) -> None:
    """Raise ConfigError where no prompt, however short, can have so long an answer."""
    new = generation.max_new_tokens
    require(
        most is None or new < most,
        f"generation.max_new_tokens {new:,} leaves no room for a prompt: lvlm.model {model} takes {most or 0:,} "
        "tokens, prompt and answer together",
    )


def not_finite(stream: Stream) -> RowError:
    return RowError(
        "generation_failed",
        f"sample {stream.prompt.sample_id}: the model's logits are not finite; try lvlm.dtype bfloat16 or float32",
    )


def does_not_fit(stream: Stream) -> RowError:
    tokens = stream.prompt.num_tokens
    return RowError(
        "out_of_memory", f"{ran_out(stream.prompt.sample_id, 'generation_failed')}; its prompt has {tokens:,} tokens"
    )


def answer_of(stream: Stream) -> Answer:
    return Answer(
        tuple(stream.tokens),
        stream.ended or "length",
        stream.prompt.num_tokens,
        tuple(stream.log_probabilities),
        stream.cost,
        stream.saved,
        stream.hidden,
        stream.logits,
        stream.mass / stream.num_queries if stream.num_queries else None,
    )
