"""The console: every command tells its own flags from an audit's settings, and says what has no effect on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from guardalign.cli import main
from guardalign.commands import COMMANDS


@pytest.mark.parametrize("command", ["calibrate", "fit-casa"])
def test_a_misspelt_flag_of_a_commands_own_is_known(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--unsafe_lable", "x"]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'unsafe_label'?" in said and f"see guardalign {command} --help" in said


def test_an_evaluation_knows_its_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--defences", "none"]) == 2
    assert "did you mean 'defenses'?" in capsys.readouterr().err


def test_flags_without_effect_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "head")]
    idle = ["--engine", "ray", "--judge.name=none", "--cluster.threads", "1"]
    assert main(["fit-casa", "--limit", "12", *idle, *output]) == 2  # too few rows, told after the flags
    assert "note      without effect on fit-casa: --engine, --judge.name\n" in capsys.readouterr().out
    assert main(["fit-casa", "--limit", "12", *output]) == 2
    assert "without effect" not in capsys.readouterr().out


def test_a_fit_has_no_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit-casa", "--dry_run", "--output", str(tmp_path / "head")]) == 2
    assert "no dry run" in capsys.readouterr().err
    assert not (tmp_path / "head").exists()


def test_the_commands_list_and_the_version_need_no_model_library() -> None:
    code = (
        "import sys\nfrom guardalign.cli import main\nmain(['--help'])\nmain(['--version'])\n"
        "assert not {'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert all(f"\n  {command} " in said for command in COMMANDS)
