"""Where weights lie, and which they are. They come from disk: nothing is downloaded here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from emu_lightning.resources import shipped


def find_weights(weights: str) -> Path:
    """A file or folder, or the local copy of a repository of the Hugging Face hub.

    Args:
        weights: path, or hub id, such as "laion/CLIP-ViT-B-32-laion2B-s34B-b79K".

    Raises:
        FileNotFoundError: it is neither; the message says how to fetch it.
    """
    path = shipped(Path(weights).expanduser())
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(weights, local_files_only=True))
    except (OSError, HFValidationError):
        raise FileNotFoundError(
            f"weights {weights} are no path, and no repository of the Hugging Face hub that lies on this "
            f"machine. Nothing is downloaded unasked: fetch it by `hf download {weights}`"
        ) from None


def find_in(folder: Path, names: Sequence[str]) -> Path:
    """The first of `names` that is a file in `folder`.

    Raises:
        FileNotFoundError: none is.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds no weights ({' or '.join(names)})")


def sha256(path: Path) -> str:
    """Of a file's content; read once, as long as its size and time of change stay."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@lru_cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """Hash of all that scores depend on, given as what JSON knows."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def offline() -> Iterator[None]:
    """Within it, libraries that would fetch from the Hugging Face hub find what lies on this machine only."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
