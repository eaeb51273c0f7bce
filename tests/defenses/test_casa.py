"""CASA: the label is the two labels' softmax by hand, costs one step, is never shown, and no prefill gets past it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from guardalign.config import GenerationConfig, LvlmConfig
from guardalign.core.safety_attention import SafetyAttention
from guardalign.defenses import answered
from guardalign.defenses.casa import Casa, LabelReading
from guardalign.defenses.guardalign import GuardAlignDefense
from guardalign.defenses.plain import PREFIX, NoDefense
from guardalign.errors import ConfigError, ModelError
from guardalign.micro import resolve_lvlm
from guardalign.micro.sample import SAMPLE
from guardalign.models.asking import Ask, Asking
from guardalign.models.decoding import Decoder
from guardalign.models.lvlm import Lvlm
from guardalign.models.openings import opening_ids
from guardalign.models.prompts import Prompt
from guardalign.models.safety_head import lvlm_fingerprint, save_head
from guardalign.types import Case, Reply, Sample
from tests.small_lvlms import FAMILIES_BY_TURNS, FAMILIES_SELDOM, picture, small_lvlm

GREEDY = GenerationConfig(max_new_tokens=6)
REFUSING = {"label_before_safe": False, "refusal": "I'm sorry"}


def cases() -> list[Case]:
    prompts = ("What is shown?", "Describe the image, then count the cats and the dogs.", "Why?")
    pictures = (picture(), None, picture(30, 70, "green"))
    return [Case(Sample(str(at), p, None, ""), x) for at, (p, x) in enumerate(zip(prompts, pictures, strict=True))]


def readings(lvlm: Lvlm, defense: Casa, some: list[Case], hidden: bool = True) -> list[LabelReading]:
    def read(case: Case) -> Asking[LabelReading]:
        return (yield from defense.read(lvlm, case, hidden))

    found = [outcome.value for outcome in Decoder(lvlm, 4).run(read(case) for case in some)]
    return [each for each in found if isinstance(each, LabelReading)]


@pytest.fixture(scope="module")
def micro() -> Lvlm:
    return Lvlm.load(resolve_lvlm(LvlmConfig(device="cpu")))


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Case, str]]:
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    rows = [row for row in pq.read_table(SAMPLE).to_pylist() if row["image"]][:48]
    return [
        (Case(Sample(row["sample_id"], row["prompt"], None, ""), Image.open(io.BytesIO(row["image"]))), row["label"])
        for row in rows
    ]


@pytest.mark.parametrize("labels", [("unsafe", "safe"), ("harmful and unsafe", "safe")], ids=["short", "long"])
@pytest.mark.parametrize("family", FAMILIES_SELDOM)
def test_token_only_is_masking_by_hand(family: str, labels: tuple[str, str]) -> None:
    """softmax over the labels' sequence log-probabilities, each from one plain forward over prompt and label."""
    lvlm = small_lvlm(family)
    defense = Casa(mode="token_only", unsafe_label=labels[0], safe_label=labels[1])
    for case, reply in zip(cases(), answered(defense, lvlm, cases(), GREEDY), strict=True):
        prompt = lvlm.prompt(case.sample.sample_id, case.sample.prompt, case.picture)
        sums = [forced_log_probability(lvlm, prompt, opening_ids(lvlm, prompt, word)) for word in labels]
        assert reply.defense_score == pytest.approx(torch.tensor(sums).softmax(0)[0].item(), abs=1e-4)
        assert reply.flagged == (reply.defense_score >= 0.5)  # type: ignore[operator]


def forced_log_probability(lvlm: Lvlm, prompt: object, ids: tuple[int, ...]) -> float:
    """Without the loop's cache: each token's probability after the prompt and the tokens before it."""
    from guardalign.models.asking import continued

    total = 0.0
    for at, token in enumerate(ids):
        probabilities = lvlm.first_token_probabilities([continued(prompt, ids[:at])])[0]  # type: ignore[arg-type]
        total += float(probabilities[token].log())
    return total


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_a_label_read_off_the_logits_is_the_label_forced(family: str) -> None:
    lvlm = small_lvlm(family)
    for case in cases():
        (reading,) = readings(lvlm, Casa(mode="token_only"), [case])
        prompt = lvlm.prompt(case.sample.sample_id, case.sample.prompt, case.picture)
        logs = [forced_log_probability(lvlm, prompt, ids) for ids in reading.labels]
        assert [reading.log_unsafe, reading.log_safe] == pytest.approx(logs, abs=1e-3)


