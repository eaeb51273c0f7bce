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
from guardalign.sources import benign_layouts, column_layouts, unsafe_layouts, utility_layouts
from guardalign.sources.column_layouts import ColumnLayout
from guardalign.sources.contract import INPUT_SCHEMA, InputFile, Outline, Plan, Shard, Source, Span
from guardalign.sources.figstep import FigstepSource
from guardalign.sources.huggingface import HuggingfaceSource
from guardalign.sources.micro_scenes import MicroSource
from guardalign.sources.parquet import ParquetSource
from guardalign.sources.planning import check_settings
from guardalign.sources.tables import CsvSource, JsonlSource, TableSource
from guardalign.sources.webdataset import WebdatasetSource

__all__ = ["INPUT_SCHEMA", "SOURCES", "InputFile", "Outline", "Plan", "Shard", "Source", "Span", "make_source"]

SourceClass = (
    type[ParquetSource]
    | type[WebdatasetSource]
    | type[HuggingfaceSource]
    | type[TableSource]
    | type[ColumnLayout]
    | type[MicroSource]
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
    "micro": MicroSource,
    "figstep": FigstepSource,
    "figstep-suffix": unsafe_layouts.FigstepSuffixSource,
    "unconstrained": unsafe_layouts.UnconstrainedSource,
    "mm-safetybench": unsafe_layouts.MmSafetybenchSource,
    "spa-vl-harm": column_layouts.SpaVlHarm,
    "spa-vl-help": column_layouts.SpaVlHelp,
    "jailbreakv-28k": unsafe_layouts.JailbreakvSource,
    "mssbench": benign_layouts.MssbenchSource,
    "mossbench": benign_layouts.MossbenchSource,
    "hades": column_layouts.HadesSource,
    "msts": column_layouts.MstsSource,
    "vlsafe": unsafe_layouts.VlsafeSource,
    "vlguard": unsafe_layouts.VlguardSource,
    "xstest": benign_layouts.XstestSource,
    "vqav2": utility_layouts.VqaV2Source,
    "textvqa": utility_layouts.TextvqaSource,
    "scienceqa-img": utility_layouts.ScienceqaSource,
    "mme": column_layouts.MmeSource,
    "mmbench": column_layouts.MmbenchSource,
}
"""The sources by `input.format`; `embedded` is a parquet file by the time it gets here."""
