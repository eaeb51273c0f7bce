"""What does not fit is halved and tried again: the same answers, one error row for what does not fit alone."""

from __future__ import annotations

import io
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from guardalign.config import ClipConfig, GenerationConfig, LvlmConfig
from guardalign.core.memory import is_out_of_memory
from guardalign.defenses import answered as defended
from guardalign.defenses.casa import Casa
from guardalign.defenses.eta import Eta
from guardalign.detectors import OtDetector
from guardalign.errors import RowError
from guardalign.guard import Failure, guarded
from guardalign.models import decoding
from guardalign.models.asking import Answer, Ask, Asking, Phase
from guardalign.models.checkpoints import Checkpoint
from guardalign.models.clip_weights import write_random_model
from guardalign.models.conversations import Conversation
from guardalign.models.decoding import Decoder, Outcome
from guardalign.models.guard import PolicyGuard, TextGuard
from guardalign.models.lvlm import Lvlm
from guardalign.models.memory import Room, fits
from guardalign.models.prompts import Prompt
from guardalign.models.reward import ClassifierScorer, load_reward
from guardalign.schema import IMAGE, trace_of, with_columns
from guardalign.stages import Detect
from guardalign.taxonomy import Category, Taxonomy
from guardalign.types import Case, Reply, Sample
from guardalign.working import Counted
from tests.small_clip import small_config
from tests.small_guards import random_guard, shieldgemma2
from tests.small_lvlms import FAMILIES, picture, small_lvlm

TEXTS = ("What is shown?", "Describe the image, then count the cats.", "Why?", "How can I use it when it is wet?")
PICTURES = (picture(), picture(30, 70, "green"), picture(60, 60, "white"), picture(120, 40, "black"))
ERRORS: dict[str, Callable[[], Exception]] = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    "Python": MemoryError,
}
HOT = Phase(temperature=1.5, top_k=50)


@dataclass
class Scarce:
    """Memory for so many rows, columns and rows times columns only; counts what did not fit."""

    rows: int = 10**9
    columns: int = 10**9
    cells: int = 10**9
    error: Callable[[], Exception] = ERRORS["CUDA"]
    failures: int = 0
    seconds: float = 0.0
    """that a failing call takes"""

    def check(self, rows: int, columns: int = 0) -> None:
        if rows > self.rows or columns > self.columns or rows * columns > self.cells:
            self.failures += 1
            time.sleep(self.seconds)
            raise self.error()


