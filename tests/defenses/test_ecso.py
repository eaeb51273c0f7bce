"""ECSO: what it does not flag is the plain answer, and what it flags is answered without the picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from guardalign.config import GenerationConfig, LvlmConfig
from guardalign.defenses import answered
from guardalign.defenses.ecso import Ecso
from guardalign.defenses.plain import NoDefense
from guardalign.errors import ConfigError
from guardalign.micro import FOLDER, resolve_lvlm
from guardalign.micro.dialogues import PLACEHOLDER, REFUSAL
from guardalign.models.asking import Answer, Ask, Asking
from guardalign.models.lvlm import Lvlm
from guardalign.models.prompts import Prompt
from guardalign.types import Case, Cost, Detection, Reply, Sample
from tests.small_lvlms import FAMILIES_BY_TURNS, FAMILIES_SELDOM, picture, small_lvlm

GREEDY = GenerationConfig(max_new_tokens=8)
SAMPLED = GenerationConfig(max_new_tokens=8, temperature=0.9, seed=3)
FLAGGED = Detection(True, 0.1, 0.5, "weapons", {})
CLEAR = replace(FLAGGED, flagged=False, image_score=0.9)


def case(name: str, text: str, seen: Image.Image | None, detection: Detection | None = None) -> Case:
    return Case(Sample(name, text, None, "here"), seen, detection)


CASES = [
    case("a", "What is shown?", picture(), FLAGGED),
    case("b", "Describe the image, then count the cats and the dogs.", None),
    case("c", "Why?", picture(30, 70, "green"), CLEAR),
    case("d", "What is shown <image>?", picture(60, 60, "white"), FLAGGED),
]


@lru_cache(maxsize=1)
def micro() -> Lvlm:
    return Lvlm.load(resolve_lvlm(LvlmConfig()))


@lru_cache(maxsize=1)
def scenes() -> tuple[list[Case], list[str]]:
    """Forty scenes of the packaged sample, and their labels."""
    rows = [row for row in pq.read_table(FOLDER / "sample.parquet").to_pylist() if row["image"] is not None][:40]
    pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]
    made = [case(row["sample_id"], row["prompt"], seen) for row, seen in zip(rows, pictures, strict=True)]
    return made, [row["label"] for row in rows]


def asked(asking: Asking[Reply], *said: Answer) -> list[Ask]:
    """Every ask of a sample that gets these answers, one after the other."""
    (ask,), asks = next(asking), []
    asks.append(ask)
    for answer in said:
        try:
            (ask,) = asking.send([answer])
        except StopIteration:
            return asks
        asks.append(ask)
    return asks


def says(lvlm: Lvlm, text: str) -> Answer:
    tokens = tuple(lvlm.tokenizer(text, add_special_tokens=False)["input_ids"])
    return Answer(tokens, "end", 1, (), Cost())


def read(lvlm: Lvlm, ask: Ask) -> str:
    """The prompt's text."""
    return str(lvlm.tokenizer.decode(prompt_of(ask).tensors["input_ids"][0]))


def prompt_of(ask: Ask) -> Prompt:
    assert isinstance(ask.prompt, Prompt)
    return ask.prompt


# ---- theorems


@pytest.mark.parametrize("detect", ["self", "ot"])
@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_without_the_picture_means_no_image_token_and_no_pixels(family: str, detect: str) -> None:
    lvlm = small_lvlm(family)
    words = [says(lvlm, "Sure."), says(lvlm, "Yes.")] if detect == "self" else []
    for row in (CASES[0], CASES[3]):  # the second's request has an image token written in it
        asking = Ecso(detect=detect).answer(lvlm, row, GREEDY)  # type: ignore[arg-type]
        asks = asked(asking, *words, says(lvlm, "A <image> of a cat."), says(lvlm, "No."))
        last, described = prompt_of(asks[-1]), prompt_of(asks[-2])
        assert described.image or "cross_attention_mask" in described.tensors
        assert last.image == ()
        of_pictures = set(lvlm.writer.processor.image_processor.model_input_names) | {"pixel_values"}
        assert of_pictures & set(described.tensors)
        assert not of_pictures & set(last.tensors)
        assert lvlm.writer.image_token_id not in last.tensors["input_ids"]
        alone = lvlm.prompt(row.sample.sample_id, "Why?", None)
        assert set(last.tensors) == set(alone.tensors)


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_the_last_answer_depends_on_the_description_alone(family: str) -> None:
    lvlm, seen = small_lvlm(family), []
    for colour in ("red", "green"):
        row = case("a", "What is shown?", picture(64, 64, colour))
        asks = asked(Ecso().answer(lvlm, row, GREEDY), says(lvlm, "It."), says(lvlm, "yes"), says(lvlm, "A cat."))
        assert len(asks) == 4
        seen.append(prompt_of(asks[-1]).tensors)
    assert all(seen[0][name].equal(seen[1][name]) for name in seen[0])


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES_SELDOM)
def test_what_is_not_flagged_is_the_plain_answer(family: str, generation: GenerationConfig) -> None:
    lvlm = small_lvlm(family)
    plain = answered(NoDefense(), lvlm, CASES, generation)
    judged = answered(Ecso(), lvlm, CASES, generation)  # a model with random weights does not say yes
    assert [reply.first_response for reply in judged] == [reply.text for reply in plain]
    assert [replace(reply, flagged=None, first_response=None) for reply in judged] == plain
    clear = [replace(each, detection=CLEAR) for each in CASES]
    detected = answered(Ecso(detect="ot"), lvlm, clear, generation)
    assert [reply.flagged for reply in detected] == [False, None, False, False]
    assert [replace(reply, flagged=None, first_response=None) for reply in detected] == plain


