"""`Lvlm`: a large vision-language model of any proven family, as the defenses see it: write prompts, generate answers.

Family quirks (chat templates, image tokens, tiles, cross attention) end in this module and its neighbours: `prompts.py`
writes the tokens, `decoding.py` runs the one loop over `prefill` and `step`, `attention.py` calibrates. Weights come
from safetensors only and no code of a checkpoint is run. Knows nothing of defenses, stages or files of a run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from guardalign.config import GenerationConfig, LvlmConfig
from guardalign.core.calibration import Calibration, default_layers
from guardalign.errors import ConfigError, ModelError, RowError, require
from guardalign.models.asking import Answer, Ask, Asking, Phase, Saved
from guardalign.models.cached_rows import CachedRows
from guardalign.models.checkpoints import ADAPTER
from guardalign.models.decoding import Decoder
from guardalign.models.forward import Read
from guardalign.models.memory import Room
from guardalign.models.prompts import Place, Prompt, PromptWriter, UserText
from guardalign.types import Reply, StopReason

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


PICTURES: Final = frozenset({"pixel_values", "image_grid_thw"})
"""Tensors that tell a prompt with a picture."""
STEADY: Final = ("cross_attention_mask",)
"""Tensors over tokens whose last column every decoding step gets again."""


class Lvlm:
    """An image-text-to-text model with its processor; see `load`."""

    num_loads = 1

    def __init__(self, model: PreTrainedModel, processor: Any, config: LvlmConfig) -> None:
        self.model, self.tokenizer, self.config = model.eval(), processor.tokenizer, config
        self.writer = PromptWriter(processor, config.system_prompt, config.model)
        self.text_config = model.config.get_text_config(decoder=True)
        self.num_layers = int(self.text_config.num_hidden_layers)
        self.cross_attention_layers = frozenset(getattr(self.text_config, "cross_attention_layers", None) or ())
        self.max_tokens: int | None = getattr(self.text_config, "max_position_embeddings", None)
        self.eos_ids = _eos_ids(model, self.tokenizer)
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (*self.eos_ids, 0)[0]
        self.room = Room("lvlm")
        self._notes = (*self.writer.notes, *_generation_notes(model, self.eos_ids, config.model))
        self.num_forward_calls = self.num_prompt_tokens = self.num_tokens = 0
        # InstructBLIP's steps, and its rows without a picture, are its language model's own
        self.decoder: Any = model.language_model if hasattr(model, "qformer") else model
        self.decoder.register_forward_pre_hook(self._count)
        for note in self.notes:
            log.warning("%s", note)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for run.json; more of them once memory has run out."""
        return *self._notes, *self.room.notes

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
        _require_complete(processor, model, report, config.model)
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

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is read and decoded in here counts for nobody."""
        before = self.num_forward_calls, self.num_prompt_tokens, self.num_tokens
        try:
            yield
        finally:
            self.num_forward_calls, self.num_prompt_tokens, self.num_tokens = before

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

        `RowError` for the first row that is too long, or whose logits are no numbers.
        """
        assert len(prompts) == len(seeds), "a seed for every prompt"
        asks = [
            plain_ask(prompt, generation, seed, calibration=calibration, strength=scale, record=record_prefix_attention)
            for prompt, seed, scale in zip(prompts, seeds, strengths or [1.0] * len(prompts), strict=True)
        ]
        return self.answered([self.replying(ask) for ask in asks], max(1, len(prompts)))

    def answered(self, askings: Iterable[Asking[Reply]], capacity: int) -> list[Reply]:
        """The replies of samples, in order, at most `capacity` rows in a batch; raises the first row's `RowError`."""
        replies = self.outcomes(askings, capacity)
        for reply in replies:
            if isinstance(reply, RowError):
                raise reply
        return [reply for reply in replies if isinstance(reply, Reply)]

    def outcomes(
        self, askings: Iterable[Asking[Reply]], capacity: int, again: Callable[[int], Asking[Reply]] | None = None
    ) -> list[Reply | RowError]:
        """As `answered`, with a row's `RowError` in its place; each reply knows what it took.

        `again` begins the sample at a place anew, where memory ran out on it among others (`Decoder.run`).
        """
        ended = Decoder(self, capacity).run(askings, again)
        return [replace(each.value, cost=each.cost) if isinstance(each.value, Reply) else each.value for each in ended]

    def replying(self, ask: Ask) -> Asking[Reply]:
        """A sample that is answered by one ask."""
        (answer,) = yield [ask]
        return self.reply(answer)

    def reply(self, answer: Answer) -> Reply:
        """An answer's text, as the user would see it."""
        stop: StopReason = "end" if answer.tokens and answer.tokens[-1] in self.eos_ids else "length"
        self.num_prompt_tokens += answer.num_prompt_tokens
        self.num_tokens += len(answer.tokens)
        text = self.text(answer.tokens)
        return Reply(text, answer.num_prompt_tokens, len(answer.tokens), stop, answer.prefix_attention)

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without control tokens and outer white space."""
        return str(
            self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ).strip()

    def first_token_probabilities(
        self,
        prompts: Sequence[Prompt],
        calibration: Calibration | None = None,
        strengths: Sequence[float] | None = None,
    ) -> Tensor:
        """softmax of the logits that decode the answer's first token, [B, vocabulary], fp32 on the CPU."""

        def reading(prompt: Prompt, strength: float) -> Asking[Tensor]:
            (answer,) = yield [Ask(prompt, 0, calibration=calibration, strength=strength, keep=True)]
            assert answer.logits is not None
            return answer.logits.softmax(-1).cpu()

        scales = strengths or [1.0] * len(prompts)
        askings = [reading(*each) for each in zip(prompts, scales, strict=True)]
        found = [each.value for each in Decoder(self, max(1, len(prompts))).run(askings)]
        for each in found:
            if isinstance(each, RowError):
                raise each
        return torch.stack([each for each in found if isinstance(each, Tensor)])

    def kind(self, prompt: Prompt) -> bool:
        """Rows without a picture go apart where pictures come by cross attention or through a Q-Former."""
        return (bool(self.cross_attention_layers) or self.decoder is not self.model) and bool(prompt.image)

    def prefill(self, tensors: Mapping[str, Tensor], hidden: bool) -> Read:
        """Reads left-padded prompts, as `generate` of transformers would."""
        given: dict[str, Any] = self._placed(tensors)
        mask = given["attention_mask"]
        others = {name: x for name, x in given.items() if name != "input_ids"}
        # every family's own rule, mrope's included; it is what `generate` calls
        positions = self.model._prepare_position_ids_for_generation(given["input_ids"], others)
        given |= {"attention_mask": _unless_full(mask), "position_ids": positions}
        with _last_hidden(self.model, hidden) as seen:
            out = (self.model if set(given) & PICTURES else self.decoder)(**given, use_cache=True, logits_to_keep=1)
        cache = getattr(out, "language_model_outputs", out).past_key_values
        steady = {name: given[name][:, -1:] for name in STEADY if name in given}
        rows = CachedRows(cache, mask, positions[..., -1:], steady, self.cross_attention_layers)
        return Read(rows, out.logits[:, -1].float(), seen[0] if hidden else None)

    def step(self, rows: CachedRows, tokens: Sequence[int]) -> Read:
        """Feeds every row one token."""
        rows = rows.extended()
        out = self.decoder(
            input_ids=torch.tensor(tokens, device=self.model.device)[:, None],
            attention_mask=_unless_full(rows.mask),
            position_ids=rows.positions,
            past_key_values=rows.cache,
            use_cache=True,
            logits_to_keep=1,
            **rows.steady,
        )
        return Read(rows, out.logits[:, -1].float())

    def _placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the model's device, numbers with a point in its dtype."""
        device, dtype = self.model.device, self.model.dtype
        return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in tensors.items()}

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
    if (folder / ADAPTER).exists():
        raise ModelError(f"lvlm.model: {name} holds {ADAPTER}, which names another model; merge the adapter")


