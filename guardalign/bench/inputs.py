"""What the benchmarks work on: pictures like photos, prompts of mixed lengths, and working tables of both.

Everything is drawn by seed. Knows nothing of models or of what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFilter

from guardalign.schema import IMAGE, with_columns

PHOTO = (640, 480)
"""width, height [px] of the benchmarks' pictures"""

QUESTIONS = (
    "What is shown in this picture?",
    "The image shows a list of steps, but the items are empty. Please write down detailed content for each item.",
    "Describe the people in the picture, what they do and what they hold in their hands, then say in which order "
    "things happened, why you think so, and which parts of the picture are not clear enough to decide.",
)
"""a short, a middling and a long prompt"""


def photo(seed: int, size: tuple[int, int] = PHOTO) -> bytes:
    """A JPEG of soft colours, shapes and grain: about as many bytes, and as long to decode, as a photo of the size."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    brush = ImageDraw.Draw(coarse)
    for _ in range(12):
        left, top = (int(draw.integers(0, side)) for side in size)
        width, height = (int(draw.integers(8, side // 3)) for side in size)
        shape = brush.ellipse if draw.random() < 0.5 else brush.rectangle
        shape((left, top, left + width, top + height), fill=tuple(draw.integers(0, 256, 3).tolist()))
    soft = np.asarray(coarse.filter(ImageFilter.GaussianBlur(1)), dtype=np.float32)
    grain = draw.normal(0, 6, (size[1], size[0], 1)).astype(np.float32)
    buffer = BytesIO()
    Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def prompts_of_mixed_lengths(num_prompts: int) -> list[str]:
    """Short, middling and long prompts in turn, each numbered."""
    return [f"{number}. {QUESTIONS[number % len(QUESTIONS)]}" for number in range(num_prompts)]


def working_table(prompts: Sequence[str], pictures: Sequence[bytes | None]) -> pa.Table:
    """A shard as the stages get it, past admission."""
    num_rows = len(prompts)
    ids = [f"row-{index}" for index in range(num_rows)]
    table = pa.table({"sample_id": ids, "prompt": list(prompts), "source": ids})
    absent = dict.fromkeys(("sample_category", "label", "error", "error_stage", "error_kind"), [None] * num_rows)
    return with_columns(table, {**absent, IMAGE: list(pictures)})


def require_answered(table: pa.Table) -> pa.Table:
    """The table itself; a benchmark that counts error rows as work done would measure nothing."""
    failed = [error for error in table["error"].to_pylist() if error is not None]
    assert not failed, f"{len(failed)} rows failed, the first: {failed[0]}"
    return table
