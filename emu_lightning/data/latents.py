"""Latents of a source, encoded once and kept in one safetensors file.

The file is named and keyed by what made it: the autoencoder's weights and configuration, the pictures, the
resolution and the crop. Captions are not part of it and are read afresh.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from emu_lightning.data.batch import Batch, collate
from emu_lightning.data.pictures import Pictures
from emu_lightning.data.sampler import Place
from emu_lightning.data.source import Source

ENCODE_BATCH = 32  # fixed: with another batch size a convolution may round differently
CHUNK = 1024  # pictures encoded between two saves; a multiple of ENCODE_BATCH


class Encoder(Protocol):
    """What the cache needs of an autoencoder."""

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, C, h, w) normalised latents."""


def load_encoder(folder: Path, device: torch.device) -> Encoder:
    """The autoencoder in `folder`, frozen."""
    from emu_lightning.models.autoencoder import Autoencoder  # diffusers takes seconds to import

    return Autoencoder.from_pretrained(folder).to(device).eval().requires_grad_(False)


def autoencoder_hash(folder: Path) -> str:
    """sha256 of an autoencoder folder's weights and configuration.

    Raises:
        FileNotFoundError: the folder holds no config.json or no safetensors.
    """
    config, weights = folder / "config.json", sorted(folder.glob("*.safetensors"))
    if not config.is_file() or not weights:
        raise FileNotFoundError(
            f"{folder} is not an autoencoder: it needs config.json and a .safetensors file"
        )
    settings = json.loads(config.read_text(encoding="utf-8"))
    own = {key: value for key, value in settings.items() if not key.startswith("_")}  # no library version
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for path in weights:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class LatentPictures(Dataset[Batch]):
    """Cached latents as batches; a whole batch is one gather, no picture is touched.

    Args:
        tensors: `latents` (N, C, h, w), `original_size` and `crop` (N, 2).
        resolution: side of the encoded pictures in pixels.
        texts: N captions.
        uids: N names.
        broken: index -> names of the files skipped there; it holds the next picture that decodes.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        resolution: int,
        texts: Sequence[str],
        uids: Sequence[str],
        broken: dict[int, list[str]],
    ) -> None:
        self.tensors, self.resolution, self.texts, self.uids, self.broken = (
            tensors,
            resolution,
            texts,
            uids,
            broken,
        )

    def __len__(self) -> int:
        return len(self.uids)

    def __getitem__(self, place: Place) -> Batch:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[Place]) -> list[Batch]:
        """One batch of all `places`; DataLoader prefers this to asking one by one."""
        indices = [index for _, index in places]
        tensors: dict[str, Any] = {name: tensor[indices] for name, tensor in self.tensors.items()}
        return [
            Batch(
                images=None,
                texts=[self.texts[index] for index in indices],
                uids=[self.uids[index] for index in indices],
                position=places[0][0],
                target_size=torch.full((len(indices), 2), self.resolution),
                broken=[name for index in indices for name in self.broken.get(index, ())],
                **tensors,
            )
        ]


class LatentCache:
    """The latents of `source` under an autoencoder, in a file below `folder`.

    Pictures are cropped in the centre and not flipped; latents are the posterior's mean, normalised.

    Args:
        source: pictures to encode.
        autoencoder: folder written by `Autoencoder.save_pretrained`.
        resolution: side of the square pictures in pixels.
        folder: where caches live; made if it is not there.
    """

    def __init__(self, source: Source, autoencoder: str | Path, resolution: int, folder: str | Path) -> None:
        self.source, self.autoencoder, self.resolution = source, Path(autoencoder), resolution
        made_by = {
            "version": 1,
            "autoencoder": autoencoder_hash(self.autoencoder),
            "pictures": source.fingerprint(),
            "resolution": resolution,
            "crop": "center",
        }
        self.key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
        self.path = Path(folder) / f"latents-{self.key[:16]}.safetensors"

    def build(
        self,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        load: Callable[[Path, torch.device], Encoder] = load_encoder,
    ) -> None:
        """Encode what is missing and write the file. Does nothing when it is there.

        Killed half-way, it goes on from the last whole chunk. Two processes may ask at once: one waits.

        Raises:
            ValueError: no picture can be decoded.
        """
        if self.path.is_file():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            if not self.path.is_file():
                parts = self.path.with_suffix(".parts")
                parts.mkdir(exist_ok=True)
                with torch.random.fork_rng(devices=[]):  # a run with a cache must not differ from one without
                    self._encode(parts, torch.device(device), num_workers, load)
                self._merge(parts)
                shutil.rmtree(parts)

    def load(self) -> LatentPictures:
        """The cached latents with the source's captions.

        Raises:
            FileNotFoundError: there is no cache yet.
            ValueError: the file is damaged, or was made by another autoencoder or from other pictures.
        """
        if not self.path.is_file():
            raise FileNotFoundError(
                f"latents are not cached in {self.path.parent} yet: build the cache first"
            )
        tensors, metadata = _read(self.path)
        if metadata.get("key") != self.key:
            raise ValueError(
                f"{self.path} holds latents of another autoencoder or of other pictures: delete it"
            )
        broken = {int(index): names for index, names in json.loads(metadata["broken"]).items()}
        texts = [self.source.text(self._shown(index, broken)) for index in range(len(self.source))]
        return LatentPictures(tensors, self.resolution, texts, json.loads(metadata["uids"]), broken)

    def _shown(self, index: int, broken: Container[int]) -> int:
        while index in broken:
            index = (index + 1) % len(self.source)
        return index

    def _encode(
        self,
        parts: Path,
        device: torch.device,
        num_workers: int,
        load: Callable[[Path, torch.device], Encoder],
    ) -> None:
        encoder: Encoder | None = None
        with tqdm(total=len(self.source), desc="encoding pictures", unit="img") as bar:
            for first in range(0, len(self.source), CHUNK):
                indices = range(first, min(first + CHUNK, len(self.source)))
                part = parts / f"{first:09d}.safetensors"
                if part.is_file():
                    bar.update(len(indices))
                else:
                    encoder = encoder or load(self.autoencoder, device)
                    _write(part, *self._encode_chunk(encoder, device, num_workers, indices, bar))

    @torch.no_grad()
    def _encode_chunk(
        self, encoder: Encoder, device: torch.device, num_workers: int, indices: range, bar: tqdm[None]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        loader = DataLoader(
            Pictures(self.source, self.resolution),
            batch_size=ENCODE_BATCH,
            collate_fn=list,
            sampler=[(index, index) for index in indices],
            num_workers=num_workers,
        )
        parts: list[Batch] = []
        broken: dict[int, list[str]] = {}
        for items in loader:
            broken |= {item.position: item.broken for item in items if item.broken}
            batch = collate(items)
            assert batch.images is not None
            latents = encoder.encode(batch.images.to(device)).float().cpu()
            parts.append(replace(batch, images=None, latents=latents.contiguous()))
            bar.update(len(batch))
        whole = collate(parts)
        assert whole.latents is not None
        tensors = {"latents": whole.latents, "original_size": whole.original_size, "crop": whole.crop}
        return tensors, {"uids": json.dumps(whole.uids), "broken": json.dumps(broken)}

    def _merge(self, parts: Path) -> None:
        chunks = [_read(path) for path in sorted(parts.glob("*.safetensors"))]
        tensors = {name: torch.cat([tensors[name] for tensors, _ in chunks]) for name in chunks[0][0]}
        uids = [uid for _, metadata in chunks for uid in json.loads(metadata["uids"])]
        broken: dict[str, list[str]] = {}
        for _, metadata in chunks:
            broken |= json.loads(metadata["broken"])
        _write(self.path, tensors, {"key": self.key, "uids": json.dumps(uids), "broken": json.dumps(broken)})


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Save so that `path` is either absent or whole."""
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata)
    os.replace(unfinished, path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from None
