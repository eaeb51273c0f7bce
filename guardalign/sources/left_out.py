"""What stands in the input's folders and is not read: which of it deserves a word, and the sentence about it.

Knows nothing of file systems.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from guardalign.sources.endings import IMAGE_SUFFIXES
from guardalign.sources.planning import named

_WRITERS: Final = frozenset({"_temporary", "_delta_log", "_spark_metadata"})
"""Folders of those who write data sets; what they hold is never a part of them."""
_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something in a folder of the input that is not read."""

    name: str
    """relative to the input's root"""
    why: str = ""
    """one word or two; empty for an ending that is not the format's"""


def is_visible(relative: str, suffixes: tuple[str, ...]) -> bool:
    """Part of the data: writers leave _SUCCESS, .part.crc and _temporary/ beside it."""
    return not is_hidden(relative) and relative.lower().endswith(suffixes)


def is_hidden(relative: str) -> bool:
    """Whether it or a folder above it is."""
    return any(part.startswith((".", "_")) for part in relative.split("/"))


def why_left_out(name: str, suffixes: tuple[str, ...], *, is_file: bool, is_folder: bool) -> str | None:
    """The reason, as `LeftOut.why`; None for what nobody misses: pictures, what writers and tools leave behind."""
    is_own = name.lower().endswith(suffixes)
    if name.endswith(".crc") or not _WRITERS.isdisjoint(name.split("/")) or (is_hidden(name) and not is_own):
        return None
    if is_folder:
        return "a linked folder"
    if name.lower().endswith(IMAGE_SUFFIXES):
        return None
    if not is_file:
        return "no regular file"
    return "hidden" if is_own else ""


def note_of_left_out(
    left_out: Sequence[LeftOut], suffixes: Sequence[str], pictures: Collection[str] = ()
) -> tuple[str, ...]:
    """The sentence about what stands in the input's folders and is not read, up to three by name; `pictures` are.

    Names with one of `suffixes` in them come first: they look most like input.
    """
    rest = {each.name: each.why for each in left_out if each.name not in pictures}
    if not rest:
        return ()
    ordered = sorted(rest, key=lambda name: (not any(suffix in name.lower() for suffix in suffixes), name))
    shown = [f"{name} ({rest[name]})" if rest[name] else name for name in ordered]
    are = "1 file of the input's folder is" if len(rest) == 1 else f"{len(rest):,} files of the input's folder are"
    return (f"{are} left out (visible ones in {' or '.join(suffixes)} are read): {named(shown, _SHOWN)}",)
