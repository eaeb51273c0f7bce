"""The calibrated attention equals a naive one that builds the whole score matrix, in every family and backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from guardalign.config import LvlmConfig
from guardalign.core.calibration import Calibration
from guardalign.models import attention
from guardalign.models.attention import CalibratedBatch, calibrated
from guardalign.models.batches import Padded, collate
from guardalign.models.lvlm import Lvlm
from tests.small_lvlms import FAMILIES, FAMILIES_BY_TURNS, build, picture, small_lvlm

PREFIX = "As an AI assistant, I decline."
NEW = 6


def calibration(gamma: float, form: str = "gain", answer: bool = True, layers: Sequence[int] = (2, 3)) -> Calibration:
    return Calibration(gamma, form, tuple(layers), answer)  # type: ignore[arg-type]


def batch_of(lvlm: Lvlm, rows: int = 3) -> Padded:
    """Unequal lengths, so that all but one row are padded on the left."""
    texts = ["What is shown?", "Describe the image, then count the cats and the dogs.", "Why?"][:rows]
    pictures = [picture(), picture(30, 70, "green"), picture(60, 60, "white")]
    prompts = [lvlm.prompt(text, text, pictures[row], PREFIX) for row, text in enumerate(texts)]
    return collate(prompts, lvlm.pad_id)


def decode(lvlm: Lvlm, batch: Padded) -> tuple[Tensor, Tensor]:
    """Greedy tokens and the logits of every step, [B, steps, vocabulary]."""
    settings = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=lvlm.pad_id
    )
    with torch.inference_mode():
        made = lvlm.model.generate(**lvlm._placed(batch.tensors), generation_config=settings, eos_token_id=None)
    return made.sequences[:, batch.num_columns :], torch.stack(made.logits, dim=1)


def ours(lvlm: Lvlm, batch: Padded, how: Calibration, record: bool = False) -> tuple[Tensor, Tensor, CalibratedBatch]:
    spans = (batch.prefixes, batch.instructions, batch.num_columns)
    with calibrated(lvlm.model, how, *spans, record=record) as active:
        tokens, logits = decode(lvlm, batch)
    return tokens, logits, active


def naive(how: Calibration, batch: Padded, masses: list[Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Equation 13 as it is printed: the whole matrix Z, the whole matrix M, one softmax."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        groups, (Q, K) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        product = query @ key.transpose(2, 3)
        Z = product * options["scaling"]
        rows, columns = torch.arange(Q) + K - Q, torch.arange(K)
        in_TR = torch.zeros(query.shape[0], 1, Q, K, dtype=torch.bool)
        for b, (prefix, instruction) in enumerate(zip(batch.prefixes, batch.instructions, strict=True)):
            T = (rows >= instruction[0]) & (rows < instruction[1])
            if how.answer:
                T |= rows >= batch.num_columns - 1
            R = (columns >= prefix[0]) & (columns < prefix[1])  # type: ignore[index]
            in_TR[b, 0] = T[:, None] & R
        if module.layer_idx in how.layers:
            M = (product > 0).to(Z) if how.form == "gain" else product.clamp(min=0)
            Z = Z + how.gamma * (M * in_TR) * Z
        if mask is None:
            mask = columns <= rows[:, None]
        hidden = torch.finfo(Z.dtype).min
        weights = (Z.masked_fill(~mask, hidden) if mask.dtype == torch.bool else Z + mask).softmax(-1)
        if module.layer_idx in how.layers:
            masses.append(torch.stack([(weights * in_TR).sum((1, 2, 3)) / weights.shape[1], in_TR.any(3).sum((1, 2))]))
        return (weights @ value).transpose(1, 2), None

    return attend


@contextmanager
def naively(lvlm: Lvlm, how: Calibration, batch: Padded) -> Iterator[list[Tensor]]:
    masses: list[Tensor] = []
    AttentionInterface.register("naive_reference", naive(how, batch, masses))
    AttentionMaskInterface.register("naive_reference", sdpa_mask)
    backend = lvlm.model.config.text_config._attn_implementation
    lvlm.model.set_attn_implementation({"text_config": "naive_reference"})
    try:
        yield masses
    finally:
        lvlm.model.set_attn_implementation({"text_config": backend})


def assert_equals_naive(lvlm: Lvlm, batch: Padded, how: Calibration) -> None:
    with naively(lvlm, how, batch):
        expected_tokens, expected = decode(lvlm, batch)
    tokens, logits, _ = ours(lvlm, batch, how)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def layers_of(lvlm: Lvlm) -> tuple[int, ...]:
    return lvlm.calibrated_layers(None)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_gain_equals_the_naive_attention(family: str, backend: str) -> None:
    lvlm = small_lvlm(family, backend)
    assert_equals_naive(lvlm, batch_of(lvlm), calibration(1.0, layers=layers_of(lvlm)))


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("form", ["gain", "printed"])
def test_both_forms_and_query_sets_equal_the_naive_attention(form: str, answer: bool) -> None:
    lvlm = small_lvlm("llava")
    assert_equals_naive(lvlm, batch_of(lvlm), calibration(2.0 if form == "gain" else 0.05, form, answer))


def test_one_row_without_padding_has_no_mask_and_equals_the_naive_attention() -> None:
    lvlm = small_lvlm("llava")
    assert_equals_naive(lvlm, batch_of(lvlm, rows=1), calibration(1.0))


def test_first_and_last_layer_may_be_calibrated() -> None:
    lvlm = small_lvlm("llava_onevision")
    assert_equals_naive(lvlm, batch_of(lvlm), calibration(1.0, layers=(0, 5)))


def test_long_instructions_go_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", 1)
    lvlm = small_lvlm("llava")
    assert_equals_naive(lvlm, batch_of(lvlm), calibration(1.0))


def test_the_decoding_buffer_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BUFFER_STEP", 1)
    lvlm = small_lvlm("llava")
    assert_equals_naive(lvlm, batch_of(lvlm), calibration(1.0))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_gamma_zero_is_the_plain_model(family: str, backend: str) -> None:
    lvlm = small_lvlm(family, backend)
    batch = batch_of(lvlm)
    plain_tokens, plain = decode(lvlm, batch)
    tokens, logits, _ = ours(lvlm, batch, calibration(0.0, layers=layers_of(lvlm)))
    assert torch.equal(tokens, plain_tokens)
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_gamma_tiny_stays_close_and_gamma_one_differs(family: str) -> None:
    lvlm = small_lvlm(family)
    batch = batch_of(lvlm)
    _, plain = decode(lvlm, batch)
    _, tiny, _ = ours(lvlm, batch, calibration(1e-6, layers=layers_of(lvlm)))
    _, one, _ = ours(lvlm, batch, calibration(1.0, layers=layers_of(lvlm)))
    assert (tiny[:, 0] - plain[:, 0]).abs().max() < 1e-3
    assert (one[:, 0] - plain[:, 0]).abs().max() > 1e-2


def kernel_call(seed: int, Q: int, K: int) -> tuple[Any, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    module = SimpleNamespace(layer_idx=0, num_key_value_groups=2, training=False, is_causal=True)
    query = torch.randn(2, 4, Q, 16, generator=draw)
    key, value = (torch.randn(2, 2, K, 16, generator=draw) for _ in range(2))
    return module, query, key, value


def one_layer(gamma: float, num_columns: int) -> CalibratedBatch:
    how = calibration(gamma, layers=(0,))
    return CalibratedBatch([how] * 2, [(1, 4), (3, 5)], [(0, 6), (5, 7)], num_columns, torch.device("cpu"))


def test_gamma_zero_is_bit_equal_where_the_same_kernel_runs() -> None:
    """All rows calibrated, so that nothing is split: prefill and a decoding step under a padding mask."""
    batch, N = one_layer(0.0, 8), 8
    mask = torch.ones(2, 1, N, N, dtype=torch.bool).tril()
    mask[1, ..., 0] = False
    mask[1, 0, 0, 0] = True
    prefill = kernel_call(0, N, N)
    mine, _ = batch.attend(sdpa_attention_forward, *prefill, mask, {"scaling": 0.25})
    assert torch.equal(mine, sdpa_attention_forward(*prefill, mask, scaling=0.25)[0])
    step = kernel_call(1, 1, N + 1)
    seen = torch.ones(2, 1, 1, N + 1, dtype=torch.bool)
    seen[1, ..., 0] = False
    mine, _ = batch.attend(sdpa_attention_forward, *step, seen, {"scaling": 0.25})
    assert torch.equal(mine, sdpa_attention_forward(*step, seen, scaling=0.25)[0])


def test_a_sliding_window_counts_tokens_seen_not_keys_kept() -> None:
    """Two keys have been dropped: the prefix stands two places further left, and what left the window is gone."""
    batch, N, dropped = one_layer(1.0, 8), 8, 2
    module, query, key, value = kernel_call(0, N, N)
    batch.attend(sdpa_attention_forward, module, query, key, value, None, {"scaling": 0.25})
    module, query, key, value = kernel_call(1, 1, N + 1 - dropped)
    mine, _ = batch.attend(sdpa_attention_forward, module, query, key, value, None, {"scaling": 0.25})
    Z = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.25
    for row, (start, stop) in enumerate([(0, 2), (1, 3)]):  # (1, 4) and (3, 5) less 2
        Z[row, ..., start:stop] += Z[row, ..., start:stop].clamp(min=0)
    expected = (Z.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(mine, expected)


@pytest.fixture
def sliding_lvlm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lvlm:
    """Every other layer keeps 24 keys; prompts are longer, so that the prefix leaves these layers' windows."""
    config, processor = FAMILIES["llava_onevision"]()
    text = config.text_config
    text.use_sliding_window, text.sliding_window, text.max_window_layers = True, 24, 0
    text.layer_types = ["sliding_attention", "full_attention"] * 3
    monkeypatch.setitem(FAMILIES, "sliding", lambda: (config, processor))
    return Lvlm.load(LvlmConfig(model=str(build("sliding", tmp_path)), device="cpu"))


