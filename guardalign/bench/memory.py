"""Does memory grow with the number of rows? Peak memory of an audit of many rows against one of a tenth of them.

the driver's    20k rows / 2k: blank prompts, each an error row without any model work, so that what is measured is
                the planning, the engine, the commits and the manifest
a worker's      20 shards / 2: the embedded sample, over and over, detected, sanitized, answered and judged
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from guardalign.bench.ratios import Benchmark, Side
from guardalign.micro.sample import SAMPLE

AUDIT = """
import resource, sys
from guardalign.cli import main
code = main(["audit", "--input.format", "parquet", *sys.argv[1:]])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def peak_memory(engine: str) -> Benchmark:
    """Peak resident memory of the driver process, 20,000 rows / 2,000."""
    return Benchmark(
        title=f"driver's peak memory at 20k no-op rows / at 2k ({engine} engine)",
        must_be=1.1,
        goal=1.0,
        at_least=False,
        rounds=1,
        prepare=lambda: (_audit_of(20_000, engine), _audit_of(2_000, engine)),
        warm_up=False,
    )


def worker_memory(rows_each: int = 32, shards: tuple[int, int] = (20, 2)) -> Benchmark:
    """Peak resident memory of a process that runs all stages itself, 20 shards / 2."""
    many, few = shards
    return Benchmark(
        title=f"worker's peak memory at {many} shards of {rows_each} rows / at {few}",
        must_be=1.1,
        goal=1.0,
        at_least=False,
        rounds=1,
        prepare=lambda: (_stages_over(many, rows_each), _stages_over(few, rows_each)),
        warm_up=False,
    )


def _audit_of(num_rows: int, engine: str) -> Side:
    blank = pa.table({"prompt": [" "] * num_rows})
    return lambda: _peak_of(blank, "--recipe", "none", "--engine", engine)


def _stages_over(num_shards: int, rows_each: int) -> Side:
    sample = pq.read_table(SAMPLE, columns=["image", "prompt"]).slice(0, rows_each)
    rows = pa.concat_tables([sample] * -(-num_shards * rows_each // sample.num_rows)).slice(0, num_shards * rows_each)
    flags = ("--engine", "local", "--cluster.isolated", "false", "--generation.max_new_tokens", "8")
    return lambda: _peak_of(rows, *flags, "--shard_rows", str(rows_each))


def _peak_of(rows: pa.Table, *flags: str) -> float:
    """Peak resident memory [bytes] of the process that audits these rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        pq.write_table(rows, path)
        command = [sys.executable, "-c", AUDIT, "--input.path", str(path), "--output", f"{folder}/out", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"the audit ended with code {done.returncode}: {done.stderr[-400:]}"
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("peak "))
        return float(line.split()[1])
