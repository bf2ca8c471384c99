"""Pictures for an evaluation: one a prompt, at given seeds, kept on disk so that a killed run goes on."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from emu_lightning.files import write_whole

GENERATE_OPTIONS = ("num_steps", "guidance_scale", "negative_prompt")


class Generates(Protocol):
    """Anything that makes pictures of prompts; every generator and its quality-tuning do."""

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Iterable[int],
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]; a picture is a function of its prompt and seed alone."""


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Images (B, 3, H, W) in [-1, 1] to pictures (B, H, W, 3)."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    pictures: NDArray[np.uint8] = scaled.permute(0, 2, 3, 1).cpu().numpy()
    return pictures


def to_images(pictures: NDArray[np.uint8]) -> Tensor:
    """Pictures (B, H, W, 3) to images (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def generate_pictures(
    generator: Generates,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    description: str = "generating",
) -> NDArray[np.uint8]:
    """Pictures (N, H, W, 3), one a prompt, with a progress bar that shows the time left."""
    pictures = []
    with tqdm(total=len(prompts), desc=description, unit="picture") as progress:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            images = generator.generate(
                prompts[part], seeds[part], num_steps=num_steps, guidance_scale=guidance_scale
            )
            pictures.append(to_uint8(images))
            progress.update(len(images))
    return np.concatenate(pictures)


def generate_folder(
    generator: Generates,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: str | Path,
    *,
    settings: Mapping[str, Any],
    batch_size: int = 64,
    description: str = "generating",
) -> NDArray[np.uint8]:
    """As :func:`generate_pictures`, into ``folder``: ``00000.png`` ... and ``manifest.json``.

    Pictures that are there already are not made again.

    Args:
        settings: what the pictures depend on besides prompts and seeds (which model, its hash, steps,
            guidance); what of :data:`GENERATE_OPTIONS` is in it is passed on.

    Raises:
        ValueError: the folder holds pictures of other prompts, seeds or settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"settings": dict(settings), "prompts": list(prompts), "seeds": list(seeds)}
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path = folder / "manifest.json"
    if path.exists() and json.loads(path.read_text()).get("sha256") != manifest["sha256"]:
        raise ValueError(
            f"{folder} holds pictures of other prompts, seeds or settings: remove it or name another"
        )
    write_whole(path, json.dumps(manifest, indent=1) + "\n")
    files = [folder / f"{i:05d}.png" for i in range(len(prompts))]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    options = {name: settings[name] for name in GENERATE_OPTIONS if name in settings}
    with tqdm(
        total=len(files), initial=len(files) - len(missing), desc=description, unit="picture"
    ) as progress:
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            images = generator.generate(
                [prompts[i] for i in part],
                [seeds[i] for i in part],
                **options,
            )
            for i, picture in zip(part, to_uint8(images), strict=True):
                write_png(files[i], picture)
            progress.update(len(part))
    return read_folder(folder)[0]


def read_folder(folder: str | Path) -> tuple[NDArray[np.uint8], list[str]]:
    """Pictures (N, H, W, 3) and prompts of a folder that :func:`generate_folder` wrote.

    Raises:
        FileNotFoundError: there is no manifest, or a picture is missing.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a folder of generated pictures: {path.name} is missing")
    prompts = json.loads(path.read_text())["prompts"]
    files = [folder / f"{i:05d}.png" for i in range(len(prompts))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: run the generation again, it makes what is not there"
            )
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]), prompts


def write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Writes (H, W, 3) whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    write_whole(path, buffer.getvalue())
