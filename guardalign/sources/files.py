"""Locations: what a path, folder, glob or list names, how it is opened, and how its files are called in the results.

Local paths and fsspec URIs alike. Knows nothing of what the files hold.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from guardalign.errors import InputError
from guardalign.sources.contract import InputFile

_PACKAGE = Path(__file__).parents[1]
_MAGIC = re.compile(r"[*?\[]")
_REMOTE = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_ETAG_KEYS = (
    "etag",
    "ETag",
    "md5Hash",
    "content_md5",
    "md5",
    "checksum",
    "crc32c",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file of the input."""

    uri: str
    """opens it: an absolute local path or an fsspec URI"""
    name: str
    """relative to the input's root, with forward slashes"""
    size: int
    """[bytes]"""
    etag: str
    """changes when the file does"""

    @property
    def as_input(self) -> InputFile:
        """The file as it enters the fingerprint."""
        return InputFile(self.name, self.size, self.etag)


def is_remote(path: str) -> bool:
    """Whether `path` is a URI of another protocol than file://."""
    return bool(_REMOTE.match(path)) and not path.startswith("file://")


def absolute(path: str) -> str:
    """`path` in a form that means the same on every machine: local ones from the root, ~ expanded, links kept."""
    if is_remote(path):
        protocol, _, inner = path.partition("://")
        return f"{protocol}://{inner.rstrip('/')}"
    local = Path(path.removeprefix("file://")).expanduser()
    return os.path.abspath(local)


def open_file(uri: str) -> IO[bytes]:
    """`uri` opened for reading, seekable."""
    if not is_remote(uri):
        return Path(uri).open("rb")
    file_system, inner = _file_system(uri)
    opened: IO[bytes] = file_system.open(inner, "rb")
    return opened


@contextmanager
def open_input(uri: str, name: str) -> Iterator[IO[bytes]]:
    """The file `name` of the input, opened. Raises `InputError` where that fails."""
    try:
        opened = open_file(uri)
    except OSError as error:
        raise InputError(f"{name} cannot be opened: {error}") from error
    with opened:
        yield opened


