"""The data path of all stages: a training source, a validation source, and an exact place to resume at."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from emu_lightning.data.batch import Batch, collate
from emu_lightning.data.buckets import Bucketing, Buckets
from emu_lightning.data.chunks import CacheDtype
from emu_lightning.data.latents import LatentCache, LatentPictures, refuse_other_latents
from emu_lightning.data.pictures import Crop, Pictures
from emu_lightning.data.sampler import (
    BucketTurns,
    Passes,
    ResumableBatchSampler,
    SequentialBatchSampler,
    Stream,
    local_batch_size,
)
from emu_lightning.data.source import BrokenImage, Source
from emu_lightning.data.subset import Subset, find_uids, nested_subset, read_selection
from emu_lightning.data.text_cache import CachedTexts, TextCache

Stage = Literal["train", "val", "test"]


class ImageData(LightningDataModule, ABC):
    """Batches of captioned pictures. A data source is a subclass with a `train_source` and a `val_source`.

    Training sees an endless stream ordered by `seed` alone, whatever the number of workers, devices and
    accumulated batches; `max_steps` ends it. The Trainer needs `use_distributed_sampler=False`. A checkpoint
    holds the number of samples trained on, so that a resumed run sees exactly what an uninterrupted one would
    have seen.

    Args:
        resolution: side of the pictures in pixels; the shorter side is resized to it, then cropped.
        batch_size: samples of an optimizer step, over all devices and accumulated batches.
        seed: of order, cropping and flipping.
        num_workers: processes that decode pictures; none are used with cached latents.
        crop: `center` or `random`.
        use_flip: mirror half of the pictures. Off, because captions may say left or right.
        subset_size: train on so many pictures only; smaller subsets are inside larger ones. With 0 training
            ends before it begins, with the model as it was.
        subset_seed: another seed is another subset.
        selection: file of uids to train on (text, one a line; or JSON).
        buckets: sizes other than the square, so that less is cropped; each batch has one of them. They have a
            resolution of their own, which then goes before `resolution`.
        latents_from: autoencoder folder, or diffusers pipeline; batches then carry its latents, encoded once,
            instead of images.
        cache_text: encode each caption once by the model's frozen text encoder; batches carry the embeddings.
        cache_dtype: of cached latents and embeddings in their files.
        cache_dir: where they live. Any number of processes may share it, and the work of filling it.
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
        buckets: Buckets | None = None,
        latents_from: str | None = None,
        cache_text: bool = False,
        cache_dtype: CacheDtype = "float32",
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
        self.buckets = buckets
        self.latents_from, self.cache_text = latents_from, cache_text
        self.cache_dtype, self.cache_dir = cache_dtype, cache_dir
        self.consumed_samples = 0
        self._sources: dict[str, Source | None] = {}
        self._bucketings: dict[str, Bucketing] = {}
        self._sampler: ResumableBatchSampler | None = None
        self._texts: CachedTexts | None = None

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

    def _chosen(self) -> Source | None:
        if self.subset_size == 0:
            return None
        source = self.train_source()
        if self.selection is not None:
            source = Subset(source, find_uids(source, read_selection(self.selection)))
        if self.subset_size is not None:
            source = Subset(source, nested_subset(source.uids(), self.subset_size, self.subset_seed))
        return source

    def bucketing(self, stage: Stage) -> Bucketing | None:
        """Which picture of `stage` is shown at which size; made once. None without buckets or pictures."""
        source = self.source(stage)
        if self.buckets is None or source is None:
            return None
        if stage not in self._bucketings:
            fewest = self.batch_size if stage == "train" else 1  # a validation batch may be smaller
            self._bucketings[stage] = self.buckets.assign(source.sizes(), fewest)
        return self._bucketings[stage]

    def _size(self, stage: Stage) -> int | NDArray[np.int64]:
        """What the pictures of `stage` are resized to, as `Pictures` takes it."""
        bucketing = self.bucketing(stage)
        return self.resolution if bucketing is None else bucketing.picture_sizes

    def _dataset(self, stage: Stage) -> Pictures | LatentPictures | None:
        source, latents = self.source(stage), self._latent_cache(stage)
        if source is None:
            return None
        if latents is not None:
            latents.build(num_workers=self.num_workers)  # a Trainer's call of `setup` leaves nothing to do
            return latents.load()
        if stage == "train":
            return Pictures(source, self._size(stage), self.crop, self.use_flip, self.seed)
        return Pictures(source, self._size(stage))

    def _latent_cache(self, stage: Stage) -> LatentCache | None:
        source = self.source(stage)
        if source is None or self.latents_from is None:
            return None
        return LatentCache(source, self.latents_from, self._size(stage), self.cache_dir, self.cache_dtype)

    def _captions(self, stages: Sequence[Stage]) -> set[str]:
        captions: set[str] = set()
        for source in filter(None, map(self.source, stages)):
            for index in range(len(source)):
                with suppress(BrokenImage):  # then it is not shown, so its caption is not read either
                    captions.add(source.text(index))
        return captions

    def setup(self, stage: str) -> None:
        """Fills the caches before networks are spread over devices; every process helps."""
        assert self.trainer is not None
        stages: dict[str, list[Stage]] = {"fit": ["train", "val"], "validate": ["val"]}
        self.build_caches(
            stages.get(stage, ["test"]),
            self.trainer.lightning_module,
            self.trainer.strategy.root_device,
            show_progress=self.trainer.is_global_zero,
        )

    def build_caches(
        self,
        stages: Sequence[Stage],
        module: LightningModule | None,
        device: torch.device,
        show_progress: bool = True,
    ) -> dict[str, LatentCache | TextCache]:
        """Fills the caches that this data asks for; returns them by what they hold.

        Raises:
            ValueError: latents would not be those that `module` learns, or captions are to be cached, but it
                has no frozen text encoder.
        """
        generator: Any = getattr(module, "generator", None)
        caches: dict[str, LatentCache | TextCache] = {}
        for stage in stages:
            if (latents := self._latent_cache(stage)) is not None:
                if generator is not None and not caches:
                    refuse_other_latents(latents.autoencoder, generator.encode, generator.device)
                latents.build(device, self.num_workers, show_progress=show_progress)
                caches[f"latents of {stage}"] = latents
        if self.cache_text:
            encoder = generator.frozen_text() if generator is not None else None
            if encoder is None:
                raise ValueError(
                    f"data.cache_text needs a frozen text encoder, which {type(module).__name__} does not "
                    "have (embeddings by one that is trained change with every step): leave it out"
                )
            texts = caches["embeddings of captions"] = TextCache(encoder, self.cache_dir, self.cache_dtype)
            texts.build(self._captions(stages), device, show_progress)
            self._texts = texts.load()
        return caches

    def stream(self) -> Stream:
        """The endless order of training."""
        source, bucketing = self.source("train"), self.bucketing("train")
        assert source is not None

        def order(epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
            return source.order(self.seed, epoch, indices)

        if bucketing is None:
            return Passes(np.arange(len(source)), order)
        members = bucketing.members
        buckets = [Passes(each, order) for each in members]
        return BucketTurns(buckets, [len(each) for each in members], self.batch_size, self.seed)

    # --- loaders --------------------------------------------------------------------------------------------

    def _ranks(self) -> tuple[int, int]:
        """All processes are data-parallel, those of sharded training too."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    @property
    def _num_accumulated(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    def _loader(
        self, dataset: Pictures | LatentPictures, batches: ResumableBatchSampler | SequentialBatchSampler
    ) -> DataLoader[Batch]:
        num_workers = 0 if isinstance(dataset, LatentPictures) else self.num_workers
        if self.cache_text and self._texts is None:
            raise ValueError("data.cache_text needs the model: call build_caches, or use a Trainer")
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate if self._texts is None else self._texts.collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each start of the loader would draw from the global one
        )

    def train_dataloader(self) -> DataLoader[Batch] | list[Any]:
        dataset, bucketing = self._dataset("train"), self.bucketing("train")
        if dataset is None:
            return _nothing()
        if bucketing is not None:
            rank_zero_info(bucketing.describe())
        self._sampler = ResumableBatchSampler(
            self.stream(), self.batch_size, self.consumed_samples, *self._ranks(), self._num_accumulated
        )
        if self.trainer is not None:
            _begin_at_whole_step(self.trainer)
        return self._loader(dataset, self._sampler)

    def _finite(self, stage: Stage) -> DataLoader[Batch] | list[Any]:
        dataset, bucketing = self._dataset(stage), self.bucketing(stage)
        if dataset is None:
            return _nothing()
        rank, world_size = self._ranks()
        local_size = local_batch_size(self.batch_size, world_size, self._num_accumulated)  # as in training
        groups = [np.arange(len(dataset))] if bucketing is None else bucketing.members
        return self._loader(dataset, SequentialBatchSampler(groups, local_size, rank, world_size))

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

    def state_dict(self) -> dict[str, Any]:
        """Where to go on, and what the order depends on."""
        train, bucketing = self.source("train"), self.bucketing("train")
        return {
            "consumed_samples": self.consumed_samples,
            "num_samples": len(train) if train else 0,
            "seed": self.seed,
            # A step has one bucket, so that with buckets, and only then, the order depends on the batch size.
            "buckets": "none" if bucketing is None else f"{bucketing.digest()} x {self.batch_size}",
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the samples already consumed; says so when the order will differ from before."""
        before = {"buckets": "none", **state_dict}  # checkpoints of version 0.1 know no buckets
        self.consumed_samples = before["consumed_samples"]
        if self.buckets is not None:  # whole steps, also after one of another batch size
            self.consumed_samples = -(-self.consumed_samples // self.batch_size) * self.batch_size
        now = self.state_dict()
        changed = [f"{key} was {before[key]}, is {now[key]}" for key in now if before[key] != now[key]]
        if changed:
            rank_zero_warn(
                f"the training data changed since the checkpoint ({'; '.join(changed)}): "
                "the order is another from here on"
            )


def _nothing() -> list[Any]:
    """What Lightning takes for nothing to do; it would warn that it may be a mistake."""
    warnings.filterwarnings("ignore", "Total length of .* across ranks is zero")
    return []


def _begin_at_whole_step(trainer: Trainer) -> None:
    """Makes Lightning count accumulated batches from the first of a step, where the data begin.

    It steps after every `accumulate_grad_batches`-th batch since training began. A checkpoint made with
    another number of them, or between the batches of a step, would shift all steps that follow.

    Raises:
        ValueError: Lightning's epochs would end, and make it step, within a step of ours.
    """
    settings: Any = trainer  # Lightning does not declare all of its attributes
    num, limit = settings.accumulate_grad_batches, settings.limit_train_batches
    if isinstance(limit, int) and limit % num and not settings.fast_dev_run:
        raise ValueError(
            f"trainer.limit_train_batches {limit} must be a multiple of trainer.accumulate_grad_batches {num}"
        )
    batches = settings.fit_loop.epoch_loop.batch_progress
    for progress in (batches.current, batches.total):
        surplus = progress.processed % num
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress, name, getattr(progress, name) - surplus)
