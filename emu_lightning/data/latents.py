"""Latents of a source, encoded once and kept in a folder of safetensors files.

The folder is named and keyed by what made it: the autoencoder's weights and configuration, the pictures,
their sizes and the crop. Captions are not part of it and are read afresh. Every file holds pictures of one
size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from emu_lightning.data.batch import Batch, collate
from emu_lightning.data.chunks import CacheDtype, make_all, map_chunk, narrowed
from emu_lightning.data.pictures import Pictures
from emu_lightning.data.sampler import Place
from emu_lightning.data.source import Source
from emu_lightning.files import write_whole

ENCODE_BATCH = 32  # fixed: with another batch size a convolution may round differently
ENCODE_PIXELS = ENCODE_BATCH * 256 * 256  # of larger pictures, fewer at once
CHUNK = 512  # pictures of a file, and what a kill can lose; a multiple of ENCODE_BATCH


class Encoder(Protocol):
    """What the cache needs of an autoencoder."""

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, C, h, w) latents, as the generator takes them."""


def load_encoder(autoencoder: str | Path, device: torch.device) -> Encoder:
    """The autoencoder in a folder, of the class that wrote it, or that of a diffusers pipeline; frozen."""
    # imported late: diffusers takes seconds
    from emu_lightning.models import Autoencoder, PipelineVAE, VQAutoencoder
    from emu_lightning.models.autoencoder import class_name
    from emu_lightning.models.pipeline_folder import is_pipeline

    network: type[Autoencoder | PipelineVAE | VQAutoencoder]
    if is_pipeline(autoencoder):
        network = PipelineVAE
    elif class_name(autoencoder) == VQAutoencoder.__name__:
        network = VQAutoencoder
    else:
        network = Autoencoder
    return network.from_pretrained(autoencoder).to(device).eval().requires_grad_(False)


def autoencoder_hash(autoencoder: str | Path) -> str:
    """sha256 of an autoencoder's weights and configuration.

    Args:
        autoencoder: its folder, or a diffusers pipeline, folder or hub id.

    Raises:
        FileNotFoundError: the folder holds no config.json or no safetensors.
        OSError: the hub cannot be reached.
    """
    from emu_lightning.models.pipeline_folder import is_pipeline, pipeline_folder

    folder = pipeline_folder(autoencoder) / "vae" if is_pipeline(autoencoder) else Path(autoencoder)
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


def refuse_other_latents(
    autoencoder: str | Path, encode: Callable[[Tensor], Tensor | None], device: torch.device
) -> None:
    """Compares what `autoencoder` makes of a picture with what a model does.

    Args:
        autoencoder: as for `LatentCache`.
        encode: the model's; it gives None where it does not know.
        device: of `encode`.

    Raises:
        ValueError: they differ by more than the rounding of weights or sums explains.
    """
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    own = encode(images.to(device))
    if own is None:
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # making a network draws random numbers
        cached = load_encoder(autoencoder, device).encode(images.to(device)).float()
    if cached.shape != own.shape or (cached - own).abs().mean() > 0.1 * own.abs().mean():
        raise ValueError(
            f"data.latents_from {autoencoder} is not the autoencoder of the model: of a picture of 64 pixels "
            f"it makes {_shape(cached)}, the model's own {_shape(own)} of other values; name the same in both"
        )


class LatentPictures(Dataset[Batch]):
    """Cached latents as batches: memory holds what a batch needs, no picture is touched.

    Args:
        source: of captions and names.
        sizes: (N, 2) height and width in pixels of the encoded pictures.
        parts: which pictures each file holds, in its order.
        chunks: `latents` (n, C, h, w), `original_size` and `crop` (n, 2) of each file.
        broken: index -> names of the files skipped there; it holds the next picture that decodes.
    """

    def __init__(
        self,
        source: Source,
        sizes: NDArray[np.int64],
        parts: list[NDArray[np.int64]],
        chunks: list[dict[str, Tensor]],
        broken: dict[int, list[str]],
    ) -> None:
        self.source, self.broken = source, broken
        self.latents = [chunk["latents"] for chunk in chunks]
        self.places = np.empty((len(source), 2), np.int64)  # file, row
        self.sizes = {"target_size": torch.tensor(sizes)}
        for name in ("original_size", "crop"):
            self.sizes[name] = torch.empty_like(self.sizes["target_size"])
        for number, (part, chunk) in enumerate(zip(parts, chunks, strict=True)):
            self.places[part, 0], self.places[part, 1] = number, np.arange(len(part))
            for name in ("original_size", "crop"):
                self.sizes[name][part] = chunk[name]
        # Captions are read once: some sources take long to give them.
        self.texts = [source.text(self._shown(index)) for index in range(len(source))]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: Place) -> Batch:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[Place]) -> list[Batch]:
        """One batch of all `places`; DataLoader prefers this to asking one by one."""
        indices = [index for _, index in places]
        rows = self.places[indices].tolist()
        tensors: dict[str, Any] = {name: tensor[indices] for name, tensor in self.sizes.items()}
        return [
            Batch(
                images=None,
                latents=torch.stack([self.latents[number][row] for number, row in rows]).float(),
                texts=[self.texts[index] for index in indices],
                uids=[self.source.uid(self._shown(index)) for index in indices],
                position=places[0][0],
                broken=[name for index in indices for name in self.broken.get(index, ())],
                **tensors,
            )
        ]

    def _shown(self, index: int) -> int:
        return (index + len(self.broken.get(index, ()))) % len(self.source)


