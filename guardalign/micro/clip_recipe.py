"""How the micro CLIPs are trained: one whose patches are taught, and one that only ever sees pictures with captions.

    taught        windows of 4 x 4 cells, every cell's token against the kinds' texts; then whole scenes, the same loss
                  plus the contrastive loss of pictures and captions
    contrastive   pictures and captions alone, windows first, then whole scenes: nobody tells its patches what they show
                  (nearer to a real CLIP; but crops of what is in them, and a vector that is the mean of the patches')

The token loss **grants by construction** what optimal transport needs, patches with local meaning; every figure of the
taught CLIP has to be read with that in mind. Knows nothing of dialogues.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from guardalign.micro.corpus import BACKGROUND, Corpus
from guardalign.micro.dialogues import vocabulary_texts
from guardalign.micro.language import (
    BACKGROUNDS,
    CAPTIONS,
    HELD_OUT_BACKGROUNDS,
    HELD_OUT_TEMPLATES,
    caption,
    clip_tokenizer,
    texts_of,
)
from guardalign.micro.training import train
from guardalign.micro.world import CELL, GRID, KINDS, SIDE
from guardalign.models.clip import images_and_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOW: Final = 4
"""cells along a window's side"""
CONTEXT: Final = 77
SEEN: Final = 0.7
"""cells' worth of pixels that an object must have in a window to be named in its caption"""
LARGEST_LOGIT_SCALE: Final = 4.0
"""of its logarithm"""


@dataclass(frozen=True)
class ClipRecipe:
    """Sizes and budget of one micro CLIP."""

    taught: bool = True
    """with the token loss"""
    width: int = 128
    layers: int = 4
    peak_rate: float = 2e-3
    window_steps: int = 1300
    """batches of windows: the token loss alone, or windows with captions"""
    scene_steps: int = 300
    """batches of whole scenes"""
    batch: int = 128
    pooling: Literal["tok", "avg"] = "tok"
    """how a picture's vector comes about: its class token, or the mean of its patches"""
    background_weight: float = 0.2
    """weight of a cell without object in the token loss"""


