"""The loop gives what transformers' own `generate` gives, and a row's tokens depend on no neighbour."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from guardalign.core.calibration import Calibration
from guardalign.errors import RowError
from guardalign.models.asking import Answer, Ask, Asking, Phase, continued
from guardalign.models.batches import collate
from guardalign.models.choosing import policy_logits
from guardalign.models.decoding import Decoder
from guardalign.models.lvlm import Lvlm
from guardalign.models.prompts import Prompt
from tests.small_lvlms import FAMILIES, FAMILIES_BY_TURNS, picture, small_lvlm

PREFIX = "As an AI assistant, I decline."
TEXTS = (
    "What is shown?",
    "Describe the image, then count the cats and the dogs, and say where they are.",
    "Why?",
    "How can I use it, and what does it do when it is wet?",
    "Is it?",
)
PICTURES = (picture(), picture(30, 70, "green"), picture(60, 60, "white"), picture(120, 40, "black"), picture())


def prompts(lvlm: Lvlm, count: int = 5, prefix: str | None = None) -> list[Prompt]:
    rows = zip(TEXTS[:count], PICTURES[:count], strict=True)
    return [lvlm.prompt(text, text, seen, prefix) for text, seen in rows]


def answered(lvlm: Lvlm, asks: Sequence[Ask], capacity: int) -> list[Answer]:
    def one(ask: Ask) -> Asking[Answer]:
        (answer,) = yield [ask]
        return answer

    ended = Decoder(lvlm, capacity).run([one(ask) for ask in asks])
    assert all(isinstance(each.value, Answer) for each in ended), [each.value for each in ended]
    return [each.value for each in ended if isinstance(each.value, Answer)]


def generated(lvlm: Lvlm, some: Sequence[Prompt], count: int) -> list[list[int]]:
    """transformers' own tokens of one left-padded batch, up to each row's end."""
    batch = collate(some, lvlm.pad_id)
    with torch.inference_mode():
        made = lvlm.model.generate(
            **lvlm._placed(batch.tensors),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=lvlm.pad_id,
            eos_token_id=list(lvlm.eos_ids) or None,
        )
    rows = made[:, -count:] if made.shape[1] == count else made[:, batch.num_columns :]
    return [_until_end(row.tolist(), lvlm.eos_ids) for row in rows]


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    at = next((at for at, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: at + 1]


def with_ends(lvlm: Lvlm, tokens: Sequence[int]) -> Lvlm:
    """The same model with more tokens that end an answer: random models seldom say their own."""
    twin = object.__new__(Lvlm)
    twin.__dict__ = dict(lvlm.__dict__) | {"eos_ids": (*lvlm.eos_ids, *tokens)}
    return twin


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_generates_own_token_for_token(family: str) -> None:
    lvlm, count = small_lvlm(family), 24
    some = prompts(lvlm, 3)
    expected = generated(lvlm, some, count)
    assert [list(each.tokens) for each in answered(lvlm, [Ask(p, count) for p in some], 3)] == expected
    ending = with_ends(lvlm, [expected[0][5], expected[1][11]])
    assert [list(each.tokens) for each in answered(ending, [Ask(p, count) for p in some], 3)] == generated(
        ending, some, count
    )


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_rows_that_join_and_leave_in_mid_flight_say_what_they_say_alone(family: str) -> None:
    lvlm = small_lvlm(family)
    lengths = (5, 31, 9, 17, 2)
    asks = [Ask(prompt, length) for prompt, length in zip(prompts(lvlm), lengths, strict=True)]
    alone = [answered(lvlm, [ask], 1)[0] for ask in asks]
    assert [len(each.tokens) for each in alone] == list(lengths)
    for capacity in (1, 2, 3, 5):
        assert answered(lvlm, asks, capacity) == alone
    assert answered(lvlm, asks[::-1], 2) == alone[::-1]


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_calibrated_rows_among_plain_ones_are_calibrated_as_alone(family: str) -> None:
    lvlm = small_lvlm(family)
    layers = lvlm.calibrated_layers(None)
    hows = [
        Calibration(3.0, "gain", layers, True),
        None,
        Calibration(0.05, "printed", layers, True),
        Calibration(3.0, "gain", layers[-1:], False),
        Calibration(3.0, "gain", layers, True),
    ]
    lengths = (6, 21, 13, 9, 17)
    asks = [
        Ask(prompt, length, calibration=how, record=how is not None, strength=1.0 if at < 4 else 0.5)
        for at, (prompt, length, how) in enumerate(zip(prompts(lvlm, prefix=PREFIX), lengths, hows, strict=True))
    ]
    alone = [answered(lvlm, [ask], 1)[0] for ask in asks]
    for capacity in (2, 5):
        together = answered(lvlm, asks, capacity)
        assert [each.tokens for each in together] == [each.tokens for each in alone]
        masses = [each.prefix_attention for each in alone]
        assert [each.prefix_attention for each in together] == [
            None if mass is None else pytest.approx(mass, abs=1e-5) for mass in masses
        ]
    plain = answered(lvlm, [replace(ask, calibration=None, record=False) for ask in asks], 5)
    assert plain[1].tokens == alone[1].tokens
    assert any(a.tokens != b.tokens for a, b in zip(plain, alone, strict=True)), "the calibration acts"


def first_logits(lvlm: Lvlm, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
    """Logits after these tokens, by a forward call that knows no cache."""
    whole = continued(prompt, tokens)
    (answer,) = answered(lvlm, [Ask(whole, 0, keep=True)], 1)
    assert answer.logits is not None
    return answer.logits


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_contrasted_tokens_are_those_of_two_separate_views(family: str) -> None:
    lvlm, alpha, steps = small_lvlm(family), 0.6, 4
    texts = TEXTS[:2]
    views = [(lvlm.prompt("a", text, PICTURES[0]), lvlm.prompt("a", text, PICTURES[1])) for text in texts]
    phases = (Phase(steps=steps, contrast=alpha), Phase())
    asks = [Ask(own, 9, phases, partner=other) for own, other in views]
    together = answered(lvlm, [*asks, Ask(prompts(lvlm)[2], 12)], 3)
    for (own, other), answer in zip(views, together, strict=False):
        said: list[int] = []
        for step in range(9):
            z = first_logits(lvlm, own, said)
            if step < steps:
                z = z - alpha * first_logits(lvlm, other, said)
            said.append(int(z.argmax()))
        assert list(answer.tokens) == said
        assert answer.cost.contrast_seconds > 0
    assert together[2] == answered(lvlm, [Ask(prompts(lvlm)[2], 12)], 1)[0]


def test_a_contrast_of_zero_is_no_contrast_and_reads_no_second_view() -> None:
    lvlm = small_lvlm("llava")
    own, other = prompts(lvlm, 2)
    before = lvlm.num_forward_calls
    contrasted = answered(lvlm, [Ask(own, 6, (Phase(steps=3, contrast=0.0), Phase()), partner=other)], 2)
    assert lvlm.num_forward_calls - before == 6
    assert contrasted == answered(lvlm, [Ask(own, 6)], 1)
    assert contrasted[0].cost.contrast_seconds == 0


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_a_saved_row_goes_on_as_if_it_had_never_stopped(family: str) -> None:
    lvlm = small_lvlm(family)
    some = prompts(lvlm, 3)
    whole = answered(lvlm, [Ask(prompt, 12) for prompt in some], 3)

    def in_parts(prompt: Prompt) -> Asking[list[tuple[int, ...]]]:
        (read,) = yield [Ask(prompt, 0, keep=True)]
        assert read.saved is not None and not read.tokens
        (first,) = yield [Ask(read.saved, 5, keep=True)]
        assert first.saved is not None
        again, rest = yield [Ask(read.saved, 12), Ask(first.saved, 7)]
        return [first.tokens + rest.tokens, again.tokens]

    ended = Decoder(lvlm, 2).run([in_parts(prompt) for prompt in some])
    assert [each.value for each in ended] == [[each.tokens] * 2 for each in whole]


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_forced_tokens_and_a_longer_prompt_lead_to_the_same_words(family: str) -> None:
    lvlm = small_lvlm(family)
    for prompt in prompts(lvlm, 2):
        opening = tuple(lvlm.tokenizer.encode("the cats are", add_special_tokens=False))
        (forced,) = answered(lvlm, [Ask(prompt, len(opening) + 6, forced=opening)], 1)
        (longer,) = answered(lvlm, [Ask(continued(prompt, opening), 6)], 1)
        assert forced.tokens == opening + longer.tokens
        expected = [
            float(first_logits(lvlm, prompt, opening[:at]).log_softmax(-1)[token]) for at, token in enumerate(opening)
        ]
        assert list(forced.log_probabilities) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_the_models_last(family: str) -> None:
    lvlm = small_lvlm(family)
    some = prompts(lvlm, 3)
    found = answered(lvlm, [Ask(prompt, 0, keep=True, hidden=True) for prompt in some], 3)
    for prompt, answer in zip(some, found, strict=True):
        assert answer.hidden is not None and answer.logits is not None
        assert answer.hidden.shape[0] == prompt.num_tokens
        head = lvlm.model.get_output_embeddings()
        with torch.inference_mode():
            logits = head(answer.hidden[-1])
        torch.testing.assert_close(logits.float(), answer.logits, rtol=1e-4, atol=1e-4)


def test_the_same_prompt_is_read_once_and_each_seed_draws_its_own() -> None:
    lvlm = small_lvlm("qwen2_5_vl")
    (prompt,) = prompts(lvlm, 1)
    hot = (Phase(temperature=1.5, top_k=50),)
    before = lvlm.num_forward_calls

    def five() -> Asking[list[tuple[int, ...]]]:
        found = yield [Ask(prompt, 6, hot, seed) for seed in range(5)]
        return [each.tokens for each in found]

    ((drawn, _),) = [(each.value, each.cost) for each in Decoder(lvlm, 5).run([five()])]
    assert lvlm.num_forward_calls - before == 6
    assert isinstance(drawn, list) and len(set(drawn)) == 5
    assert drawn == [answered(lvlm, [Ask(prompt, 6, hot, seed)], 1)[0].tokens for seed in range(5)]


def test_phases_follow_each_other_and_a_stop_rule_ends_an_answer() -> None:
    lvlm = small_lvlm("llava")
    (prompt,) = prompts(lvlm, 1)
    (plain,) = answered(lvlm, [Ask(prompt, 8)], 1)
    banned = plain.tokens[2]
    phases = (Phase(steps=2), Phase(steps=1, bias=-torch.inf, biased=(banned,)), Phase())
    (turned,) = answered(lvlm, [Ask(prompt, 8, phases)], 1)
    assert turned.tokens[:2] == plain.tokens[:2] and turned.tokens[2] != banned
    (short,) = answered(lvlm, [Ask(prompt, 8, stops=lambda tokens: len(tokens) == 3)], 1)
    assert short.tokens == plain.tokens[:3] and short.stop_reason == "stopped"


def test_a_row_that_cannot_be_answered_costs_no_other() -> None:
    lvlm = small_lvlm("llava")
    good, broken = prompts(lvlm, 2)
    nan = replace(broken, tensors=dict(broken.tensors) | {"pixel_values": torch.full((1, 3, 28, 28), torch.nan)})
    long = lvlm.prompt("a9", "cats dogs " * 600, None)
    asks = [Ask(good, 5), Ask(nan, 5), Ask(long, 5), Ask(good, 5)]

    def one(ask: Ask) -> Asking[tuple[int, ...]]:
        (answer,) = yield [ask]
        return answer.tokens

    def forgiving() -> Asking[str]:
        try:
            yield [Ask(long, 5), Ask(good, 2)]
        except RowError as error:
            return error.kind
        return "answered"

    found = [each.value for each in Decoder(lvlm, 2).run([*map(one, asks), forgiving()])]  # type: ignore[list-item]
    assert found[0] == found[3] == answered(lvlm, [asks[0]], 1)[0].tokens
    assert [getattr(each, "kind", None) for each in found[1:3]] == ["generation_failed", "prompt_too_long"]
    assert found[4] == "prompt_too_long"


def test_policy_logits_by_hand() -> None:
    own = torch.tensor([[2.0, 1.0, 0.0, -9.0]])
    other = torch.tensor([[1.0, 4.0, 0.0, -99.0]])
    contrasted = policy_logits(Phase(contrast=0.5), own, other)
    torch.testing.assert_close(contrasted, torch.tensor([[1.5, -1.0, 0.0, 40.5]]))
    plausible = policy_logits(Phase(contrast=0.5, plausibility=0.1), own, other)
    torch.testing.assert_close(plausible, torch.tensor([[1.5, -1.0, 0.0, -torch.inf]]))  # e^-2 >= 0.1 > e^-11
    biased = policy_logits(Phase(bias=3.0, biased=(1, 2)), own, None)
    torch.testing.assert_close(biased, torch.tensor([[2.0, 4.0, 3.0, -9.0]]))


def test_a_decoder_may_run_again_and_costs_add_up() -> None:
    lvlm = small_lvlm("llava")
    decoder, asks = Decoder(lvlm, 2), [Ask(prompt, 4) for prompt in prompts(lvlm, 3)]

    def one(ask: Ask) -> Asking[int]:
        (answer,) = yield [ask]
        (more,) = yield [ask]
        return answer.cost.steps + more.cost.steps

    first = decoder.run([one(ask) for ask in asks])
    assert [each.value for each in first] == [6, 6, 6] == [each.cost.steps for each in first]
    assert all(each.cost.prefill_seconds > 0 and each.cost.decode_seconds > 0 for each in first)
    assert [each.value for each in decoder.run([one(asks[0])])] == [6]
    assert decoder.run([]) == []


def test_a_finished_samples_caches_are_gone_at_once_without_the_collector() -> None:
    lvlm = small_lvlm("llava")
    (prompt,) = prompts(lvlm, 1)
    kept: list[weakref.ref[Tensor]] = []
    most = 0

    def one() -> Asking[int]:
        nonlocal most
        (read,) = yield [Ask(prompt, 0, keep=True)]
        assert read.saved is not None
        kept.append(weakref.ref(read.saved.rows.cache.layers[0].keys))
        most = max(most, sum(each() is not None for each in kept))
        (answer,) = yield [Ask(read.saved, 3)]
        return len(answer.tokens)

    gc.collect()
    gc.disable()
    try:
        found = Decoder(lvlm, 2).run(one() for _ in range(12))
        assert [each.value for each in found] == [3] * 12
        assert most <= 2
        assert not any(each() is not None for each in kept)
    finally:
        gc.enable()


def test_a_saved_row_keeps_no_neighbours_memory() -> None:
    lvlm = small_lvlm("llava")
    asks = [Ask(prompt, 0, keep=True) for prompt in prompts(lvlm, 4)]
    for answer in answered(lvlm, asks, 4):
        assert answer.saved is not None
        keys = answer.saved.rows.cache.layers[0].keys
        assert keys.untyped_storage().nbytes() == keys.numel() * keys.element_size()
        assert keys.shape[2] == answer.num_prompt_tokens


def test_a_row_pays_for_its_own_prompts_length() -> None:
    lvlm = small_lvlm("llava")
    short, long = lvlm.prompt("a", "Why?", None), lvlm.prompt("b", "Why? " * 60, None)
    costs = [each.cost for each in answered(lvlm, [Ask(short, 4), Ask(long, 4)], 2)]
    ratio = costs[1].prefill_seconds / costs[0].prefill_seconds
    assert ratio == pytest.approx(long.num_tokens / short.num_tokens)
    assert costs[0].decode_seconds == pytest.approx(costs[1].decode_seconds)
