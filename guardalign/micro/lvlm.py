"""The micro LVLM's parts: configuration, tokenizer and processor of a LLaVA of three million parameters.

Every text can be written in its tokens, so that nothing is unknown to it. Knows nothing of training or of defenses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE = 96
PATCH_SIZE = 12
MAX_TOKENS = 4096
ROPE_THETA = 500_000.0
"""Llama 3's: half of a head's dimensions turn so slowly that words match picture tokens from anywhere"""
SPECIAL = ("<s>", "</s>", "<pad>", "<image>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ content['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def with_control_tokens(tokenizer: Tokenizer) -> Any:
    """A byte-level tokenizer as the model's: control tokens added, `<s>` put in front, padding on the left."""
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        add_bos_token=True,
        padding_side="left",
        model_max_length=MAX_TOKENS,
    )


@dataclass(frozen=True)
class Shape:
    """Sizes of the language model and of the vision tower that it looks through."""

    vision_width: int = 128
    vision_layers: int = 4
    width: int = 160
    layers: int = 6
    heads: int = 4
    key_heads: int = 4
    vision_features: tuple[int, ...] = (0, -1)
    """states of the tower that the projector sees side by side: the embedded patches know where, the last layer what"""


def model_config(tokenizer: Any, shape: Shape = Shape()) -> LlavaConfig:
    """A LLaVA; the projector takes what the tower's layers give, before its final norm; words share one table."""
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_width // 32,
        projection_dim=128,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.width * 27 // 10,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=list(shape.vision_features),
        tie_word_embeddings=True,
    )


def build_processor(tokenizer: Any, image_size: int = IMAGE_SIZE, patch_size: int = PATCH_SIZE) -> LlavaProcessor:
    """The whole picture, squashed to a square of `image_size` [px]: nothing is cropped away."""
    side = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