def printable(name: str) -> str:
    """`name` as valid Unicode: bytes of file names that are no UTF-8 as backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def list_files(paths: str | Sequence[str], suffixes: tuple[str, ...]) -> tuple[ListedFile, ...]:
    """The files that `paths` name, in its order; a folder or glob in the order of names, below it by `suffixes`.

    A name is relative to the one item's folder, or to the folder common to all items of a list: two files never share
    one. Raises `InputError` with the path as it was typed.
    """
    items = [paths] if isinstance(paths, str) else list(paths)
    found = [(base, entry) for item in items for base, entry in _list_item(item, suffixes)]
    bases = [_parts(base) for base, _ in found]
    num_common = _num_common(bases)
    listed = [_listed(parts[num_common:], base, entry) for parts, (base, entry) in zip(bases, found, strict=True)]
    _refuse_twice(listed)
    return tuple(listed)


@dataclass(frozen=True, slots=True)
class _Entry:
    relative: str
    size: int
    etag: str


def _listed(parts: Sequence[str], base: str, entry: _Entry) -> ListedFile:
    name = printable("/".join([*parts, entry.relative]))
    return ListedFile(join(base, entry.relative), name, entry.size, entry.etag)


def join(base: str, relative: str) -> str:
    """The path or URI of `relative` in folder `base`."""
    return base + relative if base.endswith("/") else f"{base}/{relative}"


def folder_of(uri: str) -> str:
    """The folder that holds the file `uri`."""
    folder = uri.rpartition("/")[0]
    return f"{folder}/" if folder == "" or folder.endswith(":/") else folder


def _parts(base: str) -> list[str]:
    protocol, _, path = base.rpartition("://")
    if protocol:
        path = re.sub(r"^[^/@]*@", "", path)  # credentials are no part of a name
    return [protocol or "file", *(part for part in path.split("/") if part)]


def _num_common(bases: Sequence[Sequence[str]]) -> int:
    """How many leading parts all have in common."""
    for i, parts in enumerate(zip(*bases, strict=False)):
        if len(set(parts)) > 1:
            return i
    return min((len(parts) for parts in bases), default=0)


def _refuse_twice(listed: Sequence[ListedFile]) -> None:
    seen: set[str] = set()
    for file in listed:
        if file.name in seen:
            raise InputError(f"input.path names the file {file.name} twice")
        seen.add(file.name)


def _list_item(typed: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, _Entry]]:
    """Each file of one item, with the folder that its name is relative to."""
    base = absolute(typed)
    try:
        folder, entries = _look(base, suffixes)
    except FileNotFoundError:
        raise InputError(f"input.path {typed} does not exist") from None
    except (OSError, ImportError, ValueError) as error:
        raise InputError(f"input.path {typed} cannot be read: {error}") from error
    if not entries:
        raise InputError(f"input.path {typed} holds no file that ends in {' or '.join(suffixes)}")
    for entry in entries:
        yield folder, entry


def _look(base: str, suffixes: tuple[str, ...]) -> tuple[str, list[_Entry]]:
    file_system, inner = _file_system(base)
    if _MAGIC.search(base) and not file_system.exists(inner):
        return _look_glob(file_system, base)
    if file_system.isdir(inner):
        return base, [entry for entry in _below(file_system, inner) if _is_visible(entry.relative, suffixes)]
    found = {**file_system.info(inner), "name": inner}
    return folder_of(base), [_entry(file_system, inner.rpartition("/")[0], found)]


def _look_glob(file_system: Any, pattern: str) -> tuple[str, list[_Entry]]:
    magic = _MAGIC.search(pattern)
    assert magic is not None
    base = folder_of(pattern[: magic.start()])
    _, inner = _file_system(base)
    _, inner_pattern = _file_system(pattern)
    found = file_system.glob(inner_pattern, detail=True).values()
    files = [_entry(file_system, inner, one) for one in found if _is_file(file_system, one)]
    if not files:
        raise FileNotFoundError(pattern)
    return base, sorted(files, key=lambda entry: entry.relative)


def _below(file_system: Any, inner: str) -> list[_Entry]:
    """All files below a folder, by name."""
    found = file_system.find(inner, detail=True).values()
    files = [_entry(file_system, inner, one) for one in found if _is_file(file_system, one)]
    return sorted(files, key=lambda entry: entry.relative)


def list_folder(uri: str, *, recursive: bool = False) -> Mapping[str, tuple[int, str]]:
    """Size [bytes] and etag of the files in folder `uri` by relative name; nothing where there is no such folder."""
    file_system, inner = _file_system(uri)
    if not file_system.isdir(inner):
        return {}
    if recursive:
        entries = _below(file_system, inner)
    else:
        found = file_system.ls(inner, detail=True)
        entries = [_entry(file_system, inner, one) for one in found if _is_file(file_system, one)]
    return {entry.relative: (entry.size, entry.etag) for entry in entries}


def _is_visible(relative: str, suffixes: tuple[str, ...]) -> bool:
    """Part of the data: writers leave _SUCCESS, .part.crc and _temporary/ beside it."""
    hidden = any(part.startswith((".", "_")) for part in relative.split("/"))
    return not hidden and relative.lower().endswith(suffixes)


def _is_file(file_system: Any, found: Mapping[str, Any]) -> bool:
    if found["type"] == "file":
        return True
    return bool(_is_local(file_system)) and Path(found["name"]).is_file()


def _entry(file_system: Any, inner_base: str, found: Mapping[str, Any]) -> _Entry:
    name = str(found["name"])
    relative = name[len(inner_base.rstrip("/")) :].lstrip("/")
    if _is_local(file_system):
        stat = Path(name).stat()
        return _Entry(relative, stat.st_size, _local_etag(Path(name), stat.st_mtime_ns))
    etag = next((found[key] for key in _ETAG_KEYS if found.get(key) is not None), "")
    text = etag.isoformat() if hasattr(etag, "isoformat") else str(etag)
    return _Entry(relative, int(found["size"] or 0), text)


def _local_etag(path: Path, mtime_ns: int) -> str:
    """The time of change; of the package's own files the content, which another installation leaves as it is."""
    if _PACKAGE not in path.parents:
        return str(mtime_ns)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_local(file_system: Any) -> bool:
    return "file" in (file_system.protocol if isinstance(file_system.protocol, tuple) else (file_system.protocol,))


def _file_system(uri: str) -> tuple[Any, str]:
    file_system, inner = fsspec.core.url_to_fs(uri)
    return file_system, str(inner)
