"""Finds the files that travel with the package: shipped configs and the miniature base model."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def shipped(path: str | Path) -> Path:
    """``path`` where it exists; else the file or folder of that name that travels with the package.

    So `configs/prompts/world_stop.txt` and `emu_lightning/miniature/latent` mean the same outside a checkout.
    """
    path = Path(path)
    if path.exists() or path.is_absolute():
        return path
    for travelling in (PACKAGE / path, PACKAGE.parent / path):
        if travelling.exists() and path.parts[:1] in (("configs",), (PACKAGE.name,)):
            return travelling
    return path


def config_path(name: str) -> Path:
    """Path of a shipped config: below `configs/` in a checkout, below `emu_lightning/configs/` in a wheel.

    Args:
        name: path relative to that folder, such as `quality_tuning/folder.yaml`.

    Raises:
        FileNotFoundError: no shipped config has this name; the message lists those that exist.
    """
    folder = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
    path = folder / name
    if not path.is_file():
        shipped = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.yaml"))
        raise FileNotFoundError(f"no shipped config is named {name!r}; there are {', '.join(shipped)}")
    return path


def miniature_path(name: str = "latent") -> Path:
    """Folder of a carried miniature base: `latent`, `pixel` or `masked`; weights, description, model card."""
    return PACKAGE / "miniature" / name
