"""Command lines that somebody in this folder would type: the same one again, the one that comes next.

Knows nothing of what the commands do.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from guardalign.results import RunFolder


def next_line(folder: RunFolder) -> str:
    """A line that shows the first flagged row, or else the first row."""
    first = None
    for table in folder.tables(["sample_id", "flagged"]):
        flagged = [row["sample_id"] for row in table.to_pylist() if row["flagged"]]
        first = first or table["sample_id"][0].as_py()
        if flagged:
            first = flagged[0]
            break
    guard = ["--"] if str(first).startswith("-") else []
    return shlex.join([program(), "show", folder.out, *guard, str(first)])


def typed_line() -> str:
    """The command line of this process, as somebody in this folder would type it again."""
    script = Path(sys.argv[0])
    begin = ["python", os.path.relpath(script)] if script.suffix == ".py" else [program()]
    return shlex.join([*begin, *sys.argv[1:]])


def program() -> str:
    """The console command: its name where the shell finds it, else its place beside this Python."""
    beside = Path(sys.executable).with_name("guardalign")
    found = shutil.which("guardalign")
    is_same = found is not None and Path(found).parent.resolve() == beside.parent.resolve()
    return "guardalign" if is_same or not beside.exists() else os.path.relpath(beside)
