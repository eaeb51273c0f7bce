"""The closing summary tells what went wrong on the way, and is silent about what did not."""

from __future__ import annotations

from guardalign.receipts import Receipt
from guardalign.summary import summary_lines, totals
from guardalign.supervision import DEATHS


def lines(*receipts: Receipt) -> list[str]:
    whole = totals(receipts)
    return summary_lines(whole, whole, 1.0, "here", "next", [])


def test_deaths_of_workers_are_told_when_there_were_any() -> None:
    quiet, deadly = Receipt(0, 4), Receipt(1, 4, errors={"killed_worker": 1}, counters={DEATHS: 2})
    told = [line for line in lines(quiet, deadly) if line.startswith("workers")]
    assert told == ["workers   2 died or were stopped, and were begun again"]
    assert "errors    killed_worker 1" in lines(quiet, deadly)
    assert not [line for line in lines(quiet) if line.startswith("workers")]


def test_a_run_without_an_answer_says_so() -> None:
    assert "warning   not one row was answered" in lines(Receipt(0, 4, errors={"prompt_too_long": 4}))
    assert not [line for line in lines(Receipt(0, 4, errors={"prompt_too_long": 3})) if line.startswith("warning")]


def test_a_defenses_own_verdicts_are_counted_where_it_has_any() -> None:
    told = lines(Receipt(0, 4, defense_judged=3, defense_flagged=1), Receipt(1, 4, defense_judged=1))
    assert [line for line in told if line.startswith("defense   flagged 1 of 4 (25.0%")]
    assert not [line for line in lines(Receipt(0, 4)) if line.startswith("defense")]
