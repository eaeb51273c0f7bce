"""SafeCoDe: neutral it is the plain model, its contrast two forward passes, `released` the released arithmetic."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from guardalign.config import AuditConfig, Choice, GenerationConfig, LvlmConfig
from guardalign.core.contrast import begins_a_sentence, best_opening, noisy_view, suppressing_bias
from guardalign.defenses import answered
from guardalign.defenses.plain import NoDefense, seed_of
from guardalign.defenses.safecode import SafeCoDe
from guardalign.errors import ConfigError
from guardalign.ignored import ignored_settings
from guardalign.micro import FOLDER, resolve_lvlm
from guardalign.micro.dialogues import REFUSAL
from guardalign.models.asking import Answer, Ask, Asking, continued
from guardalign.models.batches import collate
from guardalign.models.decoding import Decoder
from guardalign.models.forward import Read
from guardalign.models.lvlm import Lvlm
from guardalign.models.openings import opening_ids
from guardalign.models.prompts import Prompt
from guardalign.models.sampling import row_seed, uniform_numbers
from guardalign.types import Case, Cost, Reply, Sample
from tests.small_lvlms import DISTINCT, FAMILIES_BY_TURNS, FAMILIES_SELDOM, picture, small_lvlm

PROFILES: Final[tuple[Literal["paper", "released"], ...]] = ("paper", "released")
GREEDY = GenerationConfig(max_new_tokens=8)
SAMPLED = GenerationConfig(max_new_tokens=8, temperature=0.9, top_p=0.95, seed=3)


def case(name: str, text: str = "What is shown?", seen: Image.Image | None = None) -> Case:
    return Case(Sample(name, text, None, "here"), seen)


def cases(family: str) -> list[Case]:
    return [
        case("a", seen=picture()),
        case("b", "Describe the image, then count the cats and the dogs.", None),
        case("c", "Why?", picture(30, 70, "green")),
        case("d", "Is it?", picture(60, 60, "white")),
    ]


@lru_cache(maxsize=1)
def micro() -> Lvlm:
    return Lvlm.load(resolve_lvlm(LvlmConfig()))


@lru_cache(maxsize=1)
def scenes() -> tuple[list[Case], list[str]]:
    """Thirty-two scenes of the packaged sample, and their labels."""
    rows = [row for row in pq.read_table(FOLDER / "sample.parquet").to_pylist() if row["image"] is not None][:32]
    pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]
    made = [case(row["sample_id"], row["prompt"], seen) for row, seen in zip(rows, pictures, strict=True)]
    return made, [row["label"] for row in rows]


def unflagged(replies: Sequence[Reply]) -> list[Reply]:
    return [replace(reply, flagged=None) for reply in replies]


def under(defense: SafeCoDe, lvlm: Lvlm, some: Case, unsafe: bool | None, generation: GenerationConfig) -> Reply:
    """The reply under a given verdict."""
    return lvlm.answered([defense.decoded(lvlm, some, generation, unsafe)], 2)[0]


# ---- theorems


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES_SELDOM)
def test_without_contrast_and_modulation_it_is_the_plain_model(family: str, generation: GenerationConfig) -> None:
    neutral, lvlm = SafeCoDe(alpha=0, lambda_boost=0, lambda_supp=0), small_lvlm(family)
    plain = answered(NoDefense(), lvlm, cases(family), generation)
    assert unflagged(answered(neutral, lvlm, cases(family), generation)) == plain
    for unsafe in (True, False):
        some = [neutral.decoded(lvlm, each, generation, unsafe) for each in cases(family)]
        assert unflagged(lvlm.answered(some, 4)) == plain


@pytest.mark.slow
def test_neutral_it_is_the_plain_model_whatever_a_trained_model_says_of_the_request() -> None:
    neutral = SafeCoDe(alpha=0, lambda_boost=0, lambda_supp=0, verdict_sees_picture=True)
    found, plain = (answered(how, micro(), scenes()[0], GREEDY) for how in (neutral, NoDefense()))
    assert {reply.flagged for reply in found} == {True, False}
    assert unflagged(found) == plain


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_the_contrasted_logits_are_two_forward_passes(family: str) -> None:
    lvlm, some, alpha = small_lvlm(family), case("a", seen=picture()), 0.7
    how = SafeCoDe(verdict="none", alpha=alpha, sigma=0.5, steps=3)
    ask = the_ask(how, lvlm, some, replace(GREEDY, max_new_tokens=5))
    assert ask.partner is not None
    noise = noisy_view(picture(), 0.5, row_seed(seed_of(some, GREEDY), "noise"))
    views = [lvlm.prompt("a", some.sample.prompt, each) for each in (picture(), noise)]
    tokens = tuple(range(40, 45))
    (answer,) = told(lvlm, replace(ask, forced=tokens))
    for step, token in enumerate(tokens):
        own, noisy = (logits_after(lvlm, view, tokens[:step]) for view in views)
        assert (own - noisy).abs().max() > 1e-3
        z = own - alpha * noisy if step < 3 else own
        assert answer.log_probabilities[step] == pytest.approx(float(z.log_softmax(-1)[token]), abs=2e-4)


def test_without_noise_the_contrast_is_a_temperature() -> None:
    for family in DISTINCT:
        lvlm, how = small_lvlm(family), SafeCoDe(verdict="none", sigma=0, alpha=0.5)
        assert answered(how, lvlm, cases(family), GREEDY) == answered(NoDefense(), lvlm, cases(family), GREEDY)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", FAMILIES_SELDOM)
def test_an_answer_is_the_same_alone_and_in_any_batch(family: str, profile: Literal["paper", "released"]) -> None:
    lvlm, how = small_lvlm(family), SafeCoDe(profile=profile, sigma=0.5)
    verdicts = (True, False, None, True)

    def askings(rows: Sequence[int]) -> list[Asking[Reply]]:
        return [how.decoded(lvlm, cases(family)[row], SAMPLED, verdicts[row]) for row in rows]

    alone = [lvlm.answered(askings([row]), 2)[0] for row in range(4)]
    assert lvlm.answered(askings(range(4)), 8) == alone
    assert lvlm.answered(askings(range(4)), 3) == alone
    assert lvlm.answered(askings([3, 1, 0, 2]), 5) == [alone[row] for row in (3, 1, 0, 2)]
    whole = answered(how, lvlm, cases(family), SAMPLED)
    assert whole == [answered(how, lvlm, [each], SAMPLED)[0] for each in cases(family)]


# ---- the released arithmetic, by hand


def test_released_suppression_multiplies_probabilities_and_renormalises() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    bias = torch.tensor([suppressing_bias(1.0), 0, suppressing_bias(1.0), 0], dtype=torch.float64)
    # halved: 0.25, 0.3, 0.075, 0.05, together 0.675
    expected = torch.tensor([0.25 / 0.675, 0.3 / 0.675, 0.075 / 0.675, 0.05 / 0.675], dtype=torch.float64)
    torch.testing.assert_close((p.log() + bias).softmax(-1), expected)


def test_the_released_opening_is_the_best_plain_one_of_the_best() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    openings = [[3, 2], [0], [1, 3], [1, 1]]  # 0.3, 0.4, 0.4, 0.6
    assert best_opening(logits, openings, [False] * 4) == 3
    assert best_opening(logits, openings, [True, False, True, False]) == 2
    assert best_opening(logits, openings, [True, True, True, False]) == 1
    assert best_opening(logits, openings, [True, False, True, False], most=2) == 3


def test_released_after_safe_is_the_released_arithmetic_on_a_fixed_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm, ids = small_lvlm("llava"), ordinary_tokens()
    r = opening_ids(lvlm, lvlm.prompt("a", "Why?", None), "I")[-1]
    low, middle, high = ids[0], ids[1], ids[2]
    assert low < middle < high < r
    how = SafeCoDe(profile="released", alpha=0.4, steps=2, refusals=("I",))
    trace = [
        # alpha' = 0.2: z_r = 2, z_low = 1.9 - 0.2 · 2 = 1.5; halved, r has exp(0.5)/2 = 0.82 of low's share (under the
        # whole alpha it would have exp(0.9)/2 = 1.23 of it)
        ({r: 2.0, low: 1.9}, {r: 0.0, low: 2.0}),
        # p = 4/6, 1/6, 1/6; r halved and renormalised: 0.5, 0.25, 0.25; at T 0.8: 0.5432, 0.2284, 0.2284
        ({r: math.log(4), low: 0.0, middle: 0.0}, {r: 0.0, low: 0.0, middle: 0.0}),
        # no suppression, p = 0.5, 0.3, 0.15, 0.05; at T 0.8: 0.5536, 0.2924, 0.1229, 0.0311; top-p 0.9 leaves three
        *[({r: math.log(0.5), low: math.log(0.3), middle: math.log(0.15), high: math.log(0.05)}, {})] * 2,
    ]
    seen: set[tuple[int, ...]] = set()
    for name in map(str, range(40)):
        some = case(name, "Why?", picture())
        play(monkeypatch, lvlm, trace)
        seed = seed_of(some, GREEDY)
        first, rest = uniform_numbers(seed, 2)[1], uniform_numbers(row_seed(seed, "rest"), 2)
        led = at_share(first, {low: 0.25**1.25, middle: 0.25**1.25, r: 0.5**1.25})
        sampled = [at_share(u, {low: 0.3**1.25, middle: 0.15**1.25, r: 0.5**1.25}) for u in rest]
        tokens = told_tokens(how.decoded(lvlm, some, replace(GREEDY, max_new_tokens=4), False), lvlm)
        assert tokens == (low, led, *sampled)
        seen.add(tokens)
    assert len(seen) > 9


def test_released_after_unsafe_is_the_released_arithmetic_on_a_fixed_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm, (low, middle, high) = small_lvlm("llava"), ordinary_tokens()[:3]
    refusals, keywords = ("q q q q q q", "k l m n o p", "r s t u v w"), ("K L", "r s")
    prompt = lvlm.prompt("a", "Why?", picture())
    written = [opening_ids(lvlm, prompt, text) for text in refusals]
    q, x, y = (own_token(written, at) for at in range(3))
    assert [[tokens.count(token) for token in (q, x, y)] for tokens in written] == [[6, 0, 0], [0, 1, 0], [0, 0, 1]]
    trace = [
        # z_x = 2.9 - 0, z_y = 3 - 0.3 · 1 = 2.7: x wins by the contrast; q is best, 6 exp(2) against exp(2.9), but no
        # keyword stands in its refusal
        ({x: 2.9, y: 3.0, q: 2.0}, {x: 0.0, y: 1.0, q: 0.0}),
        *[({}, {})] * 4,
        # p = 0.6, 0.3, 0.1; p^(1/0.7) renormalised: 0.6873, 0.2553, 0.0531 / 0.9957; top-p 0.85 leaves two
        *[({low: math.log(0.6), middle: math.log(0.3), high: math.log(0.1)}, {})] * 3,
    ]
    how = SafeCoDe(profile="released", refusals=refusals, keywords=keywords, continued_tokens=3)
    for name in map(str, range(20)):
        some = case(name, "Why?", picture())
        drawn = uniform_numbers(seed_of(some, GREEDY), 8)[5:]
        sampled = [at_share(u, {low: 0.6 ** (1 / 0.7), middle: 0.3 ** (1 / 0.7)}) for u in drawn]
        play(monkeypatch, lvlm, trace)
        assert told_tokens(how.decoded(lvlm, some, GREEDY, True), lvlm) == (*written[1][:5], *sampled)
    for other, opening in ((replace(how, alpha=0), written[2]), (replace(how, keywords=("none",)), written[0])):
        play(monkeypatch, lvlm, trace)
        assert told_tokens(other.decoded(lvlm, some, GREEDY, True), lvlm)[:5] == opening[:5]


def test_released_leads_until_a_sentence_has_begun() -> None:
    assert [begins_a_sentence(text) for text in ("The dog", "A dog", "the dog", "The", "")] == [True] + [False] * 4


@pytest.mark.parametrize(("family", "most"), [("llava", 20), ("llava_next", 20), ("qwen2_5_vl", 30), ("mllama", 256)])
def test_released_goes_on_after_a_refusal_as_long_as_it_is_published(family: str, most: int) -> None:
    lvlm, how = small_lvlm(family), SafeCoDe(profile="released")
    asking = how.decoded(lvlm, case("a", seen=picture()), GenerationConfig(max_new_tokens=400), True)
    reading = next(asking)
    assert [ask.max_new_tokens for ask in reading] == [0, 0]
    (ask,) = asking.send(told(lvlm, *reading))
    assert (len(ask.forced), ask.max_new_tokens) == (5, 5 + most)
    assert under(how, lvlm, case("a", seen=picture()), True, GenerationConfig(max_new_tokens=3)).num_tokens <= 3


# ---- the verdict


@pytest.mark.slow
def test_a_trained_model_tells_unsafe_scenes_and_better_with_the_picture() -> None:
    some, labels = scenes()
    shares = []
    for sees in (False, True):
        flags = [reply.flagged for reply in answered(SafeCoDe(verdict_sees_picture=sees), micro(), some, GREEDY)]
        assert None not in flags
        shares.append(np.mean([flag == (label == "unsafe") for flag, label in zip(flags, labels, strict=True)]))
    assert shares[1] >= shares[0]
    assert shares[1] > 0.85


@pytest.mark.parametrize(
    ("word", "verdict", "published"),
    [
        ("unsafe", True, True),
        ("Unsafe.", True, False),
        (" UNSAFE\n", True, True),
        ("safe", False, False),
        ("It depends.", None, False),
    ],
)
def test_the_verdict_is_the_word_and_published_slips_are_an_option(
    word: str, verdict: bool | None, published: bool
) -> None:
    lvlm = micro()
    for how, expected in (
        (SafeCoDe(), verdict),
        (SafeCoDe(profile="released", published_slips=True), published),
    ):
        asking = how.judged(lvlm, case("a", seen=picture()))
        (caption,) = next(asking)
        (question,) = asking.send([says(lvlm, "A dog.")])
        assert (caption.purpose, question.purpose) == ("verdict", "verdict")
        assert (caption.max_new_tokens, question.max_new_tokens) == (100, 10)
        with pytest.raises(StopIteration) as ended:
            asking.send([says(lvlm, word)])
        assert ended.value.value is expected


def test_a_verdict_raises_or_lowers_the_refusal_tokens_and_none_modulates_nothing() -> None:
    lvlm, how = small_lvlm("llava"), SafeCoDe(lambda_boost=2.5, lambda_supp=1.5)
    row = case("a", seen=picture())
    asks = [next(how.decoded(lvlm, row, GREEDY, unsafe))[0] for unsafe in (True, False, None)]
    assert [ask.phases[0].bias for ask in asks] == [2.5, -1.5, 0.0]
    assert all(ask.phases[0].steps == 5 and ask.phases[-1].bias == 0 for ask in asks)
    prompt = lvlm.prompt("a", "What is shown?", picture())
    expected = {token for text in how.refusals for token in opening_ids(lvlm, prompt, text)}
    assert set(asks[0].phases[0].biased) == expected
    assert len(asks[0].phases[0].biased) == len(expected)
    assert under(how, lvlm, row, None, GREEDY) == under(SafeCoDe(verdict="none"), lvlm, row, None, GREEDY)
    assert under(how, lvlm, row, None, GREEDY).flagged is None


def test_an_unparsable_verdict_leaves_the_contrast_alone() -> None:
    for profile in PROFILES:
        lvlm, how = small_lvlm("llava"), SafeCoDe(profile=profile)
        some = cases("llava")
        judged, unjudged = (answered(each, lvlm, some, SAMPLED) for each in (how, replace(how, verdict="none")))
        assert judged == unjudged  # a model with random weights says neither word
        assert all(reply.flagged is None for reply in judged)


def test_a_strong_boost_leaves_refusal_tokens_alone_and_a_strong_suppression_none_of_them() -> None:
    some, lvlm = scenes()[0][:8], micro()
    how = SafeCoDe(alpha=0, lambda_boost=30, lambda_supp=30, refusals=(REFUSAL,), verdict="none")
    tokens = opening_ids(lvlm, lvlm.prompt("a", "Why?", picture()), REFUSAL)
    for each in some:
        raised, lowered = (told_tokens(how.decoded(lvlm, each, GREEDY, unsafe), lvlm)[:5] for unsafe in (True, False))
        assert set(raised) <= set(tokens)
        assert not set(lowered) & set(tokens)


@pytest.mark.slow
def test_released_begins_with_a_refusal_after_unsafe() -> None:
    lvlm, how = micro(), SafeCoDe(profile="released", verdict_sees_picture=True)
    replies = answered(how, lvlm, scenes()[0], GenerationConfig(max_new_tokens=64))
    flagged = [reply for reply in replies if reply.flagged]
    assert flagged
    for reply in flagged:
        assert reply.num_tokens <= 25
        assert any(reply.text[:12] == refusal[:12] for refusal in how.refusals), reply.text


# ---- the noisy view


def test_the_noise_is_clipped_seeded_and_as_wide_as_it_says() -> None:
    grey = Image.new("RGB", (90, 300), (128, 128, 128))
    eps = (np.asarray(noisy_view(grey, 0.1, 7)).astype(float) - 128) / 255
    assert eps.shape == (300, 90, 3)
    assert eps.std() == pytest.approx(0.1, rel=0.02)
    assert abs(eps.mean()) < 0.002
    assert noisy_view(grey, 0.1, 7).tobytes() == noisy_view(grey, 0.1, 7).tobytes()
    assert noisy_view(grey, 0.1, 8).tobytes() != noisy_view(grey, 0.1, 7).tobytes()
    assert noisy_view(picture(), 0.0, 7).tobytes() == picture().tobytes()
    black = np.asarray(noisy_view(Image.new("RGB", (64, 64)), 0.1, 7))
    assert 0.45 < (black == 0).mean() < 0.55  # half of the noise is below, and clipped


def test_rows_have_their_own_noise_and_the_runs_seed_changes_it() -> None:
    lvlm, how = small_lvlm("llava"), SafeCoDe(verdict="none")
    rows = [("a", 0), ("b", 0), ("a", 1), ("a", 0)]
    asks = [the_ask(how, lvlm, case(name, seen=picture()), replace(GREEDY, seed=seed)) for name, seed in rows]
    pixels = [ask.partner.tensors["pixel_values"] for ask in asks if ask.partner is not None]
    assert pixels[0].equal(pixels[3])
    assert not any(pixels[0].equal(other) for other in pixels[1:3])


def test_a_request_without_a_picture_has_no_second_view() -> None:
    for profile in PROFILES:
        how = SafeCoDe(profile=profile, verdict="none")
        ask = the_ask(how, small_lvlm("llava"), case("a"), GREEDY)
        assert ask.partner is None
        assert all(phase.contrast == 0 for phase in ask.phases)
    paper = SafeCoDe(verdict="none")
    text = [case("a"), case("b", "Why?")]
    assert answered(paper, small_lvlm("llava"), text, GREEDY) == answered(
        NoDefense(), small_lvlm("llava"), text, GREEDY
    )


def test_seconds_are_those_of_the_verdict_the_contrast_and_the_answer() -> None:
    lvlm, row = small_lvlm("llava"), [case("a", seen=picture())]
    costs = [answered(how, lvlm, row, GREEDY)[0].cost for how in (SafeCoDe(), SafeCoDe(verdict="none"), NoDefense())]
    assert [cost.verdict_seconds > 0 for cost in costs] == [True, False, False]
    assert [cost.contrast_seconds > 0 for cost in costs] == [True, True, False]


# ---- words and settings


def test_an_opening_has_the_tokens_that_the_model_itself_writes() -> None:
    lvlm, found = micro(), 0
    for each in scenes()[0]:
        prompt = lvlm.prompt("a", each.sample.prompt, each.picture)
        (answer,) = told(lvlm, Ask(prompt, 14))
        if lvlm.text(answer.tokens) == REFUSAL:
            found += 1
            assert answer.tokens[:-1] == opening_ids(lvlm, prompt, REFUSAL)
    assert found


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": 1.0}, r"defense\.alpha"),
        ({"alpha": math.nan}, r"defense\.alpha"),
        ({"steps": 0}, r"defense\.steps"),
        ({"sigma": math.inf}, r"defense\.sigma"),
        ({"lambda_boost": -1}, r"defense\.lambda_boost"),
        ({"lambda_supp": math.nan}, r"defense\.lambda_supp"),
        ({"lambda_supp": 2.0, "profile": "released"}, r"defense\.lambda_supp must be below 2"),
        ({"plausibility": 1.1}, r"defense\.plausibility"),
        ({"caption_instruction": " "}, r"defense\.caption_instruction"),
        ({"verdict_template": "Safe?"}, r"defense\.verdict_template has no place for the prompt"),
        ({"verdict_template": "{prompt} {picture}"}, r"defense\.verdict_template has the place \{picture\}"),
        ({"refusals": ()}, r"defense\.refusals"),
        ({"refusals": ("I", " ")}, r"defense\.refusals"),
        ({"published_slips": True}, r"defense\.published_slips belongs to"),
        ({"continued_tokens": 9}, r"defense\.continued_tokens belongs to"),
        ({"continued_tokens": 0, "profile": "released"}, r"defense\.continued_tokens must be positive"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        SafeCoDe(**options)


def test_sampling_settings_that_the_released_profile_ignores_are_told_of() -> None:
    for profile, told_of in (("released", True), ("paper", False)):
        run = AuditConfig(defense=Choice("safecode", {"profile": profile}), generation=SAMPLED)
        assert any("defense.profile released has its own" in sentence for sentence in ignored_settings(run)) == told_of


def test_a_question_without_a_place_for_the_caption_asks_for_none() -> None:
    how = SafeCoDe(verdict_template="Request: {prompt} Is it safe or unsafe? Answer with one word.")
    (ask,) = next(how.judged(micro(), case("a", "Use {caption}?", picture())))
    assert ask.max_new_tokens == 10
    assert isinstance(ask.prompt, Prompt)
    assert not ask.prompt.image
    assert "Request: Use {caption}? Is it safe" in micro().tokenizer.decode(ask.prompt.tensors["input_ids"][0])


def test_the_plausibility_constraint_reaches_the_contrasted_steps() -> None:
    how = SafeCoDe(verdict="none", plausibility=1.0, alpha=0.9, sigma=1.0)
    for family in DISTINCT:  # only the likeliest token on the picture is plausible: the plain model again
        lvlm = small_lvlm(family)
        assert answered(how, lvlm, cases(family), GREEDY) == answered(NoDefense(), lvlm, cases(family), GREEDY)


# ---- tools


def the_ask(how: SafeCoDe, lvlm: Lvlm, some: Case, generation: GenerationConfig) -> Ask:
    """The only ask of a defense without a verdict."""
    (ask,) = next(how.answer(lvlm, some, generation))
    return ask


def told(lvlm: Lvlm, *asks: Ask) -> list[Answer]:
    """The answers of asks made side by side."""

    def one() -> Asking[list[Answer]]:
        return list((yield list(asks)))

    (outcome,) = Decoder(lvlm, 4).run([one()])
    assert isinstance(outcome.value, list)
    return outcome.value


def told_tokens(asking: Asking[Reply], lvlm: Lvlm) -> tuple[int, ...]:
    """The decoded tokens behind a reply."""
    kept: list[Answer] = []
    original: Callable[[Answer], Reply] = lvlm.reply

    def noted(answer: Answer) -> Reply:
        kept.append(answer)
        return original(answer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lvlm, "reply", noted)
        lvlm.answered([asking], 2)
    (answer,) = kept
    return answer.tokens


def logits_after(lvlm: Lvlm, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
    """[V]: of the token that follows, by a plain forward pass without a cache."""
    tensors = lvlm._placed(collate([continued(prompt, tokens)], lvlm.pad_id).tensors)
    with torch.inference_mode():
        logits: Tensor = lvlm.model(**tensors).logits
    return logits[0, -1].float()


def says(lvlm: Lvlm, text: str) -> Answer:
    """An answer of these words."""
    tokens = tuple(lvlm.tokenizer(text, add_special_tokens=False)["input_ids"])
    return Answer(tokens, "end", 1, (), Cost())


def ordinary_tokens() -> list[int]:
    """Three tokens of small letters, which end nothing and begin no sentence."""
    tokenizer = small_lvlm("llava").tokenizer
    pieces = [(token, piece) for piece, token in tokenizer.get_vocab().items() if piece in ("a", "e", "t", "n")]
    return sorted(token for token, _ in pieces)


def own_token(written: Sequence[Sequence[int]], at: int) -> int:
    """A token of this text that stands in no other."""
    others = {token for other in (*written[:at], *written[at + 1 :]) for token in other}
    return next(token for token in written[at] if token not in others)


def at_share(u: float, shares: Mapping[int, float]) -> int:
    """The token whose stretch of the cumulative shares, in the vocabulary's order, holds the fraction u of the sum."""
    left = u * sum(shares.values())
    for token in sorted(shares):
        left -= shares[token]
        if left < 0:
            return token
    return max(shares)


def play(
    monkeypatch: pytest.MonkeyPatch, lvlm: Lvlm, trace: Sequence[tuple[Mapping[int, float], Mapping[int, float]]]
) -> None:
    """The model runs as ever, but its logits are the trace's: row 0 the picture's, row 1 the noisy view's."""
    played = iter(trace)

    def instead(read: Read) -> Read:
        logits = torch.full_like(read.logits, -40.0)
        for row, values in zip(logits, next(played), strict=False):
            for token, value in values.items():
                row[token] = value
        return replace(read, logits=logits)

    monkeypatch.setattr(lvlm, "prefill", lambda *given: instead(Lvlm.prefill(lvlm, *given)))
    monkeypatch.setattr(lvlm, "step", lambda *given: instead(Lvlm.step(lvlm, *given)))