@pytest.mark.parametrize("answer", [True, False])
def test_sliding_layers_beside_full_ones_equal_the_naive_attention_without_a_cache(
    sliding_lvlm: Lvlm, answer: bool
) -> None:
    lvlm, how = sliding_lvlm, calibration(1.5, answer=answer, layers=(1, 2, 3))
    batch = batch_of(lvlm)
    tokens, logits, _ = ours(lvlm, batch, how)
    tensors = lvlm._placed(batch.tensors)
    with naively(lvlm, how, batch), torch.inference_mode():
        for step in range(NEW):
            seen = tokens[:, :step]
            grown = tensors | {
                "input_ids": torch.cat([tensors["input_ids"], seen], 1),
                "attention_mask": torch.cat([tensors["attention_mask"], torch.ones_like(seen)], 1),
            }
            positions = (grown["attention_mask"].cumsum(1) - 1).clamp(min=0)
            expected = lvlm.model(**grown, position_ids=positions, use_cache=False).logits[:, -1]
            torch.testing.assert_close(logits[:, step], expected, rtol=1e-4, atol=1e-4)


def test_rows_without_a_prefix_and_batches_without_any_stay_plain() -> None:
    lvlm = small_lvlm("llava")
    batch = collate([lvlm.prompt("a", "What is shown?", picture()), lvlm.prompt("b", "Why?", None)], lvlm.pad_id)
    assert batch.prefixes == (None, None)
    plain_tokens, plain = decode(lvlm, batch)
    tokens, logits, _ = ours(lvlm, batch, calibration(3.0))
    assert torch.equal(tokens, plain_tokens)
    assert torch.equal(logits, plain)


