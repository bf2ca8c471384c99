"""Where weights lie, and which they are. They come from disk: nothing is downloaded here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from emu_lightning.resources import shipped

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINTS = ("model.safetensors", "pytorch_model.bin")  # as transformers and timm name them
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_CHECKPOINTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
VOCABULARY_FILES = ("tokenizer.json", "spiece.model", "vocab.json", "vocab.txt")


def find_weights(weights: str) -> Path:
    """A file or folder, or the local copy of a repository of the Hugging Face hub.

    Args:
        weights: path, or hub id, such as "openai/clip-vit-large-patch14".

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


def find_in(folder: Path, names: Sequence[str], what: str = "weights") -> Path:
    """The first of `names` that is a file in `folder`.

    Raises:
        FileNotFoundError: none is.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds no {what} ({' or '.join(names)}): name the folder that does")


def find_checkpoint(weights: str, model: str | None, config: str, checkpoints: Sequence[str]) -> Path:
    """The file of weights: given by itself with the name of its architecture, or in a folder that says it.

    Raises:
        FileNotFoundError: it is not on this machine.
        ValueError: the architecture is named twice, or not at all.
    """
    path = find_weights(weights)
    if path.is_file():
        if model is None:
            raise ValueError(f"{weights} is a file of weights: name the architecture by model")
        return path
    if model is not None:
        raise ValueError(f"{weights} brings its architecture, in {config}: leave out model")
    find_in(path, [config])
    return find_in(path, checkpoints)


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of weights that transformers reads in a folder: one, or those that an index names.

    Raises:
        FileNotFoundError: there are none.
    """
    for name in CHECKPOINTS:
        index = folder / f"{name}.index.json"
        if not (folder / name).is_file() and index.is_file():
            return [
                folder / part for part in sorted(set(json.loads(index.read_text())["weight_map"].values()))
            ]
    return [find_in(folder, CHECKPOINTS)]


def label(weights: str) -> str:
    """A name of weights for reports: the hub id, or the last part of a path."""
    is_hub_id = weights.count("/") == 1 and weights[0] not in "./~" and not shipped(weights).exists()
    return weights if is_hub_id else Path(weights).name


def sha256(*paths: Path) -> str:
    """Of a file's content; of several files, the hash of their hashes."""
    stats = [path.stat() for path in paths]
    return joint_sha256(
        [_sha256(path, stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]
    )


def joint_sha256(hashes: Sequence[str]) -> str:
    """One hash as it is; of several, the hash of them."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


@lru_cache  # gigabytes are read once, as long as the file's size and time of change stay
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors, or from a pickle of tensors only.

    Raises:
        ValueError: the file holds something else.
    """
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:  # torch and safetensors each raise their own kinds
        raise ValueError(f"{path} holds no tensors that can be read: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """The cause in one line; two of them where the first only announces the second."""
    first, *others = (str(error) or type(error).__name__).strip().splitlines()
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first


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
