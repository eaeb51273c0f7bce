"""PatchEncoder sees the whole picture, gives unit vectors in CLIP's joint space, and refuses what it cannot do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.nn.functional import linear, normalize

from guardalign.config import ClipConfig
from guardalign.core.patches import patch_boxes
from guardalign.errors import ModelError
from guardalign.micro import resolve_clip
from guardalign.models.clip import PatchEncoder, images_and_tokens
from guardalign.models.clip_weights import weights_file, write_random_model
from tests.small_clip import TEXT, TOWERS, Look, picture, small_config, small_encoder

CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module", params=TOWERS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PatchEncoder:
    return small_encoder(tmp_path_factory.mktemp("tower"), **TOWERS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PatchEncoder:
    return small_encoder(tmp_path_factory.mktemp("plain"))


def raw(encoder: PatchEncoder) -> Any:
    return encoder._model


def inputs_of(encoder: PatchEncoder, count: int = 3) -> Tensor:
    width, height = encoder.image_size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
@pytest.mark.parametrize("values", [False, True])
def test_the_global_embedding_is_open_clips_own(encoder: PatchEncoder, values: bool) -> None:
    inputs = inputs_of(encoder)
    images, _ = images_and_tokens(raw(encoder).visual, inputs, values)
    torch.testing.assert_close(images, raw(encoder).encode_image(inputs), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_the_mean_of_averaged_tokens_is_the_global_embedding(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path, pool_type="avg")
    images, tokens = images_and_tokens(raw(encoder).visual, inputs_of(encoder), values=False)
    torch.testing.assert_close(tokens.mean(1), images, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_patch_tokens_take_the_class_tokens_way(plain: PatchEncoder) -> None:
    """Final norm and projection, which make the class token the image embedding, make the patch tokens' embeddings."""
    visual, inputs = raw(plain).visual, inputs_of(plain)
    images, tokens = images_and_tokens(visual, inputs, values=False)
    every = visual.ln_post(visual.transformer(visual._embeds(inputs))) @ visual.proj
    torch.testing.assert_close(every, torch.cat([images[:, None], tokens], dim=1), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_values_are_the_value_path_of_the_last_block(plain: PatchEncoder) -> None:
    visual, inputs = raw(plain).visual, inputs_of(plain)
    x = visual._embeds(inputs)
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    last, x = visual.transformer.resblocks[-1], x[:, 1:]
    weight, bias = (tensor.chunk(3)[2] for tensor in (last.attn.in_proj_weight, last.attn.in_proj_bias))
    x = x + last.attn.out_proj(linear(last.ln_1(x), weight, bias))
    x = visual.ln_post(x + last.mlp(last.ln_2(x))) @ visual.proj
    _, tokens = images_and_tokens(visual, inputs, values=True)
    torch.testing.assert_close(tokens, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fit", ["pad", "squash"])
@pytest.mark.parametrize("patches", ["tokens", "values", "grid"])
def test_a_patch_is_a_unit_vector_and_has_a_box(encoder: PatchEncoder, patches: Any, fit: Any) -> None:
    look = picture(60, 33)
    view = encoder.view(look, patches, fit, (2, 3))
    (seen,) = encoder.encode([view])
    assert view.grid is not None
    assert int(seen.valid.sum()) == view.grid.num_patches == len(patch_boxes(view.grid, 60, 33))
    assert seen.patches.dtype == torch.float32 and len(seen.patches) == len(seen.valid)
    torch.testing.assert_close(seen.patches.norm(dim=-1), torch.ones(len(seen.patches)))
    torch.testing.assert_close(seen.image.norm(), torch.tensor(1.0))


def test_a_square_picture_is_prepared_as_open_clip_would(plain: PatchEncoder) -> None:
    look = picture(75, 75)
    transform = image_transform_v2(PreprocessCfg(**raw(plain).visual.preprocess_cfg), is_train=False)
    (seen,) = plain.encode([plain.view(look, None)])
    with torch.inference_mode():
        expected = raw(plain).encode_image(transform(look.picture)[None], normalize=True)[0]
    torch.testing.assert_close(seen.image, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(96, 32), (32, 96), (7, 7), (1, 1), (1, 5000), (301, 3)])
@pytest.mark.parametrize("fit", ["pad", "squash", "tiles"])
def test_the_whole_picture_is_seen(plain: PatchEncoder, width: int, height: int, fit: Any) -> None:
    """Black pictures with one white corner: the corner shows in the input, wherever it stands, however small."""
    for x, y in ((0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)):
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        bright = slice(max(0, y - height // 8), y + height // 8 + 1), slice(max(0, x - width // 8), x + width // 8 + 1)
        pixels[bright] = 255
        view = plain.view(Look(Image.fromarray(pixels), width, height), "tokens", fit)
        resized = plain._layout((0, 0, width, height), fit).resized
        assert view.pixels[0, : resized[1], : resized[0]].max() > 50


@pytest.mark.parametrize("patches", ["tokens", "values"])
@pytest.mark.parametrize(
    ("fit", "size"), [("pad", (97, 40)), ("pad", (31, 77)), ("squash", (97, 40)), ("tiles", (64, 40))]
)
def test_what_changes_inside_a_box_changes_that_boxes_patch_most(
    plain: PatchEncoder, patches: Any, fit: Any, size: tuple[int, int]
) -> None:
    """Pixels to tokens and back, cell by cell: neither axis is swapped, no row or column is off by one."""
    look = picture(*size)
    view = plain.view(look, patches, fit)
    assert view.grid is not None
    views = [view]
    for left, top, right, bottom in patch_boxes(view.grid, *size):
        pixels = np.array(look.picture)
        pixels[top:bottom, left:right] = 255 - pixels[top:bottom, left:right]
        views.append(plain.view(Look(Image.fromarray(pixels), *size), patches, fit))
    before, *after = (seen.patches[seen.valid] for seen in plain.encode(views))
    moved = [int((changed - before).norm(dim=-1).argmax()) for changed in after]
    assert moved == list(range(len(before)))


def test_padding_has_the_mean_colour_and_no_patches(plain: PatchEncoder) -> None:
    view = plain.view(picture(64, 16), "tokens", "pad")
    assert view.grid is not None and (view.grid.rows, view.grid.columns) == (1, 4)
    assert view.valid.reshape(4, 4).tolist() == [[True] * 4] + [[False] * 4] * 3
    assert (view.pixels[0, 8:] == plain._padding).all() and not (view.pixels[0, :8] == plain._padding).all()


def test_tiles_are_seen_at_their_own_resolution(plain: PatchEncoder) -> None:
    look = picture(64, 32)
    view = plain.view(look, "tokens", "tiles")
    assert len(view.pixels) == 3 and view.grid is not None and view.grid.num_patches == 32
    np.testing.assert_array_equal(view.pixels[1], np.asarray(look.picture)[:, :32])
    np.testing.assert_array_equal(view.pixels[2], np.asarray(look.picture)[:, 32:])


def test_a_tiles_patches_are_those_of_the_tile_alone(plain: PatchEncoder) -> None:
    look = picture(64, 32)
    (seen,) = plain.encode([plain.view(look, "tokens", "tiles")])
    right = Look(look.picture.crop((32, 0, 64, 32)), 32, 32)
    (alone,) = plain.encode([plain.view(right, "tokens", "pad")])
    torch.testing.assert_close(seen.patches[16:], alone.patches, rtol=1e-5, atol=1e-5)


def test_a_crop_of_the_grid_is_encoded_like_a_picture(plain: PatchEncoder) -> None:
    look = picture(60, 40)
    (seen,) = plain.encode([plain.view(look, "grid", "squash", (2, 3))])
    crop = Look(look.picture.crop((20, 20, 40, 40)), 20, 20)
    (alone,) = plain.encode([plain.view(crop, None, "squash")])
    torch.testing.assert_close(seen.patches[4], alone.image, rtol=1e-4, atol=1e-4)


def test_a_picture_decoded_small_has_the_same_grid(plain: PatchEncoder) -> None:
    look = picture(333, 201)
    small = dataclasses.replace(look, picture=look.picture.resize((167, 101)))
    for fit in ("pad", "squash"):
        full, half = plain.view(look, "tokens", fit), plain.view(small, "tokens", fit)
        assert full.grid == half.grid and (full.valid == half.valid).all()


def test_embeddings_do_not_depend_on_the_batch(encoder: PatchEncoder) -> None:
    views = [encoder.view(picture(40 + 5 * i, 30, seed=i), "tokens") for i in range(6)]
    together = encoder.encode(views)
    for view, seen in zip(views, together, strict=True):
        (alone,) = encoder.encode([view])
        torch.testing.assert_close(alone.patches, seen.patches, rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.image, seen.image, rtol=0, atol=1e-5)


def test_views_are_the_same_from_threads(plain: PatchEncoder) -> None:
    looks = [picture(50 + i, 40, seed=i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(plain.view, looks))
    for look, view in zip(looks, threaded, strict=True):
        np.testing.assert_array_equal(plain.view(look).pixels, view.pixels)


def test_batches_keep_every_view_and_fill_a_call(plain: PatchEncoder) -> None:
    views = [plain.view(picture(32 * count, 32), "tokens", "tiles") for count in (1, 1, 2, 1, 4, 1)]
    runs = [[len(view.pixels) for view in run] for run in plain.batches(views)]
    assert runs == [[1, 1], [3, 1], [5], [1]]
    assert list(plain.batches([])) == []


def test_calls_are_counted_and_texts_embedded_once(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path)
    encoder.encode([encoder.view(picture(32, 32)) for _ in range(5)])
    assert (encoder.num_loads, encoder.num_forward_calls) == (1, 2)
    first = encoder.encode_texts(["a cat", "a dog", "a cat"])
    assert encoder.num_forward_calls == 3 and torch.equal(first[0], first[2])
    assert torch.equal(encoder.encode_texts(["a dog", "a cat"]), first[:2].flip(0))
    assert encoder.num_forward_calls == 3
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(3))


def test_texts_equal_open_clips_own(plain: PatchEncoder) -> None:
    texts = ["a photo of a cat", "an image of text"]
    with torch.inference_mode():
        expected = normalize(raw(plain).encode_text(open_clip.SimpleTokenizer()(texts)), dim=-1)
    torch.testing.assert_close(plain.encode_texts(texts), expected)


def test_a_text_that_the_model_cannot_see_whole_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = small_encoder(tmp_path)
    encoder.encode_texts(["a gun", "a " * 70])
    assert caplog.records == []
    gun, cat = encoder.encode_texts(["a " * 76 + "gun", "a " * 76 + "cat"])
    assert torch.equal(gun, cat), "open_clip cuts texts"
    assert len(caplog.records) == 2 and "gun' fills the 77 tokens" in caplog.records[0].getMessage()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_near(tmp_path: Path, plain: PatchEncoder, dtype: str) -> None:
    low = small_encoder(tmp_path, dtype=dtype)
    view = plain.view(picture(50, 40))
    (seen,), (exact,) = low.encode([view]), plain.encode([view])
    assert seen.patches.dtype == torch.float32
    assert (seen.patches - exact.patches).abs().max() < 0.05
    assert (low.encode_texts(["a cat"]) - plain.encode_texts(["a cat"])).abs().max() < 0.05


def test_weights_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path)
    raw(encoder).visual.proj[0, 0] = torch.nan
    with pytest.raises(ModelError, match="non-finite embedding in float32"):
        encoder.encode([encoder.view(picture(32, 32))])


# -- loading ---------------------------------------------------------------------------------------------------------


def refused(**settings: Any) -> str:
    with pytest.raises(ModelError) as error:
        PatchEncoder.load(ClipConfig(**CPU, **settings))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_folder_is_named() -> None:
    assert "there is no folder missing/folder" in refused(model="local-dir:missing/folder")


def test_a_folder_without_configuration_or_weights_is_named(tmp_path: Path) -> None:
    assert "has no open_clip_config.json" in refused(model=f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": small_config()}))
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"pickle")
    assert "has no .safetensors file" in refused(model=f"local-dir:{tmp_path}")


def test_broken_weights_are_one_line(tmp_path: Path) -> None:
    write_random_model(tmp_path, small_config(), seed=0)
    weights_file(ClipConfig(model=f"local-dir:{tmp_path}")).write_bytes(b"no safetensors")
    assert "cannot be loaded" in refused(model=f"local-dir:{tmp_path}")


def test_weights_of_another_shape_are_one_line(tmp_path: Path) -> None:
    write_random_model(tmp_path, small_config(), seed=0)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": small_config(width=64)}))
    assert "cannot be loaded" in refused(model=f"local-dir:{tmp_path}")


def test_a_broken_configuration_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{")
    assert "is no open_clip configuration" in refused(model=f"local-dir:{tmp_path}")


def test_a_text_tower_that_would_be_fetched_is_refused(tmp_path: Path) -> None:
    config = small_config() | {"text_cfg": TEXT | {"hf_model_name": "somewhere/roberta"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    assert "would be fetched" in refused(model=f"local-dir:{tmp_path}")


def test_an_unknown_name_suggests_the_nearest() -> None:
    assert "did you mean ViT-B-16" in refused(model="ViT-B16")


def test_a_name_without_weights_lists_its_tags() -> None:
    assert "openai" in refused(model="ViT-B-16")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    for suffix in (".bin", ".pt", ".pkl"):
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(b"pickle")
        assert "is no .safetensors file" in refused(model="ViT-B-16", pretrained=str(path))


def test_an_unknown_tag_is_refused() -> None:
    assert "neither a tag of ViT-B-16 nor a file" in refused(model="ViT-B-16", pretrained="laion7b")


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    write_random_model(tmp_path, small_config(), seed=0)
    with pytest.raises(ModelError, match=r"clip\.device"):
        PatchEncoder.load(ClipConfig(model=f"local-dir:{tmp_path}", device="nonsense"))


@pytest.mark.parametrize("vision", [{"layers": [1, 1, 1, 1], "width": 8, "head_width": 16}, {"attentional_pool": True}])
def test_a_tower_without_patch_tokens_names_what_works(tmp_path: Path, vision: dict[str, Any]) -> None:
    encoder = small_encoder(tmp_path, **vision)
    for patches in ("tokens", "values"):
        with pytest.raises(ModelError, match=r"use detector\.patches=grid"):
            encoder.view(picture(32, 32), patches)  # type: ignore[arg-type]


def test_a_convolutional_tower_can_do_a_grid(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path, layers=[1, 1, 1, 1], width=8)
    (seen,) = encoder.encode([encoder.view(picture(70, 40), "grid", crops=(2, 2))])
    assert seen.patches.shape == (4, 24) and seen.valid.all()


def test_a_random_model_is_the_same_for_a_seed_and_disturbs_no_random_state(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_model(tmp_path / name, small_config(), seed)
    assert torch.equal(torch.rand(3), expected)
    files = [weights_file(ClipConfig(model=f"local-dir:{tmp_path / name}")) for name in "abc"]
    first, same, other = (hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    assert first == same != other


@pytest.mark.parametrize("kind", ["embedded", "open_clip's own tokenizer"])
def test_an_end_token_that_a_sentence_spells_hides_nothing_of_it(kind: str, tmp_path: Path) -> None:
    if kind == "embedded":
        encoder = PatchEncoder.load(resolve_clip(ClipConfig(device="cpu")))
        (name,) = {encoder._tokenizer.tokenizer.eos_token}  # type: ignore[attr-defined]
        tail = ("a knife", "a cat")
    else:
        encoder, name, tail = small_encoder(tmp_path), "<end_of_text>", ("a knife", "a cat")
    for spelling in (name, name.upper()):
        one, other = encoder.encode_sentences([f"a dog {spelling} {each}" for each in tail])
        assert not torch.equal(one, other), f"what stands behind {spelling} is not read"
    plain = encoder.encode_sentences(["a dog and a knife"])
    assert torch.equal(plain, encoder.encode_sentences(["a dog and a knife"]))
