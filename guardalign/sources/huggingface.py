"""Hugging Face data sets: a folder written by `save_to_disk`, or a name on the hub.

Rows are read as Arrow, so pictures stay encoded. Class labels become their names. The driver pins a hub data set to its
commit, which every worker loads, from the cache or the hub.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from guardalign.config import InputConfig
from guardalign.errors import ConfigError, InputError, require
from guardalign.sources import arrow
from guardalign.sources.contract import InputFile, Outline, Plan, Shard, Span
from guardalign.sources.files import absolute, list_folder
from guardalign.sources.pictures import ImageRoot, PictureCensus, web_limits
from guardalign.sources.planning import Columns, IdLedger, ShardCutter, find_columns, refuse_empty
from guardalign.sources.rows import InputRow, bare, checked, location, whole

_ID_ROWS = 10_000
_PICTURE_ROWS = 32
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HuggingfaceSource:
    """One split of one data set."""

    config: InputConfig
    meaningless: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        path, root = self.config.path, self.config.image_root
        if not isinstance(path, str):
            raise ConfigError("input.path of format huggingface is one folder or hub name, not a list")
        is_folder = Path(path).expanduser().is_dir()
        here = dataclasses.replace(
            self.config, path=absolute(path) if is_folder else path, image_root=absolute(root) if root else None
        )
        object.__setattr__(self, "config", here)  # a worker's current folder is another one

    def plan(self, shard_rows: int, limit: int | None) -> Plan:
        """See `Source.plan`."""
        config = self.config
        rows, split = _load(str(config.path), config.subset, config.split, config.revision)
        columns = find_columns(self.config, rows.column_names)
        arrow.check_types(rows.features.arrow_schema, columns, str(self.config.path))
        num_rows = len(rows) if limit is None else min(limit, len(rows))
        refuse_empty(self.config, num_rows)
        cutter = ShardCutter(shard_rows)
        cutter.add(_pinned(str(config.path), rows), split, 0, num_rows)
        self._refuse_duplicates(rows, columns, split, num_rows)
        fields = arrow.passthrough_fields(rows.features.arrow_schema, self.config.passthrough)
        census = self._census(rows, columns, num_rows)
        files = (*self._files(rows), *census.close()[0])
        notes = columns.notes + census.note_of_idle_root(config.image_root)
        return Plan(cutter.shards(), num_rows, files, fields, notes)

    def _refuse_duplicates(self, rows: Any, columns: Columns, split: str, num_rows: int) -> None:
        if columns.sample_id is None:
            return
        ledger = IdLedger()
        for sample_id, _ in islice(_ids(rows, columns.sample_id, split), num_rows):
            ledger.add(sample_id)
        ledger.refuse_duplicates(lambda: islice(_ids(rows, columns.sample_id, split), num_rows))

    def _files(self, rows: Any) -> tuple[InputFile, ...]:
        folder = Path(str(self.config.path))
        if not folder.is_dir():
            return tuple(_cached_file(Path(file["filename"])) for file in rows.cache_files)
        listing = list_folder(str(folder), recursive=True)
        return tuple(InputFile(name, size, etag) for name, (size, etag) in sorted(listing.items()))

    def _census(self, rows: Any, columns: Columns, num_rows: int) -> PictureCensus:
        """The picture files that rows name instead of holding bytes."""
        census = PictureCensus()
        kind = pa.null() if columns.image is None else rows.features.arrow_schema.field(columns.image).type
        if arrow.may_refer(kind):
            census.expect()
        if not arrow.is_path(kind):
            return census
        for batch in rows.select(range(num_rows)).select_columns([columns.image]).iter(_ID_ROWS):
            for reference in arrow.texts(batch[columns.image]):
                census.add(self._image_root(), checked(InputRow("", "", image_reference=reference)))
        return census

    def _image_root(self) -> ImageRoot:
        if self.config.image_root is not None:
            return ImageRoot(self.config.image_root, "image_root", is_configured=True, web=web_limits(self.config))
        return ImageRoot(absolute(str(self.config.path)), "", web=web_limits(self.config))

    def read(self, shard: Shard) -> pa.Table:
        """See `Source.read`."""
        tables = [table for span in shard.spans for table in self._read_span(span)]
        return whole(pa.concat_tables(tables).combine_chunks(), shard)

    def outline(self, shard: Shard) -> Outline:
        """See `Source.outline`."""
        tables = [self._outline_of(span) for span in shard.spans]
        each = [dataclasses.replace(span, first=number, num_rows=1) for span in shard.spans for number in span.rows]
        return Outline(whole(pa.concat_tables(tables), shard), tuple(each))

    def _outline_of(self, span: Span) -> pa.Table:
        path, revision = _unpinned(span.uri)
        rows, _ = _load(path, self.config.subset, self.config.split, revision)
        places = [location(span.name, number) for number in span.rows if number < len(rows)]
        columns = find_columns(self.config, rows.column_names)
        fields = arrow.passthrough_fields(rows.features.arrow_schema, self.config.passthrough)
        ids: Iterable[str] = places
        if columns.sample_id is not None:
            only = dataclasses.replace(columns, category=None, label=None)
            table = rows.select_columns([columns.sample_id])[span.first : span.first + len(places)]
            ids = arrow.ids(_with_class_names(table, rows.features, only), columns.sample_id, places)
        return bare([InputRow(*pair) for pair in zip(ids, places, strict=True)], fields)

    def _read_span(self, span: Span) -> Iterator[pa.Table]:
        path, revision = _unpinned(span.uri)
        rows, _ = _load(path, self.config.subset, self.config.split, revision)
        columns = find_columns(self.config, rows.column_names)
        end = min(span.first + span.num_rows, len(rows))
        for first in range(span.first, end, _PICTURE_ROWS):
            table = rows[first : min(first + _PICTURE_ROWS, end)]
            places = [location(span.name, first + i) for i in range(table.num_rows)]
            named = _with_class_names(table, rows.features, columns)
            passed = table.select(self.config.passthrough)
            yield arrow.input_table(named, passed, columns, places, self._image_root())


def _ids(rows: Any, column: str | None, split: str) -> Iterator[tuple[str, str]]:
    first = 0
    for batch in rows.select_columns([column]).iter(_ID_ROWS):
        places = [location(split, first + i) for i in range(batch.num_rows)]
        yield from zip(arrow.ids(batch, column, places), places, strict=True)
        first += batch.num_rows


def _library() -> Any:
    import datasets  # here, since it is slow to import and one format needs it

    return datasets


def _with_class_names(table: pa.Table, features: Any, columns: Columns) -> pa.Table:
    """Class labels of the columns that become text as their names; -1, which means unlabelled, as null."""
    for column in (columns.category, columns.label, columns.sample_id):
        feature = features.get(column)
        if isinstance(feature, _library().ClassLabel):
            numbers = table[column].to_pylist()
            names = [None if number is None or number < 0 else feature.names[number] for number in numbers]
            table = table.set_column(table.column_names.index(column), column, pa.array(names, pa.large_string()))
    return table


@lru_cache(maxsize=4)
def _load(path: str, subset: str | None, split: str | None, revision: str | None) -> tuple[Any, str]:
    """The one split as Arrow rows, and its name. Memory-mapped; cached, since every shard asks for it."""
    loaded = _load_folder(path, subset, revision) if _is_local(path) else _load_hub(path, subset, revision)
    if isinstance(loaded, _library().DatasetDict):
        split, rows = _one_split(loaded, split, path)
    else:
        rows, own = loaded, str(loaded.split or "rows")
        if split is not None and split != own:
            raise InputError(f"input.split {split} does not exist in {path}, which is one split: {own}")
        split = own
    return rows.with_format("arrow"), split


def _pinned(path: str, rows: Any) -> str:
    """NAME@COMMIT for a hub data set, whose prepared files lie in a folder named by the commit."""
    if _is_local(path) or not rows.cache_files:
        return path
    commit = Path(rows.cache_files[0]["filename"]).parent.name
    return f"{path}@{commit}" if _COMMIT.fullmatch(commit) else path


def _unpinned(uri: str) -> tuple[str, str | None]:
    path, _, commit = uri.rpartition("@")
    return (path, commit) if path and not _is_local(uri) and _COMMIT.fullmatch(commit) else (uri, None)


def _is_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or Path(path).is_dir()


def _load_folder(path: str, subset: str | None, revision: str | None) -> Any:
    require(subset is None, "input.subset has no meaning for a data set saved to disk")
    require(revision is None, "input.revision has no meaning for a data set saved to disk")
    if not Path(path).is_dir():
        raise InputError(f"input.path {path} does not exist")
    try:
        return _library().load_from_disk(path)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"input.path {path} is no complete data set written by save_to_disk: {error}") from error


def _load_hub(path: str, subset: str | None, revision: str | None) -> Any:
    try:
        return _library().load_dataset(path, name=subset, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:  # no such name, configuration or revision; no network
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"input.path {path} is no folder, and the hub gives no such data set: {reason}") from error


def _one_split(loaded: Any, split: str | None, path: str) -> tuple[str, Any]:
    there = ", ".join(loaded)
    if split is None and len(loaded) > 1:
        raise InputError(f"{path} has several splits; name one by input.split: {there}")
    name = next(iter(loaded)) if split is None else split
    if name not in loaded:
        raise InputError(f"input.split {name} does not exist in {path}; its splits: {there}")
    return name, loaded[name]


def _cached_file(path: Path) -> InputFile:
    """A prepared hub file: its folder is named by the revision, so its time of change does not matter."""
    return InputFile("/".join(path.parts[-4:]), path.stat().st_size, path.parent.name)
