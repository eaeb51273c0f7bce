"""PatchEncoder: pictures and texts -> unit vectors in the joint space of an open_clip model, and where patches lie.

    view     on the CPU, per picture, thread-safe: resize, place, and say which cells are patches
    encode   on the device, per batch: the global embedding of every picture and the embeddings of its patches

Patches are the vision transformer's own tokens (`tokens`), the tokens as they leave the last block when each attends
to itself alone (`values`), or crops sent through the ordinary encoder (`grid`). The whole picture is always seen:
nothing is centre-cropped. Knows nothing of categories, thresholds or scores.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from open_clip.transformer import VisionTransformer
from PIL.Image import Image, Resampling
from torch import Tensor
from torch.nn.functional import normalize

from guardalign.config import ClipConfig
from guardalign.core.patches import (
    Canvas,
    Fit,
    crop_grid,
    pad_grid,
    patch_boxes,
    squash_grid,
    tile_boxes,
    tiled_grid,
)
from guardalign.errors import ModelError
from guardalign.models.clip_weights import load_model
from guardalign.models.memory import Room
from guardalign.types import Box, PatchGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from guardalign.core.images import Decoded

log = logging.getLogger(__name__)

PatchKind = Literal["tokens", "values", "grid"]


@dataclass(frozen=True)
class View:
    """A picture as the model shall see it; made ahead of the model, on the CPU."""

    pixels: NDArray[np.uint8]
    """[N, height, width, 3]: the whole picture, then its tiles or crops, if it was cut into any"""
    patches: PatchKind | None
    """what its patches are; None when only the whole picture is wanted"""
    grid: PatchGrid | None
    """where they lie on the picture"""
    valid: NDArray[np.bool_]
    """[P]: which of the model's P cells are patches; the others are padding"""


@dataclass(frozen=True)
class Embedded:
    """What the model says of one view: unit vectors in fp32, on the model's device."""

    image: Tensor
    """[D] the whole picture"""
    patches: Tensor
    """[P, D] every cell, padding cells included; [0, D] when no patches are wanted"""
    valid: Tensor
    """[P] which cells are patches"""


