"""Every defense on every family: one answer a sample, the same alone, in any batch and among rows of other defenses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from guardalign.config import GenerationConfig
from guardalign.core.safety_attention import SafetyAttention
from guardalign.defenses import DEFENSES, Defense, answered
from guardalign.defenses.casa import Casa
from guardalign.defenses.ecso import Ecso
from guardalign.defenses.eta import Eta
from guardalign.defenses.guardalign import GuardAlignDefense
from guardalign.defenses.plain import NoDefense, SafetyPrefix
from guardalign.defenses.safecode import SafeCoDe
from guardalign.models.lvlm import Lvlm
from guardalign.models.safety_head import lvlm_fingerprint, question_embedding, save_head
from guardalign.types import Case, Reply, Sample
from tests.small_lvlms import FAMILIES_SELDOM, picture, small_lvlm

DECODING = GenerationConfig(max_new_tokens=7)
CASES = (
    Case(Sample("a", "What is shown?", None, "here"), picture()),
    Case(Sample("b", "Describe the cats, then count the dogs.", None, "here"), None),
    Case(Sample("c", "Why?", None, "here"), picture(30, 70, "green")),
)


def random_head(lvlm: Lvlm, folder: Path) -> str:
    """A head that nobody fitted, of the model's sizes."""
    query = question_embedding(lvlm, "Is it safe?")
    width = lvlm.model.get_output_embeddings().weight.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = SafetyAttention(query, width, 8)
    save_head(folder, head, {"lvlm": lvlm_fingerprint(lvlm.config.model, lvlm.config.revision)})
    return str(folder)


def every_defense(lvlm: Lvlm, folder: Path) -> dict[str, Defense]:
    """Each defense so that all of its steps are taken, whatever a random model says."""
    head = random_head(lvlm, folder)
    return {
        "none": NoDefense(),
        "prefix": SafetyPrefix(),
        "guardalign": GuardAlignDefense(gamma=2.0),
        "safecode": SafeCoDe(steps=3, plausibility=0.05),
        "safecode, released": SafeCoDe(profile="released", steps=3),
        "casa": Casa(mode="scale", head=head),
        "casa, replace, calibrated": Casa(
            mode="replace", head=head, prefix="As an AI assistant, I decline.", gamma=2.0
        ),
        "casa, token only": Casa(mode="token_only", refusal="I'm sorry"),
        "eta": Eta(reward_threshold=1e9, similarity_threshold=-1.0, num_candidates=3, sentence_tokens=3),
        "ecso": Ecso(caption_tokens=4),
    }


@pytest.mark.parametrize("family", FAMILIES_SELDOM)
def test_every_defense_answers_every_family_the_same_alone_and_among_others(family: str, tmp_path: Path) -> None:
    lvlm = small_lvlm(family)
    defenses = every_defense(lvlm, tmp_path)
    assert {name.split(",")[0] for name in defenses} == set(DEFENSES)
    alone = [[answered(d, lvlm, [case], DECODING, 1)[0] for case in CASES] for d in defenses.values()]
    mixed = _together(lvlm, list(defenses.values()))
    expected = [reply for replies in alone for reply in replies]
    assert [replace(r, defense_score=None) for r in mixed] == [replace(r, defense_score=None) for r in expected]
    scores = [r.defense_score for r in expected]
    assert [r.defense_score for r in mixed] == [
        s if s is None else pytest.approx(s, rel=1e-3, abs=1e-9) for s in scores
    ]
    assert all(reply.cost.steps > 0 or reply.num_tokens <= 1 for reply in mixed)


def _together(lvlm: Lvlm, defenses: Sequence[Defense]) -> list[Reply]:
    """All samples under all defenses in one run of the loop."""
    pairs = [(defense, case) for defense in defenses for case in CASES]
    return lvlm.answered((defense.answer(lvlm, case, DECODING) for defense, case in pairs), 5)
