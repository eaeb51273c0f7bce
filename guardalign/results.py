"""Where a run's files stand, how a shard is committed, and how a run is read back.

    OUT/plan.json                  the science and the input's shape, written before any work; sealed
    OUT/inputs.parquet             every input file with size and etag
    OUT/results/shard-000017.parquet   one file a shard, complete or absent; sealed
    OUT/run.json                   the manifest, written last: its presence means "complete"; sealed

A commit writes the whole file under a temporary name, flushes it to the disk and renames it; on an object store it is
one PUT. So a shard is done exactly when its file is there, and doing it twice changes nothing. Knows nothing of stages,
models, sources, Ray or what a receipt counts.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
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
from guardalign.seals import as_json, is_whole_json, is_whole_parquet, sealed_json, sealed_parquet, sha256

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
        if name == "run.json":
            mend = "remove it and type the audit again: it is written anew from the shards"
            return ResumeError(f"{self.out}/{name} is damaged; {mend}")
        is_shard = name.startswith("results/")
        mend = "remove it and run its audit again" if is_shard else "mend it from a copy, or name another --output"
        return ResumeError(f"{self.out}/{name} is missing or damaged; {mend}")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file whole, or not at all."""
        self.write(name, as_json(content))

    def write_sealed(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file that holds its own checksum, so that `is_intact` tells every changed byte of it."""
        self.write(name, sealed_json(content))

    def is_intact(self, name: str) -> bool:
        """Whether a JSON file is, byte for byte, what `write_sealed` wrote."""
        return is_whole_json(self.files.cat_file(self.path(name)), self.read_json(name))

    def read_sealed(self, name: str, *keys: str) -> dict[str, Any]:
        """A JSON file of the run, which `write_sealed` wrote and which has these keys; damaged with any other byte."""
        found = self.read_json(name, *keys)
        if not self.is_intact(name):
            raise self._damaged(name)
        return found

    def checksums(self, *names: str) -> list[dict[str, str]]:
        """The SHA-256 of these files of the run, as far as they are there."""
        there = [name for name in names if self.exists(name)]
        return [{"name": name, "sha256": sha256(self.files.cat_file(self.path(name)))} for name in there]

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A Parquet file of the run, held to its seal; or these columns of it, held to their pages' checksums."""
        try:
            with self.files.open(self.path(name), "rb") as stream:
                if columns is None and not is_whole_parquet(stream.read()):
                    raise pa.ArrowInvalid("no seal, or another one")
                found = pq.ParquetFile(stream, page_checksum_verification=True)
                table = found.read(columns=None if columns is None else list(columns))
        except (pa.ArrowException, OSError, ValueError):
            raise self._damaged(name) from None
        if not set(columns or ()) <= set(table.column_names):
            raise self._damaged(name)
        return table

    def write_table(self, name: str, table: pa.Table) -> str:
        """Writes a Parquet file (zstd), sealed, whole, or not at all; returns its SHA-256."""
        content = sealed_parquet(table)
        self.write(name, content)
        return sha256(content)

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
        matches = ((name, _SHARD_FILE.fullmatch(name.removeprefix("results/"))) for name in self.sizes())
        return {int(match[1]): name for name, match in matches if match}

    def sizes(self) -> dict[str, int]:
        """The files of results, in the order of their names: name within the run -> bytes."""
        folder = self.path("results")
        if not self.files.exists(folder):
            return {}
        listed = {Path(str(each["name"])).name: each["size"] for each in self.files.ls(folder, detail=True)}
        return {f"results/{name}": int(listed[name] or 0) for name in sorted(listed)}

    def require_sizes(self, due: Mapping[str, int]) -> None:
        """A `ResumeError` that names the first of these files whose size is another; no file is read for it."""
        there = self.sizes()
        for name, size in due.items():
            if there.get(name) != size:
                raise self._damaged(name)

    def receipt(self, name: str) -> Receipt:
        """The receipt in a shard file's footer, with size and checksum; the file is read whole, and is, by its seal."""
        try:
            content = self.files.cat_file(self.path(name))
            metadata = pq.ParquetFile(io.BytesIO(content)).schema_arrow.metadata or {}
            found = Receipt(**json.loads(metadata[RECEIPT_KEY.encode()]))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            raise self._damaged(name) from None
        if not is_whole_parquet(content):
            raise self._damaged(name)
        if name != shard_name(found.shard):
            raise ResumeError(f"{self.out}/{name} holds shard {found.shard}; remove it and run its audit again")
        return found.of(content)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The result rows, shard by shard, in the shards' order."""
        for _, name in sorted(self.committed().items()):
            yield self.read_table(name, columns)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def entries(receipts: Iterable[Receipt]) -> list[dict[str, Any]]:
    """The entries of run.json's `files`."""
    return [
        {"name": shard_name(each.shard), "rows": each.num_rows, "num_bytes": each.num_bytes, "sha256": each.sha256}
        for each in receipts
    ]


def sizes_of(manifest: Mapping[str, Any]) -> dict[str, int]:
    """What run.json says of the files' sizes [bytes], by name; earlier versions said nothing."""
    return {each["name"]: each["num_bytes"] for each in manifest["files"] if "num_bytes" in each}


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
        content = sealed_parquet(result.replace_schema_metadata(metadata))
        RunFolder(self.out).write(name, content)
        return receipt.of(content)

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
