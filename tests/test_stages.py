"""The guard: a culprit costs its own row only, what the user can mend stops the run, no content leaks."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardalign.errors import ModelError, RowError
from guardalign.guard import Failure, guarded
from guardalign.schema import IMAGE, with_columns
from guardalign.stages import admit


@given(st.lists(st.booleans(), max_size=40))
def test_every_culprit_fails_alone(bad: list[bool]) -> None:
    def work(items: Sequence[int]) -> list[int]:
        if any(bad[item] for item in items):
            raise KeyError("the content of a row")
        return [item * 10 for item in items]

    items = list(range(len(bad)))
    found = guarded(work, items, [f"s{item}" for item in items], "generation_failed")
    for item, result in zip(items, found, strict=True):
        if bad[item]:
            assert isinstance(result, Failure)
            assert f"s{item}:" in result.message
            assert "content" not in result.message
        else:
            assert result == item * 10


def test_a_row_error_keeps_its_kind_and_its_words() -> None:
    def work(items: Sequence[int]) -> list[int]:
        raise RowError("prompt_too_long", "prompt of sample a has 9 tokens; the model takes 8")

    (failure,) = guarded(work, [1], ["a"], "generation_failed")
    assert failure == Failure("prompt_too_long", "prompt of sample a has 9 tokens; the model takes 8")


def test_what_the_user_can_mend_stops_the_run() -> None:
    def work(items: Sequence[int]) -> list[int]:
        raise ModelError("no such layer")

    with pytest.raises(ModelError):
        guarded(work, [1, 2], ["a", "b"], "generation_failed")


def test_admission_keeps_read_errors_and_gives_up_blank_prompts() -> None:
    table = pa.table(
        {
            "sample_id": ["a", "b", "c"],
            "prompt": ["hi", " \n", None],
            "error": [None, None, "the line is broken"],
            "error_kind": [None, None, "row_unreadable"],
        },
        schema=pa.schema([(n, pa.string()) for n in ("sample_id", "prompt", "error", "error_kind")]),
    )
    admitted = admit(with_columns(table, {IMAGE: [b"x", None, None]}))
    assert admitted["error_kind"].to_pylist() == [None, "prompt_missing", "row_unreadable"]
    assert admitted["error_stage"].to_pylist() == [None, "read", "read"]
    assert admitted["image_sha256"][0].as_py().startswith("2d711642b726b044")
