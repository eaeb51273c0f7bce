"""Does the driver's memory grow with the number of rows? Peak memory of an audit of 20k no-op rows against 2k.

The rows are blank prompts: each becomes an error row without any model work, so that what is measured is the planning,
the engine, the commits and the manifest.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from guardalign.bench.ratios import Benchmark, Side

AUDIT = """
import resource, sys
from guardalign.cli import main
code = main(["audit", "--recipe", "none", "--input.format", "parquet", *sys.argv[1:]])
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


def _audit_of(num_rows: int, engine: str) -> Side:
    def side() -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.parquet"
            pq.write_table(pa.table({"prompt": [" "] * num_rows}), path)
            flags = ["--input.path", str(path), "--output", f"{folder}/out", "--engine", engine]
            done = subprocess.run([sys.executable, "-c", AUDIT, *flags], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"the audit ended with code {done.returncode}: {done.stderr[-400:]}"
            (line,) = (line for line in done.stdout.splitlines() if line.startswith("peak "))
            return float(line.split()[1])

    return side