def _require_complete(processor: Any, model: PreTrainedModel, report: Mapping[str, Any], name: str) -> None:
    """transformers draws missing weights at random and goes on: not here."""
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelError(f"lvlm.model {name} has no processor for pictures and text")
    if not hasattr(processor.tokenizer, "backend_tokenizer"):
        raise ModelError(f"lvlm.model {name} has no fast tokenizer (tokenizer.json)")
    if model.config.get_text_config(decoder=True).is_encoder_decoder:
        raise ModelError(f"lvlm.model {name} has an encoder-decoder language model; only decoders can be calibrated")
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


def plain_ask(prompt: Prompt | Saved, generation: GenerationConfig, seed: int, **more: Any) -> Ask:
    """An ask under the run's own decoding settings, the same at every step."""
    phase = Phase(temperature=generation.temperature, top_p=generation.top_p, top_k=generation.top_k)
    return Ask(prompt, generation.max_new_tokens, (phase,), seed, **more)


def _unless_full(mask: Tensor) -> Tensor | None:
    """No mask where there is no padding, as `generate` has it: kernels then run their causal path."""
    return None if bool(mask.all()) else mask


@contextmanager
def _last_hidden(model: PreTrainedModel, wanted: bool) -> Iterator[list[Tensor]]:
    """Collects what the language model hands to its head, [B, W, D] after the final norm; nothing unless wanted."""
    seen: list[Tensor] = []
    if not wanted:
        yield seen
        return
    decoder: Any = model.get_decoder()
    hook = decoder.register_forward_hook(lambda module, given, out: seen.append(out[0]))
    try:
        yield seen
    finally:
        hook.remove()


def _first_line(error: BaseException) -> str:
    """A library's message cut to one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
