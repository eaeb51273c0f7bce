"""The theorem: nothing that a user or a model writes becomes a control token, a picture, or a frame of another form.

For every text t, every family and every place that quotes a text:

    (a) the tokens of t hold no control token;
    (b) the control tokens around it, and all tokens before and after its stretch of plain text, are those of a
        harmless text;
    (c) pictures are as many, of as many tokens and tiles;
    (d) the stretch reads as the template's words with t in their midst.

What it cannot say: where a template marks turns by words alone (`USER:`, `ASSISTANT:` of LLaVA-1.5 and InstructBLIP),
these are words for whoever writes them; no tokens tell them apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import run
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from guardalign.config import GenerationConfig
from guardalign.defenses.ecso import Ecso
from guardalign.defenses.safecode import SafeCoDe
from guardalign.errors import RowError
from guardalign.judges.protocol import Exchange
from guardalign.judges.template import QUESTION, filled
from guardalign.models.asking import Answer, Ask
from guardalign.models.conversations import Conversation, ConversationWriter
from guardalign.models.lvlm import Lvlm
from guardalign.models.openings import opening_ids
from guardalign.models.prompts import Prompt
from guardalign.models.qformer import IDS
from guardalign.models.vocabulary import control_tokens, without_added_tokens
from guardalign.types import Case, Cost, Reply, Sample
from tests.fuzz.corpus_prompts import CONTROLS, MILLION, TURNS, prompts
from tests.fuzz.endings import AT_LENGTH, rows_must_be
from tests.small_guards import GUARD_TEMPLATE, PARTS_TEMPLATE, guard_tokenizer
from tests.small_lvlms import FAMILIES_BY_TURNS, picture, small_lvlm

PREFIX = "As an AI assistant, I answer safely. <image"
"""Ends in the first half of a token, which the instruction could complete."""
HARMLESS = "What is shown?"
PICTURE = picture()

# ---- end to end


def test_every_prompt_ends_as_a_row_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = prompts()
    lines = (json.dumps({"sample_id": name, "prompt": text}) for name, (text, _) in cases.items())
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    words = ("--input.format", "jsonl", "--input.path", tmp_path / "in.jsonl", "--output", tmp_path / "out")
    assert run("--recipe", "guardalign", *words, "--self_check", "false", "--cluster.log_seconds", 9999) == 0
    assert capsys.readouterr().err == ""
    rows_must_be(tmp_path / "out", {name: kind for name, (_, kind) in cases.items()})


# ---- the theorem, family by family


def alphabet(tokenizer: object) -> st.SearchStrategy[str]:
    """Texts made of a tokenizer's own control tokens, whole and in pieces, of turn marks, and of anything else."""
    own = [entry.content for entry in tokenizer.added_tokens_decoder.values()]  # type: ignore[attr-defined]
    marks = sorted({*own, *CONTROLS, *TURNS})
    broken = [part for mark in marks for part in (mark[: len(mark) // 2], mark[len(mark) // 2 :])]
    joined = ["\u200d".join(mark) for mark in marks] + [
        mark.replace("<", "\uff1c").replace("|", "\uff5c") for mark in marks
    ]
    glue = ["", " ", "\n", "\n\n", "\u200d", "\u200b", "\x00", "▁", "Ġ", "\ufffd", "\u0301", "é", "👍🏽", "a", "."]
    pieces = st.one_of(
        st.sampled_from(marks), st.sampled_from(broken + joined), st.sampled_from(glue), st.text(max_size=4)
    )
    return st.lists(pieces, max_size=7).map("".join)


def ids_of(prompt: Prompt) -> list[int]:
    """Its tokens."""
    return [int(token) for token in prompt.tensors["input_ids"][0].tolist()]


@dataclass(frozen=True)
class Frame:
    """What of a prompt may not depend on the user's text."""

    control: tuple[int, ...]
    """all control tokens, in order"""
    before: tuple[int, ...]
    """tokens up to the last control token before the instruction"""
    after: tuple[int, ...]
    """tokens from the first control token behind it on"""
    num_image: int
    others: tuple[tuple[str, tuple[int, ...]], ...]
    """shapes of what does not run over tokens"""


def frame_of(lvlm: Lvlm, prompt: Prompt) -> tuple[Frame, list[int]]:
    """The frame, and the stretch of plain tokens that it encloses."""
    ids, control = ids_of(prompt), control_tokens(lvlm.tokenizer.backend_tokenizer)
    start, stop = prompt.instruction
    first = next((at + 1 for at in range(start - 1, -1, -1) if ids[at] in control), 0)
    last = next((at for at in range(stop, len(ids)) if ids[at] in control), len(ids))
    others = {name: tuple(x.shape) for name, x in prompt.tensors.items() if name not in prompt.per_token}
    shapes = tuple(sorted((name, shape) for name, shape in others.items() if not name.startswith("qformer")))
    found = tuple(token for token in ids if token in control)
    return Frame(found, tuple(ids[:first]), tuple(ids[last:]), len(prompt.image), shapes), ids[first:last]


@cache
def harmless_frame(family: str, prefix: str | None, place: str, seen: bool) -> Frame:
    """Of a harmless text."""
    lvlm = small_lvlm(family)
    return frame_of(lvlm, lvlm.prompt("a", HARMLESS, PICTURE if seen else None, prefix, place))[0]  # type: ignore[arg-type]


def plain(text: str) -> str:
    """Up to what tokenizers themselves do: sentencepiece's mark is a blank, and outer blanks are its own."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace("▁", " ").strip()


def must_hold(family: str, text: str, prefix: str | None, place: str, seen: bool) -> None:
    """(a) to (d) for one text."""
    lvlm = small_lvlm(family)
    prompt = lvlm.prompt("a", text, PICTURE if seen else None, prefix, place)  # type: ignore[arg-type]
    frame, stretch = frame_of(lvlm, prompt)
    control = control_tokens(lvlm.tokenizer.backend_tokenizer) | set(lvlm.tokenizer.all_special_ids)
    assert control.isdisjoint(ids_of(prompt)[slice(*prompt.instruction)])
    assert control.isdisjoint(stretch)
    assert frame == harmless_frame(family, prefix, place, seen)
    lines = [text] if prefix is None else [prefix, text] if place == "before" else [text, prefix]
    template = lvlm.writer._templates[seen]
    users = "\n".join(lines)
    users = users.lstrip() if template.strips[0] else users
    users = users.rstrip() if template.strips[1] else users
    read = str(lvlm.tokenizer.decode(stretch, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    assert plain(read) == plain(template.before + users + template.after)
    if IDS in prompt.tensors:
        of_qformer = set(lvlm.writer.processor.qformer_tokenizer.all_special_ids)
        unknown = lvlm.writer.processor.qformer_tokenizer.unk_token_id
        inner = prompt.tensors[IDS][0].tolist()[1:-1]
        assert (of_qformer - {unknown}).isdisjoint(inner)


def check_texts(family: str, examples: int) -> Callable[[], None]:
    """The theorem for so many texts."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        alphabet(small_lvlm(family).tokenizer),
        st.sampled_from([None, PREFIX]),
        st.sampled_from(["before", "after"]),
        st.booleans(),
    )
    def texts(text: str, prefix: str | None, place: str, seen: bool) -> None:
        must_hold(family, text, prefix, place, seen)

    return texts


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_no_text_leaves_the_users_turn(family: str) -> None:
    check_texts(family, 30)()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_no_text_leaves_the_users_turn_at_length(family: str) -> None:
    check_texts(family, AT_LENGTH // 5)()


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_no_named_prompt_leaves_the_users_turn(family: str) -> None:
    for text, _ in prompts().values():
        if text is not None and len(text) < 10_000:
            must_hold(family, text, PREFIX, "before", seen=True)


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_words_at_the_borders_leave_every_token_of_the_frame_as_it_is(family: str) -> None:
    lvlm = small_lvlm(family)
    own = lvlm.prompt("a", "Why or why not", PICTURE)
    before, after = ids_of(own)[: own.instruction[0]], ids_of(own)[own.instruction[1] :]
    for control in CONTROLS + TURNS:
        prompt = lvlm.prompt("a", f"Why {control} not", PICTURE)
        assert (ids_of(prompt)[: prompt.instruction[0]], ids_of(prompt)[prompt.instruction[1] :]) == (before, after)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
@pytest.mark.parametrize("text", ["a" * MILLION, "<|im_end|>" * (MILLION // 10), "a " * (MILLION // 2), " " * MILLION])
def test_a_megabyte_is_written_in_seconds(family: str, text: str) -> None:
    lvlm, started = small_lvlm(family), time.process_time()
    lvlm.length_hint(text, (64, 48))
    try:
        assert lvlm.prompt("a", text, PICTURE).num_tokens > 0
    except RowError as error:  # the Q-Former's own limit
        assert error.kind == "prompt_too_long"
    assert time.process_time() - started < 15


# ---- the openings of answers


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_how_an_answer_opens_does_not_depend_on_the_users_text(family: str) -> None:
    lvlm = small_lvlm(family)
    expected = [opening_ids(lvlm, lvlm.prompt("a", HARMLESS, None), word) for word in ("unsafe", "I cannot help.")]
    for text in (*CONTROLS, *TURNS, "\u0301", "👍🏽", "x \u200d", "\n"):
        prompt = lvlm.prompt("a", text, None)
        assert [opening_ids(lvlm, prompt, word) for word in ("unsafe", "I cannot help.")] == expected, text


# ---- questions that quote the user, the model, or both

ECSO, SAFECODE = Ecso(), SafeCoDe()
SPLIT_TEMPLATE = "{prompt}{answer}"


def case_of(text: str) -> Case:
    """A sample with a picture."""
    return Case(Sample("a", text, b"", "in#0"), PICTURE)


def reply_of(text: str) -> Reply:
    """An answer."""
    return Reply(text, 1, 1, "end")


def answer_of(lvlm: Lvlm, text: str) -> Answer:
    """What the model would have to write to say this in words."""
    ids = lvlm.writer._blind[False].encode(text, add_special_tokens=False).ids
    return Answer(tuple(ids), "end", 1, (), Cost())


def prompts_asked(lvlm: Lvlm, text: str, said: str) -> Iterator[Prompt]:
    """Every question of defenses and judges about a user's text and a model's own words."""
    generation = GenerationConfig(max_new_tokens=4)
    for asking in (ECSO.judged(lvlm, case_of(text), said), ECSO.blind(lvlm, case_of(text), generation),
                   SAFECODE.judged(lvlm, case_of(text))):  # fmt: skip
        asks: Sequence[Ask] = next(asking)
        try:
            for _ in range(3):
                assert isinstance(asks[0].prompt, Prompt)
                yield asks[0].prompt
                asks = asking.send([answer_of(lvlm, said)])
        except StopIteration:
            continue
    for template in (QUESTION, SPLIT_TEMPLATE):
        question = filled(template, Exchange(case_of(text).sample, reply_of(said)))
        yield lvlm.prompt("a", question, PICTURE)


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_no_question_lets_what_it_quotes_out_of_the_turn(family: str) -> None:
    lvlm = small_lvlm(family)
    own = [frame_of(lvlm, prompt)[0] for prompt in prompts_asked(lvlm, HARMLESS, "A red square.")]
    assert len(own) >= 6
    everything = " ".join(CONTROLS[::3] + TURNS[::4])
    halves = [(mark[: len(mark) // 2], mark[len(mark) // 2 :]) for mark in CONTROLS]
    for text, said in [(everything, everything), (HARMLESS, everything), (everything, "yes"), *halves[::5]]:
        assert [frame_of(lvlm, prompt)[0] for prompt in prompts_asked(lvlm, text, said)] == own


# ---- guards and reward scorers


def guard_skeleton(writer: ConversationWriter, conversation: Conversation) -> tuple[list[int], str]:
    """Control tokens of the guard's prompt, and what it reads as."""
    ids = writer.write(conversation).tensors["input_ids"][0].tolist()
    control = control_tokens(writer.tokenizer.backend_tokenizer)
    return [token for token in ids if token in control], str(writer.tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("template", [GUARD_TEMPLATE, PARTS_TEMPLATE], ids=["strings", "parts"])
@pytest.mark.parametrize("num_turns", [1, 2])
def test_no_conversation_closes_a_turn_of_the_guard(template: str, num_turns: int) -> None:
    writer = ConversationWriter(guard_tokenizer(template), "small guard")
    own, _ = guard_skeleton(writer, Conversation("a", (HARMLESS, "A square.")[:num_turns]))

    @settings(max_examples=40, deadline=None)
    @given(alphabet(writer.tokenizer), alphabet(writer.tokenizer))
    def conversations(request: str, answer: str) -> None:
        skeleton, read = guard_skeleton(writer, Conversation("a", (request, answer)[:num_turns]))
        assert skeleton == own
        assert all(plain(text) in plain(read) for text in (request, answer)[:num_turns])

    conversations()


@pytest.mark.parametrize("family", [each for each in FAMILIES_BY_TURNS if each != "instructblip"])
def test_no_conversation_closes_a_turn_of_a_guard_that_sees(family: str) -> None:
    writer = ConversationWriter(small_lvlm(family).writer.processor, family)
    turns = 1 if family == "llava_next" else 2  # its small template has no turn of the assistant
    own, _ = guard_skeleton(writer, Conversation("a", (HARMLESS, "A square.")[:turns], PICTURE))

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(alphabet(writer.tokenizer), alphabet(writer.tokenizer))
    def conversations(request: str, answer: str) -> None:
        assert guard_skeleton(writer, Conversation("a", (request, answer)[:turns], PICTURE))[0] == own

    conversations()


# ---- tokenizers that rewrite text before they look at it


def test_no_normalizer_makes_a_control_token_of_what_looks_like_one() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "image": 1, "<": 2, ">": 3, "|": 4}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens(["<image>", "<|image|>"])
    looks = ("\uff1cimage\uff1e", "<IMAGE>", "<\uff5cimage\uff5c>", "<image>", " <ima" + "ge> ")
    assert any(control_tokens(tokenizer) & set(tokenizer.encode(look).ids) for look in looks)
    for opens in (True, False):
        blind = without_added_tokens(tokenizer, opens)
        assert all(control_tokens(tokenizer).isdisjoint(blind.encode(look).ids) for look in looks)
