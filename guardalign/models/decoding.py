"""The one decoding loop: rows with their own policies over `model.forward` and a key-value cache.

    while rows are left:
        admit waiting rows into the free places (prefill, or a saved cache)
        feed every row its token; from the logits choose each row's next by its own policy
        rows that are done leave

So no row waits for a longer neighbour. A contrast's second view is a row like any other, fed the same tokens, for the
contrasted steps only. Greedy decoding gives transformers' own `generate`, token for token; a row gives the same tokens
alone and among any neighbours, up to the rounding of the kernels. The order of work depends on the asks alone, and on
memory: where it runs out, the rows under way begin again from their prompts, half as many at a time.

Knows nothing of defenses, prompts' texts or families: what a family needs at a step is in `Forward`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor

from guardalign.core.memory import is_out_of_memory
from guardalign.errors import RowError
from guardalign.models.asking import Asking, Saved
from guardalign.models.attention import active
from guardalign.models.batches import collate
from guardalign.models.cached_rows import joined
from guardalign.models.calibrating import Calibrating, note_masses
from guardalign.models.choosing import choose
from guardalign.models.forward import Forward
from guardalign.models.memory import fits, release
from guardalign.models.prompts import Prompt
from guardalign.models.streams import (
    Batch,
    Member,
    Owner,
    Stream,
    answer_of,
    by_phase,
    does_not_fit,
    keep,
    not_finite,
    share_seconds,
    too_long,
)
from guardalign.types import Cost

T = TypeVar("T")

FREE_SHARE: Final = 4
"""rows are admitted when at least one place in this many is free: few large prefills instead of many small ones"""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """How a sample ended."""

    value: T | RowError
    """what its generator returned, or why the row was given up"""
    cost: Cost
    """of all its asks"""

    @property
    def ran_out(self) -> bool:
        """Memory ran out on the sample, or on a part of one that returns a list."""
        parts = self.value if isinstance(self.value, list) else [self.value]
        return any(isinstance(part, RowError) and part.kind == "out_of_memory" for part in parts)


class Decoder:
    """Answers samples with at most `capacity` rows in a batch (more only where one ask alone needs them)."""

    def __init__(self, forward: Forward, capacity: int) -> None:
        assert capacity > 0
        self.forward, self.capacity = forward, capacity
        self._waiting: deque[Stream] = deque()
        self._batch: Batch | None = None
        self._under_way: dict[int, Stream] = {}
        self._outcomes: dict[int, Outcome[Any]] = {}
        self._calibrating = Calibrating(forward.model)
        self._num_open = 0
        self._booked = 0.0

    def run(self, askings: Iterable[Asking[T]], again: Callable[[int], Asking[T]] | None = None) -> list[Outcome[T]]:
        """One outcome a generator, in order; generators are begun as places become free.

        A sample that ran out of memory among others, whose caches lay there, is begun once more alone: `again` makes a
        fresh generator of the one at a place. Without it, that is an `out_of_memory` for the caller to try again.
        """
        ended = self._run(askings)
        if again is None or len(ended) == 1:
            return ended
        half = self._room // 2
        return [self._alone(again(at), each.cost, half) if each.ran_out else each for at, each in enumerate(ended)]

    def _alone(self, asking: Asking[T], cost: Cost, half: int) -> Outcome[T]:
        """The outcome with nothing beside it in memory; where it fits now, there were too many rows before."""
        release()
        (ended,) = self._run([asking])
        if not ended.ran_out:
            self.forward.room.learn(half)
        return replace(ended, cost=cost + ended.cost)

    def _run(self, askings: Iterable[Asking[T]]) -> list[Outcome[T]]:
        fresh, self._outcomes, self._num_open = enumerate(askings), {}, 0
        with torch.inference_mode(), self._calibrating:
            while True:
                self._begin(fresh)
                if self._batch is None and not self._waiting:
                    break
                self._booked = perf_counter()
                if not fits(self._advance):
                    self._make_room()
        return [self._outcomes[position] for position in range(len(self._outcomes))]

    def _advance(self) -> None:
        """Lets rows in, then decodes a token for each."""
        self._admit()
        if self._batch is not None:
            self._batch = self._stepped(self._batch)

    def _make_room(self) -> None:
        """Memory ran out, perhaps in mid-write: all rows under way give up their caches and begin again, half as many
        at a time. One that is alone is given up, and the room is again what it was before its failures."""
        lost, self._under_way, self._batch = list(self._under_way.values()), {}, None
        assert lost, "memory ran out, and no row was under way"
        for stream in lost:
            stream.begin_again()
        release()
        share_seconds([Member(stream, stream.prompt) for stream in lost], perf_counter() - self._booked, None)
        room = self.forward.room
        room.num_failures += 1
        if len(lost) == 1:
            (stream,) = lost
            room.most = stream.room_before if stream.num_restarts else room.most
            stream.error = does_not_fit(stream)
            self._finish(lost)
            return
        for stream in lost:
            stream.room_before = stream.room_before if stream.num_restarts else room.most
            stream.num_restarts += 1
        self._waiting.extendleft(reversed(lost))
        room.learn(sum(stream.num_rows for stream in lost) // 2)

    @property
    def _room(self) -> int:
        """Rows that may be in the batch now."""
        return self.forward.room.of(self.capacity)

    def _begin(self, fresh: Iterable[tuple[int, Asking[Any]]]) -> None:
        """Starts generators until as many rows wait as fit."""
        for_room = iter(fresh)
        while max(len(self._waiting), self._num_open) < self._room:
            following = next(for_room, None)
            if following is None:
                return
            self._num_open += 1
            self._go_on(Owner(*following))

    def _go_on(self, owner: Owner[Any]) -> None:
        """Sends a sample the answers that it waits for; what it asks next waits in front of the others."""
        answers = [answer_of(stream) for stream in owner.streams]
        error = next((stream.error for stream in owner.streams if stream.error is not None), None)
        begun, started = bool(owner.streams), perf_counter()
        name = owner.streams[0].prompt.sample_id if begun else None
        owner.streams = []  # their caches live as long as the sample holds their answers, and no longer
        try:
            while True:
                if error is not None:
                    asks = owner.asking.throw(error)
                else:
                    asks = owner.asking.send(answers) if begun else next(owner.asking)
                begun, error, answers = True, None, []
                if asks:
                    break
        except StopIteration as stop:
            self._end(owner, stop.value, started)
            return
        except RowError as problem:
            self._end(owner, problem, started)
            return
        except (MemoryError, RuntimeError) as problem:  # the defense's own work beside the batch: a reward, a picture
            if not is_out_of_memory(problem):
                raise
            self._end(owner, _ran_out_beside(name), started)
            return
        owner.cost += _own(started)
        owner.streams = [Stream(owner, ask) for ask in asks]
        self._waiting.extendleft(reversed(owner.streams))

    def _end(self, owner: Owner[Any], value: Any, started: float) -> None:
        self._outcomes[owner.position] = Outcome(value, owner.cost + _own(started))
        self._num_open -= 1

    def _admit(self) -> None:
        """Lets waiting rows of one kind into the free places."""
        used = 0 if self._batch is None else len(self._batch.members)
        room = self._room
        if not self._waiting or (used and room - used < max(1, room // FREE_SHARE)):
            return
        taken = self._taken(room - used)
        self._under_way |= {id(stream): stream for stream in taken}
        for stream in taken:
            stream.error = too_long(stream, self.forward.max_tokens)
        self._finish([stream for stream in taken if stream.error is not None])
        taken = [stream for stream in taken if stream.error is None]
        fresh = [stream for stream in taken if isinstance(stream.ask.prompt, Prompt)]
        batches = [self._prefilled(fresh)] if fresh else []
        batches += self._resumed([stream for stream in taken if isinstance(stream.ask.prompt, Saved)])
        self._join([batch for batch in batches if batch is not None])

    def _taken(self, room: int) -> list[Stream]:
        """Waiting streams that fit, of the batch's kind or of the first one's; at least one when the batch is empty."""
        kind = self.forward.kind(self._batch.members[0].prompt if self._batch else self._waiting[0].prompt)
        taken: list[Stream] = []
        left: deque[Stream] = deque()
        while self._waiting:
            stream = self._waiting.popleft()
            needs = 1 + (stream.ask.partner is not None)
            fits = needs <= room or (self._batch is None and not taken)
            if self.forward.kind(stream.prompt) == kind and fits:
                taken.append(stream)
                room -= needs
            else:
                left.append(stream)
                if not fits:
                    break
        left.extend(self._waiting)
        self._waiting = left
        return taken

    def _prefilled(self, streams: Sequence[Stream]) -> Batch | None:
        """Reads the streams' prompts, each once, and chooses their first tokens."""
        members = [Member(stream, stream.prompt) for stream in streams]
        members += [
            Member(s, s.ask.partner, True) for s in streams if s.ask.partner is not None and s.ask.contrasted_steps
        ]
        keys = [(id(m.prompt), m.stream.ask.calibration, m.stream.ask.strength) for m in members]
        unique = list(dict.fromkeys(keys))
        firsts = [members[keys.index(key)] for key in unique]
        started = perf_counter()
        padded = collate([member.prompt for member in firsts], self.forward.pad_id)
        calibrated = self._calibrating.of_prompts(firsts, padded)
        with nullcontext() if calibrated is None else active(calibrated):
            read = self.forward.prefill(padded.tensors, any(stream.ask.hidden for stream in streams))
        places = [unique.index(key) for key in keys]
        note_masses(calibrated, [(place, member) for place, member in zip(places, members, strict=True)])
        for place, member in zip(places, members, strict=True):
            if member.stream.ask.hidden and not member.is_partner:
                assert read.hidden is not None
                member.stream.hidden = read.hidden[place, -member.prompt.num_tokens :].clone()
        rows = read.rows if places == list(range(len(unique))) else read.rows.select(places)
        shares = [member.prompt.num_tokens / places.count(at) for at, member in zip(places, members, strict=True)]
        return self._chosen(Batch(rows, members, []), read.logits[places], started, shares)

    def _resumed(self, streams: Sequence[Stream]) -> list[Batch | None]:
        """Goes on from saved caches: those whose next logits are known choose at once, the others are fed first."""
        saved = [(stream, stream.ask.prompt) for stream in streams if isinstance(stream.ask.prompt, Saved)]
        known = [(stream, each, each.logits) for stream, each in saved if each.logits is not None]
        fed = [(stream, each, each.pending) for stream, each in saved if each.logits is None]
        batches: list[Batch | None] = []
        if known:
            rows = joined([each.rows for _, each, _ in known])
            batch = Batch(rows, [Member(stream, each.prompt) for stream, each, _ in known], [])
            logits = torch.stack([logits for _, _, logits in known])
            batches.append(self._chosen(batch, logits, perf_counter()))
        if fed:
            rows = joined([each.rows for _, each, _ in fed])
            tokens = [pending for _, _, pending in fed if pending is not None]
            batches.append(Batch(rows, [Member(stream, each.prompt) for stream, each, _ in fed], tokens))
        return batches

    def _join(self, batches: Sequence[Batch]) -> None:
        """Lets these rows into the batch, behind the rows that are there."""
        parts = [*([self._batch] if self._batch is not None else []), *batches]
        if len(parts) == 1 and self._batch is None:
            self._batch = parts[0]
        elif len(parts) > 1:
            members, tokens = [m for part in parts for m in part.members], [t for part in parts for t in part.tokens]
            self._batch = Batch(joined([part.rows for part in parts]), members, tokens)

    def _stepped(self, batch: Batch) -> Batch | None:
        """Feeds every row its token and chooses the next."""
        started = perf_counter()
        calibrated = batch.calibrated or self._calibrating.of_columns(batch)
        with nullcontext() if calibrated is None else active(calibrated):
            read = self.forward.step(batch.rows, batch.tokens)
        note_masses(calibrated, list(enumerate(batch.members)))
        for member in batch.members:
            member.stream.cost += Cost(steps=int(not member.is_partner))
        return self._chosen(replace(batch, rows=read.rows, calibrated=calibrated), read.logits, started)

    def _chosen(
        self, batch: Batch, logits: Tensor, started: float, read: Sequence[float] | None = None
    ) -> Batch | None:
        """Chooses a token for every row from the logits [B, V]; those that are done leave. Partners copy their row.

        `read` are the shares of a prefill's seconds: a row pays for its own prompt's length.
        """
        own = [row for row, member in enumerate(batch.members) if not member.is_partner]
        partner = {id(member.stream): row for row, member in enumerate(batch.members) if member.is_partner}
        finite = logits.isfinite().all(-1).tolist()
        for row in own:
            stream = batch.members[row].stream
            seen = [row, *([partner[id(stream)]] if id(stream) in partner else [])]
            if not all(finite[at] for at in seen):
                stream.error = not_finite(stream)
            elif stream.ask.max_new_tokens == 0:
                stream.ended = "length"
        for phase, rows in by_phase(batch.members, own).items():
            others = [partner.get(id(batch.members[row].stream)) for row in rows]
            streams = [batch.members[row].stream for row in rows]
            choose(phase, streams, logits[rows], logits[others] if phase.contrast else None, self.forward.eos_ids)
        self._booked = perf_counter()
        share_seconds(batch.members, self._booked - started, read)
        return self._left(batch, logits)

    def _left(self, batch: Batch, logits: Tensor) -> Batch | None:
        """The batch without the rows that are done, and without second views that are not needed any more."""
        done = [row for row, m in enumerate(batch.members) if m.stream.is_done and not m.is_partner]
        for row in done:
            keep(batch.members[row].stream, batch.rows, row, logits)
        left = [row for row, m in enumerate(batch.members) if m.is_needed]
        members = [batch.members[row] for row in left]
        self._finish([batch.members[row].stream for row in done])
        if not left:
            return None
        tokens = [member.stream.tokens[-1] for member in members]
        if len(left) == len(batch.members):
            return replace(batch, tokens=tokens)
        return Batch(batch.rows.select(left), members, tokens)

    def _finish(self, streams: Sequence[Stream]) -> None:
        """Samples whose asks are all answered go on."""
        owners = {id(stream.owner): stream.owner for stream in streams}
        for stream in streams:
            stream.owner.cost += stream.cost
            self._under_way.pop(id(stream), None)
        for owner in owners.values():
            if all(stream.is_done for stream in owner.streams):
                self._go_on(owner)
        self._booked = perf_counter()


def _ran_out_beside(sample_id: str | None) -> RowError:
    """Of a sample whose generator ran out of memory; its name is known from its first ask on."""
    whose = "the sample" if sample_id is None else f"sample {sample_id}"
    return RowError("out_of_memory", f"{whose}: generation failed: memory ran out in the defense's own work")


def _own(started: float) -> Cost:
    """What a defense did by itself since then."""
    return Cost(own_seconds=perf_counter() - started)
