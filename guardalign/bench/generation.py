"""Benchmarks of the second pool: what calibration, batching and the whole defense cost, on a mid-sized random LVLM.

Every answer runs to the same number of tokens on both sides, since the model has no end token. Knows nothing of how
ratios are measured or printed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from guardalign.bench.inputs import QUESTIONS, photo, prompts_of_mixed_lengths, require_answered, working_table
from guardalign.bench.lvlm import MID_SIZED, LvlmSizes, build_random_lvlm
from guardalign.bench.ratios import Benchmark, Side, timed
from guardalign.config import AuditConfig, GenerationConfig, LvlmConfig
from guardalign.core.calibration import Calibration
from guardalign.defenses.plain import PREFIX, NoDefense
from guardalign.micro import resolve_taxonomy
from guardalign.models.clip_weights import write_random_model
from guardalign.models.lvlm import Lvlm
from guardalign.models.prompts import Prompt
from guardalign.pipeline import Stage, steps
from guardalign.schema import IMAGE
from guardalign.settings import load_settings
from guardalign.stages import Generate
from guardalign.taxonomy import load_taxonomy

SEED = 20260224
MAX_PIXELS = 100_000_000

SMALL_PICTURES = LvlmSizes(image_size=112, layers=8)
"""64 image tokens. On a GPU, a 7B model reads a prompt of 640 tokens in about two decoding steps' time; on a CPU it
takes twenty. What batching gains while decoding is lifelike only with a prompt that is read in a few steps' time."""

PROPORTIONAL_CLIP: Mapping[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 336, "patch_size": 14, "width": 192, "layers": 4, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}
"""A tower of 2 million parameters on 336 px: to the mid-sized LVLM what CLIP ViT-L/14-336 is to a 7B model.

In operations a picture takes about 4 % of what prompt and answer do, for both pairs."""


@dataclass(frozen=True)
class Load:
    """How much is generated."""

    num_rows: int
    batch_size: int
    """prompts per forward call"""
    num_tokens: int
    """length of every answer"""
    sizes: LvlmSizes = MID_SIZED
    clip: Mapping[str, Any] = field(default_factory=lambda: PROPORTIONAL_CLIP)
    """the detector's model, where there is a detector"""

    @property
    def table(self) -> pa.Table:
        """The rows: prompts of mixed lengths, each with a picture."""
        return working_table(prompts_of_mixed_lengths(self.num_rows), [photo(seed) for seed in range(self.num_rows)])

    @property
    def generation(self) -> GenerationConfig:
        """Greedy."""
        return GenerationConfig(max_new_tokens=self.num_tokens)

    def write_lvlm(self, folder: Path) -> None:
        """The random LVLM, whose tokenizer knows the words of the prompts and of the prefix."""
        build_random_lvlm(folder, self.sizes, (PREFIX, *QUESTIONS), SEED)


def calibrated_decoding(rounds: int, load: Load = Load(num_rows=4, batch_size=4, num_tokens=48)) -> Benchmark:
    """Tokens a second with calibration over those without it: the same prompts, safety prefix included, gamma 0.5."""
    return Benchmark(
        title=f"tokens/s calibrated / plain, batch {load.batch_size}, {load.num_tokens} tokens each",
        must_be=0.9,
        goal=0.97,
        at_least=True,
        rounds=rounds,
        prepare=lambda: _calibrated_sides(load),
    )


def _calibrated_sides(load: Load) -> tuple[Side, Side]:
    with tempfile.TemporaryDirectory() as folder:
        load.write_lvlm(Path(folder))
        lvlm = Lvlm.load(LvlmConfig(model=folder))
    calibration = Calibration(gamma=0.5, form="gain", layers=lvlm.calibrated_layers(None), answer=True)
    rows = load.table.to_pylist()
    prompts = [lvlm.prompt(row["sample_id"], row["prompt"], _picture(row[IMAGE]), PREFIX) for row in rows]

    def side(chosen: Calibration | None) -> Side:
        return timed(partial(_answer, lvlm, prompts, load, chosen))

    return side(None), side(calibration)


def _answer(lvlm: Lvlm, prompts: Sequence[Prompt], load: Load, calibration: Calibration | None) -> None:
    for start in range(0, len(prompts), load.batch_size):
        batch = prompts[start : start + load.batch_size]
        replies = lvlm.generate(batch, load.generation, [0] * len(batch), calibration)
        assert all(reply.num_tokens == load.num_tokens for reply in replies), "answers of unequal length"