class LatentCache:
    """The latents of `source` under an autoencoder, in a folder below `folder`.

    Pictures are cropped in the centre and not flipped; latents are the posterior's mean, normalised.

    Args:
        source: the N pictures to encode.
        autoencoder: folder of an `Autoencoder` or a `VQAutoencoder`, or a diffusers pipeline.
        size: side of the square in pixels, or (N, 2) height and width of each picture.
        folder: where caches live; made if it is not there.
        dtype: of the latents in the files; batches have float32.
    """

    def __init__(
        self,
        source: Source,
        autoencoder: str | Path,
        size: int | NDArray[np.int64],
        folder: str | Path,
        dtype: CacheDtype = "float32",
    ) -> None:
        self.pictures = Pictures(source, size)
        self.autoencoder, self.dtype = autoencoder, dtype
        made_by = {
            "version": 2,
            "autoencoder": autoencoder_hash(autoencoder),
            "pictures": source.fingerprint(),
            "sizes": hashlib.sha256(self.pictures.sizes.astype("<i8").tobytes()).hexdigest(),
            "crop": "center",
            "dtype": dtype,
        }
        self.key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
        self.folder = Path(folder) / f"latents-{self.key[:16]}"
        self.parts = _parts(self.pictures.sizes)

    @property
    def is_complete(self) -> bool:
        return self.parts.keys() <= self._made()

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum((self.folder / name).stat().st_size for name in self.parts)

    def build(
        self,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        load: Callable[[str | Path, torch.device], Encoder] = load_encoder,
        show_progress: bool = True,
    ) -> None:
        """Encodes what is missing. Does nothing when everything is there.

        Killed half-way, it goes on from the last whole file. Several processes may call it: they share the
        work, and each returns when all of it is done.

        Raises:
            ValueError: no picture can be decoded, or a latent is not finite in this precision.
        """
        if self.is_complete:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        device = torch.device(device)

        @cache
        def encoder() -> Encoder:
            return load(self.autoencoder, device)

        def make(name: str) -> None:
            tensors, broken = self._encode(encoder(), device, num_workers, self.parts[name], bar)
            metadata = {"key": self.key, "broken": json.dumps(broken)}
            write_whole(self.folder / name, save(tensors, metadata))

        with (
            tqdm(
                initial=self._num_made(),
                total=len(self.pictures),
                desc="encoding pictures",
                unit="img",
                disable=not show_progress,
            ) as bar,
            torch.random.fork_rng(devices=[]),  # a run with a cache must not differ from one without
        ):
            make_all(self.folder, self.parts, make)
            bar.update(self._num_made() - bar.n)  # what other processes made

    def load(self) -> LatentPictures:
        """The cached latents with the source's captions.

        Raises:
            FileNotFoundError: the cache is not complete.
            ValueError: a file is damaged, or was made by another autoencoder or from other pictures.
        """
        if not self.is_complete:
            raise FileNotFoundError(
                f"latents are not cached in {self.folder.parent} yet: build the cache first"
            )
        chunks: list[dict[str, Tensor]] = []
        broken: dict[int, list[str]] = {}
        for name in self.parts:
            tensors, metadata = map_chunk(self.folder / name)
            if metadata.get("key") != self.key:
                raise ValueError(
                    f"{self.folder / name} holds latents of another autoencoder or of other pictures: "
                    "delete it"
                )
            chunks.append(tensors)
            broken |= {int(index): names for index, names in json.loads(metadata["broken"]).items()}
        return LatentPictures(
            self.pictures.source, self.pictures.sizes, list(self.parts.values()), chunks, broken
        )

    def _made(self) -> set[str]:
        return {path.name for path in self.folder.glob("*.safetensors")}

    def _num_made(self) -> int:
        made = self._made()
        return sum(len(part) for name, part in self.parts.items() if name in made)

    @torch.no_grad()
    def _encode(
        self,
        encoder: Encoder,
        device: torch.device,
        num_workers: int,
        part: NDArray[np.int64],
        bar: tqdm[None],
    ) -> tuple[dict[str, Tensor], dict[int, list[str]]]:
        height, width = self.pictures.sizes[part[0]].tolist()
        loader = DataLoader(
            self.pictures,
            batch_size=min(ENCODE_BATCH, max(1, ENCODE_PIXELS // (height * width))),
            collate_fn=list,
            sampler=[(index, index) for index in part.tolist()],
            num_workers=num_workers,
        )
        batches: list[Batch] = []
        broken: dict[int, list[str]] = {}
        for items in loader:
            broken |= {item.position: item.broken for item in items if item.broken}
            batch = collate(items)
            assert batch.images is not None
            latents = narrowed(
                encoder.encode(batch.images.to(device)).float(), self.dtype, f"latents of {batch.uids[0]}"
            )
            batches.append(replace(batch, images=None, latents=latents))
            bar.update(len(batch))
        whole = collate(batches)
        assert whole.latents is not None
        tensors = {"latents": whole.latents, "original_size": whole.original_size, "crop": whole.crop}
        return tensors, broken


def _shape(latents: Tensor) -> str:
    return " x ".join(map(str, latents.shape[1:]))


def _parts(sizes: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """File name -> indices of its at most CHUNK pictures, all of one size."""
    kinds, kind_of = np.unique(sizes[:, 0] * 2**32 + sizes[:, 1], return_inverse=True)  # numbers sort faster
    parts = {}
    for number, kind in enumerate(kinds.tolist()):
        height, width = divmod(kind, 2**32)
        members = np.flatnonzero(kind_of == number)
        for first in range(0, len(members), CHUNK):
            parts[f"{height}x{width}-{first // CHUNK:06d}.safetensors"] = members[first : first + CHUNK]
    return parts