@contextmanager
def scarce(lvlm: Lvlm, **limits: Any) -> Iterator[Scarce]:
    """The model's last layer fails, once the layers before it have already written into their caches."""
    short, lvlm.room = Scarce(**limits), Room("lvlm")

    def look(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = given[0] if given else named["hidden_states"]
        columns = named["past_key_values"].get_seq_length()
        short.check(hidden.shape[0], columns)

    hook = lvlm.model.get_decoder().layers[-1].register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield short
    finally:
        hook.remove()
        lvlm.room = Room("lvlm")


@contextmanager
def limited(module: nn.Module, **limits: Any) -> Iterator[Scarce]:
    """The module takes so many rows at a time."""
    short = Scarce(**limits)

    def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        short.check(*next(x for x in (*given, *named.values()) if isinstance(x, Tensor)).shape[:1])

    hook = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield short
    finally:
        hook.remove()


def asks(lvlm: Lvlm) -> list[Ask]:
    """Greedy, sampled, contrasted and long ones."""
    own = [lvlm.prompt(text, text, seen) for text, seen in zip(TEXTS, PICTURES, strict=True)]
    contrast = (Phase(steps=3, contrast=0.6), HOT)
    return [
        Ask(own[0], 9),
        Ask(own[1], 7, (HOT,), seed=1),
        Ask(own[2], 8, contrast, seed=2, partner=own[3]),
        Ask(own[3], 12, (HOT,), seed=3),
    ]


def one(ask: Ask) -> Asking[Answer]:
    (answer,) = yield [ask]
    return answer


def ended(lvlm: Lvlm, some: Sequence[Ask], capacity: int = 8) -> list[Outcome[Answer]]:
    return Decoder(lvlm, capacity).run([one(ask) for ask in some])


def values(outcomes: Sequence[Outcome[Any]]) -> list[Any]:
    return [each.value for each in outcomes]


@pytest.mark.parametrize("family", [name for name in ("llava", "qwen2_5_vl", "gemma3", "mllama") if name in FAMILIES])
def test_answers_are_those_of_an_undisturbed_run(family: str) -> None:
    lvlm = small_lvlm(family)
    some = asks(lvlm)
    expected = values(ended(lvlm, some))
    widest = max(ask.prompt.num_tokens for ask in some if isinstance(ask.prompt, Prompt))
    mid_decoding = {"cells": 5 * (widest + 1)}  # five rows can be read, and decode one token
    for limits in ({"rows": 3}, mid_decoding):
        with scarce(lvlm, **limits) as short:
            assert values(ended(lvlm, some)) == expected
            assert short.failures == lvlm.room.num_failures > 0
            assert lvlm.room.most == 2


@pytest.mark.parametrize("error", ERRORS)
def test_the_working_size_is_remembered_and_told(error: str) -> None:
    lvlm = small_lvlm("llava")
    some = [replace(ask, partner=None, phases=(HOT,)) for ask in asks(lvlm)]
    expected = values(ended(lvlm, some))
    with scarce(lvlm, rows=1, error=ERRORS[error]) as short:
        counted = Counted(lvlm, "lvlm")
        told = counted.since_last()[1]
        assert values(ended(lvlm, some)) == expected
        before = short.failures
        assert before == 2, "of 4 rows, then of 2"
        assert values(ended(lvlm, some)) == expected
        assert short.failures == before
        (note,) = counted.since_last()[1]
        assert note == "lvlm: larger batches did not fit into memory; at most 1 at a time since then"
        assert note not in told and counted.since_last()[1] == ()


def test_a_row_that_never_fits_is_an_error_row_and_tells_nothing_of_batches() -> None:
    lvlm = small_lvlm("llava")
    brief = [Ask(lvlm.prompt(text, text, None), 6) for text in TEXTS]
    long = Ask(lvlm.prompt("a9", "Why? " * 30, None), 12)
    expected = values(ended(lvlm, brief))
    assert isinstance(long.prompt, Prompt)
    late = long.prompt.num_tokens + 4
    with scarce(lvlm, columns=late) as short:
        found = values(ended(lvlm, [*brief[:2], long, *brief[2:]]))
        assert short.failures > 1
        assert lvlm.room.most is None and lvlm.notes == lvlm._notes
    culprit = found.pop(2)
    assert found == expected
    assert isinstance(culprit, RowError) and culprit.kind == "out_of_memory"
    assert str(culprit).startswith("sample a9: generation failed: memory ran out, although the row was alone; its")


def test_a_contrast_is_tried_alone_with_both_its_rows() -> None:
    lvlm = small_lvlm("llava")
    some = asks(lvlm)
    with scarce(lvlm, rows=1):
        kinds = [getattr(each, "kind", "answered") for each in values(ended(lvlm, some))]
    assert kinds == ["answered", "answered", "out_of_memory", "answered"]


@pytest.mark.parametrize(
    ("defense", "rows"),
    [
        (Casa(mode="token_only", unsafe_label="the cats are unsafe", safe_label="a dog is safe"), 2),
        (Eta(num_candidates=3, sentence_tokens=4, reward_threshold=1e9, similarity_threshold=-2.0), 1),
    ],
    ids=["casa", "eta"],
)
def test_defenses_of_many_asks_give_the_same_replies(defense: Casa | Eta, rows: int) -> None:
    lvlm, generation = small_lvlm("llava"), GenerationConfig(max_new_tokens=6, temperature=0.9)
    cases = [Case(Sample(text, text, None, ""), seen) for text, seen in zip(TEXTS, PICTURES, strict=True)]
    expected = [_near(reply) for reply in defended(defense, lvlm, cases, generation, capacity=6)]
    with scarce(lvlm, rows=rows) as short:
        assert [_near(reply) for reply in defended(defense, lvlm, cases, generation, capacity=6)] == expected
        assert short.failures > 0


def _near(reply: Reply) -> Reply:
    assert reply.defense_score is not None
    return replace(reply, defense_score=round(reply.defense_score, 5))


def test_a_saved_cache_is_untouched_by_what_fails_after_it() -> None:
    lvlm = small_lvlm("gemma3")
    (prompt,) = [ask.prompt for ask in asks(lvlm)[:1]]
    (read,) = values(ended(lvlm, [Ask(prompt, 0, keep=True)]))
    saved = read.saved
    layers = saved.rows.cache.layers
    before = [(layer.keys.clone(), layer.values.clone(), dict(vars(layer))) for layer in layers]
    again = [Ask(saved, 9, (HOT,), seed) for seed in range(3)]
    expected = values(ended(lvlm, again))
    with scarce(lvlm, rows=1) as short:
        assert values(ended(lvlm, again)) == expected
        assert short.failures > 0
    for layer, (keys, others, state) in zip(layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, others)
        assert vars(layer).keys() == state.keys() and all(vars(layer)[name] is state[name] for name in state)


def test_lost_work_is_paid_for() -> None:
    lvlm = small_lvlm("llava")
    some = asks(lvlm)
    steps = [each.cost.steps for each in ended(lvlm, some)]
    with scarce(lvlm, rows=2, seconds=0.5) as short:
        started = time.perf_counter()
        found = ended(lvlm, some)
        seconds = time.perf_counter() - started
    assert all(each.cost.steps >= alone for each, alone in zip(found, steps, strict=True))
    unpaid = seconds - sum(sum(astuple(each.cost)[1:]) for each in found)
    assert unpaid < 0.25 * short.failures, "of half a second each"


def test_nothing_of_the_failed_call_is_held_when_the_retry_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = small_lvlm("llava")
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    monkeypatch.setattr(decoding, "release", lambda: alive.append(sum(each() is not None for each in seen)))

    def note(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        keys = [each.keys for each in named["past_key_values"].layers if each.keys is not None]
        seen.extend(map(weakref.ref, (given[0], *keys)))

    with scarce(lvlm, rows=2) as short:
        hook = lvlm.model.get_decoder().layers[-1].register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        try:
            ended(lvlm, asks(lvlm))
        finally:
            hook.remove()
    assert alive == [0] * short.failures and seen


def test_a_defense_that_runs_out_among_others_is_begun_again_alone() -> None:
    lvlm = small_lvlm("llava")
    some = asks(lvlm)[:2]
    opened: list[int] = []

    def hungry(place: int) -> Asking[tuple[int, ...]]:
        (answer,) = yield [some[place]]
        opened.append(place)
        if place == 1 and opened.count(1) == 1:
            raise torch.OutOfMemoryError("the reward model found no room")
        return answer.tokens

    try:
        first, second = Decoder(lvlm, 4).run(map(hungry, range(2)), hungry)
        assert [first.value, second.value] == [each.tokens for each in values(ended(lvlm, some))]
        assert isinstance(second.value, tuple)
        assert second.cost.steps == 2 * (len(second.value) - 1)
        assert lvlm.room.most == 2, "there were too many rows beside it"
        opened.clear()
        lost = Decoder(lvlm, 4).run(map(hungry, range(2)))[1].value
        assert isinstance(lost, RowError) and lost.kind == "out_of_memory" and some[1].prompt.sample_id in str(lost)  # type: ignore[union-attr]
    finally:
        lvlm.room = Room("lvlm")


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    def work() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        fits(work)
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises((RuntimeError, MemoryError)) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


@given(st.integers(1, 9), st.lists(st.booleans(), min_size=1, max_size=24))
def test_what_fits_is_done_and_each_that_never_fits_is_told_apart(limit: int, never: list[bool]) -> None:
    room, items = Room("x"), list(range(len(never)))

    def work(some: Sequence[int]) -> list[int]:
        if len(some) > limit or any(never[item] for item in some):
            raise MemoryError
        return [10 * item for item in some]

    assert room.fitted(work, items) == [None if never[item] else 10 * item for item in items]
    if any(never):
        with pytest.raises(MemoryError):
            room.all_fitted(work, items)
        return
    assert (room.most is None) == (len(items) <= limit) and (room.most or limit) <= limit
    before = room.num_failures
    assert room.all_fitted(work, items) == [10 * item for item in items] and room.num_failures == before


def test_one_that_never_fits_does_not_shrink_the_room() -> None:
    def work(some: Sequence[int]) -> list[int]:
        if 5 in some:
            raise MemoryError
        return list(some)

    room = Room("x")
    assert room.fitted(work, range(16)) == [*range(5), None, *range(6, 16)]
    assert room.most is None and room.notes == ()


def test_the_guard_names_a_row_that_ran_out_of_memory() -> None:
    def work(items: Sequence[int]) -> list[int]:
        if 1 in items:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(items)

    found = guarded(work, [0, 1, 2], ["a", "b", "c"], "judging_failed")
    sentence = "sample b: judging failed: memory ran out, although the row was alone"
    assert found == [0, Failure("out_of_memory", sentence), 2]


def test_judges_and_rewards_halve_their_batches_and_remember(tmp_path: Path) -> None:
    at = {name: Checkpoint(str(tmp_path / name), None, "float32", "cpu") for name in ("text", "policies")}
    random_guard(tmp_path / "text"), shieldgemma2(tmp_path / "policies")
    text, policies = TextGuard(at["text"]), PolicyGuard(at["policies"])
    reward = load_reward("embedded", None, "float32", "cpu")
    assert isinstance(reward, ClassifierScorer)
    asked = [Conversation(each, (each, "It is a cat.")) for each in TEXTS]
    works: list[tuple[Any, Callable[[], Any]]] = [
        (text, lambda: text.answers(asked, 5)),
        (policies, lambda: [list(each.values()) for each in policies.probabilities(PICTURES)]),
        (reward, lambda: reward(TEXTS[0], TEXTS)),
    ]
    for model, work in works:
        expected, model.room = work(), Room("x")
        with limited(model.model, rows=len(model.policies) if model is policies else 1) as short:
            assert _alike(work(), expected)
            before = short.failures
            assert before > 0 and model.room.most == 1 and _alike(work(), expected)
            assert short.failures == before
        model.room = Room("x")
    assert text.notes == policies.notes == ()


def _alike(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    return all(
        a == (b if isinstance(b, str) else pytest.approx(b, abs=1e-5)) for a, b in zip(found, expected, strict=True)
    )


TAXONOMY = Taxonomy("one", (Category("weapons", "Weapons", ("a gun", "a rifle")),), ("a cat", "a bowl"), ("this test",))


def detect_stage(folder: Path, device: str = "cpu", batch_size: int = 8, **vision: Any) -> Detect:
    write_random_model(folder, small_config(**vision), seed=0)
    config = ClipConfig(model=f"local-dir:{folder}", device=device, batch_size=batch_size)
    return Detect(config, OtDetector(), TAXONOMY, 10**6)


def shard(count: int) -> pa.Table:
    images = []
    for at in range(count):
        buffer = io.BytesIO()
        picture(40 + at, 41, "green").save(buffer, "PNG")
        images.append(buffer.getvalue())
    texts = {name: pa.array([None] * count, pa.string()) for name in ("error", "error_kind", "error_stage")}
    return with_columns(pa.table({"sample_id": [f"s{at}" for at in range(count)], **texts}), {IMAGE: images})


def test_detection_begins_later_shards_with_the_size_that_fits(tmp_path: Path) -> None:
    detect, table = detect_stage(tmp_path), shard(10)
    expected = [row["image_score"] for row in detect(table).to_pylist()]
    with limited(detect.encoder._visual.conv1, rows=2) as short:
        first = detect(table)
        before = short.failures
        second = detect(table)
    assert before == 2, "of 8, then of 4"
    assert short.failures == before
    for found in (first, second):
        assert [row["image_score"] for row in found.to_pylist()] == pytest.approx(expected, abs=1e-5)
        assert found["error"].null_count == 10
    assert trace_of(first).notes == ("clip: larger batches did not fit into memory; at most 2 at a time since then",)
    assert trace_of(second).notes == ()


def test_a_picture_that_never_fits_costs_its_own_row_only(tmp_path: Path) -> None:
    detect, table = detect_stage(tmp_path), shard(6)
    real = detect.encoder._forward

    def forward(pixels: Any, kind: Any) -> Any:
        if (pixels == culprit).all((1, 2, 3)).any():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pixels, kind)

    rows = [{"sample_id": "s3", IMAGE: table[IMAGE][3].as_py()}]
    culprit = detect._view(rows[0], {}, 0).pixels
    detect.encoder._forward = forward  # type: ignore[method-assign]
    found = detect(table).to_pylist()
    assert [row["error_kind"] for row in found] == [None, None, None, "out_of_memory", None, None]
    assert found[3]["error"] == "sample s3: detection failed: memory ran out, although the row was alone"
    assert detect.encoder.room.most is None


@pytest.mark.gpu
def test_detection_survives_a_small_share_of_the_device(tmp_path: Path) -> None:
    detect = detect_stage(tmp_path, "cuda", 64, image_size=448, width=512)
    table = shard(64)
    expected = [row["image_score"] for row in detect(table).to_pylist()]
    with _share_left(96 * 2**20):
        found = detect(table)
    assert detect.encoder.room.num_failures > 0
    assert [row["image_score"] for row in found.to_pylist()] == pytest.approx(expected, abs=1e-4)


@pytest.mark.gpu
def test_decoding_survives_a_small_share_of_the_device() -> None:
    path = small_lvlm("llava").config.model
    lvlm = Lvlm.load(LvlmConfig(model=path, device="cuda"))
    some = [Ask(lvlm.prompt(str(at), "Why? " * 90, PICTURES[0]), 24) for at in range(256)]
    expected = [each.tokens for each in values(ended(lvlm, some, 256))]
    with _share_left(96 * 2**20):
        found = values(ended(lvlm, some, 256))
    assert lvlm.room.num_failures > 0
    assert sum(each.tokens == other for each, other in zip(found, expected, strict=True)) > 0.9 * len(some)


@contextmanager
def _share_left(num_bytes: int) -> Iterator[None]:
    """The process may take so many bytes of the device beside what it holds."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + num_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
