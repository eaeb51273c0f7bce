"""Where a run's files stand, how a shard is committed, and how a run is read back.

    OUT/plan.json                  the science and the input's shape, written before any work
    OUT/inputs.parquet             every input file with size and etag
    OUT/results/shard-000017.parquet   one file a shard, complete or absent
    OUT/run.json                   the manifest, written last: its presence means "complete"

A commit writes the whole file under a temporary name, flushes it to the disk and renames it; on an object store it is
one PUT. So a shard is done exactly when its file is there, and doing it twice changes nothing. Knows nothing of stages,
models, sources, Ray or what a receipt counts.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from guardalign.errors import ConfigError, ResumeError, UserError
from guardalign.faults import reach
from guardalign.receipts import RECEIPT_KEY, Receipt, shard_receipt
from guardalign.schema import PLANNED, TIMED_STAGES, Trace, to_result, trace_of, with_columns

CHECKSUM = "checksum"
"""Key of a JSON file's own checksum."""
_SHARD_FILE = re.compile(r"shard-(\d{6}|[1-9]\d{6,})\.parquet")


def shard_name(shard: int) -> str:
    """The file of a shard within the run."""
    return f"results/shard-{shard:06d}.parquet"


class RunFolder:
    """The files of one run, on a local (or mounted) file system or any fsspec URI."""

    def __init__(self, out: str) -> None:
        self.out = out
        try:
            self.files, root = fsspec.url_to_fs(os.path.expanduser(out))
        except (ValueError, ImportError) as error:
            raise ConfigError(f"the folder {out} cannot be opened: {error}") from None
        self.root = str(root).rstrip("/")
        self.is_local = isinstance(self.files, LocalFileSystem)

    def path(self, name: str) -> str:
        """The full path of a file of the run."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the run has that file."""
        return bool(self.files.exists(self.path(name)))

    def read_json(self, name: str, *keys: str) -> dict[str, Any]:
        """A JSON file of the run, which has these keys."""
        try:
            found = json.loads(self.files.cat_file(self.path(name)))
        except (ValueError, OSError):
            raise self._damaged(name) from None
        if not isinstance(found, dict) or any(key not in found for key in keys):
            raise self._damaged(name)
        return found

    def _damaged(self, name: str) -> ResumeError:
        is_shard = name.startswith("results/")
        mend = "remove it and run its audit again" if is_shard else "mend it from a copy, or name another --output"
        return ResumeError(f"{self.out}/{name} is missing or damaged; {mend}")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file whole, or not at all."""
        self.write(name, _json_bytes(content))

    def write_sealed(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file that holds its own checksum, so that `is_intact` tells every changed byte of it."""
        self.write_json(name, _sealed(content))

    def is_intact(self, name: str) -> bool:
        """Whether a JSON file is, byte for byte, what `write_sealed` wrote."""
        try:
            due = _json_bytes(_sealed(self.read_json(name)))
        except UnicodeEncodeError:  # half a character: nothing that was ever written
            return False
        return bool(self.files.cat_file(self.path(name)) == due)

    def checksums(self, *names: str) -> list[dict[str, str]]:
        """The SHA-256 of these files of the run, as far as they are there."""
        there = [name for name in names if self.exists(name)]
        return [{"name": name, "sha256": sha256(self.files.cat_file(self.path(name)))} for name in there]

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A Parquet file of the run."""
        try:
            with self.files.open(self.path(name), "rb") as stream:
                return pq.ParquetFile(stream).read(columns=None if columns is None else list(columns))
        except (pa.ArrowInvalid, OSError):
            raise self._damaged(name) from None

    def write_table(self, name: str, table: pa.Table) -> str:
        """Writes a Parquet file (zstd) whole, or not at all; returns its SHA-256."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", row_group_size=max(table.num_rows, 1))
        content = buffer.getvalue()
        self.write(name, content)
        return hashlib.sha256(content).hexdigest()

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole, or not at all; a `UserError` where the folder does not take it."""
        try:
            self._write(self.path(name), content)
        except OSError as error:
            raise UserError(f"{self.out}/{name} cannot be written: {error.strerror or error}") from error

    def _write(self, target: str, content: bytes) -> None:
        if not self.is_local:
            self.files.pipe_file(target, content)
            return
        folder = Path(target).parent
        folder.mkdir(parents=True, exist_ok=True)
        # a lost node's worker may still write while its successor does, under the same process id in another container
        temporary = folder / f".{Path(target).name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        with temporary.open("wb") as stream:
            half = len(content) // 2
            stream.write(content[:half])
            stream.flush()
            reach("write.half")
            stream.write(content[half:])
            stream.flush()
            os.fsync(stream.fileno())
        reach("write.whole")
        os.replace(temporary, target)
        reach("write.renamed")
        _flush_folder(folder)

    def remove(self, name: str) -> None:
        """Removes a file or folder of the run; one that is not there is as good as removed."""
        with suppress(FileNotFoundError):
            self.files.rm(self.path(name), recursive=True)

    def clear_temporary(self) -> int:
        """Removes what a killed process left half-written; returns the number of files removed."""
        if not self.is_local:
            return 0
        left = [*Path(self.root).glob(".*.tmp"), *Path(self.root, "results").glob(".*.tmp")]
        for file in left:
            file.unlink(missing_ok=True)
        return len(left)

    def committed(self) -> dict[int, str]:
        """The shards that are done: index -> file name within the run."""
        folder = self.path("results")
        if not self.files.exists(folder):
            return {}
        names = (Path(str(path)).name for path in self.files.ls(folder, detail=False))
        return {int(match[1]): f"results/{name}" for name in sorted(names) if (match := _SHARD_FILE.fullmatch(name))}

    def receipt(self, name: str) -> Receipt:
        """The receipt in a shard file's footer, with the checksum of the file as it is now."""
        try:
            content = self.files.cat_file(self.path(name))
            metadata = pq.ParquetFile(io.BytesIO(content)).schema_arrow.metadata or {}
            found = Receipt(**json.loads(metadata[RECEIPT_KEY.encode()]))
        except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
            raise self._damaged(name) from None
        if name != shard_name(found.shard):
            raise ResumeError(f"{self.out}/{name} holds shard {found.shard}; remove it and run its audit again")
        return replace(found, sha256=hashlib.sha256(content).hexdigest())

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The result rows, shard by shard, in the shards' order."""
        for _, name in sorted(self.committed().items()):
            yield self.read_table(name, columns)


