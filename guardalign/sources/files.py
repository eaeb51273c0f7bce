"""Locations: what a path, folder, glob or list names, how it is opened, and how its files are called in the results.

Local paths and fsspec URIs alike. Knows nothing of what the files hold.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from guardalign.errors import InputError
from guardalign.sources.contract import InputFile
from guardalign.sources.left_out import LeftOut, is_hidden, is_visible, why_left_out

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


def list_files(
    paths: str | Sequence[str], suffixes: tuple[str, ...], left_out: list[LeftOut] | None = None
) -> tuple[ListedFile, ...]:
    """The files that `paths` name, in its order; a folder or glob in the order of names, below folders by `suffixes`.

    A name is relative to the one item's folder, or to the folder common to all items of a list: two files never share
    one. What folders hold beside them goes to `left_out`. Raises `InputError` with the path as it was typed.
    """
    items = [paths] if isinstance(paths, str) else list(paths)
    looks = [_list_item(item, suffixes) for item in items]
    bases = [_parts(look.base) for look in looks]
    num_common = _num_common(bases)
    listed = [
        _listed(parts[num_common:], look.base, entry)
        for parts, look in zip(bases, looks, strict=True)
        for entry in look.entries
    ]
    _refuse_twice(listed)
    if left_out is not None:
        taken = {file.name for file in listed}
        for parts, look in zip(bases, looks, strict=True):
            names = [(printable("/".join([*parts[num_common:], relative])), why) for relative, why in look.rest.items()]
            left_out += [LeftOut(name, why) for name, why in names if name not in taken]
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


@dataclass(frozen=True)
class _Look:
    """What one item names."""

    base: str
    """the folder that names are relative to"""
    entries: list[_Entry]
    rest: Mapping[str, str]
    """what is left out, and why"""


def _list_item(typed: str, suffixes: tuple[str, ...]) -> _Look:
    """The files of one item."""
    base = absolute(typed)
    try:
        look = _look(base, suffixes)
    except FileNotFoundError:
        raise InputError(f"input.path {typed} does not exist") from None
    except (OSError, ImportError, ValueError) as error:
        raise InputError(f"input.path {typed} cannot be read: {error}") from error
    if not look.entries:
        raise InputError(f"input.path {typed} holds no file that ends in {' or '.join(suffixes)}")
    return look


def _look(base: str, suffixes: tuple[str, ...]) -> _Look:
    file_system, inner = _file_system(base)
    if _MAGIC.search(base) and not file_system.exists(inner):
        return _look_glob(file_system, base, suffixes)
    if file_system.isdir(inner):
        return _Look(base, *_look_below(file_system, inner, inner, suffixes, inner))
    found = {**file_system.info(inner), "name": inner}
    return _Look(folder_of(base), [_entry(file_system, inner.rpartition("/")[0], found)], {})


def _look_glob(file_system: Any, pattern: str, suffixes: tuple[str, ...]) -> _Look:
    """Files that a glob matches are taken as they are, folders are looked through; hidden ones only if it says so."""
    magic = _MAGIC.search(pattern)
    assert magic is not None
    base = folder_of(pattern[: magic.start()])
    _, inner = _file_system(base)
    _, inner_pattern = _file_system(pattern)
    entries: dict[str, _Entry] = {}
    rest: dict[str, str] = {}
    matched = file_system.glob(inner_pattern, detail=True)
    for found in matched.values():
        if _is_folder(file_system, found):
            below, others = _look_below(file_system, inner, _start(pattern, found), suffixes, str(found["name"]))
            entries |= {entry.relative: entry for entry in below}
            rest |= others
        elif _is_file(file_system, found):
            entry = _entry(file_system, inner, found)
            entries[entry.relative] = entry
        else:
            rest[_relative(found, inner)] = "no regular file"
    if not matched:
        raise FileNotFoundError(pattern)
    return _Look(base, [entries[name] for name in sorted(entries)], rest)


def _start(pattern: str, found: Mapping[str, Any]) -> str:
    """Where names begin to count as hidden: below the folder found, unless it is a hidden one that nobody asked for."""
    above, _, name = str(found["name"]).rpartition("/")
    is_asked_for = not is_hidden(name) or posixpath.basename(pattern)[:1] == name[:1]
    return f"{above}/{name}" if is_asked_for else above


def _is_folder(file_system: Any, found: Mapping[str, Any]) -> bool:
    return found["type"] == "directory" or (bool(_is_local(file_system)) and Path(found["name"]).is_dir())


def _look_below(
    file_system: Any, inner_base: str, start: str, suffixes: tuple[str, ...], folder: str
) -> tuple[list[_Entry], dict[str, str]]:
    """The files below `folder` that are read, and the rest, named from `inner_base` on; hidden is told from `start`."""
    entries: list[_Entry] = []
    rest: dict[str, str] = {}
    for found in file_system.find(folder, detail=True).values():
        name, is_file = _relative(found, start), _is_file(file_system, found)
        if is_file and is_visible(name, suffixes):
            entries.append(_entry(file_system, inner_base, found))
            continue
        is_folder = not is_file and _is_folder(file_system, found)
        why = why_left_out(name, suffixes, is_file=is_file, is_folder=is_folder)
        if why is not None:
            rest[_relative(found, inner_base)] = why
    return sorted(entries, key=lambda entry: entry.relative), rest


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


def _is_file(file_system: Any, found: Mapping[str, Any]) -> bool:
    if found["type"] == "file":
        return True
    return bool(_is_local(file_system)) and Path(found["name"]).is_file()


def _entry(file_system: Any, inner_base: str, found: Mapping[str, Any]) -> _Entry:
    name, relative = str(found["name"]), _relative(found, inner_base)
    if _is_local(file_system):
        stat = Path(name).stat()
        return _Entry(relative, stat.st_size, _local_etag(Path(name), stat.st_mtime_ns))
    etag = next((found[key] for key in _ETAG_KEYS if found.get(key) is not None), "")
    text = etag.isoformat() if hasattr(etag, "isoformat") else str(etag)
    return _Entry(relative, int(found["size"] or 0), text)


def _relative(found: Mapping[str, Any], inner_base: str) -> str:
    return str(found["name"])[len(inner_base.rstrip("/")) :].lstrip("/")


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
