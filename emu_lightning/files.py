"""Files: written whole or not at all, since a kill must never leave half of one; and which are pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
UNREAD = frozenset(  # pictures too, but Pillow needs more than itself for them
    {".heic", ".heif", ".avif", ".jxl", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".raf", ".rw2"}
)


def unread_pictures(names: Iterable[str]) -> list[str]:
    """Those of `names` that are pictures but cannot be read, such as HEIC, without a readable one beside."""
    paths = [PurePosixPath(name) for name in names]
    read = {path.with_suffix("") for path in paths if path.suffix.lower() in SUFFIXES}
    return [str(path) for path in paths if path.suffix.lower() in UNREAD and path.with_suffix("") not in read]


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Writes beside ``path`` and moves into place; makes the folder where it is missing. Text is UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
    return path