class PatchEncoder:
    """An open_clip model that embeds pictures, their patches, and texts."""

    def __init__(self, model: Any, tokenizer: Any, config: ClipConfig, device: torch.device) -> None:
        self._model, self._tokenizer, self._config, self._device = model, tokenizer, config, device
        self._visual = model.visual
        self._texts: dict[str, Tensor] = {}
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        preprocess = self._visual.preprocess_cfg
        self._resampling = Resampling[preprocess["interpolation"].upper()]
        self._mean = 255 * torch.tensor(preprocess["mean"], device=device)
        self._std = 255 * torch.tensor(preprocess["std"], device=device)
        self._padding = np.array([round(255 * mean) for mean in preprocess["mean"]], dtype=np.uint8)
        self.room = Room("clip")
        """inputs of a forward call that fit, and pictures that are scored together"""
        self.logit_scale = float(self._model.logit_scale.exp())
        """s, the factor that the model was trained to put on cosines"""
        self.image_size: tuple[int, int] = _width_height(self._visual.image_size)
        """width, height [px] of the model's input"""
        self._refusal = _why_no_patch_tokens(self._visual)
        self.canvas = self._whole_canvas()
        """the model's cells; a single one for a tower without patch tokens"""
        self.num_loads = 1
        """how often weights were loaded"""
        self.num_forward_calls = 0
        """batches of pictures and batches of texts sent through the model"""

    @classmethod
    def load(cls, config: ClipConfig) -> PatchEncoder:
        """Load what `config` names; `embedded` must have been resolved to a folder. Raises ModelError."""
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        device = _device(chosen)
        model, tokenizer = load_model(config, device)
        return cls(model, tokenizer, config, device)

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for run.json once memory has run out."""
        return self.room.notes

    @property
    def batch_size(self) -> int:
        """Pictures (or crops) per forward call."""
        return self._config.batch_size

    @property
    def patch_size(self) -> tuple[int, int]:
        """Width, height [px] of a patch on the model's input."""
        return self.canvas.cell

    def require_patches(self, patches: PatchKind | None) -> None:
        """Raise ModelError unless the model can give such patches."""
        if patches in ("tokens", "values") and self._refusal:
            raise ModelError(
                f"clip.model {self._config.model} {self._refusal}, so it has no patch {patches} in the joint space; "
                "use detector.patches=grid"
            )

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is embedded in here counts for nobody."""
        before = self.num_forward_calls
        try:
            yield
        finally:
            self.num_forward_calls = before

    # -- one picture, on the CPU ---------------------------------------------------------------------------------

    def view(
        self,
        decoded: Decoded,
        patches: PatchKind | None = "tokens",
        fit: Fit = "pad",
        crops: tuple[int, int] = (1, 1),
    ) -> View:
        """Resize the picture as `fit` says and lay out its patches; `crops` are rows, columns for `patches="grid"`."""
        self.require_patches(patches)
        width, height = decoded.width, decoded.height
        whole: Box = (0, 0, width, height)
        grid: PatchGrid | None = None
        parts: tuple[Box, ...] = ()
        if patches == "grid":
            grid = crop_grid(width, height, *crops)
            parts = patch_boxes(grid, width, height)
        elif patches is not None:
            grid = self._token_grid(width, height, fit)
            tiles = tile_boxes(width, height, self.canvas) if fit == "tiles" else ()
            parts = tiles if len(tiles) > 1 else ()
        pixels = np.stack([self._seen(decoded, box, fit) for box in (whole, *parts)])
        return View(pixels, patches, grid, self._valid_cells(patches, parts or (whole,), fit))

    def _token_grid(self, width: int, height: int, fit: Fit) -> PatchGrid:
        if fit == "squash":
            return squash_grid(self.canvas)
        return (tiled_grid if fit == "tiles" else pad_grid)(width, height, self.canvas)

    def _layout(self, box: Box, fit: Fit) -> PatchGrid:
        """How a part of the picture lies on the model's input."""
        return squash_grid(self.canvas) if fit == "squash" else pad_grid(box[2] - box[0], box[3] - box[1], self.canvas)

    def _seen(self, decoded: Decoded, box: Box, fit: Fit) -> NDArray[np.uint8]:
        """The part of the picture inside the box, placed on an input of the model; [height, width, 3]."""
        size = self._layout(box, fit).resized
        seen = np.asarray(_cut(decoded, box).resize(size, self._resampling))
        if size == self.image_size:
            return seen
        canvas = np.empty((self.image_size[1], self.image_size[0], 3), dtype=np.uint8)
        canvas[:] = self._padding
        canvas[: size[1], : size[0]] = seen
        return canvas

    def _valid_cells(self, patches: PatchKind | None, parts: Sequence[Box], fit: Fit) -> NDArray[np.bool_]:
        if patches is None or patches == "grid":
            return np.ones(len(parts) if patches else 0, dtype=np.bool_)
        valid = np.zeros((len(parts), self.canvas.rows, self.canvas.columns), dtype=np.bool_)
        for index, box in enumerate(parts):
            layout = self._layout(box, fit)
            valid[index, : layout.rows, : layout.columns] = True
        return valid.reshape(-1)

    def _whole_canvas(self) -> Canvas:
        if self._refusal:
            return Canvas(rows=1, columns=1, cell=self.image_size)
        rows, columns = self._visual.grid_size
        return Canvas(rows=rows, columns=columns, cell=_width_height(self._visual.patch_size))

    # -- batches, on the device ----------------------------------------------------------------------------------

    def batches(self, views: Sequence[View]) -> Iterator[Sequence[View]]:
        """Runs of views whose inputs fill one forward call (a view of more inputs than that stands alone)."""
        start, inputs = 0, 0
        for index, view in enumerate(views):
            if index > start and inputs + len(view.pixels) > self.batch_size:
                yield views[start:index]
                start, inputs = index, 0
            inputs += len(view.pixels)
        if views:
            yield views[start:]

    @torch.inference_mode()
    def encode(self, views: Sequence[View]) -> list[Embedded]:
        """Embed views of one kind, in order, `batch_size` inputs per forward call, or as many as fit into memory.

        Raises ModelError on NaN, MemoryError where an input does not fit alone.
        """
        kind = views[0].patches if views else None
        assert all(view.patches == kind for view in views), "views of one call are of one kind"
        inputs = [picture for view in views for picture in view.pixels]
        if not inputs:
            return []

        def embedded(some: Sequence[NDArray[np.uint8]]) -> list[tuple[Tensor, Tensor]]:
            return list(zip(*self._forward(np.stack(some), kind), strict=True))

        rows: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(inputs), self.batch_size):
            rows += self.room.all_fitted(embedded, inputs[start : start + self.batch_size])
        images_ND, tokens_NGD = (torch.stack(parts) for parts in zip(*rows, strict=True))
        counts = [len(view.pixels) for view in views]
        split = zip(views, images_ND.split(counts), tokens_NGD.split(counts), strict=True)
        return [self._embedded(view, images, tokens) for view, images, tokens in split]

    def _embedded(self, view: View, images_ND: Tensor, tokens_NGD: Tensor) -> Embedded:
        """The first input is the whole picture; where it was cut into parts, they carry the patches."""
        first = min(1, len(images_ND) - 1)
        patches_PD = images_ND[1:] if view.patches == "grid" else tokens_NGD[first:].flatten(0, 1)
        return Embedded(images_ND[0], patches_PD, torch.from_numpy(view.valid).to(self._device))

    def _forward(self, pixels: NDArray[np.uint8], kind: PatchKind | None) -> tuple[Tensor, Tensor]:
        """Images [N, D] and, for `tokens` and `values`, their cells [N, G, D] (else [N, 0, D]); unit vectors."""
        self.num_forward_calls += 1
        seen = torch.from_numpy(pixels).to(self._device)
        inputs = ((seen - self._mean) / self._std).permute(0, 3, 1, 2).to(self._dtype)
        if kind in ("tokens", "values"):
            images_ND, tokens_NGD = images_and_tokens(self._visual, inputs, kind == "values")
        else:
            images_ND = self._model.encode_image(inputs)
            tokens_NGD = images_ND[:, None][:, :0]
        images_ND, tokens_NGD = normalize(images_ND.float(), dim=-1), normalize(tokens_NGD.float(), dim=-1)
        if not (images_ND.isfinite().all() and tokens_NGD.isfinite().all()):
            raise ModelError(f"clip.model {self._config.model} gave a non-finite embedding in {self._config.dtype}")
        return images_ND, tokens_NGD

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [len(texts), D] in fp32; every text is embedded once in the encoder's life.

        Warns of a text that fills the model's context: open_clip cuts what stands beyond it.
        """
        fresh = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for start in range(0, len(fresh), self.batch_size):
            batch = fresh[start : start + self.batch_size]
            self.num_forward_calls += 1
            tokens = self._tokenizer(batch)
            self._warn_of_full_contexts(batch, tokens)
            vectors = normalize(self._model.encode_text(tokens.to(self._device)).float(), dim=-1)
            self._texts.update(zip(batch, vectors, strict=True))
        return torch.stack([self._texts[text] for text in texts])

    @torch.inference_mode()
    def encode_sentences(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [len(texts), D] in fp32 of texts that are met once, such as answers: none is kept, and what
        stands beyond the model's context is cut without a word. Control tokens that they spell are words to it."""
        self.num_forward_calls += 1
        tokens = self._tokenizer([_without_control(text, self._tokenizer) for text in texts]).to(self._device)
        return normalize(self._model.encode_text(tokens).float(), dim=-1)

    def _warn_of_full_contexts(self, texts: Sequence[str], tokens_TS: Tensor) -> None:
        longer_TS = self._tokenizer([f"{text} and more" for text in texts])
        for text, full in zip(texts, (tokens_TS == longer_TS).all(1).tolist(), strict=True):
            if full:
                sentence = "the text %r fills the %d tokens that clip.model takes; what stands beyond them is not seen"
                log.warning(sentence, text, tokens_TS.shape[1])