def sha256(content: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def _sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with the SHA-256 of all the rest of it as its last entry."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    return rest | {CHECKSUM: sha256(_json_bytes(rest))}


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class ShardWriter:
    """The last stage: commits one shard as one Parquet file."""

    out: str
    """the run's folder"""
    schema: pa.Schema
    """of the result files"""
    run_id: str
    """this run's name"""
    attempts: int
    """runs so far that had these shards to do, this one included"""

    def commit(self, table: pa.Table) -> Receipt:
        """Writes a shard's working table, and tells what it holds."""
        reach("commit.begin")
        shard, planned = _only(table, "shard"), _only(table, PLANNED)
        assert table.num_rows == planned, f"shard {shard} has {table.num_rows} rows, {planned} were planned"
        trace = trace_of(table)
        result = to_result(self._with_provenance(table, trace), self.schema)
        receipt = shard_receipt(result, shard, self.run_id, trace)
        metadata = dict(result.schema.metadata) | {RECEIPT_KEY: json.dumps(asdict(receipt))}
        name = shard_name(shard)
        self._refuse_if_superseded()
        sha256 = RunFolder(self.out).write_table(name, result.replace_schema_metadata(metadata))
        return replace(receipt, sha256=sha256)

    def receipt(self, table: pa.Table) -> Receipt | None:
        """Of the table's shard, where its file is there: whoever wrote it died before it could tell."""
        folder, name = RunFolder(self.out), shard_name(_only(table, "shard"))
        return folder.receipt(name) if folder.exists(name) else None

    def _refuse_if_superseded(self) -> None:
        """A worker that outlived its killed driver must not write over what the resumed run has committed."""
        folder = RunFolder(self.out)
        if folder.exists("plan.json") and folder.read_json("plan.json", "run_id")["run_id"] != self.run_id:
            raise ResumeError(f"another run has taken {self.out} over from run {self.run_id}")

    def _with_provenance(self, table: pa.Table, trace: Trace) -> pa.Table:
        rows = table.num_rows
        share = {
            f"{stage}_seconds": trace.seconds[stage] / rows if stage in trace.seconds else None
            for stage in TIMED_STAGES
        }
        return with_columns(
            table, {"timings": [share] * rows, "attempts": [self.attempts] * rows, "run_id": [self.run_id] * rows}
        )


def _only(table: pa.Table, column: str) -> int:
    """The one value of a column that must be the same throughout the shard."""
    values = table[column].unique().to_pylist()
    assert len(values) == 1, f"{column} has the values {values[:5]} in what must be one shard"
    return int(values[0])
