"""Picture files that rows name: which may be read, reading one, and listing those of a whole data set.

Nothing outside the image root is read, and nothing from the web: a reference is data, and data may be hostile.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from guardalign.errors import RowError
from guardalign.sources.contract import InputFile
from guardalign.sources.files import is_remote, join, list_folder, open_file, printable
from guardalign.sources.planning import named
from guardalign.sources.rows import InputRow, failed

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""Endings of picture files, lower case."""

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class ImageRoot:
    """The folder that references start from and must stay in."""

    uri: str
    """absolute path or URI"""
    name: str
    """what its files' names start with in the listing; empty for the input's own root"""
    is_configured: bool = False
    """input.image_root names it"""

    def relative(self, reference: str, sample_id: str) -> str:
        """`reference` as a path below the root. Raises `RowError` for one that leaves it, by its text alone."""
        if re.match(r"https?://", reference, re.IGNORECASE):
            raise _missing(sample_id, "is named by a web address; pictures are read from files only")
        if "\0" in reference:
            raise _missing(sample_id, "has a name that no file can have")
        protocol, root = _split(self.uri)
        whole = reference if _is_absolute(reference) else f"{self.uri}/{reference}"
        other, path = _split(whole)
        if protocol != other or not path.startswith(root.rstrip("/") + "/"):
            raise _missing(sample_id, "lies outside the image root")
        return path[len(root.rstrip("/")) + 1 :]

    def read(self, reference: str, sample_id: str) -> bytes:
        """The encoded picture. Raises `RowError` where there is none to be had; other I/O errors pass."""
        uri = join(self.uri, self.relative(reference, sample_id))
        if not is_remote(uri):
            self._check_local(Path(uri), sample_id)
        try:
            with open_file(uri) as file:
                return file.read()
        except PermissionError:
            raise RowError("image_unreadable", f"the picture file of sample {sample_id} may not be read") from None
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno in _ABSENT:
                raise _missing(sample_id, "does not exist") from None
            raise

    def _check_local(self, path: Path, sample_id: str) -> None:
        """No link out of the root, and no pipe or device, which a read might never end on."""
        root = os.path.realpath(self.uri)
        if not os.path.realpath(path).startswith(root.rstrip("/") + "/"):
            raise _missing(sample_id, "lies outside the image root, behind a link")
        if not os.path.isfile(path):
            raise _missing(sample_id, "does not exist")


def _missing(sample_id: str, what: str) -> RowError:
    return RowError("image_missing", f"the picture of sample {sample_id} {what}")


def _is_absolute(reference: str) -> bool:
    return reference.startswith("/") or "://" in reference


def _split(uri: str) -> tuple[str, str]:
    """Protocol, and the path with its dots resolved."""
    protocol, _, path = uri.rpartition("://")
    return ("file" if protocol in ("", "file") else protocol), posixpath.normpath("/" + path.lstrip("/"))


def with_picture(row: InputRow, root: ImageRoot) -> InputRow:
    """`row` with its picture read, or as an error row."""
    if row.image_reference is None:
        return row
    try:
        image = root.read(row.image_reference, row.sample_id)
    except RowError as error:
        return failed(row, error)
    return InputRow(row.sample_id, row.source, row.prompt, image, None, row.category, row.label, row.passthrough)


class PictureCensus:
    """Which picture files the rows name, and which none does. Holds names and listings, never a picture."""

    def __init__(self) -> None:
        self._named: dict[ImageRoot, set[str]] = {}

    def open(self, root: ImageRoot) -> None:
        """Count the files of `root` even if no row names one."""
        self._named.setdefault(root, set())

    def add(self, root: ImageRoot, row: InputRow) -> None:
        """Note the picture of a row; references that may not be read name no file."""
        if row.image_reference is None:
            return
        try:
            relative = root.relative(row.image_reference, row.sample_id)
        except RowError:
            return
        self._named.setdefault(root, set()).add(relative)

    def close(self) -> tuple[tuple[InputFile, ...], tuple[str, ...]]:
        """The named files that exist, and the names of pictures beside them that no row names, each sorted."""
        files: dict[str, InputFile] = {}
        others: set[str] = set()
        for root, named_here in self._named.items():
            for relative, (size, etag) in _listing(root, named_here).items():
                name = posixpath.join(root.name, relative)
                if relative in named_here:
                    files[name] = InputFile(name, size, etag)
                elif relative.lower().endswith(IMAGE_SUFFIXES):
                    others.add(relative)
        return tuple(files[name] for name in sorted(files)), tuple(sorted(printable(name) for name in others))


def _listing(root: ImageRoot, relatives: Iterable[str]) -> dict[str, tuple[int, str]]:
    """All of a configured image root; else only the folders that rows name, since a table may stand anywhere."""
    if root.is_configured:
        return dict(list_folder(root.uri, recursive=True))
    listing: dict[str, tuple[int, str]] = {}
    for folder in sorted({posixpath.dirname(relative) for relative in relatives}):
        in_folder = list_folder(join(root.uri, folder) if folder else root.uri)
        listing |= {posixpath.join(folder, name): found for name, found in in_folder.items()}
    return listing


def note_of_unnamed(names: tuple[str, ...], tables: tuple[str, ...]) -> tuple[str, ...]:
    """The sentence about pictures without a line; none when there are none."""
    if not names:
        return ()
    subject = "1 image file has" if len(names) == 1 else f"{len(names):,} image files have"
    where = tables[0] if len(tables) == 1 else "the tables"
    return (f"{subject} no line in {where}: {named(names)}",)
