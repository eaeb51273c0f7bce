"""The house rules that a machine can check: imports go down the floors only; Ray and weights have one place each."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "guardalign"
FLOORS = (
    ("types", "errors", "schema", "config", "ignored", "credentials", "version", "faults", "in_hand"),
    ("core",),
    ("models",),
    ("taxonomy", "scales", "detectors", "sanitizers", "judges", "sources", "benchmarks", "defenses"),
    (
        "stages",
        "guard",
        "working",
        "seals",
        "receipts",
        "results",
        "lock",
        "sight",
        "reading",
        "fingerprint",
        "canaries",
        "supervision",
        "watching",
        "worker",
        "journal",
        "machine",
    ),
    (
        "pipeline",
        "nodes",
        "signals",
        "ending",
        "verify",
        "micro",
        "settings",
        "progress",
        "summary",
        "rescore",
        "typed",
        "placement",
        "show",
        "audit",
        "thresholds",
        "calibrate",
        "evaluation",
        "fit_casa",
        "cli",
        "commands",
        "bench",
        "soak",
    ),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    floor = FLOOR_OF[part_of(path)]
    for module in imports(path):
        if module.startswith("guardalign."):
            assert FLOOR_OF[module.split(".")[1]] <= floor, f"{path.name} must not import {module}"


def test_only_the_pipeline_and_the_proof_of_sight_import_ray() -> None:
    importers = {path.name for path in FILES for module in imports(path) if module.split(".")[0] == "ray"}
    assert importers == {"pipeline.py", "nodes.py"}


def test_only_models_and_the_builders_import_weight_libraries() -> None:
    allowed = {"models", "micro", "bench"}
    for path in FILES:
        libraries = {module.split(".")[0] for module in imports(path)}
        if libraries & {"open_clip", "transformers"}:
            assert part_of(path) in allowed, path


def test_one_guard_only_catches_everything() -> None:
    broad = [
        path.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException"))
    ]
    assert broad == ["guard.py"]


def test_everything_beside_the_code_ships_with_the_package() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    globs = project["tool"]["setuptools"]["package-data"]["guardalign"]
    shipped = {path for glob in globs for path in PACKAGE.glob(glob)}
    lost = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path not in shipped
    ]
    assert not lost
