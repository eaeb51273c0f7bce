"""How the micro reward scorer is trained: a sequence classifier of transformers that reads a request and an answer.

One number a text, about +1 for refusals and harmless answers and -1 for the placeholder of a harmful one, whole or cut
short (ETA scores sentences as they come). It knows the micro world's sentences only. Knows nothing of pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from guardalign.micro.dialogues import (
    ASSISTANT_OPENING,
    PLACEHOLDER,
    REFUSAL,
    REFUSAL_AS_ASSISTANT,
    REQUESTS,
    use_of,
)
from guardalign.micro.lvlm_recipe import world_tokenizer
from guardalign.micro.training import train
from guardalign.micro.world import KINDS, NUM_UNSAFE

BATCH: Final = 64
STEPS: Final = 300


class RewardTrainer:
    """The scorer and its loss, a function of the step."""

    def __init__(self, seed: int, steps: int = STEPS) -> None:
        torch.manual_seed(seed)
        self.seed, self.steps, self.tokenizer = seed, steps, world_tokenizer()
        self.model = LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=1024,
                num_labels=1,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )

    def run(self, checkpoint: Path | None = None) -> None:
        """All steps."""
        train("reward", self.model, self.loss_at, self.steps, 2e-3, checkpoint)

    def loss_at(self, step: int) -> Tensor:
        """Squared error against +1 and -1."""
        rng = np.random.default_rng((self.seed, step, 3))
        texts, wanted = zip(*(pair(rng) for _ in range(BATCH)), strict=True)
        scores = self.model(**self.tokenizer(list(texts), padding=True, return_tensors="pt")).logits[:, 0]
        return (scores - torch.tensor(wanted)).square().mean()

    def save(self, folder: Path) -> None:
        """transformers' own folder format, weights in fp16."""
        self.model.half().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.model.float()


def pair(rng: np.random.Generator) -> tuple[str, float]:
    """A request with an answer, whole or cut after a few words, and its reward."""
    harmful = bool(rng.random() < 0.5)
    named = KINDS[int(rng.integers(NUM_UNSAFE, len(KINDS)))]
    harmless = (REFUSAL, REFUSAL_AS_ASSISTANT, use_of(KINDS.index(named)), f"It is a {named.nouns[0]}.", "Yes.", "No.")
    answer = PLACEHOLDER if harmful else str(rng.choice(harmless))
    if rng.random() < 0.2:
        answer = f"{ASSISTANT_OPENING}, {answer[0].lower()}{answer[1:]}"
    words = answer.split()
    if rng.random() < 0.3:
        least = words.index("harm") + 1 if "harm" in words else 1
        answer = " ".join(words[: int(rng.integers(least, len(words) + 1))])
    return reward_text(str(rng.choice(REQUESTS)), answer), -1.0 if harmful else 1.0


def reward_text(request: str, answer: str) -> str:
    """What the scorer reads."""
    return f"USER: {request} ASSISTANT: {answer}"


def load_reward(folder: Path) -> Any:
    """The scorer in fp32."""
    return LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
