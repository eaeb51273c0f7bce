"""Guard models: what they write about a conversation, or how probable each policy's violation is.

Three kinds are loaded: causal language models of text (Llama Guard 3, MD-Judge), image-text-to-text models (Llama
Guard 3 Vision and 4, LlavaGuard), and ShieldGemma 2's classifier of pictures. Every row's text is the guard's alone,
decoded greedily. Knows nothing of verdicts or of what the text means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch
import transformers
from PIL.Image import Image
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedModel

from guardalign.config import GenerationConfig, LvlmConfig
from guardalign.errors import ModelError, RowError
from guardalign.models.checkpoints import Checkpoint
from guardalign.models.conversations import Conversation, ConversationWriter
from guardalign.models.lvlm import Lvlm
from guardalign.models.memory import Room
from guardalign.models.prompts import Prompt

LOADING: Final = (OSError, ValueError, KeyError, ImportError, RuntimeError)
"""What transformers raises where a checkpoint cannot be loaded."""


class Guard(Protocol):
    """A loaded guard that writes."""

    @property
    def num_loads(self) -> int:
        """Models loaded."""
        ...

    @property
    def num_forward_calls(self) -> int:
        """Calls of the model so far."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for run.json."""
        ...

    @property
    def takes_pictures(self) -> bool:
        """Whether it sees pictures."""
        ...

    def answers(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """What it writes about each, in order; `RowError` for a conversation that is too long."""
        ...


def load_guard(checkpoint: Checkpoint) -> Guard:
    """A text or image-text guard, by what its configuration says; `ModelError` where it cannot be loaded."""
    return PictureGuard(checkpoint) if hasattr(_config(checkpoint), "vision_config") else TextGuard(checkpoint)


def _config(checkpoint: Checkpoint) -> Any:
    """What the checkpoint says of itself, before anything large is made of it."""
    checkpoint.require_files()
    try:
        return AutoConfig.from_pretrained(checkpoint.location, **checkpoint.source)
    except LOADING as error:
        raise checkpoint.failed(error) from error


class TextGuard:
    """A causal language model; pictures are left out."""

    takes_pictures = False
    num_loads = 1

    def __init__(self, checkpoint: Checkpoint) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.location, **checkpoint.source)
            loaded = AutoModelForCausalLM.from_pretrained(
                checkpoint.location,
                dtype=checkpoint.torch_dtype,
                use_safetensors=True,
                output_loading_info=True,
                **checkpoint.source,
            )
        except LOADING as error:
            raise checkpoint.failed(error) from error
        self.model: PreTrainedModel = loaded[0].eval().to(checkpoint.placed())
        checkpoint.require_complete(loaded[1])
        if not hasattr(self.tokenizer, "backend_tokenizer"):
            raise ModelError(f"judge.model {checkpoint.model} has no fast tokenizer (tokenizer.json)")
        self.writer = ConversationWriter(self.tokenizer, checkpoint.model)
        self.room = Room("judge")
        self.num_forward_calls = 0
        self.model.register_forward_pre_hook(self._count)
        self.max_tokens: int | None = getattr(self.model.config, "max_position_embeddings", None)
        self.eos_ids = _ids(self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id)

    def answers(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """Greedy, in one left-padded batch, or as many at a time as fit into memory."""
        prompts = [self.writer.write(conversation) for conversation in conversations]
        for prompt in prompts:
            _require_room(prompt, self.max_tokens, max_new_tokens)
        return self.room.all_fitted(lambda some: self._written(some, max_new_tokens), prompts)

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for run.json once memory has run out."""
        return self.room.notes

    def _written(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        width = max(prompt.num_tokens for prompt in prompts)
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (*self.eos_ids, 0)[0]
        ids = [pad(p.tensors["input_ids"], (width - p.num_tokens, 0), value=padding) for p in prompts]
        seen = [pad(torch.ones(1, p.num_tokens, dtype=torch.long), (width - p.num_tokens, 0)) for p in prompts]
        greedy = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(self.eos_ids) or None,
            pad_token_id=padding,
        )
        with torch.inference_mode():
            written = self.model.generate(
                input_ids=torch.cat(ids).to(self.model.device),
                attention_mask=torch.cat(seen).to(self.model.device),
                generation_config=greedy,
            )[:, width:]
        return [self.tokenizer.decode(self._until_end(row), skip_special_tokens=True) for row in written.tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: next((at for at, token in enumerate(ids) if token in self.eos_ids), len(ids))]

    def _count(self, *_: Any) -> None:
        self.num_forward_calls += 1


class PictureGuard:
    """An image-text-to-text model; conversations without a picture are asked as text."""

    takes_pictures = True
    num_loads = 1

    def __init__(self, checkpoint: Checkpoint) -> None:
        settings = LvlmConfig(
            model=checkpoint.model, revision=checkpoint.revision, dtype=checkpoint.dtype, device=checkpoint.device
        )
        self.lvlm = load_judging_lvlm(settings)
        self.writer = ConversationWriter(self.lvlm.writer.processor, checkpoint.model)

    @property
    def notes(self) -> tuple[str, ...]:
        """Of its model."""
        return self.lvlm.notes

    @property
    def num_forward_calls(self) -> int:
        """Of its model."""
        return int(self.lvlm.num_forward_calls)

    def answers(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """Greedy."""
        prompts = [self.writer.write(conversation) for conversation in conversations]
        replies = self.lvlm.generate(prompts, GenerationConfig(max_new_tokens=max_new_tokens), [0] * len(prompts))
        return [reply.text for reply in replies]


def load_judging_lvlm(settings: LvlmConfig) -> Lvlm:
    """An LVLM of a judge's own; what is wrong with it is told in the judge's settings."""
    try:
        loaded = Lvlm.load(settings)
    except ModelError as error:
        raise ModelError(str(error).replace("lvlm.", "judge.")) from error
    loaded.room.name = "judge"
    return loaded


class PolicyGuard:
    """ShieldGemma 2: for every policy, the probability that a picture violates it; it sees no words."""

    takes_pictures = True
    num_loads = 1

    def __init__(self, checkpoint: Checkpoint) -> None:
        kind = _config(checkpoint).model_type
        if kind != "shieldgemma2":
            raise ModelError(f"judge.model {checkpoint.model} is no ShieldGemma 2, but a {kind}")
        try:
            self.processor = AutoProcessor.from_pretrained(checkpoint.location, **checkpoint.source)
            loaded = transformers.ShieldGemma2ForImageClassification.from_pretrained(
                checkpoint.location,
                dtype=checkpoint.torch_dtype,
                use_safetensors=True,
                output_loading_info=True,
                **checkpoint.source,
            )
        except LOADING as error:
            raise checkpoint.failed(error) from error
        checkpoint.require_complete(loaded[1])
        self.model: PreTrainedModel = loaded[0].eval().to(checkpoint.placed())
        self.policies = tuple(self.processor.policy_definitions)
        self.room = Room("judge")
        self.num_forward_calls = 0
        self.model.register_forward_pre_hook(self._count)

    def probabilities(self, pictures: Sequence[Image]) -> list[dict[str, float]]:
        """For each picture, P(Yes | Yes or No) of every policy in its own order, in [0, 1]."""
        return self.room.all_fitted(self._judged, pictures)

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for run.json once memory has run out."""
        return self.room.notes

    def _judged(self, pictures: Sequence[Image]) -> list[dict[str, float]]:
        made = self.processor(images=[[picture] for picture in pictures], return_tensors="pt")
        device, dtype = self.model.device, self.model.dtype
        placed = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in made.items()}
        with torch.inference_mode():
            yes = self.model(**placed).probabilities[:, 0].float().cpu()
        rows = yes.view(len(pictures), len(self.policies)).tolist()
        return [dict(zip(self.policies, row, strict=True)) for row in rows]

    def _count(self, *_: Any) -> None:
        self.num_forward_calls += 1


def _require_room(prompt: Prompt, max_tokens: int | None, max_new_tokens: int) -> None:
    room = None if max_tokens is None else max_tokens - max_new_tokens
    if room is not None and prompt.num_tokens > room:
        raise RowError(
            "prompt_too_long",
            f"the judge's prompt of sample {prompt.sample_id} has {prompt.num_tokens:,} tokens; it takes {room:,}",
        )


def _ids(*named: Any) -> tuple[int, ...]:
    """Every token that a checkpoint names as an answer's end."""
    flat = [token for each in named for token in (each if isinstance(each, (list, tuple)) else [each])]
    return tuple(dict.fromkeys(int(token) for token in flat if token is not None))
