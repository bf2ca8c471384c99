"""The data path of all stages: a training source, a validation source, and an exact place to resume at."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from emu_lightning.data.batch import Batch, collate
from emu_lightning.data.latents import LatentCache, LatentPictures
from emu_lightning.data.pictures import Crop, Pictures
from emu_lightning.data.sampler import ResumableBatchSampler, SequentialBatchSampler
from emu_lightning.data.source import Source
from emu_lightning.data.subset import Subset, find_uids, nested_subset, read_selection

Stage = Literal["train", "val", "test"]


class ImageData(LightningDataModule, ABC):
    """Batches of captioned pictures. A data source is a subclass with a `train_source` and a `val_source`.

    Training sees an endless stream ordered by `seed` alone, whatever the number of workers and devices;
    `max_steps` ends it. The Trainer needs `use_distributed_sampler=False`. A checkpoint holds the number of
    samples trained on, so that a resumed run sees exactly what an uninterrupted one would have seen.

    Args:
        resolution: side of the pictures in pixels; the shorter side is resized to it, then cropped.
        batch_size: samples of a step over all devices.
        seed: of order, cropping and flipping.
        num_workers: processes that decode pictures; none are used with cached latents.
        crop: `center` or `random`.
        use_flip: mirror half of the pictures. Off, because captions may say left or right.
        subset_size: train on so many pictures only; smaller subsets are inside larger ones.
        subset_seed: another seed is another subset.
        selection: file of uids to train on (text, one a line; or JSON).
        latents_from: autoencoder folder; batches then carry its latents, encoded once, instead of images.
        cache_dir: where cached latents live.
    """

    def __init__(
        self,
        resolution: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 2,
        crop: Crop = "center",
        use_flip: bool = False,
        subset_size: int | None = None,
        subset_seed: int = 0,
        selection: str | None = None,
        latents_from: str | None = None,
        cache_dir: str = "runs/cache",
    ) -> None:
        super().__init__()
        if latents_from is not None and (crop == "random" or use_flip):
            raise ValueError(
                "cached latents are of fixed pictures: set crop=center and use_flip=false, "
                "or leave latents_from out"
            )
        self.resolution, self.batch_size = resolution, batch_size
        self.seed, self.num_workers = seed, num_workers
        self.crop, self.use_flip = crop, use_flip
        self.subset_size, self.subset_seed, self.selection = subset_size, subset_seed, selection
        self.latents_from, self.cache_dir = latents_from, cache_dir
        self.consumed_samples = 0
        self._sources: dict[str, Source | None] = {}
        self._sampler: ResumableBatchSampler | None = None

    @abstractmethod
    def train_source(self) -> Source:
        """All pictures that may be trained on, before `selection` and `subset_size`."""

    @abstractmethod
    def val_source(self) -> Source | None:
        """Pictures for validation, or None."""

    def test_source(self) -> Source | None:
        """Pictures for `test`; those of validation unless a subclass has others."""
        return self.val_source()

    # --- sources and caches ---------------------------------------------------------------------------------

    def source(self, stage: Stage) -> Source | None:
        """The pictures of `stage`, after selection; made once. None where there are none."""
        if stage not in self._sources:
            made = {"train": self._chosen, "val": self.val_source, "test": self.test_source}[stage]()
            self._sources[stage] = made
        return self._sources[stage]

    def _chosen(self) -> Source:
        source = self.train_source()
        if self.selection is not None:
            source = Subset(source, find_uids(source, read_selection(self.selection)))
        if self.subset_size is not None:
            source = Subset(source, nested_subset(source.uids(), self.subset_size, self.subset_seed))
        return source

    def _dataset(self, stage: Stage) -> Pictures | LatentPictures | None:
        source = self.source(stage)
        if source is None:
            return None
        if self.latents_from is not None:
            cache = LatentCache(source, self.latents_from, self.resolution, self.cache_dir)
            device = self.trainer.strategy.root_device if self.trainer else "cpu"
            cache.build(device, self.num_workers)
            return cache.load()
        if stage == "train":
            return Pictures(source, self.resolution, self.crop, self.use_flip, self.seed)
        return Pictures(source, self.resolution)

    # --- loaders --------------------------------------------------------------------------------------------

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(
        self, dataset: Pictures | LatentPictures, batches: ResumableBatchSampler | SequentialBatchSampler
    ) -> DataLoader[Batch]:
        num_workers = 0 if isinstance(dataset, LatentPictures) else self.num_workers
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each start of the loader would draw from the global one
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        dataset = self._dataset("train")
        assert dataset is not None
        self._sampler = ResumableBatchSampler(
            len(dataset), self.batch_size, self.seed, self.consumed_samples, *self._ranks()
        )
        return self._loader(dataset, self._sampler)

    def _finite(self, stage: Stage) -> DataLoader[Batch] | list[Any]:
        dataset = self._dataset(stage)
        if dataset is None:  # Lightning takes [] for nothing to do, but warns that it may be a mistake
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
            return []
        return self._loader(dataset, SequentialBatchSampler(len(dataset), self.batch_size, *self._ranks()))

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return self._finite("val")

    def test_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return self._finite("test")

    def predict_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return self._finite("test")

    # --- resuming -------------------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Counts what is trained on: called just before each step, so read-ahead batches do not count."""
        if self.trainer is not None and self.trainer.training and self._sampler is not None:
            self.consumed_samples = self._sampler.consumed_after(batch.position)
            self._sampler.start = self.consumed_samples  # where the loader would begin anew
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where to go on, and what the order depends on."""
        train = self.source("train")
        return {
            "consumed_samples": self.consumed_samples,
            "num_samples": len(train) if train else 0,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the samples already consumed; says so when the order will differ from before."""
        self.consumed_samples = state_dict["consumed_samples"]
        now = self.state_dict()
        changed = [
            f"{key} was {state_dict[key]}, is {now[key]}" for key in now if state_dict[key] != now[key]
        ]
        if changed:
            rank_zero_warn(
                f"the training data changed since the checkpoint ({'; '.join(changed)}): "
                "the order is another from here on"
            )
