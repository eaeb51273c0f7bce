"""What is said of scenes: names, captions, and the byte-level vocabulary of both small models.

The texts that models are trained on and the ones they are tested with differ: the templates of `HELD_OUT_TEMPLATES`
are never seen in training; their words are, all but "with". Knows nothing of pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from guardalign.micro.world import KINDS, Kind

TEMPLATES: Final = (
    "{}",
    "a picture of {}",
    "an image showing {}",
    "{} on a plain background",
    "a small drawing of {}",
    "there is {} in the scene",
)
HELD_OUT_TEMPLATES: Final = ("an image of {}", "a picture showing {}", "a scene with {}")
"""never trained on"""
BACKGROUNDS: Final = (
    "a plain background",
    "a picture of a plain background",
    "an image showing nothing",
    "nothing on a plain background",
    "there is nothing in the scene",
)
HELD_OUT_BACKGROUNDS: Final = ("an image of a plain background", "a picture showing nothing")
CAPTIONS: Final = (
    "a picture of {}",
    "an image showing {}",
    "there is {} in the scene",
    "{} on a plain background",
    "{}",
)
PLURAL: Final = ("grapes",)
MASS: Final = ("dynamite", "smoke")


def with_article(noun: str) -> str:
    """`a bomb`, `an apple`, `grapes`."""
    last = noun.split()[-1]
    if last in PLURAL or noun in MASS:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def texts_of(kind: Kind, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Every template with every noun of the kind."""
    return [template.format(with_article(noun)) for template in templates for noun in kind.nouns]


def caption(kinds: Sequence[int], rng: np.random.Generator) -> str:
    """One sentence that names every object, in any order, each by any of its nouns."""
    nouns = [with_article(str(rng.choice(KINDS[kinds[at]].nouns))) for at in rng.permutation(len(kinds))]
    return str(rng.choice(CAPTIONS)).format(listed(nouns))


def listed(nouns: Sequence[str]) -> str:
    """`a dog`, `a dog and a car`, `a dog, a car and a bee`."""
    return " and ".join(part for part in (", ".join(nouns[:-1]), nouns[-1]) if part)


def byte_level_bpe(texts: Iterable[str]) -> Tokenizer:
    """Byte-pair merges until every word of `texts` is one token; any other text falls apart into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    return tokenizer


def clip_tokenizer(texts: Iterable[str]) -> Any:
    """For open_clip: `<s> text </s>`; the end token has the largest id, as its text pooling wants."""
    from tokenizers import decoders, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_level_bpe(texts)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>"])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )
