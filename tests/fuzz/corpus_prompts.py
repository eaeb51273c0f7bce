"""Hostile and odd prompts, all made by code: what each is called, its text, and how its row must end."""

from __future__ import annotations

from tests.fuzz.corpus_tables import SECRET

Prompt = tuple[str | None, str | None]
"""The text, and the error kind that the row must end with; None: it is answered."""
MISSING, TOO_LONG = "prompt_missing", "prompt_too_long"
CONTROLS = (
    "<image>", "<video>", "<|image|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<IMG_CONTEXT>", "<img>",
    "</img>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<fake_token_around_image>", "<global-img>",
    "<row_1_col_1>", "<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>", "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>", "<|im_start|>", "<|im_end|>",
    "<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>", "[INST]", "[/INST]", "<<SYS>>",
    "<</SYS>>", "<tool_call>", "</tool_call>", "<think>", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "[DEC]", "<0x0A>",
    "<|assistant|>", "<|user|>", "<end_of_text>", "<start_of_text>",
)  # fmt: skip
"""What families call their control tokens."""
TURNS = (
    "USER:", "ASSISTANT:", " ASSISTANT: ", "\n\nAssistant: ", "User: ", "### Response:", "user\n", "assistant\n",
    "model\n", "system\n", "\n<END>\n", "<BEGIN>", "Agent: ",
)  # fmt: skip
"""Words that mark turns; in some families nothing else does, and they are words then for whoever writes them."""
MILLION, MANY = 1_000_000, 100_000


def prompts() -> dict[str, Prompt]:
    """All of them."""
    cases: dict[str, Prompt] = {
        "null": (None, MISSING),
        "empty": ("", MISSING),
        "blank": (" \t\n\u00a0\u3000\u2003", MISSING),
        "zero-width-alone": ("\u200b\u200d\u2060\ufeff", None),
        "nul": (f"What\x00is {SECRET}?", None),
        "nul-alone": ("\x00", None),
        "control-characters": ("".join(map(chr, range(32))) + "\x7f\x9b[31m", None),
        "terminal": ("\x1b[2J\x1b]0;title\x07 What?", None),
        "right-to-left": ("What \u202e?nwohs si\u202c \u2066\u2069 \u200f", None),
        "right-to-left-words": ("מה מוצג כאן? ماذا يظهر؟", None),
        "emoji": ("👩‍👩‍👧‍👦🏴‍☠️🇩🇪👍🏽", None),
        "combining-storm": ("Z\u0300" + "\u0301\u0315\u0336" * 40, None),
        "combining-first": ("\u0301What?", None),
        "noncharacters": ("\ufffe\uffff\U0010ffff\ue000", None),
        "tags": ("".join(chr(0xE0000 + ord(c)) for c in "hidden"), None),
        "braces": ("{prompt} {answer} {caption} {0} {} {{x}} {prompt!r:>{answer}} %s %(a)s $x ${y}", None),
        "jinja": ("{{ messages }} {% for m in messages %}{{ raise_exception('x') }}{% endfor %} {# c #}", None),
        "jinja-open": ("{{ {% {#", None),
        "sentinels": ("Zqsentinelqz Zqrequestqz Zqreplyqz", None),
        "a-very-long-word": ("a" * MANY, TOO_LONG),
        "a-very-long-text": ("What is shown? " * (MILLION // 15), TOO_LONG),
        "a-very-long-line-of-signs": ("<|im_end|>" * (MANY // 10), TOO_LONG),
        "many-spaces": ("a" + " " * MANY + "b", TOO_LONG),
        "many-line-ends": ("\n" * MANY + "a", TOO_LONG),
        "many-joiners": ("a" + "\u200d" * MANY, TOO_LONG),
        "many-accents": ("e" + "\u0301" * MANY, TOO_LONG),
        "all-controls": (" ".join(CONTROLS), None),
        "all-turns": ("".join(TURNS), None),
        **{f"control-{number:02}": (f"What {control} is shown?", None) for number, control in enumerate(CONTROLS)},
    }
    return cases
