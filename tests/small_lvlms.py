"""Small random LVLMs of the real classes with their real processors, built offline and saved as checkpoints.

One builder a family; `build(family, folder)` writes what a hub checkpoint holds: config, safetensors, tokenizer,
image processor and a chat template of the family's published shape. Weights are random: only mechanics can be tested.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from guardalign.config import LvlmConfig
from guardalign.models.lvlm import Lvlm
from tests.small_templates import (
    CHATML_TEMPLATE,
    GEMMA3_TEMPLATE,
    IDEFICS3_TEMPLATE,
    INTERNVL_TEMPLATE,
    LLAMA3_TEMPLATE,
    MISTRAL_TEMPLATE,
    QWEN3_TEMPLATE,
    QWEN_TEMPLATE,
    SMOLVLM_TEMPLATE,
    VICUNA_TEMPLATE,
)
from tests.small_tokenizers import (
    LLAMA3_SPLIT,
    QWEN_SPLIT,
    bert_tokenizer,
    byte_level_tokenizer,
    gemma_tokenizer,
    llama_tokenizer,
)


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


def qwen3_vl() -> tuple[Any, Any]:
    special = [*CHATML, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_level_tokenizer(QWEN_SPLIT, special, {}, **CHATML_ROLES)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 16}
    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config=text_config("qwen3_vl_text", tokenizer, head_dim=12, rope_parameters=rope),
        vision_config={
            **vision,
            "out_hidden_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            patch_size=16, min_pixels=32 * 32, max_pixels=32 * 32 * 8, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        video_processor=transformers.Qwen3VLVideoProcessor(),
        tokenizer=tokenizer,
        chat_template=QWEN3_TEMPLATE,
    )
    return config, processor


def gemma3() -> tuple[Any, Any]:
    """Every third layer sees all, the others eight tokens: less than any prompt has.

    Departs: output weights of its own, since with Gemma's tied ones a random model repeats its last token.
    """
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = gemma_tokenizer(["<start_of_turn>", "<end_of_turn>"], named)
    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    more = {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8, "layer_types": layers}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text_config("gemma3_text", tokenizer, **more)
        | {"eos_token_id": [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]},
        vision_config=vision_config("siglip_vision_model", vision_use_head=False, image_size=56),
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=GEMMA3_TEMPLATE,
    )
    return config, processor


TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
TILED = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}


def idefics3() -> tuple[Any, Any]:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    roles = {"bos_token": special[0], "eos_token": "<end_of_utterance>", "pad_token": "<|end_of_text|>"}
    tokenizer = byte_level_tokenizer(LLAMA3_SPLIT, [*special, "<global-img>", *TILES], {}, **roles)
    config = AutoConfig.for_model(
        "idefics3",
        text_config=text_config("llama", tokenizer),
        vision_config=vision_config("idefics3_vision", patch_size=7),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(**TILED), tokenizer, image_seq_len=4, chat_template=IDEFICS3_TEMPLATE
    )
    return config, processor


def smolvlm() -> tuple[Any, Any]:
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    roles = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    tokenizer = byte_level_tokenizer(QWEN_SPLIT, [*CHATML, *TILES], named, **roles)
    config = AutoConfig.for_model(
        "smolvlm",
        text_config=text_config("llama", tokenizer),
        vision_config=vision_config("smolvlm_vision", patch_size=7),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
    )
    sampling = {"max_frames": 2, "fps": 1, "video_size": {"longest_edge": 28}}
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**TILED),
        tokenizer,
        transformers.SmolVLMVideoProcessor(**TILED, video_sampling=sampling),
        image_seq_len=4,
        chat_template=SMOLVLM_TEMPLATE,
    )
    return config, processor


def instructblip() -> tuple[Any, Any]:
    tokenizer = llama_tokenizer()
    qformer_tokenizer = bert_tokenizer()
    processor = transformers.InstructBlipProcessor(
        transformers.BlipImageProcessor(size={"height": 28, "width": 28}),
        tokenizer,
        qformer_tokenizer,
        num_query_tokens=4,
    )
    config = AutoConfig.for_model(
        "instructblip",
        text_config=text_config("llama", tokenizer),
        vision_config=vision_config("instructblip_vision_model"),
        qformer_config={
            "vocab_size": len(qformer_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
            "encoder_hidden_size": 32,
        },
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return config, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_5_vl": qwen2_5_vl,
    "internvl": internvl,
    "mllama": mllama,
    "qwen3_vl": qwen3_vl,
    "gemma3": gemma3,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "instructblip": instructblip,
}

"""families that answer a prompt without a picture"""


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


DISTINCT = ("llava", "qwen2_5_vl", "gemma3", "mllama", "instructblip")
"""Plain causal attention, mrope, sliding windows, cross attention, a Q-Former."""
FAMILIES_BY_TURNS: list[Any] = [
    family if family in DISTINCT else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES
]
"""All families; those that differ little from others in what is tested are left to the slow suite."""
FAMILIES_SELDOM: list[Any] = [
    family if family in ("llava", "mllama") else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES
]
"""All families, for tests of seconds each: two by default."""


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