def test_a_row_without_a_prefix_stays_plain_beside_rows_with_one() -> None:
    lvlm = small_lvlm("llava")
    rows = [lvlm.prompt("a", "What is shown?", picture(), PREFIX), lvlm.prompt("b", "Why?", None)]
    batch = collate(rows, lvlm.pad_id)
    _, plain = decode(lvlm, batch)
    _, logits, _ = ours(lvlm, batch, calibration(3.0))
    torch.testing.assert_close(logits[1], plain[1], rtol=1e-5, atol=1e-5)
    assert (logits[0] - plain[0]).abs().max() > 1e-2


def test_the_model_is_left_as_it_was_even_after_an_error() -> None:
    lvlm = small_lvlm("llava")
    batch = batch_of(lvlm)
    _, before = decode(lvlm, batch)
    with pytest.raises(KeyError), calibrated(lvlm.model, calibration(1.0), batch.prefixes, batch.instructions, 9):
        assert lvlm.model.config.text_config._attn_implementation == "guardalign_sdpa"
        assert lvlm.model.config.vision_config._attn_implementation == "sdpa"
        raise KeyError
    assert lvlm.model.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(decode(lvlm, batch)[1], before)


def test_prefix_attention_is_the_mean_mass_that_the_naive_attention_sees() -> None:
    lvlm, how = small_lvlm("llava"), calibration(1.0)
    batch = batch_of(lvlm)
    with naively(lvlm, how, batch) as masses:
        decode(lvlm, batch)
    total = torch.stack(masses).sum(0)
    _, _, active = ours(lvlm, batch, how, record=True)
    assert active.prefix_attention([NEW] * 3) == pytest.approx((total[0] / total[1]).tolist(), rel=1e-4)