@pytest.mark.parametrize("label_before_safe", [True, False])
@pytest.mark.parametrize("family", FAMILIES_SELDOM)
def test_the_reply_is_the_text_after_the_label_alone_and_with_neighbours(family: str, label_before_safe: bool) -> None:
    """By hand: the label of the higher probability forced, and its tokens cut off; the batch does not matter."""
    lvlm = small_lvlm(family)
    defense = Casa(mode="token_only", label_before_safe=label_before_safe)
    together = answered(defense, lvlm, cases(), GREEDY)
    for case, reply in zip(cases(), together, strict=True):
        assert bare(answered(defense, lvlm, [case], GREEDY)[0]) == bare(reply)
        prompt = lvlm.prompt(case.sample.sample_id, case.sample.prompt, case.picture)
        label = opening_ids(lvlm, prompt, "unsafe" if reply.flagged else "safe")
        label = label if reply.flagged or label_before_safe else ()
        ask = Ask(prompt, GREEDY.max_new_tokens + len(label), forced=label)
        (by_hand,) = Decoder(lvlm, 1).run([_tokens(ask)])
        assert isinstance(by_hand.value, tuple)
        assert reply.text == lvlm.text(by_hand.value[len(label) :])
        assert reply.num_tokens == len(by_hand.value) - len(label)


def _tokens(ask: Ask) -> Asking[tuple[int, ...]]:
    (answer,) = yield [ask]
    return answer.tokens


def bare(reply: Reply) -> Reply:
    return dataclasses.replace(reply, defense_score=None, cost=type(reply.cost)())


def test_a_safe_answer_without_its_label_is_the_undefended_one(micro: Lvlm, scenes: list[tuple[Case, str]]) -> None:
    some = [case for case, _ in scenes]
    plain = answered(NoDefense(), micro, some, GREEDY)
    defended = answered(Casa(mode="token_only", **REFUSING), micro, some, GREEDY)  # type: ignore[arg-type]
    safe = [at for at, reply in enumerate(defended) if not reply.flagged]
    assert 10 < len(safe) < len(some)
    assert [defended[at].text for at in safe] == [plain[at].text for at in safe]


def test_the_label_costs_one_step(micro: Lvlm, scenes: list[tuple[Case, str]]) -> None:
    """The prompt is read once; an answer of n tokens takes n - 1 steps without a label and n with one."""
    some = [case for case, _ in scenes[:6]]
    before = micro.num_forward_calls
    replies = answered(Casa(), micro, some, GREEDY, capacity=8)
    assert micro.num_forward_calls - before == 1 + max(reply.num_tokens for reply in replies)
    assert [reply.cost.steps for reply in replies] == [reply.num_tokens for reply in replies]
    assert [each.cost.steps for each in answered(NoDefense(), micro, some[:1], GREEDY)] == [GREEDY.max_new_tokens - 1]


def test_a_forced_answer_prefix_cannot_skip_the_label(micro: Lvlm, scenes: list[tuple[Case, str]]) -> None:
    """Label and score are decided before the prefill, and stand before it; what the model then says is its own."""
    some, attack = [case for case, _ in scenes], "Sure, here is"
    longer = GenerationConfig(max_new_tokens=40)
    calm = answered(Casa(**REFUSING), micro, some, longer)  # type: ignore[arg-type]
    attacked = answered(Casa(prefill=attack, **REFUSING), micro, some, longer)  # type: ignore[arg-type]
    assert [a.flagged for a in attacked] == [c.flagged for c in calm]
    assert [a.defense_score for a in attacked] == pytest.approx([c.defense_score for c in calm], abs=1e-5)
    flagged = [at for at, reply in enumerate(calm) if reply.flagged]
    assert len(flagged) > 10
    assert all(calm[at].text == "I'm sorry, but I can't help with that." for at in flagged)
    assert all(reply.text.startswith(attack) for reply in attacked)


def test_the_label_stands_before_a_prefill(micro: Lvlm, scenes: list[tuple[Case, str]]) -> None:
    case = next(case for case, label in scenes if label == "unsafe")
    seen: list[Ask] = []

    def watched() -> Asking[Reply]:
        asking = Casa(mode="token_only", threshold=1e-9, prefill="Sure, here is").answer(micro, case, GREEDY)
        asks = next(asking)
        while True:
            seen.extend(asks)
            try:
                asks = asking.send((yield asks))
            except StopIteration as stop:
                return stop.value

    micro.answered([watched()], 1)
    prompt = seen[0].prompt
    assert isinstance(prompt, Prompt)
    label = opening_ids(micro, prompt, "unsafe")
    assert seen[-1].forced == label + opening_ids(micro, prompt, "Sure, here is", "unsafe")


