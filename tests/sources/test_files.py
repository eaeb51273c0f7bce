"""Locations: what stands for a file's content in a run's fingerprint."""

import hashlib
from pathlib import Path

from guardalign.sources.files import list_files
from guardalign.sources.micro_scenes import FOLDER


def test_a_shipped_file_stays_the_same_when_the_package_is_installed_again() -> None:
    shipped = FOLDER / "sample.parquet"
    (listed,) = list_files(str(shipped), ())
    assert listed.etag == hashlib.sha256(shipped.read_bytes()).hexdigest()


def test_a_file_of_the_users_is_another_one_after_each_write(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("id\n1\n")
    (before,) = list_files(str(table), ())
    table.touch()
    (after,) = list_files(str(table), ())
    assert before.size == after.size and before.etag != after.etag
