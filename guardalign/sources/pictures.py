"""Picture files that rows name: which may be read, reading one, and listing those of a whole data set.

Nothing outside the image root is read, and nothing from the web unless `input.allow_urls` is set: a reference is data,
and data may be hostile.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from guardalign.config import InputConfig
from guardalign.errors import InputError, RowError
from guardalign.sources.contract import InputFile
from guardalign.sources.endings import IMAGE_SUFFIXES
from guardalign.sources.files import is_remote, join, list_folder, open_file, printable
from guardalign.sources.planning import named
from guardalign.sources.rows import InputRow, failed
from guardalign.sources.web import WebLimits, fetch, is_url

FETCHES = 8
"""Pictures from the web that a reader waits for at once."""

_DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(;[^,]*)?,", re.IGNORECASE)
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
    web: WebLimits | None = None
    """for references that are web addresses; None: they are refused"""

    def relative(self, reference: str, sample_id: str) -> str:
        """`reference` as a path below the root. Raises `RowError` for one that leaves it, by its text alone."""
        if is_url(reference):
            raise _missing(sample_id, "is named by a web address, and input.allow_urls is off")
        if "\0" in reference or (is_remote(self.uri) and "::" in reference):  # "::" chains fsspec's file systems
            raise _missing(sample_id, "has a name that no file can have")
        if _DATA_URI.match(reference):
            raise _missing(sample_id, "is named by a data: URI, which is no path; give its bytes, or a file")
        relative = self._below(reference)
        if relative is None and "://" in reference and _split(reference)[0] != _split(self.uri)[0]:
            raise _missing(
                sample_id, "is named by the URI of another file system, and such references are not followed"
            )
        if relative is None or (is_remote(self.uri) and self._below(unquote(reference)) is None):
            raise _missing(sample_id, "lies outside the image root")
        return relative

    def _below(self, reference: str) -> str | None:
        """The path from the root on; None for one that leads out of it."""
        protocol, root = _split(self.uri)
        other, path = _split(reference if _is_absolute(reference) else f"{self.uri}/{reference}")
        inside = protocol == other and path.startswith(root.rstrip("/") + "/")
        return path[len(root.rstrip("/")) + 1 :] if inside else None

    def read(self, reference: str, sample_id: str) -> bytes:
        """The encoded picture. Raises `RowError` where there is none to be had; other I/O errors pass."""
        if self.web is not None and is_url(reference):
            return fetch(reference, sample_id, self.web)
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
        if os.path.isdir(path):
            raise _missing(sample_id, "is a folder, not a file")
        if os.path.islink(path) and not os.path.exists(path):
            raise _missing(sample_id, "is a link that leads to no file")
        if os.path.exists(path) and not os.path.isfile(path):
            raise _missing(sample_id, "is no regular file, but a pipe, socket or device")


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


def with_pictures(rows: Sequence[InputRow], root: ImageRoot) -> list[InputRow]:
    """`rows` with their pictures read; several at once where they come from the web."""
    from_web = {row.sample_id for row in rows if row.image_reference is not None and is_url(row.image_reference)}
    if root.web is None or not from_web:
        return [with_picture(row, root) for row in rows]
    if (only := _FETCHING.get()) is not None:
        left = from_web - only.wanted
        only.fetched.update(from_web & only.wanted)
        rows = [replace(row, image_reference=None) if row.sample_id in left else row for row in rows]
    with ThreadPoolExecutor(min(FETCHES, len(from_web))) as threads:
        return list(threads.map(partial(with_picture, root=root), rows))


@dataclass(frozen=True)
class Fetching:
    """Which rows' pictures are fetched from the web."""

    wanted: frozenset[str]
    """sample ids; the pictures of all others are left out without a word"""
    fetched: set[str] = field(default_factory=set)
    """of these, those whose picture is named by a web address, filled as rows are read"""


_FETCHING: ContextVar[Fetching | None] = ContextVar("_FETCHING", default=None)


@contextmanager
def fetching_only(sample_ids: Iterable[str]) -> Iterator[Fetching]:
    """Meanwhile nothing is fetched for other rows than these; for readers who want some rows of a shard."""
    found = Fetching(frozenset(sample_ids))
    before = _FETCHING.set(found)
    try:
        yield found
    finally:
        _FETCHING.reset(before)


def web_limits(config: InputConfig) -> WebLimits | None:
    """What a picture from the web may cost; None where none is to be fetched."""
    return WebLimits(config.url_seconds, config.url_bytes) if config.allow_urls else None


class PictureCensus:
    """Which picture files the rows name, and which none does. Holds names and listings, never a picture."""

    def __init__(self) -> None:
        self._named: dict[ImageRoot, set[str]] = {}
        self._may_refer = False

    def open(self, root: ImageRoot) -> None:
        """Count the files of `root` even if no row names one."""
        self._named.setdefault(root, set())

    def add(self, root: ImageRoot, row: InputRow) -> None:
        """Note the picture of a row; web addresses, and references that may not be read, name no file."""
        if row.image_reference is None:
            return
        self.expect()
        try:
            relative = root.relative(row.image_reference, row.sample_id)
        except RowError:
            return
        self._named.setdefault(root, set()).add(relative)

    def expect(self) -> None:
        """Rows may name pictures, whether or not such rows are added."""
        self._may_refer = True

    def note_of_idle_root(self, image_root: str | None) -> tuple[str, ...]:
        """The sentence about an `input.image_root` that nothing refers to; none otherwise."""
        if image_root is None or self._may_refer:
            return ()
        return ("input.image_root has no effect: no row names a picture",)

    def close(self) -> tuple[tuple[InputFile, ...], tuple[str, ...]]:
        """The named files that exist, and the names of pictures beside them that no row names, each sorted.

        Raises `InputError` where pictures are to lie in a folder that is none.
        """
        files: dict[str, InputFile] = {}
        others: set[str] = set()
        for root, named_here in self._named.items():
            if named_here:
                _refuse_absent(root)
            for relative, (size, etag) in _listing(root, named_here).items():
                name = posixpath.join(root.name, relative)
                if relative in named_here:
                    files[name] = InputFile(name, size, etag)
                elif relative.lower().endswith(IMAGE_SUFFIXES):
                    others.add(relative)
        return tuple(files[name] for name in sorted(files)), tuple(sorted(printable(name) for name in others))


def _refuse_absent(root: ImageRoot) -> None:
    if root.is_configured and not is_remote(root.uri) and not os.path.isdir(root.uri):
        what = "is no folder" if os.path.exists(root.uri) else "does not exist"
        raise InputError(f"input.image_root {root.uri} {what}")


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