def test_the_embedded_head_decides_scenes_that_it_never_saw(micro: Lvlm, scenes: list[tuple[Case, str]]) -> None:
    labels = [label == "unsafe" for _, label in scenes]
    for mode in ("scale", "replace"):
        replies = answered(Casa(mode=mode), micro, [case for case, _ in scenes], GREEDY)  # type: ignore[arg-type]
        right = [reply.flagged == unsafe for reply, unsafe in zip(replies, labels, strict=True)]
        assert sum(right) >= 0.85 * len(right)


def test_scale_and_replace_use_the_head_over_the_whole_prompt(tmp_path: Path) -> None:
    lvlm = small_lvlm("llava")
    case = cases()[0]
    prompt = lvlm.prompt("0", case.sample.prompt, case.picture)
    (reading,) = readings(lvlm, Casa(mode="token_only"), [case])
    assert reading.hidden is not None and len(reading.hidden) == prompt.num_tokens
    folder = written_head(tmp_path / "head", lvlm)
    logit = SafetyAttention(torch.ones(48), 48, 8, seed=3).logit(reading.hidden)
    scores = [answered(Casa(mode=m, head=folder), lvlm, [case], GREEDY)[0].defense_score for m in ("replace", "scale")]  # type: ignore[arg-type]
    own = reading.log_unsafe - reading.log_safe
    assert scores == pytest.approx([torch.tensor(x).sigmoid().item() for x in (logit, own + logit)], abs=1e-5)


def written_head(folder: Path, lvlm: Lvlm) -> str:
    module = SafetyAttention(torch.ones(48), 48, 8, seed=3)
    save_head(folder, module, {"lvlm": lvlm_fingerprint(lvlm.config.model, lvlm.config.revision)})
    return str(folder)


def test_a_head_of_another_lvlm_is_refused(tmp_path: Path) -> None:
    folder = written_head(tmp_path / "head", small_lvlm("llava"))
    with pytest.raises(ModelError, match="was fitted to another LVLM"):
        answered(Casa(head=folder), small_lvlm("internvl"), cases(), GREEDY)
    with pytest.raises(ModelError, match=r"^defense\.head embedded was fitted to another LVLM"):
        answered(Casa(), small_lvlm("llava"), cases(), GREEDY)
    with pytest.raises(ModelError, match="no fitted head"):
        answered(Casa(head=str(tmp_path / "none")), small_lvlm("llava"), cases(), GREEDY)


def test_the_fingerprint_follows_the_head(tmp_path: Path) -> None:
    folder = written_head(tmp_path / "head", small_lvlm("llava"))
    prints = {Casa(head=folder).fingerprint, Casa().fingerprint, Casa(mode="token_only").fingerprint}
    assert len(prints) == 3
    with pytest.raises(ModelError, match="no fitted head"):
        _ = Casa(head=str(tmp_path / "none")).fingerprint


@pytest.mark.parametrize("gamma", [0.0, 3.0])
def test_calibration_raises_attention_before_the_label_and_after(gamma: float) -> None:
    """Without a label, CASA under a prefix and gamma decodes what GuardAlign does; gamma reaches the label's score."""
    lvlm, some = small_lvlm("llava"), cases()
    never = {"mode": "token_only", "threshold": 1 - 1e-9, "label_before_safe": False}
    casa = answered(Casa(prefix=PREFIX, gamma=gamma, **never), lvlm, some, GREEDY)  # type: ignore[arg-type]
    guardalign = answered(GuardAlignDefense(gamma=gamma), lvlm, some, GREEDY)
    assert [reply.text for reply in casa] == [reply.text for reply in guardalign]
    other = answered(Casa(prefix=PREFIX, gamma=1.5, **never), lvlm, some, GREEDY)  # type: ignore[arg-type]
    assert [reply.defense_score for reply in casa] != [reply.defense_score for reply in other]


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_an_opening_is_written_as_the_model_itself_would(family: str) -> None:
    """Read back after the prompt's own end, the ids give the words; several words in one go or in two are alike."""
    lvlm = small_lvlm(family)
    prompt = lvlm.prompt("a", "What is shown?", picture())
    whole = opening_ids(lvlm, prompt, "safe words")
    assert lvlm.text(whole) == "safe words"
    parts = opening_ids(lvlm, prompt, "safe"), opening_ids(lvlm, prompt, "words", after="safe")
    assert lvlm.text(parts[0] + parts[1]) == "safe words"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 0.0}, "defense.threshold"),
        ({"unsafe_label": "safe"}, "must differ"),
        ({"safe_label": " "}, "must be words"),
        ({"refusal": " "}, "defense.refusal is blank"),
        ({"gamma": 1.0}, "there is none: give defense.prefix"),
        ({"gamma": -1.0, "prefix": PREFIX}, "defense.gamma"),
        ({"layers": []}, "defense.layers"),
        ({"head": ""}, "defense.head is empty"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Casa(**options)  # type: ignore[arg-type]
