"""Builds the LVLM that the benchmarks run: a LLaVA with random weights, mid-sized, with the proportions of a real one.

    image     336 px in patches of 14: 576 tokens, as LLaVA-1.5
    language  16 layers of width 512, 8 query and 2 key heads: 44 million parameters outside the vocabulary
    vision    4 layers of width 192: 2 million, a 23rd of the language model, as CLIP ViT-L/14 to a 7B model

Its tokenizer knows the benchmarks' words whole, so that a text has about as many tokens as in a real vocabulary. It has
no end token: every answer runs to `max_new_tokens`, and both sides of a ratio decode equally many tokens.
Knows nothing of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from guardalign.micro.lvlm import build_processor, with_control_tokens

MAX_TOKENS = 4096
VOCABULARY = 4096
"""Rows of the embedding; the tokenizer uses the first of them."""


@dataclass(frozen=True)
class LvlmSizes:
    """How large the model is."""

    image_size: int = 336
    """side of the model's picture [px]"""
    patch_size: int = 14
    """side of a patch [px]"""
    vision_width: int = 192
    vision_layers: int = 4
    width: int = 512
    """of the language model"""
    layers: int = 16
    heads: int = 8
    key_heads: int = 2

    @property
    def image_tokens(self) -> int:
        """Prompt positions that a picture takes."""
        return (self.image_size // self.patch_size) ** 2


MID_SIZED = LvlmSizes()


def build_random_lvlm(folder: Path, sizes: LvlmSizes, texts: Sequence[str], seed: int) -> None:
    """Writes model and processor into `folder`; the words of `texts` become tokens."""
    tokenizer = word_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(model_config(tokenizer, sizes))
    model.save_pretrained(folder)
    build_processor(tokenizer, sizes.image_size, sizes.patch_size).save_pretrained(folder)


def word_tokenizer(texts: Sequence[str]) -> Any:
    """Byte-level BPE that has merged every word of `texts`; it names no end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 256,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *texts], trainer)
    finished = with_control_tokens(tokenizer)
    finished.eos_token = None
    return finished


def model_config(tokenizer: Any, sizes: LvlmSizes) -> LlavaConfig:
    """A LLaVA of these sizes; feed-forward layers as wide as Llama's and CLIP's are to their width."""
    vision = CLIPVisionConfig(
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=max(sizes.vision_width // 64, 1),
        projection_dim=sizes.vision_width,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.width,
        intermediate_size=sizes.width * 43 // 16,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=sizes.image_tokens,
    )
