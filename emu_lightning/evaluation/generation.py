"""Pictures for an evaluation: one a prompt, at given seeds, kept on disk so that a killed run goes on."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from emu_lightning.evaluation.prompts import PromptSet
from emu_lightning.files import SUFFIXES

MANIFEST = "manifest.json"
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
    """:func:`fill_folder`, and all its pictures (N, H, W, 3) in memory."""
    fill_folder(
        generator,
        prompts,
        seeds,
        folder,
        settings=settings,
        batch_size=batch_size,
        description=description,
    )
    return read_folder(folder)[0]


def fill_folder(
    generator: Generates,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: str | Path,
    *,
    settings: Mapping[str, Any],
    batch_size: int = 64,
    description: str = "generating",
    share: tuple[int, int] = (0, 1),
    notes: Mapping[str, Any] | None = None,
) -> None:
    """As :func:`generate_pictures`, into ``folder``: ``00000.png`` ... and ``manifest.json``.

    Pictures that are there already are not made again. Several processes, on one machine or on many, may fill
    one folder at a time; a picture does not depend on which of them made it.

    Args:
        settings: what the pictures depend on besides prompts and seeds (which model, its hash, steps,
            guidance); what of :data:`GENERATE_OPTIONS` is in it is passed on.
        share: (index, number of shares), index from 0: makes every so-many-th picture only.
        notes: what else the manifest should say; the pictures do not depend on it.

    Raises:
        ValueError: the folder holds pictures of other prompts, seeds or settings.
    """
    index, num_shares = share
    if not 0 <= index < num_shares:
        raise ValueError(f"share {index} of {num_shares} does not exist: count from 0 to {num_shares - 1}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"settings": dict(settings), "prompts": list(prompts), "seeds": list(seeds)}
    sha256 = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path = folder / MANIFEST
    if not path.exists():
        content = json.dumps({**(notes or {}), **manifest, "sha256": sha256}, indent=1) + "\n"
        _write_whole_beside_others(path, content.encode())
    if json.loads(path.read_text(encoding="utf-8")).get("sha256") != sha256:
        raise ValueError(
            f"{folder} holds pictures of other prompts, seeds or settings: remove it or name another"
        )
    files = [(row, folder / f"{row:05d}.png") for row in range(index, len(prompts), num_shares)]
    missing = [(row, file) for row, file in files if not file.exists()]
    options = {name: settings[name] for name in GENERATE_OPTIONS if name in settings}
    with tqdm(
        total=len(files), initial=len(files) - len(missing), desc=description, unit="picture"
    ) as progress:
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            images = generator.generate(
                [prompts[row] for row, _ in part],
                [seeds[row] for row, _ in part],
                **options,
            )
            for (_, file), picture in zip(part, to_uint8(images), strict=True):
                write_png(file, picture)
            progress.update(len(part))


@dataclass(frozen=True)
class PictureFolder:
    """Where the pictures of some prompts lie. None is read before it is asked for; sizes may differ.

    Attributes:
        folder: that holds them.
        prompts: N texts.
        files: N files, one a prompt.
        manifest: what :func:`fill_folder` wrote; empty for pictures made elsewhere.
    """

    folder: Path
    prompts: tuple[str, ...]
    files: tuple[Path, ...]
    manifest: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        """Picture (H, W, 3) of a row."""
        return np.asarray(_read(self.files[row]))

    @property
    def origin(self) -> str:
        """Which settings and weights made the pictures, for a report."""
        if not self.manifest:
            return "made elsewhere"
        weights = self.manifest["settings"].get("weights", "unknown")
        return f"settings {self.manifest['sha256'][:16]}, weights {weights[:16]}"

    @property
    def images(self) -> Sequence[Image.Image]:
        """The pictures as Pillow's, each read when it is asked for."""
        return _Images(self.files)

    def batches(self, batch_size: int) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
        """All pictures in order: the rows of a batch, and its pictures (B, H, W, 3), all of one size."""
        start, batch = 0, [self[0]]
        for row in range(1, len(self)):
            picture = self[row]
            if len(batch) == batch_size or picture.shape != batch[0].shape:
                yield slice(start, row), np.stack(batch)
                start, batch = row, []
            batch.append(picture)
        yield slice(start, len(self)), np.stack(batch)


