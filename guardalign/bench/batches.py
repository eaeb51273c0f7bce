"""Benchmark of batch independence: the share of answers that a batch changes, on the embedded LVLM and its sample.

In fp32 it is none. In bf16 kernels round differently for batches of other shapes, and now and then the likeliest token
is another. Alone means batch 1. Knows nothing of how ratios are measured or printed.
"""

from __future__ import annotations

from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from guardalign.bench.ratios import Benchmark, Side
from guardalign.config import Dtype, GenerationConfig, InputConfig, LvlmConfig
from guardalign.defenses.plain import PREFIX
from guardalign.micro import resolve_input, resolve_lvlm
from guardalign.models.lvlm import Lvlm
from guardalign.types import Reply

MOST_IN_HALF = 0.02
"""bound of the share in bf16, and what `guardalign verify` lets differ"""


def changed_answers(dtype: Dtype, rows: int = 200, batch_size: int = 16, num_tokens: int = 32) -> Benchmark:
    """Answers that a batch changes, over all answers: the sample's first rows with the safety prefix, greedily."""
    return Benchmark(
        title=f"answers in batches of {batch_size} that differ from those alone / all, {dtype}",
        must_be=0.0 if dtype == "float32" else MOST_IN_HALF,
        goal=0.0,
        at_least=False,
        rounds=1,
        prepare=lambda: _sides(dtype, rows, batch_size, num_tokens),
        warm_up=False,
    )


def _sides(dtype: Dtype, rows: int, batch_size: int, num_tokens: int) -> tuple[Side, Side]:
    def differing() -> float:
        return float(num_different(dtype, rows, batch_size, num_tokens))

    return differing, lambda: float(rows)


def num_different(dtype: Dtype, rows: int, batch_size: int, num_tokens: int) -> int:
    """Of so many rows of the sample, those whose answer in a batch is another than alone."""
    lvlm = Lvlm.load(resolve_lvlm(LvlmConfig(dtype=dtype)))
    table = pq.read_table(str(resolve_input(InputConfig()).path), columns=["prompt", "image"]).slice(0, rows)
    assert table.num_rows == rows, f"the sample has {table.num_rows} rows, not {rows}"
    generation = GenerationConfig(max_new_tokens=num_tokens)
    alone = _answers(lvlm, table, 1, generation)
    together = _answers(lvlm, table, batch_size, generation)
    return sum(one.text != other.text for one, other in zip(alone, together, strict=True))


def _answers(lvlm: Lvlm, table: pa.Table, batch_size: int, generation: GenerationConfig) -> list[Reply]:
    found: list[Reply] = []
    for start in range(0, table.num_rows, batch_size):
        some = table.slice(start, batch_size).to_pylist()
        prompts = [lvlm.prompt("row", row["prompt"], _picture(row["image"]), PREFIX) for row in some]
        found += lvlm.generate(prompts, generation, [0] * len(prompts))
    return found


def _picture(encoded: bytes | None) -> Image.Image | None:
    return None if encoded is None else Image.open(BytesIO(encoded)).convert("RGB")
