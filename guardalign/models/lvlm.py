"""`Lvlm`: a large vision-language model of any proven family, as the defenses see it: write prompts, generate answers.

Family quirks (chat templates, image tokens, tiles, cross attention) end in this module and its neighbours: `prompts.py`
writes the tokens, `batches.py` stacks them, `attention.py` calibrates, `sampling.py` draws. Weights come from
safetensors only and no code of a checkpoint is run. Knows nothing of defenses, stages or files of a run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from PIL.Image import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessorList, PreTrainedModel

from guardalign.config import GenerationConfig, LvlmConfig
from guardalign.core.calibration import Calibration, default_layers
from guardalign.errors import ConfigError, ModelError, RowError, require
from guardalign.models.attention import calibrated
from guardalign.models.batches import Batch, collate
from guardalign.models.prompts import Place, Prompt, PromptWriter, UserText
from guardalign.models.sampling import FiniteRows, RowSampler
from guardalign.types import Reply

log = logging.getLogger(__name__)

HARMLESS_SETTINGS: Final = {
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "transformers_version",
    "_from_model_config",
}
"""Entries of a checkpoint's own generation settings that are kept, or that change no answer."""


class Lvlm:
    """An image-text-to-text model with its processor; see `load`."""

    num_loads = 1

    def __init__(self, model: PreTrainedModel, processor: Any, config: LvlmConfig) -> None:
        self.model, self.tokenizer = model.eval(), processor.tokenizer
        self.writer = PromptWriter(processor, config.system_prompt, config.model)
        self.text_config = model.config.get_text_config(decoder=True)
        self.num_layers = int(self.text_config.num_hidden_layers)
        self.cross_attention_layers = frozenset(getattr(self.text_config, "cross_attention_layers", None) or ())
        self.max_tokens: int | None = getattr(self.text_config, "max_position_embeddings", None)
        self.eos_ids = _eos_ids(model, self.tokenizer)
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (*self.eos_ids, 0)[0]
        self.notes: tuple[str, ...] = (*self.writer.notes, *_generation_notes(model, self.eos_ids, config.model))
        model.generation_config = self._decoding(1)  # transformers would fill what ours leaves open from the old one
        self.num_forward_calls = self.num_prompt_tokens = self.num_tokens = 0
        model.register_forward_pre_hook(self._count)
        for note in self.notes:
            log.warning("%s", note)

    @classmethod
    def load(cls, config: LvlmConfig) -> Lvlm:
        """Loads model and processor; `ModelError` where there are none, or none that can be used."""
        local = _is_local(config.model)
        location = str(Path(config.model).expanduser()) if local else config.model
        if local:
            _require_checkpoint(Path(location), config.model)
        source = {"revision": config.revision, "local_files_only": local, "trust_remote_code": False}
        try:
            processor = AutoProcessor.from_pretrained(location, **source)
            model, report = AutoModelForImageTextToText.from_pretrained(
                location,
                dtype=getattr(torch, config.dtype),
                device_map=config.device_map,
                attn_implementation={"text_config": config.attention},
                use_safetensors=True,
                output_loading_info=True,
                **source,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ModelError(f"lvlm.model {config.model} cannot be loaded: {_first_line(error)}") from error
        _require_complete(processor, report, config.model)
        if config.device_map is None:
            model.to(_device(config.device))
        return cls(model, processor, config)

    def prompt(
        self,
        sample_id: str,
        instruction: str,
        picture: Image | None,
        prefix: str | None = None,
        place: Place = "before",
    ) -> Prompt:
        """The row's prompt: the picture, then the instruction with the safety prefix on the line before or after it."""
        return self.writer.write(sample_id, UserText.of(instruction, prefix, place), picture)

    def length_hint(self, prompt: str, picture_size: tuple[int, int] | None) -> int:
        """About the tokens of a text and a picture (width, height [px]), to sort rows by; cheap, and never raises."""
        return self.writer.length_hint(prompt, picture_size)

    def calibrated_layers(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        """`layers` checked against the model, or its default middle layers; cross-attention layers have no prefix."""
        if layers is None:
            middle = tuple(at for at in default_layers(self.num_layers) if at not in self.cross_attention_layers)
            require(bool(middle), "defense.layers: the middle layers all attend to the image alone; name some others")
            return middle
        outside = [layer for layer in layers if not 0 <= layer < self.num_layers]
        last = self.num_layers - 1
        require(not outside, f"defense.layers: {outside} lie outside the model; its layers are 0 to {last}")
        crossing = sorted(self.cross_attention_layers.intersection(layers))
        require(not crossing, f"defense.layers: {crossing} attend to the image alone (cross attention); take them out")
        return tuple(sorted(set(layers)))

    def generate(
        self,
        prompts: Sequence[Prompt],
        generation: GenerationConfig,
        seeds: Sequence[int],
        calibration: Calibration | None = None,
        *,
        record_prefix_attention: bool = False,
        strengths: Sequence[float] | None = None,
    ) -> list[Reply]:
        """One answer a prompt, in order; none depends on its neighbours. `strengths` multiply gamma row by row.

        `RowError` names the first row that is too long, or whose logits are no numbers.
        """
        assert len(prompts) == len(seeds), "a seed for every prompt"
        for prompt in prompts:
            self._require_room(prompt, generation.max_new_tokens)
        replies: dict[int, Reply] = {}
        for rows in self._groups(prompts):
            answers = self._generate(
                [prompts[row] for row in rows],
                generation,
                [seeds[row] for row in rows],
                calibration,
                record_prefix_attention,
                None if strengths is None else [strengths[row] for row in rows],
            )
            replies |= dict(zip(rows, answers, strict=True))
        return [replies[row] for row in range(len(prompts))]

    def first_token_probabilities(
        self,
        prompts: Sequence[Prompt],
        calibration: Calibration | None = None,
        strengths: Sequence[float] | None = None,
    ) -> Tensor:
        """softmax of the logits that decode the answer's first token, [B, vocabulary], fp32 on the CPU."""
        found: dict[int, Tensor] = {}
        for rows in self._groups(prompts):
            batch = collate([prompts[row] for row in rows], self.pad_id)
            chosen = None if strengths is None else [strengths[row] for row in rows]
            context = nullcontext() if calibration is None else self._calibrated(batch, calibration, False, chosen)
            with torch.inference_mode(), context:
                logits = self.model(**self._placed(batch.tensors), use_cache=False, logits_to_keep=1).logits[:, -1]
            found |= dict(zip(rows, logits.float().softmax(-1).cpu(), strict=True))
        return torch.stack([found[row] for row in range(len(prompts))])

    def _require_room(self, prompt: Prompt, max_new_tokens: int) -> None:
        room = None if self.max_tokens is None else self.max_tokens - max_new_tokens
        if room is not None and prompt.num_tokens > room:
            raise RowError(
                "prompt_too_long",
                f"prompt of sample {prompt.sample_id} has {prompt.num_tokens:,} tokens; the model takes {room:,} "
                f"({self.max_tokens:,} less {max_new_tokens:,} for the answer)",
            )

    def _groups(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Rows that go together: all, but rows without a picture apart where pictures come by cross attention."""
        rows = range(len(prompts))
        if not self.cross_attention_layers:
            return [list(rows)] if prompts else []
        kinds = ([row for row in rows if bool(prompts[row].image) is image] for image in (True, False))
        return [kind for kind in kinds if kind]

    def _generate(
        self,
        prompts: Sequence[Prompt],
        generation: GenerationConfig,
        seeds: Sequence[int],
        calibration: Calibration | None,
        record: bool,
        strengths: Sequence[float] | None,
    ) -> list[Reply]:
        batch, finite = collate(prompts, self.pad_id), FiniteRows()
        steps: list[Any] = [finite]
        if generation.temperature > 0:
            steps.append(RowSampler(generation, seeds, batch.num_columns))
        context = nullcontext() if calibration is None else self._calibrated(batch, calibration, record, strengths)
        with torch.inference_mode(), context as active:
            ids = self.model.generate(
                **self._placed(batch.tensors),
                generation_config=self._decoding(generation.max_new_tokens),
                logits_processor=LogitsProcessorList(steps),
            )
        _require_finite(prompts, finite)
        answers = [self._until_end(row) for row in ids[:, batch.num_columns :].tolist()]
        masses = active.prefix_attention([len(answer) for answer in answers]) if active and record else None
        return [
            self._reply(prompt, answer, masses[row] if masses else None)
            for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]

    def _calibrated(
        self, batch: Batch, calibration: Calibration, record: bool, strengths: Sequence[float] | None
    ) -> Any:
        spans = (batch.prefixes, batch.instructions, batch.num_columns)
        return calibrated(self.model, calibration, *spans, record=record, strengths=strengths)

    def _placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the model's device, numbers with a point in its dtype."""
        device, dtype = self.model.device, self.model.dtype
        return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in tensors.items()}

    def _decoding(self, max_new_tokens: int) -> transformers.GenerationConfig:
        """Greedy, with a cache, and nothing of the checkpoint's own settings but its end tokens."""
        return transformers.GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(self.eos_ids) or None,
            pad_token_id=self.pad_id,
        )

    def _until_end(self, ids: list[int]) -> list[int]:
        """The answer's tokens up to and with its first end token."""
        ends = (at for at, token in enumerate(ids) if token in self.eos_ids)
        return ids[: next(ends, len(ids)) + 1]

    def _reply(self, prompt: Prompt, answer: list[int], prefix_attention: float | None) -> Reply:
        self.num_prompt_tokens += prompt.num_tokens
        self.num_tokens += len(answer)
        text = self.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ended = answer[-1] in self.eos_ids
        return Reply(text.strip(), prompt.num_tokens, len(answer), "end" if ended else "length", prefix_attention)

    def _count(self, *_: Any) -> None:
        self.num_forward_calls += 1


def _is_local(name: str) -> bool:
    """A folder of this machine: such a name never asks the hub, even when there is nothing there."""
    return name.startswith((".", "~", "/")) or Path(name).is_absolute() or Path(name).exists()


def _require_checkpoint(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise ModelError(f"lvlm.model: there is no folder {name}")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"lvlm.model: {name} holds no *.safetensors; save the model with save_pretrained, which does")


def _require_complete(processor: Any, report: Mapping[str, Any], name: str) -> None:
    """transformers draws missing weights at random and goes on: not here."""
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelError(f"lvlm.model {name} has no processor for pictures and text")
    if not hasattr(processor.tokenizer, "backend_tokenizer"):
        raise ModelError(f"lvlm.model {name} has no fast tokenizer (tokenizer.json)")
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"lvlm.model {name} lacks {len(missing)} weights, the first is {missing[0]}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"lvlm.device: there is no device {name}; cpu, cuda, cuda:1, ... are") from error
    require(device.type != "cuda" or torch.cuda.is_available(), f"lvlm.device: {name} is set, but CUDA is absent")
    return device


def _eos_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """Every token that a checkpoint names as an answer's end."""
    named = (model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id, tokenizer.eos_token_id)
    ids = [each if isinstance(each, (list, tuple)) else [each] for each in named]
    return tuple(dict.fromkeys(int(token) for each in ids for token in each if token is not None))


def _generation_notes(model: PreTrainedModel, eos_ids: tuple[int, ...], name: str) -> tuple[str, ...]:
    own = {key: value for key, value in model.generation_config.to_diff_dict().items() if key not in HARMLESS_SETTINGS}
    notes = []
    if own:
        listed = ", ".join(f"{key}={value}" for key, value in sorted(own.items()))
        notes.append(f"generation settings of {name} itself are not used: {listed}")
    if not eos_ids:
        notes.append(f"{name} names no end token; every answer runs to generation.max_new_tokens")
    return tuple(notes)


def _require_finite(prompts: Sequence[Prompt], watched: FiniteRows) -> None:
    assert watched.finite is not None
    for prompt, finite in zip(prompts, watched.finite.tolist(), strict=True):
        if not finite:
            raise RowError(
                "generation_failed",
                f"sample {prompt.sample_id}: the model's logits are not finite; try lvlm.dtype bfloat16 or float32",
            )


def _first_line(error: BaseException) -> str:
    """A library's message cut to one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
