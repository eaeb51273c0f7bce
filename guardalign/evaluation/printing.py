"""Findings as text, Markdown and JSON. Columns that hold nothing are left out. Knows nothing of rows or runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

from guardalign.benchmarks import POINTS
from guardalign.errors import harmless
from guardalign.evaluation.request import BASELINE
from guardalign.evaluation.tables import IN_PERCENT, PARTS, Findings, Line, Outcomes, Spent

NOTHING: Final = "–"
TITLES: Final = {
    "usr": "Unsafe-response rate (USR): harmful answers to unsafe prompts; lower is better",
    "asr": "Attack success rate (ASR): harmful answers to attacks; lower is better",
    "not_refused": "Unsafe prompts that were not declined; no USR: such an answer may be harmless",
    "over_refusal": "Over-refusal: benign requests that were declined (questions: see utility); lower is better",
    "refusal": "Prompts that were declined",
    "safe_accuracy": "Safe accuracy: safe situations that were not declined; higher is better",
    "unsafe_accuracy": "Unsafe accuracy: unsafe situations that were declined; higher is better",
    "situational_accuracy": "Mean of safe and unsafe accuracy, over whole pairs; higher is better",
    "vqa_accuracy": "Utility: VQA accuracy; higher is better",
    "choice_accuracy": "Utility: right options; higher is better",
    "exact": "Utility: questions answered word for word; higher is better",
    "mme_accuracy": "Utility: MME accuracy; higher is better",
    "mme_accuracy_plus": "Utility: MME accuracy+ (both questions of a picture); higher is better",
    "mme_perception": "Utility: MME perception score, in points; higher is better",
    "mme_cognition": "Utility: MME cognition score, in points; higher is better",
}
"""by metric; one that is not here stands under its own name"""
RATE_NOTE: Final = (
    "In brackets: 95 % intervals (Wilson's; of differences Agresti and Min's). p: McNemar's exact test against "
    f"{BASELINE} on the samples that both decided (the sign test where answers count in part). Errors and undecided "
    "rows (no verdict, or none that could be read) are left out of the rate and stand beside it: none counts as safe. "
    "In print: a landmark under its own judge, percent or points."
)
OUTCOME_NOTE: Final = (
    "Every row stands once among errors, unparsed (a verdict that cannot be read), harmful, harmless and untold (the "
    "judge cannot tell); refused rows are among the last three."
)
COST_NOTE: Final = (
    "Means over rows without an error. Seconds are shares of the calls that a row was part of: of reading by the "
    "length of its prompt, of decoding evenly, whoever its neighbours were. An answer that several recipes share is "
    "charged to each of them whole. Steps: decoding steps, forced tokens and verdicts included. Own: prompts, "
    "pictures, heads, scorers. Detect holds sanitizing, too."
)


@dataclass(frozen=True)
class Sheet:
    """A table as words."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    note: str = ""


def sheets(found: Findings) -> list[Sheet]:
    """One table a metric, then what became of the rows, then the costs."""
    metrics = dict.fromkeys(line.metric for line in found.lines)
    listed = [_rate_sheet(name, [line for line in found.lines if line.metric == name]) for name in metrics]
    if listed:  # one note for all of them
        listed[-1] = replace(listed[-1], note=RATE_NOTE)
    return [_without_blank(sheet) for sheet in (*listed, _outcome_sheet(found.outcomes), _cost_sheet(found.spent))]


def _rate_sheet(name: str, lines: Sequence[Line]) -> Sheet:
    head = ("benchmark", "part", "model", "recipe", "count", "rate", "errors", "undecided")
    columns = (*head, f"minus {BASELINE}", "pairs", "p", "in print", "source")
    return Sheet(TITLES.get(name, name), columns, tuple(tuple(_rate_words(line)) for line in lines))


