"""What the members of a tar's samples are by their endings: the picture, words, known side files, or nothing known.

What is no picture by its ending might be one all the same: nothing is left out without a word. Knows nothing of tars.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from guardalign.config import InputConfig
from guardalign.sources.endings import IMAGE_SUFFIXES
from guardalign.sources.planning import named

DEFAULT_IMAGE: Final = InputConfig().image_column
SIDE_FILES: Final = frozenset({"cls", "cls2", "class", "count", "id", "index", "inx", "key", "md5", "sha256", "uid"})
"""Endings of members that hold a number or a name by WebDataset's custom: never a picture, never a prompt."""
_WORDS: Final = frozenset({"txt", "json"})


def pictures_among(endings: Sequence[str], image_column: str) -> list[str]:
    """The endings that are the sample's picture; more than one are one too many.

    Without a choice by `image_column` those of picture files; where there are none, those that end in one (left.png).
    """
    if image_column != DEFAULT_IMAGE:
        return [ending for ending in endings if ending == image_column]
    plain = [ending for ending in endings if ending == DEFAULT_IMAGE or f".{ending}" in IMAGE_SUFFIXES]
    return plain or [ending for ending in endings if _ends_as_picture(ending)]


def _ends_as_picture(ending: str) -> bool:
    return f".{ending}".endswith(IMAGE_SUFFIXES)


class MemberCensus:
    """Which members of a tar's samples are read, and which are left out."""

    def __init__(self, image_column: str) -> None:
        self._image_column = image_column
        self.endings: dict[str, None] = {}
        """all that were met"""
        self.has_pictures = False
        self._unknown: Counter[str] = Counter()
        self._unchosen: Counter[str] = Counter()

    def add(self, endings: Sequence[str]) -> None:
        """Take the endings of one sample."""
        self.endings |= dict.fromkeys(endings)
        chosen = pictures_among(endings, self._image_column)
        self.has_pictures |= bool(chosen)
        for ending in endings:
            if ending in chosen or ending in SIDE_FILES or ending in _WORDS:
                continue
            if self._image_column == DEFAULT_IMAGE or not _ends_as_picture(ending):
                self._unknown[ending] += 1
            elif not chosen:
                self._unchosen[ending] += 1

    def notes(self) -> tuple[str, ...]:
        """Sentences on what is left out; none when nothing is."""
        notes = []
        if self._unknown:
            notes.append(f"{_members(self._unknown, 'unknown')} left out: no picture among them is seen")
        if self._unchosen:
            lacking = f"without the .{self._image_column} that input.image_column names, a sample is a text-only prompt"
            notes.append(f"{_members(self._unchosen, 'picture')} left out: {lacking}")
        return tuple(notes)


def _members(counts: Counter[str], kind: str) -> str:
    total, listed = counts.total(), named(f".{ending}" for ending in counts)
    if total == 1:
        return f"1 tar member with the {kind} ending {listed} is"
    return f"{total:,} tar members with {kind} endings ({listed}) are"
