"""The packaged taxonomy is whole, and a wrong one is refused with one line that names the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from guardalign.errors import ConfigError
from guardalign.taxonomy import PACKAGED, Taxonomy, load_taxonomy

GOOD: dict[str, Any] = {
    "name": "own",
    "sources": ["us"],
    "categories": [
        {"name": "fire", "title": "Fire", "texts": ["a photo of a fire", "flames"]},
        {"name": "flood", "title": "Flood", "texts": ["a photo of a flood"]},
    ],
    "benign_anchors": ["a photo of a meadow"],
}


def written(folder: Path, content: object) -> str:
    path = folder / "taxonomy.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def loaded(folder: Path, **changes: Any) -> Taxonomy:
    return load_taxonomy(written(folder, {**GOOD, **changes}))


def with_category(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "categories": [{**GOOD["categories"][0], **changes}, GOOD["categories"][1]]}


def without(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_taxonomy_is_whole(name: str) -> None:
    taxonomy = load_taxonomy(name)
    assert taxonomy.name == name and taxonomy.sources
    assert all(len(category.texts) >= 8 for category in taxonomy.categories)
    assert len(taxonomy.benign_anchors) >= 24
    everything = [text for category in taxonomy.categories for text in category.texts] + list(taxonomy.benign_anchors)
    assert len({text.casefold() for text in everything}) == len(everything), "a text stands twice"
    assert all(len(text.split()) <= 25 for text in everything), "CLIP reads 77 tokens"


def test_the_packaged_categories_are_those_of_mlcommons() -> None:
    """The 13 hazard categories of v0.5 (arXiv:2404.12241)."""
    titles = {category.title for category in load_taxonomy("mlcommons").categories}
    assert titles == {
        "Violent Crimes", "Non-Violent Crimes", "Sex-Related Crimes", "Child Sexual Exploitation",
        "Indiscriminate Weapons", "Suicide & Self-Harm", "Hate", "Specialized Advice", "Privacy",
        "Intellectual Property", "Elections", "Defamation", "Sexual Content",
    }  # fmt: skip


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    taxonomy = loaded(tmp_path)
    assert [category.name for category in taxonomy.categories] == ["fire", "flood"]
    assert taxonomy.categories[0].texts == ("a photo of a fire", "flames")
    assert taxonomy.benign_anchors == ("a photo of a meadow",) and taxonomy.sources == ("us",)


def test_anchors_may_be_left_out(tmp_path: Path) -> None:
    assert load_taxonomy(written(tmp_path, without(GOOD, "benign_anchors"))).benign_anchors == ()
    assert loaded(tmp_path, benign_anchors=[]).benign_anchors == ()


def test_the_fingerprint_sees_content_and_order_but_not_layout(tmp_path: Path) -> None:
    taxonomy = loaded(tmp_path)
    commented = tmp_path / "commented.yaml"
    commented.write_text("# a comment\n" + yaml.safe_dump(GOOD, sort_keys=False, default_flow_style=True))
    assert load_taxonomy(str(commented)).fingerprint == taxonomy.fingerprint
    changed = [
        {"categories": GOOD["categories"][::-1]},
        {"categories": with_category(texts=["flames", "a photo of a fire"])["categories"]},
        {"categories": with_category(title="Fires")["categories"]},
        {"benign_anchors": []},
        {"name": "other"},
    ]
    prints = {loaded(tmp_path, **change).fingerprint for change in changed}
    assert len(prints | {taxonomy.fingerprint}) == len(changed) + 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "must be a mapping"),
        (None, "must be a mapping"),
        (without(GOOD, "name"), "lacks the key name"),
        (without(GOOD, "categories"), "lacks the key categories"),
        ({**GOOD, "anchors": []}, "unknown key 'anchors'"),
        ({**GOOD, "categories": []}, "categories must be a list of at least one"),
        ({**GOOD, "categories": {"fire": []}}, "categories must be a list"),
        ({**GOOD, "categories": ["fire"]}, r"categories\[0\] must be a mapping"),
        ({**GOOD, "categories": [GOOD["categories"][0]] * 2}, "categories holds the name 'fire' twice"),
        (with_category(texts=[]), r"categories\[0\].texts is empty"),
        (with_category(texts="a fire"), r"categories\[0\].texts must be a list"),
        (with_category(texts=["a fire", 7]), r"categories\[0\].texts\[1\] must be a non-empty string"),
        (with_category(texts=["a fire", " "]), r"categories\[0\].texts\[1\] must be a non-empty string"),
        (with_category(texts=["a fire", "a fire "]), r"categories\[0\].texts holds the text 'a fire' twice"),
        (with_category(name=True), r"categories\[0\].name must be a non-empty string"),
        (with_category(text=["a"]), r"categories\[0\] has the unknown key 'text'"),
        ({**GOOD, "benign_anchors": ["a", "a"]}, "benign_anchors holds the text 'a' twice"),
        ({**GOOD, "benign_anchors": "a"}, "benign_anchors must be a list"),
        ({**GOOD, "benign_anchors": ["flames"]}, "benign_anchors holds 'flames', which is a text of a category"),
        ({**GOOD, "sources": "us"}, "sources must be a list"),
    ],
)
def test_a_wrong_taxonomy_is_refused_in_one_line(tmp_path: Path, content: object, sentence: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_taxonomy(path)
    assert str(caught.value).startswith(f"taxonomy {path}") and "\n" not in str(caught.value)


def test_a_missing_or_unreadable_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"taxonomy 'mlcomons' is neither a packaged list \(mlcommons, micro\) nor"):
        load_taxonomy("mlcomons")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_taxonomy(str(tmp_path))
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: x\ncategories: [\n")
    with pytest.raises(ConfigError, match=r"no valid YAML \(line \d\)$"):
        load_taxonomy(str(broken))
