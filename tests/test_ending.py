"""How a command ends its process: with its exit code, whatever native threads do; handlers run, words are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
JOBS = Path(__file__).resolve().parents[1] / "jobs"
A_READ_THAT_IS_NOT_OVER = """
import io, threading, time
import pyarrow as pa, pyarrow.parquet as pq

class Slow(io.BytesIO):
    seconds = 0.0
    def read(self, *size):
        entered.set()
        time.sleep(self.seconds)
        return super().read(*size)

def leave_a_native_thread_behind():
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": list(range(1000))}), sink, row_group_size=10)
    batches = pq.ParquetFile(Slow(sink.getvalue()), pre_buffer=True).iter_batches()
    Slow.seconds = 0.5
    entered.clear()
    threading.Thread(target=lambda: list(batches), daemon=True).start()
    assert entered.wait(10)

entered = threading.Event()
"""
"""Arrow's own threads hold a Python object when the interpreter goes."""


def ended(code: str, *, imports: str = "", stdout: int | None = subprocess.PIPE) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a process whose `main` this is."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    script = f"from guardalign.ending import to_the_end\n{imports}\ndef main():\n{lines}\nto_the_end(main)\n"
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, env=BUFFERED
    )
    return done.returncode, done.stdout, done.stderr


def test_a_native_thread_at_work_does_not_change_the_exit_code() -> None:
    code = "leave_a_native_thread_behind()\nprint('done')\nreturn 3"
    assert ended(code, imports=A_READ_THAT_IS_NOT_OVER) == (3, "done\n", "")


def test_without_an_error_stream_it_ends_the_same() -> None:
    code = "sys.stderr = None\nleave_a_native_thread_behind()\nprint('done')\nreturn 3"
    assert ended(code, imports=f"import sys\n{A_READ_THAT_IS_NOT_OVER}") == (3, "done\n", "")


def test_threads_are_awaited_and_handlers_run_before_the_end(tmp_path: Path) -> None:
    code = (
        "import atexit, tempfile, threading, time\n"
        "global folder\n"
        f"folder = tempfile.TemporaryDirectory(dir={str(tmp_path)!r})\n"
        "atexit.register(print, 'handled', end='')\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('awaited'))).start()\n"
    )
    assert ended(code) == (0, "awaited\nhandled", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "code", "last"),
    [("ValueError('x')", 1, "ValueError: x"), ("SystemExit(5)", 5, ""), ("SystemExit('gone')", 1, "gone")],
)
def test_what_is_raised_ends_it_as_python_would(raised: str, code: int, last: str) -> None:
    found, _, said = ended(f"raise {raised}")
    assert (found, "".join(said.splitlines()[-1:])) == (code, last)


def test_last_words_that_cannot_be_written_are_told() -> None:
    with open("/dev/full", "w") as full:
        code, _, said = ended("print('found nothing')\nreturn 0", stdout=full.fileno())
    assert (code, said) == (2, "guardalign: standard output: No space left on device\n")


def test_a_reader_who_has_gone_changes_nothing() -> None:
    code = "import os\nread, write = os.pipe()\nos.dup2(write, 1)\nos.close(read)\nprint('found nothing')\nreturn 1"
    assert ended(code) == (1, "", "")


@pytest.mark.parametrize(
    "command",
    [
        (str(Path(sys.executable).with_name("guardalign")), "--version"),
        (sys.executable, "-m", "guardalign.cli", "--version"),
        pytest.param((sys.executable, JOBS / "audit.py", "--help"), marks=pytest.mark.slow),
        (sys.executable, JOBS / "evaluate.py", "--help"),
    ],
)
def test_every_way_to_begin_ends_so(command: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, env=BUFFERED)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("guardalign: ") and line.endswith(": No space left on device")
