"""Where a run's folder may not lie: among its own inputs, which would grow by the files that the run writes.

Local paths only. Knows nothing of what the files hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Final

from fsspec.utils import glob_translate

from guardalign.errors import ConfigError
from guardalign.sources.files import absolute, is_remote

WRITTEN: Final = ("plan.json", "inputs.parquet", "run.json", "results/shard-000000.parquet")
"""Files that every run writes."""


def refuse_output_among_inputs(output: str, paths: str | Sequence[str]) -> None:
    """`ConfigError` where an input's listing would take a file that the run writes below `output`."""
    for path in [paths] if isinstance(paths, str) else paths:
        if path and not is_remote(output) and not is_remote(path) and _takes(path, _resolved(output)):
            raise ConfigError(f"output {output} lies inside the input {path}; name another --output")


def _takes(path: str, output: str) -> bool:
    """Whether the path, a file, folder or glob, names one of the run's files."""
    place = _resolved(path)
    written = [f"{output}/{name}" for name in WRITTEN]
    if os.path.isdir(place):
        return any(file.startswith(f"{place.rstrip('/')}/") for file in written)
    return place in written or any(pattern.match(file) for pattern in _globs(place) for file in written)


def _globs(place: str) -> list[re.Pattern[str]]:
    try:
        return [re.compile(glob_translate(place))]
    except ValueError:  # no glob at all: the listing says so
        return []


def _resolved(path: str) -> str:
    return os.path.realpath(absolute(path))