def generate_stage(
    rounds: int, load: Load = Load(num_rows=16, batch_size=16, num_tokens=32, sizes=SMALL_PICTURES)
) -> Benchmark:
    """Tokens a second of the Generate stage over those of processor and `generate`, prompt by prompt."""
    tokens = load.sizes.image_tokens
    return Benchmark(
        title=f"Generate stage, batch {load.batch_size} / `generate` at batch 1, {tokens} image tokens",
        must_be=3.0,
        goal=6.0,
        at_least=True,
        rounds=rounds,
        prepare=lambda: _generate_sides(load),
    )


def _generate_sides(load: Load) -> tuple[Side, Side]:
    with tempfile.TemporaryDirectory() as folder:
        load.write_lvlm(Path(folder))
        config = LvlmConfig(model=folder, batch_size=load.batch_size)
        stage = Generate(config, NoDefense(), "none", load.generation, MAX_PIXELS)
    table = load.table
    rows = table.to_pylist()
    return (
        timed(lambda: [_answer_alone(stage.lvlm, row, load.num_tokens) for row in rows]),
        timed(lambda: _run([stage], table, load.num_tokens)),
    )


@torch.inference_mode()
def _answer_alone(lvlm: Lvlm, row: Mapping[str, Any], num_tokens: int) -> str:
    """One answer as a model card shows it: the chat template, the processor, `generate`."""
    processor = lvlm.writer.processor
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=_picture(row[IMAGE]), return_tensors="pt").to(lvlm.model.device)
    ids = lvlm.model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    answer = ids[0, inputs["input_ids"].shape[1] :]
    assert len(answer) == num_tokens, "answers of unequal length"
    return str(processor.decode(answer, skip_special_tokens=True))


def defended_audit(rounds: int, load: Load = Load(num_rows=4, batch_size=4, num_tokens=48)) -> Benchmark:
    """Time of all stages under the recipe `guardalign` over that under `none`: equally many tokens, no engine.

    The proportions are a 7B model's with CLIP ViT-L/14-336 before it, each about 160 times smaller: 44M and 2M
    parameters, 576 image tokens, 20 tokens of prefix, pictures of 640 x 480 of which half are flagged and masked.
    """
    return Benchmark(
        title=f"audit defended / undefended, LVLM 44M, CLIP 2M, {load.sizes.image_tokens} image tokens",
        must_be=1.15,
        goal=1.05,
        at_least=False,
        rounds=rounds,
        prepare=lambda: _audit_sides(load),
    )


def _audit_sides(load: Load) -> tuple[Side, Side]:
    table = load.table
    with tempfile.TemporaryDirectory() as folder:
        load.write_lvlm(Path(folder) / "lvlm")
        write_random_model(Path(folder) / "clip", load.clip, SEED)
        flags = _flags(load, Path(folder))
        undecided = load_settings("guardalign", (), flags)
        scores = _stages(undecided)[0](table)["image_score"].to_pylist()
        half = ["--detector.threshold", str(median(scores))]
        defended = _stages(load_settings("guardalign", (), [*flags, *half]))
        plain = _stages(load_settings("none", (), flags))
    return (
        timed(lambda: _run(defended, table, load.num_tokens)),
        timed(lambda: _run(plain, table, load.num_tokens)),
    )


def _flags(load: Load, folder: Path) -> list[str]:
    given = {
        "clip.model": f"local-dir:{folder / 'clip'}",
        "lvlm.model": folder / "lvlm",
        "lvlm.batch_size": load.batch_size,
        "generation.max_new_tokens": load.num_tokens,
        "self_check": "false",
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def _stages(config: AuditConfig) -> list[Stage]:
    return [step.make() for step in steps(config, load_taxonomy(resolve_taxonomy(config)))]


def _run(stages: Sequence[Callable[[pa.Table], pa.Table]], table: pa.Table, num_tokens: int) -> None:
    """The table through all stages; every answer must have the same length."""
    done = require_answered(reduce(lambda shard, stage: stage(shard), stages, table))
    assert set(done["num_tokens"].to_pylist()) == {num_tokens}, "answers of unequal length"


def _picture(encoded: bytes) -> Image.Image:
    return Image.open(BytesIO(encoded)).convert("RGB")
