"""The house rules, executed: style, types, and the order in which packages may import each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.mark.lint
@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--quiet"],
        ["mypy", "--no-error-summary"],
        ["lint-imports"],
    ],
    ids=lambda command: command[0],
)
def test_house_rules(command: list[str]) -> None:
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.lint
@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("losses.py", "import emu_lightning.verbs", "imports run downward"),
        ("losses.py", "import lightning", "the mathematics does not know the framework"),
        ("curation/filters.py", "import lightning", "curation does not know the framework"),
        ("evaluation/judge.py", "import emu_lightning.data.world", "the judge does not know the renderer"),
        ("utils.py", "", "imports run downward"),
    ],
)
def test_a_planted_violation_is_found(file: str, line: str, contract: str, tmp_path: Path) -> None:
    """A contract that cannot fail would keep nothing."""
    source = ROOT / "emu_lightning"
    for path in source.rglob("*.py"):
        copy = tmp_path / "emu_lightning" / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    with (tmp_path / "emu_lightning" / file).open("a") as planted:
        planted.write(f"\n{line}\n")
    done = subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert contract in done.stdout.partition("Broken contracts")[2] or "utils" in done.stdout
