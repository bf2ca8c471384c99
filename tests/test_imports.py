"""Every module can be imported, alone and cheaply where that is promised."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import emu_lightning

ROOT = Path(__file__).parent.parent
MODULES = sorted(module.name for module in pkgutil.walk_packages(emu_lightning.__path__, "emu_lightning."))


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_and_says_what_it_is(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"


def test_every_verb_has_its_module() -> None:
    from emu_lightning.cli import VERBS

    for target, _ in VERBS.values():
        assert f"emu_lightning.verbs.{target}" in MODULES


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("emu_lightning.cli", {"torch", "lightning", "numpy", "yaml"}),
        ("emu_lightning.processes", {"lightning", "wandb"}),
        ("emu_lightning.models", {"lightning", "wandb"}),
        ("emu_lightning.losses", {"lightning", "wandb"}),
        ("emu_lightning.evaluation", {"lightning", "wandb"}),
        ("emu_lightning.evaluation.judge", {"lightning", "wandb", "emu_lightning.data"}),
    ],
)
def test_a_module_does_not_load_what_it_must_not_know(name: str, forbidden: set[str]) -> None:
    """What import-linter reads from the source, seen at run time: libraries may import behind our back."""
    code = f"import sys, {name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not forbidden & set(done.stdout.split())


def test_shipped_configs_are_found_by_name() -> None:
    from emu_lightning.resources import PACKAGE, config_path

    shipped = sorted((ROOT / "configs").rglob("*.yaml"))
    for path in shipped:
        assert config_path(path.relative_to(ROOT / "configs").as_posix()).samefile(path)
    assert PACKAGE == ROOT / "emu_lightning"
    with pytest.raises(FileNotFoundError, match="no shipped config is named 'nothing.yaml'"):
        config_path("nothing.yaml")
