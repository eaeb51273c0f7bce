"""The micro world's held-out proof scenes as a benchmark: requests, and questions with exact answers.

Every scene is asked its request (labelled as the scene is); a benign one then its question, whose answer is known word
for word (`expected`). The style is the variant, `plain` or `shifted`, and `input.split` takes one; `pair` is the scene.
Scenes and questions ship with the package: `input.path` stays empty. Knows nothing of how they were made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Final

import pyarrow as pa
import pyarrow.parquet as pq

from guardalign.config import InputConfig
from guardalign.errors import require
from guardalign.sources.contract import Outline, Plan, Shard
from guardalign.sources.files import list_files
from guardalign.sources.layout import BENIGN, COLUMN_SETTINGS, OWN_COLUMNS, with_own_columns
from guardalign.sources.planning import URLS, ShardCutter, text_fields
from guardalign.sources.rows import InputRow, bare, location, to_table, whole

FOLDER: Final = Path(__file__).parents[1] / "micro"
SCENES, QUESTIONS = "proof.parquet", "questions.parquet"
STYLES: Final = ("plain", "shifted")


@dataclass(frozen=True)
class MicroSource:
    """All scenes of the file, in its order."""

    config: InputConfig
    meaningless: ClassVar[tuple[str, ...]] = (
        "path",
        "revision",
        "subset",
        "image_root",
        *URLS,
        *COLUMN_SETTINGS,
    )

    def __post_init__(self) -> None:
        split = self.config.split
        known = split is None or split in STYLES
        require(known, f"input.split {split} is no style of the micro world: there are {', '.join(STYLES)}")
        require(not self.config.passthrough, "input.passthrough has no meaning for format micro")
        object.__setattr__(self, "config", with_own_columns(self.config))

    def plan(self, shard_rows: int, limit: int | None) -> Plan:
        """See `Source.plan`. Rows are numbered through requests and questions, whatever `input.split` takes."""
        cutter = ShardCutter(shard_rows)
        for number, _ in islice(_chosen(self.config.split), limit):
            cutter.add(str(FOLDER / SCENES), SCENES, number)
        files = tuple(list_files(str(FOLDER / name), ())[0].as_input for name in (SCENES, QUESTIONS))
        return Plan(cutter.shards(), cutter.num_rows, files, text_fields(self.config))

    def outline(self, shard: Shard) -> Outline:
        """See `Source.outline`."""
        spans = [dataclasses.replace(span, first=number, num_rows=1) for span in shard.spans for number in span.rows]
        asked = [_asked()[span.first][1] for span in spans]
        rows = bare([InputRow(row.sample_id, row.source) for row in asked], text_fields(self.config))
        return Outline(whole(rows, shard), tuple(spans))

    def read(self, shard: Shard) -> pa.Table:
        """See `Source.read`."""
        asked = [_asked()[number] for span in shard.spans for number in span.rows]
        pictures = _pictures(sorted({scene for scene, _ in asked}))
        rows = [dataclasses.replace(row, image=pictures[scene]) for scene, row in asked]
        return whole(to_table(rows, text_fields(self.config)), shard)


def _chosen(style: str | None) -> Iterator[tuple[int, InputRow]]:
    """Number and row of what is asked under a style."""
    variant = OWN_COLUMNS.index("variant")
    for number, (_, row) in enumerate(_asked()):
        if style is None or row.passthrough[variant] == style:
            yield number, row


@lru_cache(maxsize=1)
def _asked() -> Sequence[tuple[int, InputRow]]:
    """Every row with the number of its scene, without the picture."""
    columns = ["sample_id", "prompt", "category", "label", "style"]
    scenes = pq.read_table(FOLDER / SCENES, columns=columns).to_pylist()
    questions = {each["sample_id"]: each for each in pq.read_table(FOLDER / QUESTIONS).to_pylist()}
    return [(number, row) for number, scene in enumerate(scenes) for row in _rows(scene, questions, number)]


def _rows(scene: dict[str, Any], questions: dict[str, dict[str, Any]], number: int) -> Iterator[InputRow]:
    """The request about a scene, and its question if there is one."""
    name, place = scene["sample_id"], location(SCENES, number)
    own = (None, name, scene["style"])
    yield InputRow(name, place, scene["prompt"], category=scene["category"], label=scene["label"], passthrough=own)
    if name in questions:
        asked = questions[name]
        own = (asked["answer"], name, scene["style"])
        yield InputRow(
            f"{name}-question", place, asked["prompt"], category=asked["kind"], label=BENIGN, passthrough=own
        )


def _pictures(scenes: Sequence[int]) -> dict[int, bytes]:
    """The encoded pictures of some scenes, in ascending order, from the row groups that hold them."""
    found: dict[int, bytes] = {}
    with pq.ParquetFile(FOLDER / SCENES) as file:
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            here = [scene for scene in scenes if start <= scene < end]
            if here:
                column = file.read_row_group(group, columns=["image"])["image"]
                found |= {scene: column[scene - start].as_py() for scene in here}
            start = end
    return found
