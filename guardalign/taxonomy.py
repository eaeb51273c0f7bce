"""The concepts that patches are compared with: unsafe categories, their text variants, and benign anchors.

A taxonomy is a YAML file of four keys: `name`, `sources` (where the list comes from), `categories` (each with `name`,
`title` and `texts`) and `benign_anchors` (may be left out; the `margin` score needs them). The packaged ones,
`mlcommons` for real pictures and `micro` for the micro world's, show the form.

Knows nothing of embeddings or scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import yaml

from guardalign.errors import ConfigError, require
from guardalign.models.provenance import seal

PACKAGED: Final = ("mlcommons", "micro")
"""Names of the taxonomies that ship with the package."""


@dataclass(frozen=True)
class Category:
    """One kind of unsafe content."""

    name: str
    """the key in results, e.g. violent_crimes"""
    title: str
    """the name for people"""
    texts: tuple[str, ...]
    """captions of what such pictures show, the category's text variants; at least one"""


@dataclass(frozen=True)
class Taxonomy:
    """What is unsafe, in words, and what is not."""

    name: str
    """the list's own name"""
    categories: tuple[Category, ...]
    """at least one, in the order of the results' scores"""
    benign_anchors: tuple[str, ...]
    """captions of harmless pictures, against which the `margin` score sets the categories; may be empty"""
    sources: tuple[str, ...]
    """where names and texts come from"""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content: the same for two files that differ in comments or layout only."""
        return seal(asdict(self))


def load_taxonomy(name_or_path: str) -> Taxonomy:
    """The packaged taxonomy of that name, else the one in that YAML file; `ConfigError` says what is wrong in it."""
    if name_or_path in PACKAGED:
        text = resources.files("guardalign").joinpath(f"{name_or_path}.yaml").read_text("utf-8")
    else:
        text = _read(name_or_path)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"taxonomy {name_or_path} is no valid YAML{line}") from error
    return _taxonomy(content, f"taxonomy {name_or_path}")


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text("utf-8")
    except FileNotFoundError as error:
        known = ", ".join(PACKAGED)
        raise ConfigError(f"taxonomy {path!r} is neither a packaged list ({known}) nor a YAML file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"taxonomy {path} cannot be read as UTF-8 text ({type(error).__name__})") from error


def _taxonomy(content: object, where: str) -> Taxonomy:
    fields = _fields(content, where, required=("name", "categories"), optional=("benign_anchors", "sources"))
    entries = fields["categories"]
    require(isinstance(entries, list) and bool(entries), f"{where}: categories must be a list of at least one category")
    categories = tuple(_category(entry, f"{where}: categories[{at}]") for at, entry in enumerate(entries))
    _require_distinct([category.name for category in categories], f"{where}: categories", "name")
    anchors = _texts(fields.get("benign_anchors") or [], f"{where}: benign_anchors")
    unsafe = {text for category in categories for text in category.texts}
    both = next((text for text in anchors if text in unsafe), None)
    require(both is None, f"{where}: benign_anchors holds {both!r}, which is a text of a category too")
    return Taxonomy(
        name=_line(fields["name"], f"{where}: name"),
        categories=categories,
        benign_anchors=anchors,
        sources=_texts(fields.get("sources") or [], f"{where}: sources"),
    )


def _category(entry: object, where: str) -> Category:
    fields = _fields(entry, where, required=("name", "title", "texts"))
    texts = _texts(fields["texts"], f"{where}.texts")
    require(bool(texts), f"{where}.texts is empty; a category needs at least one text")
    return Category(_line(fields["name"], f"{where}.name"), _line(fields["title"], f"{where}.title"), texts)


def _fields(content: object, where: str, required: Sequence[str], optional: Sequence[str] = ()) -> Mapping[str, Any]:
    """The mapping, once it has all the `required` keys and no unknown ones."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a mapping with the keys {', '.join(required)}")
    missing = [key for key in required if key not in content]
    require(not missing, f"{where} lacks the key{'s' * (len(missing) > 1)} {', '.join(missing)}")
    unknown = next((key for key in content if key not in (*required, *optional)), None)
    require(unknown is None, f"{where} has the unknown key {unknown!r}; known are {', '.join((*required, *optional))}")
    return content


def _texts(value: object, where: str) -> tuple[str, ...]:
    """A list of distinct, non-empty strings."""
    if not isinstance(value, list):
        raise ConfigError(f"{where} must be a list of texts")
    texts = tuple(_line(text, f"{where}[{at}]") for at, text in enumerate(value))
    _require_distinct(texts, where, "text")
    return texts


def _line(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where} must be a non-empty string (quote it if YAML reads it as something else)")
    return value.strip()


def _require_distinct(values: Sequence[str], where: str, what: str) -> None:
    twice = next((value for at, value in enumerate(values) if value in values[:at]), None)
    require(twice is None, f"{where} holds the {what} {twice!r} twice")
