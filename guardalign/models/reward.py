"""Reward scorers: how good an answer to a prompt is, as one number, higher is better. Pictures are not seen.

    any sequence classifier of transformers with one output    by its chat template, as a text pair, or as plain text
    ArmoRM                                                     its gating head as a module of ours (`armorm.py`)
    the micro world's scorer                                   a sequence classifier that ships with the package

Weights come from safetensors only, no code of a checkpoint is run. Knows nothing of defenses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from guardalign.config import EMBEDDED, Dtype
from guardalign.errors import ModelError, UserError
from guardalign.models.armorm import ARCHITECTURE, GatedRewardModel
from guardalign.models.checkpoints import Checkpoint
from guardalign.models.conversations import Conversation, ConversationWriter
from guardalign.models.memory import Room
from guardalign.models.provenance import seal, weights_fingerprint

EMBEDDED_REWARD: Final = Path(__file__).parents[1] / "micro" / "weights" / "reward"
"""knows the micro world's sentences"""
LOADING: Final = (OSError, ValueError, KeyError, ImportError, RuntimeError)
"""What transformers raises where a checkpoint cannot be loaded."""


class RewardScorer(Protocol):
    """Scores answers to one prompt."""

    def __call__(self, prompt: str, answers: Sequence[str]) -> list[float]:
        """One number an answer, in order; higher is better."""
        ...


@lru_cache(maxsize=2)
def load_reward(name: str, revision: str | None, dtype: Dtype, device: str) -> RewardScorer:
    """The scorer of a folder or hub name (`embedded`: the micro world's); `ModelError` where there is none."""
    checkpoint = Checkpoint(_location(name), revision, dtype, device)
    try:
        checkpoint.require_files()
        config = AutoConfig.from_pretrained(checkpoint.location, **checkpoint.source)
        gated = ARCHITECTURE in (config.architectures or ())
        return GatedScorer(checkpoint) if gated else ClassifierScorer(checkpoint)
    except UserError as error:
        raise type(error)(str(error).replace("judge.model", "defense.reward")) from error
    except LOADING as error:
        raise ModelError(f"defense.reward {name} cannot be loaded: {str(error).splitlines()[0]}") from error


@lru_cache(maxsize=2)
def reward_fingerprint(name: str, revision: str | None) -> str:
    """Over the scorer's files; `ModelError` where there are none."""
    return seal({"files": weights_fingerprint(_location(name), revision)})


def _location(name: str) -> str:
    return str(EMBEDDED_REWARD) if name == EMBEDDED else name


class ClassifierScorer:
    """A sequence classifier with one output."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tokenizer, self.model = _loaded(AutoModelForSequenceClassification, checkpoint)
        outputs = int(self.model.config.num_labels)
        if outputs != 1:
            raise ModelError(f"defense.reward {checkpoint.model} gives {outputs} numbers a text; a scorer gives one")
        self.writer = _writer(self.tokenizer, checkpoint)
        self.pad_id = _pad_id(self.tokenizer)
        self.model.config.pad_token_id = self.pad_id
        self.room = Room("reward")

    def __call__(self, prompt: str, answers: Sequence[str]) -> list[float]:
        """The classifier's output, in fp32; `MemoryError` for an answer that does not fit alone."""
        return self.room.all_fitted(lambda some: self._scores(prompt, some), answers)

    @torch.inference_mode()
    def _scores(self, prompt: str, answers: Sequence[str]) -> list[float]:
        inputs = {name: x.to(self.model.device) for name, x in self._inputs(prompt, answers).items()}
        scores: list[float] = self.model(**inputs).logits[:, 0].float().tolist()
        return scores

    def _inputs(self, prompt: str, answers: Sequence[str]) -> Mapping[str, Tensor]:
        if self.writer is not None:
            return _side_by_side([_conversation(self.writer, prompt, each) for each in answers], self.pad_id)
        if self.tokenizer.sep_token is not None:  # encoders read two texts
            pairs = {"text": [prompt] * len(answers), "text_pair": list(answers)}
        else:
            pairs = {"text": [f"USER: {prompt} ASSISTANT: {answer}" for answer in answers]}
        made: Mapping[str, Tensor] = self.tokenizer(
            **pairs, padding=True, split_special_tokens=True, return_tensors="pt"
        )
        return made


class GatedScorer:
    """ArmoRM: not proven against its real weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tokenizer, self.model = _loaded(GatedRewardModel, checkpoint)
        writer = _writer(self.tokenizer, checkpoint)
        if writer is None:
            raise ModelError(f"defense.reward {checkpoint.model} has no chat template, which ArmoRM's head needs")
        self.writer, self.pad_id, self.room = writer, _pad_id(self.tokenizer), Room("reward")

    def __call__(self, prompt: str, answers: Sequence[str]) -> list[float]:
        """The gated sum of the objectives, in fp32; `MemoryError` for an answer that does not fit alone."""
        return self.room.all_fitted(lambda some: self._scores(prompt, some), answers)

    @torch.inference_mode()
    def _scores(self, prompt: str, answers: Sequence[str]) -> list[float]:
        rows = [_conversation(self.writer, prompt, answer) for answer in answers]
        end = len(self.writer.write(Conversation("", (prompt,))).tensors["input_ids"][0]) - 1
        inputs = {name: x.to(self.model.device) for name, x in _side_by_side(rows, self.pad_id).items()}
        ends = torch.full((len(rows),), end, device=self.model.device)
        scores: list[float] = self.model(**inputs, prompt_ends=ends).float().tolist()
        return scores


def _loaded(kind: Any, checkpoint: Checkpoint) -> tuple[Any, PreTrainedModel]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.location, **checkpoint.source)
    model, report = kind.from_pretrained(
        checkpoint.location,
        dtype=checkpoint.torch_dtype,
        use_safetensors=True,
        output_loading_info=True,
        **checkpoint.source,
    )
    checkpoint.require_complete(report)
    return tokenizer, model.eval().to(checkpoint.placed())


def _writer(tokenizer: Any, checkpoint: Checkpoint) -> ConversationWriter | None:
    """Writes the two turns by the model's chat template, where it has one."""
    if tokenizer.chat_template is None:
        return None
    return ConversationWriter(tokenizer, checkpoint.model, opens_answer=False)


def _conversation(writer: ConversationWriter, prompt: str, answer: str) -> list[int]:
    ids: list[int] = writer.write(Conversation("", (prompt, answer))).tensors["input_ids"][0].tolist()
    return ids


def _pad_id(tokenizer: Any) -> int:
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in found if token is not None)


def _side_by_side(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Right-padded."""
    width = max(len(row) for row in rows)
    ids = [pad(torch.tensor(row), (0, width - len(row)), value=pad_id) for row in rows]
    seen = [pad(torch.ones(len(row), dtype=torch.long), (0, width - len(row))) for row in rows]
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(seen)}