def clip_config(recipe: ClipRecipe, vocabulary: int) -> dict[str, Any]:
    """open_clip's model configuration."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": SIDE,
            "patch_size": CELL,
            "width": recipe.width,
            "layers": recipe.layers,
            "head_width": 32,
            "pool_type": recipe.pooling,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "width": 96,
            "heads": 3,
            "layers": 2,
            "hf_tokenizer_name": "tokenizer",
        },
    }


def world_tokenizer() -> Any:
    """Every word of the micro world is one token; anything else falls apart into bytes."""
    names = [text for kind in KINDS for text in (*texts_of(kind), *texts_of(kind, HELD_OUT_TEMPLATES))]
    captions = [form.format("a dog, a cat and a car") for form in CAPTIONS]
    return clip_tokenizer([*names, *BACKGROUNDS, *HELD_OUT_BACKGROUNDS, *captions, *vocabulary_texts()])


class ClipTrainer:
    """The model and its two losses, each a function of the step."""

    def __init__(self, recipe: ClipRecipe, corpus: Corpus, seed: int) -> None:
        torch.manual_seed(seed)
        self.recipe, self.corpus, self.seed = recipe, corpus, seed
        self.tokenizer = world_tokenizer()
        self.config = clip_config(recipe, len(self.tokenizer))
        fields = {key: value for key, value in self.config["text_cfg"].items() if key != "hf_tokenizer_name"}
        self.model = CLIP(self.config["embed_dim"], self.config["vision_cfg"], fields)
        self._mean = 255 * torch.tensor(open_clip.OPENAI_DATASET_MEAN)
        self._std = 255 * torch.tensor(open_clip.OPENAI_DATASET_STD)
        self._texts = [*(texts_of(kind) for kind in KINDS), list(BACKGROUNDS)]

    def run(self, checkpoint: Path | None = None) -> None:
        """All steps: windows first, then whole scenes, on one schedule."""
        windows = self.recipe.window_steps
        steps = windows + self.recipe.scene_steps

        def loss_at(step: int) -> Tensor:
            rng = np.random.default_rng((self.seed, step))
            loss = self.window_loss(rng) if step < windows else self.scene_loss(rng)
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, LARGEST_LOGIT_SCALE)
            return loss

        train(
            "clip" if self.recipe.taught else "clip-contrastive",
            self.model,
            loss_at,
            steps,
            self.recipe.peak_rate,
            checkpoint,
        )

    def window_loss(self, rng: np.random.Generator) -> Tensor:
        """Windows of 4 x 4 cells, those with more object in them preferred: the token loss, or that of captions."""
        pixels, targets, _ = self._scenes(rng)
        corners = _fuller(targets, rng)
        shown = [
            whole[CELL * r : CELL * (r + WINDOW), CELL * c : CELL * (c + WINDOW)]
            for whole, (r, c) in zip(pixels, corners, strict=True)
        ]
        wanted = np.stack([rows[r : r + WINDOW, c : c + WINDOW] for rows, (r, c) in zip(targets, corners, strict=True)])
        images, tokens = self._window_vectors(self._normalised(np.stack(shown)), corners)
        if self.recipe.taught:
            return self._token_loss(normalize(tokens, dim=-1), torch.from_numpy(wanted).flatten(1, 2), rng)
        cells = wanted.sum((1, 2))
        return self._contrastive_loss(images, [np.flatnonzero(row[:BACKGROUND] > SEEN).tolist() for row in cells], rng)

    def scene_loss(self, rng: np.random.Generator) -> Tensor:
        """Contrastive loss of scenes and captions, plus the token loss where patches are taught."""
        pixels, targets, kinds = self._scenes(rng)
        images, tokens = images_and_tokens(self.model.visual, self._normalised(pixels), False)
        loss = self._contrastive_loss(images, [[int(kind) for kind in row if kind >= 0] for row in kinds], rng)
        if not self.recipe.taught:
            return loss
        return loss + self._token_loss(normalize(tokens, dim=-1), torch.from_numpy(targets).flatten(1, 2), rng)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts; the same numbers as open_clip's `encode_text`, without its padding to 77."""
        ids = self.tokenizer(list(texts), padding=True, return_tensors="pt").input_ids
        length = ids.shape[1]
        x = self.model.token_embedding(ids) + self.model.positional_embedding[:length]
        x = self.model.transformer(x, attn_mask=self.model.attn_mask[:length, :length])
        x = self.model.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)]
        return normalize(x @ self.model.text_projection, dim=-1)

    def save(self, folder: Path) -> None:
        """open_clip's own folder format, weights in fp16."""
        folder.mkdir(parents=True, exist_ok=True)
        description = {"model_cfg": self.config, "preprocess_cfg": {"interpolation": "bicubic"}}
        (folder / "open_clip_config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        weights = {name: x.detach().half().contiguous() for name, x in self.model.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        self.tokenizer.save_pretrained(folder)

    def _scenes(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int8]]:
        """Pixels [B, SIDE, SIDE, 3], the cells' shares [B, GRID, GRID, K + 1] and kinds [B, O]; half are mirrored."""
        chosen = rng.integers(0, len(self.corpus), self.recipe.batch)
        pixels = self.corpus.pixels[chosen]
        targets = self.corpus.targets(chosen).reshape(-1, GRID, GRID, BACKGROUND + 1)
        mirrored = rng.random(len(chosen)) < 0.5
        pixels[mirrored] = pixels[mirrored, :, ::-1]
        targets[mirrored] = targets[mirrored, :, ::-1]
        return pixels, targets, self.corpus.kinds[chosen]

    def _normalised(self, pixels: NDArray[np.uint8]) -> Tensor:
        return ((torch.from_numpy(pixels).float() - self._mean) / self._std).permute(0, 3, 1, 2)

    def _window_vectors(self, pixels: Tensor, corners: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """A window's own vector [B, D] and its cells' [B, 16, D]; each cell keeps its position in the scene."""
        visual, steps = self.model.visual, np.arange(WINDOW)
        rows, columns = corners[:, 0, None, None] + steps[:, None], corners[:, 1, None, None] + steps
        positions = torch.from_numpy((rows * GRID + columns).reshape(len(corners), -1))
        cells = visual.conv1(pixels).flatten(2).transpose(1, 2) + visual.positional_embedding[1 + positions]
        if self.recipe.taught:
            x = visual.ln_post(visual.transformer(visual.ln_pre(cells)))
            return x[:, 0], x @ visual.proj
        own = (visual.class_embedding + visual.positional_embedding[0]).expand(len(pixels), 1, -1)
        x = visual.ln_post(visual.transformer(visual.ln_pre(torch.cat([own, cells], dim=1)))) @ visual.proj
        return x[:, 0] if self.recipe.pooling == "tok" else x[:, 1:].mean(1), x[:, 1:]

    def _token_loss(self, tokens: Tensor, targets: Tensor, rng: np.random.Generator) -> Tensor:
        """Cross entropy of every cell against one text a kind, drawn anew each step."""
        texts = self.encode([str(rng.choice(choices)) for choices in self._texts])
        logits = self.model.logit_scale.exp() * tokens @ texts.T
        each = cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none")
        weights = 1 - (1 - self.recipe.background_weight) * targets[..., BACKGROUND].flatten()
        return (each * weights).sum() / weights.sum()

    def _contrastive_loss(self, images: Tensor, shown: Sequence[Sequence[int]], rng: np.random.Generator) -> Tensor:
        """Pictures against captions of what they show; pictures of the very same kinds are each other's positives."""
        said = [caption(kinds, rng) if kinds else str(rng.choice(BACKGROUNDS)) for kinds in shown]
        logits = self.model.logit_scale.exp() * normalize(images, dim=-1) @ self.encode(said).T
        sets = [frozenset(kinds) for kinds in shown]
        same = torch.tensor([[float(a == b) for b in sets] for a in sets])
        same = same / same.sum(-1, keepdim=True)
        return (cross_entropy(logits, same) + cross_entropy(logits.T, same)) / 2


def _fuller(targets: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64]:
    """Of two random windows a scene, the corner [B, 2] of the one with more object in it."""
    objects = 1 - targets[..., BACKGROUND]
    drawn = rng.integers(0, GRID - WINDOW + 1, (2, len(targets), 2))
    content = np.array(
        [
            [rows[r : r + WINDOW, c : c + WINDOW].sum() for rows, (r, c) in zip(objects, corners, strict=True)]
            for corners in drawn
        ]
    )
    return np.where((content[1] > content[0])[:, None], drawn[1], drawn[0])
