"""What a node must see before it works: the run's folder, the input, the models, and the driver's own software.

The driver writes down what it sees (`Sight`); a node looks for the very same (`prove`). A node that sees another OUT
would write where nobody reads, one with other weights or libraries would give other rows. Cheap: names, sizes and the
hashes of small files, no torch. Hub models are not looked for: every node fetches the pinned commit itself. Knows
nothing of Ray, and nothing of which models a run needs (`nodes.py`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from guardalign.errors import UserError, require
from guardalign.models.provenance import SETTINGS, WEIGHTS
from guardalign.results import RunFolder
from guardalign.sources.files import is_remote, open_file
from guardalign.version import VERSION

PACKAGE: Final = Path(__file__).parent
TOKEN: Final = ".sight.tmp"
"""file in OUT that the driver writes and every node reads; called like what a killed run leaves, and cleared with it"""
LIBRARIES: Final = ("torch", "transformers", "tokenizers", "open_clip_torch", "pillow")
"""of another version, they may give other rows"""
SMALL: Final = 2**20
"""settings up to this size are compared by content, all else by size [bytes]"""
_SUFFIXES: Final = WEIGHTS | SETTINGS | {".arrow"}


@dataclass(frozen=True)
class Place:
    """A file or folder that the work reads."""

    name: str
    """what it is to the user: the setting, or `the input`"""
    path: str
    """absolute, a URI, as typed, or relative to the package"""
    ships: bool
    """it lies in the package, wherever that is installed"""
    files: Mapping[str, str]
    """what the driver sees there: relative name -> size [bytes], or SHA-256 of small settings; empty: a folder that is
    only to be there"""


@dataclass(frozen=True)
class Sight:
    """What the driver sees."""

    out: str
    """the run's folder"""
    token: str
    """what stands in the file `TOKEN` there"""
    places: tuple[Place, ...]
    """what the work reads"""
    versions: Mapping[str, str]
    """of this package, of Python, of `LIBRARIES`"""


def software() -> dict[str, str]:
    """The versions here, without build tags: +cu128 and +cpu are one."""
    found = {"guardalign": VERSION, "Python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def place(name: str, path: str, *, only_there: bool = False) -> Place | None:
    """What this process sees at a path or URI; None where there is nothing, as under the name of a hub model."""
    local = Path(path).expanduser()
    ships = local.is_relative_to(PACKAGE)
    bare = Place(name, str(local.relative_to(PACKAGE)) if ships else path, ships, {})
    try:
        return bare if only_there and local.is_dir() else Place(name, bare.path, ships, _files(bare))
    except OSError:
        return None


def _files(here: Place) -> dict[str, str]:
    """Relative name -> size or hash; `OSError` where there is nothing to read."""
    if is_remote(here.path):
        with open_file(here.path) as file:
            return {"": str(file.seek(0, 2))}
    root = _local(here)
    if not root.is_dir():
        with root.open("rb"):
            return {"": _mark(root)}
    below = (path for path in sorted(root.rglob("*")) if path.suffix in _SUFFIXES and path.is_file())
    named = ((path.relative_to(root), path) for path in below)
    return {name.as_posix(): _mark(path) for name, path in named if not any(p.startswith(".") for p in name.parts)}


def _local(here: Place) -> Path:
    return PACKAGE / here.path if here.ships else Path(here.path.removeprefix("file://")).expanduser()


def _mark(path: Path) -> str:
    size = path.stat().st_size
    if size > SMALL or path.suffix not in SETTINGS:
        return f"{size} bytes"
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def shown(out: str, places: tuple[Place, ...]) -> Iterator[Sight]:
    """What this process sees, its token in OUT meanwhile; `UserError` where OUT cannot be written."""
    folder, token = RunFolder(out), secrets.token_hex(16)
    try:
        folder.files.makedirs(folder.root, exist_ok=True)
        folder.files.pipe_file(folder.path(TOKEN), token.encode())
    except OSError as error:
        raise UserError(f"{out}/{TOKEN} cannot be written: {error.strerror or error}") from error
    try:
        yield Sight(out, token, places, software())
    finally:
        with suppress(OSError):
            folder.files.rm_file(folder.path(TOKEN))


def prove(sight: Sight) -> str | None:
    """None where this process sees what the driver does; else what it does not, as the rest of a sentence."""
    return _other_software(sight) or _blind_to_out(sight) or _blind_to_places(sight)


def require_sight(sight: Sight) -> None:
    """`ConfigError` that names this node, where it does not see what the driver does."""
    problem = prove(sight)
    require(problem is None, f"node {socket.gethostname()} {problem}")


def _other_software(sight: Sight) -> str | None:
    here = software()
    for name, version in sight.versions.items():
        if here[name] != version:
            return f"runs {name} {here[name]} and the driver {version}, which may give other rows; make them the same"
    return None


def _blind_to_out(sight: Sight) -> str | None:
    mend = "mount it on every node, or use an object store"
    folder = RunFolder(sight.out)
    try:
        if folder.files.cat_file(folder.path(TOKEN)) != sight.token.encode():
            return f"does not see OUT {sight.out} as it is now: another run's token is there; {mend}"
    except OSError:
        return f"does not see OUT {sight.out}: what the driver has written there is not there; {mend}"
    own = folder.path(f".sight-{secrets.token_hex(8)}.tmp")
    try:
        folder.files.pipe_file(own, b"")
        folder.files.rm_file(own)
    except OSError as error:
        return f"cannot write into OUT {sight.out}: {error.strerror or error}; {mend}"
    return None


def _blind_to_places(sight: Sight) -> str | None:
    for each in sight.places:
        problem = _blind_to(each)
        if problem:
            return problem
    return None


def _blind_to(each: Place) -> str | None:
    where, mend = f"{each.name} {each.path}", "mount the same files on every node"
    if not (each.ships or is_remote(each.path) or each.path.startswith(("/", "~", "file:"))):
        mend = "name it by its path from the root, the same on every node"
    if not each.files:
        return None if _local(each).is_dir() else f"does not see {where}; {mend}"
    try:
        here: Any = _files(each)
    except OSError:
        return f"does not see {where}; {mend}"
    other = [name for name in {**each.files, **here} if each.files.get(name) != here.get(name)]
    return f"sees another {where} than the driver: {other[0] or 'its size'} differs; {mend}" if other else None
