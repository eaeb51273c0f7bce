"""Where image-prompt pairs come from: one class a layout, each with a plan of shards and a way to read one shard.

    from guardalign.sources import make_source
    source = make_source(config.input, reserved=RESULT_NAMES)
    plan = source.plan(shard_rows=200, limit=None)      # on the driver
    table = source.read(plan.shards[0])                 # on a worker

Knows nothing of Ray, models or results.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from guardalign.config import InputConfig
from guardalign.errors import ConfigError
from guardalign.sources.contract import INPUT_SCHEMA, InputFile, Plan, Shard, Source, Span
from guardalign.sources.figstep import FigstepSource
from guardalign.sources.huggingface import HuggingfaceSource
from guardalign.sources.parquet import ParquetSource
from guardalign.sources.planning import check_settings
from guardalign.sources.tables import CsvSource, JsonlSource
from guardalign.sources.webdataset import WebdatasetSource

__all__ = ["INPUT_SCHEMA", "SOURCES", "InputFile", "Plan", "Shard", "Source", "Span", "make_source"]

SourceClass = (
    type[ParquetSource]
    | type[WebdatasetSource]
    | type[HuggingfaceSource]
    | type[CsvSource]
    | type[JsonlSource]
    | type[FigstepSource]
)


def make_source(config: InputConfig, reserved: Collection[str] = ()) -> Source:
    """The source that `config` describes; `reserved` are names that passed-through columns may not have.

    Raises `ConfigError` for a setting that the format ignores. Make it on the driver: it resolves paths.
    """
    if config.format not in SOURCES:
        raise ConfigError(f"input.format {config.format} is no source; there are {', '.join(SOURCES)}")
    source = SOURCES[config.format]
    check_settings(config, source.meaningless, reserved)
    return source(config)


SOURCES: Mapping[str, SourceClass] = {
    "parquet": ParquetSource,
    "webdataset": WebdatasetSource,
    "huggingface": HuggingfaceSource,
    "csv": CsvSource,
    "jsonl": JsonlSource,
    "figstep": FigstepSource,
}
"""The sources by `input.format`; `embedded` is a parquet file by the time it gets here."""
