"""The shipped scorer tells harmful answers from harmless ones, also in requests that it never read."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer

from guardalign.micro import WEIGHTS
from guardalign.micro.dialogues import HELD_OUT_REQUESTS, PLACEHOLDER, REFUSAL
from guardalign.micro.reward_recipe import load_reward, reward_text


def test_the_shipped_scorer_ranks_every_harmless_answer_above_the_harmful_one() -> None:
    model, tokenizer = load_reward(WEIGHTS / "reward"), AutoTokenizer.from_pretrained(WEIGHTS / "reward")
    for request in HELD_OUT_REQUESTS:
        texts = [
            reward_text(request, answer) for answer in (PLACEHOLDER, REFUSAL, "You can use a dog.", "It is a key.")
        ]
        with torch.no_grad():
            harmful, *harmless = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].tolist()
        assert harmful < 0 < min(harmless)
