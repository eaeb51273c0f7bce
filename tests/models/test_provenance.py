"""A fingerprint changes when, and only when, a file that decides what a model computes changes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardalign.errors import ModelError
from guardalign.models.provenance import COMMIT, seal, weights_fingerprint

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def checkpoint(folder: Path) -> Path:
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "merges.txt", "chat_template.jinja"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "text").mkdir()
    (folder / "text" / "tokenizer.json").write_bytes(b"{}")
    return folder


def hub_model(cache: Path, commit: str = "c" * 40) -> Path:
    """A model in the layout of the hub's cache: blobs, and a snapshot of links to them."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        blob = repository / "blobs" / f"{commit[:4]}-{name}"
        blob.write_bytes(name.encode())
        (snapshot / name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_folder_is_told_by_its_deciding_files(tmp_path: Path) -> None:
    fingerprint = weights_fingerprint(str(checkpoint(tmp_path / "model")))
    assert list(fingerprint) == sorted(fingerprint)
    assert "text/tokenizer.json" in fingerprint and len(fingerprint) == 6
    assert fingerprint["config.json"] == hashlib.sha256(b"config.json").hexdigest()


@pytest.mark.parametrize("name", ["config.json", "model-2.safetensors", "merges.txt", "text/tokenizer.json"])
def test_a_changed_byte_changes_that_entry_alone(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path / "model")
    before = weights_fingerprint(str(folder))
    (folder / name).write_bytes(b"changed")
    after = weights_fingerprint(str(folder))
    assert {key for key in before if before[key] != after[key]} == {name}


def test_files_that_decide_nothing_are_left_out(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    before = weights_fingerprint(str(folder))
    (folder / "README.md").write_text("words")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "state.json").write_text("{}")
    assert weights_fingerprint(str(folder)) == before


def test_where_a_model_lies_does_not_matter(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path / "a"), checkpoint(tmp_path / ".hidden" / "b")
    assert weights_fingerprint(str(first)) == weights_fingerprint(str(second))


def test_a_file_is_told_by_its_content(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "model") / "model-1.safetensors"
    assert weights_fingerprint(str(file)) == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}


def test_a_hub_model_is_told_by_commit_and_weights(cache: Path) -> None:
    hub_model(cache)
    expected = {COMMIT: "c" * 40, "model.safetensors": hashlib.sha256(b"model.safetensors").hexdigest()}
    assert weights_fingerprint("owner/name") == expected
    assert weights_fingerprint("owner/name", revision="c" * 40) == expected


def test_a_settings_file_that_is_cached_later_changes_nothing(cache: Path) -> None:
    snapshot = hub_model(cache)
    before = weights_fingerprint("owner/name")
    (snapshot / "preprocessor_config.json").write_text("{}")
    assert weights_fingerprint("owner/name") == before


def test_another_commit_is_another_model(cache: Path) -> None:
    hub_model(cache)
    first = weights_fingerprint("owner/name")
    hub_model(cache, "d" * 40)
    assert weights_fingerprint("owner/name") != first
    assert weights_fingerprint("owner/name", revision="c" * 40) == first


def test_what_is_missing_is_a_model_error(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    snapshot = hub_model(cache)
    (snapshot / "model.safetensors").unlink()
    for location, said in [
        (str(tmp_path / "empty"), "holds no model weights"),
        ("owner/name", "holds no model weights"),
        ("owner/other", "no model owner/other: .*not in the local hub cache"),
        (str(tmp_path / "absent" / "model"), "neither a file nor a folder nor a hub name"),
    ]:
        with pytest.raises(ModelError, match=said):
            weights_fingerprint(location)
    with pytest.raises(ModelError, match="owner/name at revision v2"):
        weights_fingerprint("owner/name", revision="v2")


@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_a_seal_does_not_depend_on_the_order_of_keys(mapping: dict[str, object]) -> None:
    assert seal(mapping) == seal(dict(reversed(mapping.items())))


@given(st.dictionaries(st.text(), PLAIN, max_size=3), st.text(), PLAIN)
def test_a_seal_breaks_when_an_entry_is_added(mapping: dict[str, object], key: str, value: object) -> None:
    if key not in mapping:
        assert seal(mapping) != seal({**mapping, key: value})


def test_a_seal_tells_types_apart_and_takes_tuples_as_lists() -> None:
    values: list[object] = [1, "1", True, None, "None", [1], {"a": 1}, 1.5, ""]
    assert len({seal({"key": value}) for value in values}) == len(values)
    assert seal({"a": (1, 2)}) == seal({"a": [1, 2]})
    assert seal({"a": "ü\ud800"}) != seal({"a": "u"})


def test_a_seal_is_stable() -> None:
    """Computed once with sha256sum over {"a":[1,null],"b":"ü"}."""
    expected = hashlib.sha256('{"a":[1,null],"b":"ü"}'.encode()).hexdigest()
    assert seal({"b": "ü", "a": [1, None]}) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, object(), {1, 2}, b"x"])
def test_what_has_no_plain_form_cannot_be_sealed(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        seal({"key": value})


def test_provenance_imports_no_model_library() -> None:
    code = "import sys, guardalign.models.provenance; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "open_clip", "ray"} & set(run.stdout.split())
