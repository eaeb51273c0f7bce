"""Makes `sample.parquet`, the embedded data set: drawn shapes with harmless prompts, all from a seed.

    python -m guardalign.micro.sample

The scenes hold nothing unsafe; they show that the job runs. Every sixteenth row is a text-only prompt.
"""

from __future__ import annotations

import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

NUM_ROWS = 64
SEED = 7
COLOURS = ("red", "green", "blue", "orange", "purple", "black", "white", "yellow")
SHAPES = ("circle", "square", "triangle")
QUESTIONS = ("What is in the picture?", "How many shapes are there?", "Describe the picture in one sentence.")
ENCODINGS = ("PNG", "JPEG", "WEBP")


def scene(generator: random.Random) -> Image.Image:
    """A background with one to five shapes."""
    width, height = generator.randrange(90, 260), generator.randrange(90, 260)
    picture = Image.new("RGB", (width, height), generator.choice(COLOURS))
    draw = ImageDraw.Draw(picture)
    for _ in range(generator.randint(1, 5)):
        size = generator.randrange(15, 60)
        left, top = generator.randrange(0, width - size), generator.randrange(0, height - size)
        box = (left, top, left + size, top + size)
        colour, shape = generator.choice(COLOURS), generator.choice(SHAPES)
        if shape == "circle":
            draw.ellipse(box, fill=colour)
        elif shape == "square":
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon([(left, top + size), (left + size, top + size), (left + size // 2, top)], fill=colour)
    return picture


def build_sample(path: Path) -> None:
    """Writes the sample as Parquet: sample_id, image, prompt, category, label."""
    generator = random.Random(SEED)
    rows = []
    for number in range(NUM_ROWS):
        text_only = number % 16 == 15
        encoded = None if text_only else _encoded(scene(generator), ENCODINGS[number % 3])
        prompt = "What can you help me with?" if text_only else generator.choice(QUESTIONS)
        category = "text" if text_only else "shapes"
        rows.append(
            {
                "sample_id": f"shapes-{number:03d}",
                "image": encoded,
                "prompt": prompt,
                "category": category,
                "label": "benign",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd", row_group_size=16)


def _encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


if __name__ == "__main__":
    build_sample(Path(__file__).with_name("sample.parquet"))