def _without_control(text: str, tokenizer: Any) -> str:
    """`text` with its spelled-out control tokens broken up: an end token in an answer would hide what follows."""
    own = getattr(tokenizer, "tokenizer", None)  # of transformers; else open_clip's own
    names = (
        own.all_special_tokens if own is not None else [tokenizer.decoder[each] for each in tokenizer.all_special_ids]
    )
    pattern = "|".join(re.escape(name) for name in names if name)
    return (
        re.sub(pattern, lambda found: f"{found[0][:1]} {found[0][1:]}", text, flags=re.IGNORECASE) if pattern else text
    )


def _cut(decoded: Decoded, box: Box) -> Image:
    """The part of the picture inside the box (original pixels), rounded outwards on a copy decoded smaller."""
    picture, (left, top, right, bottom) = decoded.picture, box
    if box == (0, 0, decoded.width, decoded.height):
        return picture
    across, down = (picture.width, decoded.width), (picture.height, decoded.height)
    start = left * across[0] // across[1], top * down[0] // down[1]
    return picture.crop((*start, -(-right * across[0] // across[1]), -(-bottom * down[0] // down[1])))


def images_and_tokens(visual: Any, inputs: Tensor, values: bool) -> tuple[Tensor, Tensor]:
    """Image embeddings [N, D] and patch-token embeddings [N, G, D] in the joint space, not normalised; one forward.

    Tokens are those of the last block, through the tower's final norm and projection. Values are the same, but the
    last block's attention over the patches is replaced by the identity: out_proj(W_v x) stands for the attention's
    output (as in MaskCLIP, arXiv 2112.01071), residual and feed-forward stay.
    """
    blocks = visual.transformer.resblocks
    taken = len(blocks) - 2 if values else len(blocks) - 1
    output = visual.forward_intermediates(inputs, indices=[taken], output_fmt="NLC")
    (tokens,) = output["image_intermediates"]
    if values:
        alone = torch.full((tokens.shape[1],) * 2, -torch.inf, device=tokens.device, dtype=tokens.dtype)
        tokens = blocks[-1](tokens, attn_mask=alone.fill_diagonal_(0))
    tokens = visual.ln_post(tokens)
    return output["image_features"], tokens if visual.proj is None else tokens @ visual.proj


def _why_no_patch_tokens(visual: Any) -> str | None:
    """What keeps this tower's tokens out of the joint space; None when nothing does."""
    if not isinstance(visual, VisionTransformer):
        return f"has a vision tower of class {type(visual).__name__}"
    if visual.attn_pool is not None:
        return "pools its tokens by attention"
    if visual.pool_type not in ("tok", "avg"):
        return f"pools its tokens by {visual.pool_type}"
    return "has a single block" if len(visual.transformer.resblocks) < 2 else None


def _width_height(size: int | Sequence[int]) -> tuple[int, int]:
    """open_clip writes a number, or height and width."""
    return (size, size) if isinstance(size, int) else (int(size[1]), int(size[0]))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"clip.device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device