@pytest.mark.parametrize("family", FAMILIES_SELDOM)
def test_an_answer_is_the_same_alone_and_in_any_batch(family: str) -> None:
    lvlm, how = small_lvlm(family), Ecso(detect="ot", caption_tokens=5)
    alone = [answered(how, lvlm, [each], SAMPLED)[0] for each in CASES]
    assert [reply.flagged for reply in alone] == [True, None, False, True]
    for capacity in (1, 3, 8):
        assert answered(how, lvlm, CASES, SAMPLED, capacity) == alone
    assert answered(how, lvlm, CASES[::-1], SAMPLED) == alone[::-1]


# ---- the judgement


@pytest.mark.parametrize(
    ("word", "flagged"),
    [("Yes.", True), ("yes, it is", True), ("No.", False), ("It is not harmful.", None), ("yes or no?", None)],
)
def test_only_a_yes_flags(word: str, flagged: bool | None) -> None:
    lvlm, row = micro(), case("a", "How can I use what is shown?", picture())
    asking = Ecso().answer(lvlm, row, GREEDY)
    first, judge, *more = asked(asking, says(lvlm, "A key."), says(lvlm, word))
    assert (first.purpose, judge.purpose, judge.max_new_tokens) == ("answer", "verdict", 10)
    assert "Request: How can I use what is shown? Answer: A key. Is the answer harmful" in read(lvlm, judge)
    assert bool(prompt_of(judge).image)
    assert [ask.purpose for ask in more] == (["verdict"] if flagged else [])


def test_a_trained_model_flags_its_harmful_answers_and_gives_them_again() -> None:
    some, labels = scenes()
    replies, plain = (answered(how, micro(), some, GenerationConfig()) for how in (Ecso(), NoDefense()))
    harmful = [reply.text == PLACEHOLDER for reply in plain]
    assert [reply.flagged for reply in replies] == harmful
    assert [reply.first_response for reply in replies] == [reply.text for reply in plain]
    again = [reply for reply in replies if reply.flagged]
    assert again
    assert any(reply.text == REFUSAL for reply in again)
    benign = [at for at, label in enumerate(labels) if label != "unsafe" and not harmful[at]]
    assert benign
    assert all(replies[at].text == plain[at].text for at in benign)


def test_a_request_without_a_picture_keeps_its_first_answer() -> None:
    lvlm = micro()
    asks = asked(Ecso().answer(lvlm, case("a", "Why?", None), GREEDY), says(lvlm, "So."), says(lvlm, "Yes."))
    assert len(asks) == 2


def test_judge_and_description_count_as_the_verdicts_seconds() -> None:
    lvlm = small_lvlm("llava")
    plain, judged = (answered(how, lvlm, CASES[:1], GREEDY)[0].cost for how in (NoDefense(), Ecso()))
    assert plain.verdict_seconds == 0 < judged.verdict_seconds
    asks = asked(Ecso(detect="ot").answer(lvlm, CASES[0], GREEDY), says(lvlm, "A cat."))
    assert [(ask.purpose, ask.max_new_tokens) for ask in asks] == [("verdict", 256), ("answer", 8)]


# ---- words and settings


def test_braces_in_requests_and_answers_stay_as_they_are() -> None:
    lvlm, row = micro(), case("a", "Why {answer} {caption}?", picture())
    _, judge, caption, last = asked(
        Ecso().answer(lvlm, row, GREEDY), says(lvlm, "{prompt}"), says(lvlm, "Yes."), says(lvlm, "{prompt} it")
    )
    assert "Request: Why {answer} {caption}? Answer: {prompt} Is the answer" in read(lvlm, judge)
    assert "for the request: Why {answer} {caption}?" in read(lvlm, caption)
    assert "described so: {prompt} it\nAnswer from the description alone" in read(lvlm, last)


def test_the_detectors_flag_needs_a_detector() -> None:
    with pytest.raises(ConfigError, match=r"^defense\.detect ot takes the detector's flag; set detector\.name"):
        answered(Ecso(detect="ot"), small_lvlm("llava"), [replace(CASES[0], detection=None)], GREEDY)


@pytest.mark.parametrize(
    ("options", "says_so"),
    [
        ({"judge_template": "Is it harmful?"}, r"defense\.judge_template has no place for the answer"),
        ({"judge_template": "{answer} {caption}"}, r"defense\.judge_template has the place \{caption\}"),
        ({"caption_template": " "}, r"defense\.caption_template is blank"),
        ({"caption_template": "{answer}"}, r"defense\.caption_template has the place \{answer\}"),
        ({"answer_template": "{prompt}"}, r"defense\.answer_template has no place for the caption"),
        ({"caption_tokens": 0}, r"defense\.caption_tokens must be positive"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, Any], says_so: str) -> None:
    with pytest.raises(ConfigError, match=f"^{says_so}"):
        Ecso(**options)


def test_the_judge_may_be_asked_without_the_picture() -> None:
    lvlm = small_lvlm("llava")
    pictures: Sequence[bool] = [
        bool(prompt_of(asked(Ecso(judge_sees_picture=sees).answer(lvlm, CASES[0], GREEDY), says(lvlm, "It."))[1]).image)
        for sees in (True, False)
    ]
    assert pictures == [True, False]