class _Images(Sequence[Image.Image]):
    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, row: int) -> Image.Image: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[Image.Image]: ...

    def __getitem__(self, row: int | slice) -> Image.Image | Sequence[Image.Image]:
        return _Images(self._files[row]) if isinstance(row, slice) else _read(self._files[row])


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def open_folder(folder: str | Path, prompts: PromptSet | None = None) -> PictureFolder:
    """Finds the pictures of a folder, made here or elsewhere.

    Args:
        folder: with a manifest that :func:`fill_folder` wrote; or, with ``prompts``, any folder of pictures
            that are named by their prompts' ids, or by their rows from ``00000`` on. Other files in it do not
            matter.
        prompts: what is drawn. May be left out where there is a manifest, and has to agree with it.

    Raises:
        FileNotFoundError: a picture is missing, or the folder says of no prompt what is drawn.
        ValueError: the manifest has other prompts, or one prompt has two pictures.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if path.is_file():
        manifest = json.loads(path.read_text(encoding="utf-8"))
        texts = tuple(manifest["prompts"])
        if prompts is not None and prompts.prompts != texts:
            raise ValueError(f"{folder} holds pictures of other prompts than {prompts.name!r} has")
        files = [folder / f"{row:05d}.png" for row in range(len(texts))]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is missing: run the generation again, it makes what is not there"
                )
        return PictureFolder(folder, texts, tuple(files), manifest)
    if prompts is None:
        raise FileNotFoundError(
            f"{folder} is not a folder of generated pictures: {MANIFEST} is missing; "
            "for pictures made elsewhere, give the file of their prompts, too"
        )
    return PictureFolder(folder, prompts.prompts, _named_pictures(folder, prompts), {})


def holds_pictures(path: str | Path) -> bool:
    """Whether a path is a folder of pictures, and not a model that could draw some."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return True
    is_model = any((path / name).exists() for name in ("generator.yaml", "model_index.json"))
    return not is_model and path.is_dir() and any(_is_picture(file) for file in path.iterdir())


def prompts_of(folder: PictureFolder) -> PromptSet:
    """The prompts of a folder made here, under the name of the set that its manifest tells."""
    told = folder.manifest.get("prompt_set", {})
    return PromptSet.of(told.get("name", "prompts"), folder.prompts)


def read_images(folder: str | Path) -> Sequence[Image.Image]:
    """All pictures of any folder, in the order of their names, each read when it is asked for.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(folder)
    files = sorted(file for file in folder.iterdir() if _is_picture(file)) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{folder} holds no pictures")
    return _Images(files)


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _named_pictures(folder: Path, prompts: PromptSet) -> tuple[Path, ...]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: name a folder of pictures")
    pictures = sorted(file for file in folder.iterdir() if _is_picture(file))
    by_name = {file.stem: file for file in pictures}
    numbers = [f"{row:05d}" for row in range(len(prompts))]
    names = next((n for n in (prompts.ids, numbers) if by_name.keys() >= set(n)), None)
    if names is None:
        missing = [name for name in prompts.ids if name not in by_name]
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(prompts)} pictures, such as {missing[0]}.png: "
            "name them by their prompts' ids, or by their rows, from 00000 on"
        )
    twice = [name for name, count in Counter(file.stem for file in pictures).items() if count > 1]
    for name in twice:
        if name in names:
            raise ValueError(f"{folder} has two pictures named {name}: remove one of them")
    return tuple(by_name[name] for name in names)


def read_folder(folder: str | Path, prompts: PromptSet | None = None) -> tuple[NDArray[np.uint8], list[str]]:
    """All pictures (N, H, W, 3) of a folder in memory, and their prompts; see :func:`open_folder`.

    Raises:
        ValueError: the pictures are not of one size.
    """
    found = open_folder(folder, prompts)
    pictures = [found[row] for row in range(len(found))]
    if len({picture.shape for picture in pictures}) > 1:
        raise ValueError(f"{folder} holds pictures of several sizes, which is no array: use open_folder")
    return np.stack(pictures), list(found.prompts)


def write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Writes (H, W, 3) whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    _write_whole_beside_others(path, buffer.getvalue())


def _write_whole_beside_others(path: Path, content: bytes) -> None:
    """As :func:`.files.write_whole`, where another process may write the same file at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