def test_prefix_attention_rises_with_gamma_and_ignores_steps_after_the_answer() -> None:
    lvlm = small_lvlm("qwen2_5_vl")
    batch = batch_of(lvlm)
    weak, strong = (ours(lvlm, batch, calibration(g), record=True)[2].prefix_attention([1, 1, 1]) for g in (0, 2.0))
    assert all(0 < a < b < 1 for a, b in zip(weak, strong, strict=True))  # type: ignore[operator]
    longer = ours(lvlm, batch, calibration(0), record=True)[2].prefix_attention([1, NEW, 1])
    assert longer[0] == weak[0]
    assert longer[1] != weak[1]


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES_BY_TURNS)
def test_calibration_on_cuda_equals_the_cpu(family: str) -> None:
    lvlm = small_lvlm(family)
    batch, how = batch_of(lvlm), calibration(1.0, layers=layers_of(lvlm))
    tokens, logits, _ = ours(lvlm, batch, how)
    try:
        lvlm.model.to("cuda")
        cuda_tokens, cuda_logits, _ = ours(lvlm, batch, how)
    finally:
        lvlm.model.to("cpu")
    torch.testing.assert_close(cuda_logits[:, 0].cpu(), logits[:, 0], rtol=1e-3, atol=1e-3)
    assert (cuda_tokens.cpu() == tokens).float().mean() > 0.8


@pytest.mark.gpu
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_bf16_stays_near_fp32_on_cuda(gamma: float) -> None:
    lvlm = small_lvlm("llava")
    batch, how = batch_of(lvlm), calibration(gamma)
    _, logits, _ = ours(lvlm, batch, how)
    try:
        lvlm.model.to("cuda", torch.bfloat16)
        _, rough, _ = ours(lvlm, batch, how)
    finally:
        lvlm.model.to("cpu", torch.float32)
        small_lvlm.cache_clear()
    first, expected = rough[:, 0].float().cpu(), logits[:, 0]
    assert torch.nn.functional.cosine_similarity(first, expected).min() > 0.98
