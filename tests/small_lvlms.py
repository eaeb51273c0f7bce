"""Small random LVLMs of the real classes with their real processors, built offline and saved as checkpoints.

One builder a family; `build(family, folder)` writes what a hub checkpoint holds: config, safetensors, tokenizer,
image processor and a chat template of the family's published shape. Weights are random: only mechanics can be tested.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaTokenizer, PreTrainedTokenizerFast

from guardalign.config import LvlmConfig
from guardalign.models.lvlm import Lvlm

CORPUS = [
    "As an AI assistant, I answer helpfully and safely, and I decline requests that could cause harm.",
    "USER: What is shown in this picture? ASSISTANT: The picture shows a red square on a white table.",
    "Describe the image, then count the cats and the dogs. user assistant system You are a helpful assistant.",
    "The methods shown in the image are listed 1. 2. and 3. Please write down the steps!",
] * 3

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' and messages[-1]['content'] | "
    "selectattr('type', 'equalto', 'image') | list %}{{ raise_exception('Images and system turns exclude each other.') "
    "}}{% endif %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<|image|>' }}"
    "{% else %}{{ content['text'] | trim }}{% endif %}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def llama_tokenizer(**special: str) -> LlamaTokenizer:
    """Sentencepiece-like BPE: Metaspace with scheme `first`, byte fallback, `<s>` put in front."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=480, special_tokens=base, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = LlamaTokenizer(
        vocab=model["vocab"], merges=merges, legacy=False, add_bos_token=True, extra_special_tokens=special
    )
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.pad_token = "<unk>"
    return tokenizer


def byte_level_tokenizer(
    split: str, special: list[str], named: dict[str, str], **roles: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, as Qwen's and Llama 3's; `bos_token` in `roles` is put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([*special, *named.values()])
    tokenizer.add_tokens(["<tool_call>"])
    if bos := roles.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=named, padding_side="left", **roles)


def text_config(model_type: str, tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def vision_config(model_type: str, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return {"model_type": model_type, **sizes, "image_size": 28, "patch_size": 14, **more}


def llava() -> tuple[Any, Any]:
    tokenizer = llama_tokenizer(image_token="<image>")
    config = AutoConfig.for_model(
        "llava",
        text_config=text_config("llama", tokenizer),
        vision_config=vision_config("clip_vision_model"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_TEMPLATE,
    )
    return config, processor


PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def llava_next() -> tuple[Any, Any]:
    tokenizer = llama_tokenizer(image_token="<image>")
    config = AutoConfig.for_model(
        "llava_next",
        text_config=text_config("mistral", tokenizer, sliding_window=None),
        vision_config=vision_config("clip_vision_model"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    processor = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=MISTRAL_TEMPLATE,
    )
    return config, processor


CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML_ROLES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def llava_onevision() -> tuple[Any, Any]:
    named = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = byte_level_tokenizer(QWEN_SPLIT, CHATML, named, **CHATML_ROLES)
    config = AutoConfig.for_model(
        "llava_onevision",
        text_config=text_config("qwen2", tokenizer),
        vision_config=vision_config("siglip_vision_model", vision_use_head=False),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=PINPOINTS,
    )
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS
        ),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHATML_TEMPLATE,
    )
    return config, processor


def qwen2_5_vl() -> tuple[Any, Any]:
    special = [*CHATML, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_level_tokenizer(QWEN_SPLIT, special, {}, **CHATML_ROLES)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14}
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config=text_config("qwen2_5_vl_text", tokenizer, rope_parameters=rope),
        vision_config={**vision, "window_size": 56, "out_hidden_size": 48, "fullatt_block_indexes": [1]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 8),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        tokenizer=tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    return config, processor


def internvl() -> tuple[Any, Any]:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_level_tokenizer(QWEN_SPLIT, CHATML, named, **CHATML_ROLES)
    config = AutoConfig.for_model(
        "internvl",
        text_config=text_config("qwen2", tokenizer),
        vision_config=vision_config("internvl_vision", image_size=[28, 28], patch_size=[7, 7]),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        video_processor=transformers.InternVLVideoProcessor(size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=INTERNVL_TEMPLATE,
    )
    return config, processor


def mllama() -> tuple[Any, Any]:
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]
    special += ["<|finetune_right_pad_id|>", "<|image|>"]
    roles = {"bos_token": special[0], "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    tokenizer = byte_level_tokenizer(LLAMA3_SPLIT, special, {}, **roles)
    text = text_config("mllama_text_model", tokenizer, cross_attention_layers=[1, 4])
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1}
    more = {"attention_heads": 2, "image_size": 28, "patch_size": 14, "max_num_tiles": 4}
    config = AutoConfig.for_model(
        "mllama",
        text_config=text,
        vision_config={**vision, **more, "vision_output_dim": 64, "intermediate_layers_indices": [0]},
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    image_processor = transformers.MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=4)
    processor = transformers.MllamaProcessor(image_processor, tokenizer, chat_template=LLAMA3_TEMPLATE)
    return config, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_5_vl": qwen2_5_vl,
    "internvl": internvl,
    "mllama": mllama,
}


def build(family: str, folder: Path, seed: int = 0) -> Path:
    """Write the family's checkpoint into `folder`; weights are drawn wide, so that attention is far from uniform."""
    config, processor = FAMILIES[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" not in name and weight.dim() > 1:
                    weight.normal_(0.0, 0.15)
                if name.endswith("_gate"):  # Mllama's cross attention starts shut
                    weight.fill_(0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@functools.cache
def small_lvlm(family: str, attention: str = "sdpa") -> Lvlm:
    """The family's model, loaded as any checkpoint is; built once a session."""
    folder = checkpoint(family)
    return Lvlm.load(LvlmConfig(model=str(folder), device="cpu", attention=attention))  # type: ignore[arg-type]


@functools.cache
def checkpoint(family: str) -> Path:
    """A folder with the family's checkpoint, built once a session; it is removed when the session ends."""
    holder = tempfile.TemporaryDirectory(prefix=f"guardalign-{family}-")
    _HOLDERS.append(holder)
    return build(family, Path(holder.name) / family)


_HOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def picture(width: int = 90, height: int = 41, colour: str = "red") -> Image.Image:
    """A flat picture with a patch of blue in it."""
    made = Image.new("RGB", (width, height), colour)
    made.paste((0, 90, 200), (width // 8, height // 8, width // 2 + 1, height // 2 + 1))
    return made