def _rate_words(line: Line) -> Iterator[str]:
    yield from (line.benchmark, line.part, line.model, line.recipe)
    points = line.metric in POINTS
    yield f"{line.denominator} tasks" if points else f"{line.numerator:g}/{line.denominator}"
    yield (
        NOTHING if line.value is None else f"{line.value:.1f}" if points else _percent(line.value, line.low, line.high)
    )
    yield from (str(line.num_errors or ""), str(line.num_undecided or ""))
    if line.versus is None:
        yield from ("", "", "")
    else:
        yield _percent(line.versus.value, line.versus.low, line.versus.high, sign="+")
        yield from (str(line.num_pairs), _p_value(line.versus.p_value))
    yield from ("" if line.in_print is None else f"{line.in_print:g}", line.source)


def _percent(value: float, low: float | None, high: float | None, sign: str = "") -> str:
    shown = f"{IN_PERCENT * value:{sign}.1f} %"
    if low is None or high is None:
        return shown
    return f"{shown} [{IN_PERCENT * low:{sign}.1f}, {IN_PERCENT * high:{sign}.1f}]"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _outcome_sheet(outcomes: Sequence[Outcomes]) -> Sheet:
    names = ("rows", "num_errors", "unparsed", "harmful", "harmless", "untold", "refused")
    columns = ("benchmark", "model", "recipe", *(name.removeprefix("num_") for name in names), "kinds of errors")
    lines = tuple(
        (
            *(each.benchmark, each.model, each.recipe),
            *(str(getattr(each, name)) for name in names),
            ", ".join(f"{kind} {count}" for kind, count in each.errors.items()),
        )
        for each in outcomes
    )
    return Sheet("What became of every row", columns, lines, OUTCOME_NOTE)


def _cost_sheet(spent: Sequence[Spent]) -> Sheet:
    head = ("benchmark", "model", "recipe", "rows", "answer tokens", "steps")
    columns = (*head, *(f"{part} ms" for part in (*PARTS, "total")), f"ratio to {BASELINE}", "ratio in print")
    lines = tuple(
        (
            *(each.benchmark, each.model, each.recipe, str(each.rows), f"{each.tokens:.1f}", f"{each.steps:.1f}"),
            *(f"{1000 * each.seconds[part]:.2f}" for part in (*PARTS, "total")),
            *("" if ratio is None else f"{ratio:.2f}" for ratio in (each.ratio, each.in_print)),
        )
        for each in spent
    )
    return Sheet("Cost of a sample", columns, lines, COST_NOTE)


def _without_blank(sheet: Sheet) -> Sheet:
    """Without the columns in which no line says anything."""
    kept = [at for at in range(len(sheet.columns)) if any(line[at] for line in sheet.lines)]
    lines = tuple(tuple(line[at] for at in kept) for line in sheet.lines)
    return Sheet(sheet.title, tuple(sheet.columns[at] for at in kept), lines, sheet.note)


def as_text(found: Findings) -> str:
    """For a terminal: aligned columns."""
    notes = (f"note: {harmless(note)}" for note in found.notes)
    return "\n".join([*map(_text, sheets(found)), *notes]).rstrip() + "\n"


def _text(sheet: Sheet) -> str:
    lines = [sheet.columns, *(tuple(map(harmless, line)) for line in sheet.lines)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(sheet.columns))]
    body = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([sheet.title, "", body[0], rule, *body[1:], "", *([sheet.note, ""] if sheet.note else []), ""])


def as_markdown(found: Findings) -> str:
    """For a README."""
    return "\n".join([*map(_markdown, sheets(found)), *(f"- {_escaped(note)}" for note in found.notes)]).rstrip() + "\n"


def _markdown(sheet: Sheet) -> str:
    rule = _piped(["---"] * len(sheet.columns))
    body = [_piped(line) for line in sheet.lines]
    note = [sheet.note, ""] if sheet.note else []
    return "\n".join([f"**{_escaped(sheet.title)}**", "", _piped(sheet.columns), rule, *body, "", *note])


def _piped(words: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(word) for word in words) + " |"


def _escaped(word: str) -> str:
    """A word that stays a word: no column, code, HTML tag, entity or link begins in it."""
    word = re.sub(r"([\\`|*])", r"\\\1", harmless(word))
    word = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"&(?=[A-Za-z#])", "&amp;", word))
    return re.sub(r"\](?=[(\[:])", r"]\\", word)


def as_json(found: Findings) -> str:
    """For programs: every figure with its counts."""
    return json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n"
