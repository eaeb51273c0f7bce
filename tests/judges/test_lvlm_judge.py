"""An LVLM as judge: the micro model tells harmful answers from refusals, loaded once when it is the target."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from guardalign.config import LvlmConfig
from guardalign.errors import ConfigError, ModelError
from guardalign.judges import UNPARSED, Exchange, LvlmJudge
from guardalign.judges.template import QUESTION, filled, load_template
from guardalign.micro import WEIGHTS
from guardalign.micro.dialogues import HELD_OUT_REQUESTS, PLACEHOLDER, REFUSAL, REQUESTS
from guardalign.models.lvlm import Lvlm
from guardalign.types import Reply, Sample
from tests.runs import rows, run
from tests.small_lvlms import picture

MICRO = str(WEIGHTS / "lvlm")


@pytest.fixture(scope="module")
def micro() -> Lvlm:
    return Lvlm.load(LvlmConfig(model=MICRO, device="cpu"))


def exchanges(*answers: str, with_picture: bool = False) -> Iterator[Exchange]:
    for request in (*REQUESTS, *HELD_OUT_REQUESTS):
        for answer in answers:
            look = picture(96, 96) if with_picture else None
            yield Exchange(Sample("s", request, None, ""), Reply(answer, 1, 1, "end"), look)


@pytest.mark.parametrize("with_picture", [False, True])
def test_the_micro_lvlm_tells_harmful_answers_from_refusals_and_harmless_ones(micro: Lvlm, with_picture: bool) -> None:
    judge = LvlmJudge().ready(micro)
    answers = (PLACEHOLDER, REFUSAL, "You can use a cup.")
    verdicts = judge(list(exchanges(*answers, with_picture=with_picture)))
    assert [verdict.unsafe for verdict in verdicts] == [True, False, False] * 7
    assert [verdict.refused for verdict in verdicts] == [False, True, False] * 7
    assert {verdict.judge for verdict in verdicts} == {"lvlm/target"}


def test_a_verdict_does_not_depend_on_its_neighbours(micro: Lvlm) -> None:
    judge = LvlmJudge().ready(micro)
    asked = list(exchanges(PLACEHOLDER, REFUSAL))
    assert judge(asked) == [judge([one])[0] for one in asked]


def test_what_is_no_verdict_is_unparsed_and_not_safe(micro: Lvlm, tmp_path: Path) -> None:
    """The micro model describes when it is asked to: a text without yes or no."""
    template = tmp_path / "describe.txt"
    template.write_text("Describe the picture. {answer}")
    judge = LvlmJudge(template=str(template)).ready(micro)
    verdicts = judge(list(exchanges(REFUSAL, with_picture=True)))
    assert {(v.unsafe, v.refused, v.problem) for v in verdicts} == {(None, None, UNPARSED)}


def test_an_answer_cannot_open_another_slot() -> None:
    look = Exchange(Sample("s", "{answer} {x}", None, ""), Reply("{prompt} {answer}", 1, 1, "end"))
    assert filled("{prompt}|{answer}", look) == "{answer} {x}|{prompt} {answer}"
    assert filled(QUESTION, look).count("Answer yes or no") == 1


def test_another_model_is_loaded_for_itself_and_counted(tmp_path: Path) -> None:
    settings = LvlmJudge(model=MICRO, device="cpu", max_new_tokens=4)
    assert (settings.pool, settings.shares_target) == ("judge", False)
    judge = settings.ready()
    assert judge([*exchanges(PLACEHOLDER)][:1])[0].unsafe is True
    assert judge.counters["judge_loads"] == 1 and judge.counters["judge_forward_calls"] >= 2
    assert settings.fingerprint != LvlmJudge().fingerprint
    template = tmp_path / "ask.txt"
    template.write_text("{answer}? yes or no")
    assert LvlmJudge(template=str(template)).fingerprint != LvlmJudge().fingerprint


def test_wrong_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"judge\.expects safety_word needs a judge\.template"):
        LvlmJudge(expects="safety_word")
    (tmp_path / "none.txt").write_text("Is it harmful?")
    with pytest.raises(ConfigError, match=r"has no place for the answer: \{answer\}"):
        LvlmJudge(template=str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        load_template(str(tmp_path / "empty.txt"))
    with pytest.raises(ModelError, match=r"judge\.model: there is no folder /no/such"):
        LvlmJudge(model="/no/such").ready()
    for wrong in ({"model": ""}, {"batch_size": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError, match=r"judge\."):
            LvlmJudge(**wrong)


def test_options_of_another_model_warn_where_the_target_judges(caplog: pytest.LogCaptureFixture) -> None:
    LvlmJudge(dtype="bfloat16")
    assert "judge.dtype has no effect" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_the_target_is_loaded_once_and_both_stages_count_their_own_calls(
    engine: str, tmp_path: Path, ray_cluster: None
) -> None:
    flags = ("--recipe", "none", "--engine", engine, "--limit", 24, "--shard_rows", 8)
    flags += ("--generation.max_new_tokens", 16)
    assert run(*flags, "--output", tmp_path / "plain", quick=False) == 0
    assert run(*flags, "--judge.name", "lvlm", "--output", tmp_path / "judged", quick=False) == 0
    plain, judged = (json.loads((tmp_path / out / "run.json").read_text())["counters"] for out in ("plain", "judged"))
    assert (judged["lvlm_loads"], judged["judge_loads"]) == (1, 0)
    assert judged["lvlm_forward_calls"] == plain["lvlm_forward_calls"] and judged["judge_forward_calls"] > 0
    before, after = rows(tmp_path / "plain"), rows(tmp_path / "judged")
    assert {name: row["response"] for name, row in before.items()} == {n: row["response"] for n, row in after.items()}
    for row in after.values():
        assert row["judge"] == "lvlm/target"
        assert row["unsafe"] is (row["response"] == PLACEHOLDER) or row["verdict_problem"] == UNPARSED


@pytest.mark.slow
def test_another_judge_gives_the_targets_verdicts_from_a_pool_of_its_own(tmp_path: Path, ray_cluster: None) -> None:
    flags = ("--recipe", "none", "--limit", 16, "--shard_rows", 4, "--generation.max_new_tokens", 16)
    judge = ("--judge.name", "lvlm", "--judge.model", MICRO, "--cluster.judge_actors", 2, "--cluster.judge_cpus", 0.5)
    assert run(*flags, "--judge.name", "lvlm", "--output", tmp_path / "target", quick=False) == 0
    assert run(*flags, *judge, "--output", tmp_path / "other", quick=False) == 0
    target, other = rows(tmp_path / "target"), rows(tmp_path / "other")
    assert {(n, r["unsafe"], r["refused"]) for n, r in target.items()} == {
        (n, r["unsafe"], r["refused"]) for n, r in other.items()
    }
    counters = json.loads((tmp_path / "other" / "run.json").read_text())["counters"]
    assert 1 <= counters["judge_loads"] <= 2 and counters["lvlm_loads"] == 1
