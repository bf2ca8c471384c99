from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from emu_lightning.callbacks.data_errors import BrokenFileReport
from emu_lightning.data.buckets import Buckets
from emu_lightning.data.datamodule import ImageData
from emu_lightning.data.folder import FolderData
from emu_lightning.data.pictures import Pictures, resized_crop
from emu_lightning.data.source import BrokenImage, Sample, Source
from emu_lightning.data.world_data import WorldData


class Ramps(Source):
    """Pictures whose every pixel tells where it was."""

    def __init__(self, num=22, height=8, width=12, broken=()):
        self.num, self.height, self.width, self.broken = num, height, width, broken

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenImage(f"bad-{index}.png", "torn")
        rows, columns = np.mgrid[: self.height, : self.width]
        image = np.stack([rows, columns, np.full_like(rows, index)], -1).astype(np.uint8)
        return Sample(image, f"ramp {index}", f"r{index}", (self.height, self.width))

    def fingerprint(self):
        return f"ramps:{self.num}"


class RampData(ImageData):
    def __init__(self, num=22, broken=(), num_val=5, **kwargs):
        super().__init__(
            **{
                "resolution": 8,
                "batch_size": 4,
                "num_workers": 0,
                "crop": "random",
                "use_flip": True,
                **kwargs,
            }
        )
        self.num, self.broken, self.num_val = num, broken, num_val

    def train_source(self):
        return Ramps(self.num, broken=self.broken)

    def val_source(self):
        return Ramps(self.num_val, broken=self.broken) if self.num_val else None


class Mixed(Ramps):
    """Ten squares, seven wide and three tall pictures, and two between square and wide."""

    SHAPES = [(8, 8)] * 10 + [(8, 14)] * 7 + [(16, 8)] * 3 + [(9, 11)] * 2

    def __getitem__(self, index):
        self.height, self.width = self.SHAPES[index]
        return super().__getitem__(index)


class MixedData(RampData):
    def __init__(self, **kwargs):
        super().__init__(**{"buckets": Buckets(8, 2), "crop": "center", "use_flip": False, **kwargs})

    def train_source(self):
        return Mixed(22, broken=self.broken)

    val_source = train_source


class Toy(LightningModule):
    """Learns from the very pixels, so that equal weights mean equal data in equal order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 8 * 8, 1)
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch.position, batch.uids))
        images = adaptive_avg_pool2d(batch.images, 8)  # squares stay as they are
        return self.layer(images.flatten(1)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch.uids)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def trainer(folder, steps, **options):
    return Trainer(
        **{
            "max_steps": steps,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 1,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "default_root_dir": folder,
            **options,
        }
    )


def fit(folder, steps, ckpt_path=None, data=None, **options):
    module, run = Toy(), trainer(folder, steps, **options)
    run.fit(module, data or RampData(), ckpt_path=ckpt_path)
    return module, run


# --- resuming -----------------------------------------------------------------------------------------------


# 22 samples in batches of 4: a pass ends within step 6, and exactly after step 11.
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [2, 6, 11])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, stop, num_workers):
    whole, _ = fit(tmp_path, 15, data=RampData(num_workers=num_workers))
    first, run = fit(tmp_path, stop, data=RampData(num_workers=num_workers))
    run.save_checkpoint(tmp_path / "stop.ckpt")
    second, _ = fit(tmp_path, 15, tmp_path / "stop.ckpt", data=RampData(num_workers=num_workers))
    assert first.seen + second.seen == whole.seen
    assert [position for position, _ in whole.seen] == list(range(0, 60, 4))
    for resumed, uninterrupted in zip(second.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(resumed, uninterrupted)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_short_lightning_epochs_change_nothing(tmp_path, num_workers):
    """`limit_train_batches` ends an epoch early while workers have read ahead."""
    whole, _ = fit(tmp_path, 15)
    options = {"limit_train_batches": 3}
    first, run = fit(tmp_path, 6, data=RampData(num_workers=num_workers), **options)  # just at an epoch's end
    run.save_checkpoint(tmp_path / "stop.ckpt")
    second, _ = fit(tmp_path, 15, tmp_path / "stop.ckpt", data=RampData(num_workers=num_workers), **options)
    assert first.seen + second.seen == whole.seen


def test_workers_change_neither_order_nor_pixels(tmp_path):
    (alone, _), (helped, _) = (fit(tmp_path, 8, data=RampData(num_workers=workers)) for workers in (0, 2))
    assert alone.seen == helped.seen and torch.equal(alone.layer.weight, helped.layer.weight)


def test_gradient_accumulation_counts_samples_not_steps(tmp_path):
    options = {"accumulate_grad_batches": 2}
    whole, _ = fit(tmp_path, 7, **options)
    first, run = fit(tmp_path, 3, **options)
    run.save_checkpoint(tmp_path / "stop.ckpt")
    second, _ = fit(tmp_path, 7, tmp_path / "stop.ckpt", **options)
    assert first.seen + second.seen == whole.seen and torch.equal(second.layer.weight, whole.layer.weight)


def rows(module):
    """What was learned, sample by sample, however it was spread over batches."""
    return [(position + i, uid) for position, uids in module.seen for i, uid in enumerate(uids)]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 1)])
@pytest.mark.parametrize("make", [RampData, MixedData])
def test_accumulation_may_change_on_resuming(tmp_path, before, after, make):
    """Fewer devices and more accumulated batches: the step stays the same."""
    whole, _ = fit(tmp_path, 7, data=make())
    first, run = fit(tmp_path, 3, data=make(), accumulate_grad_batches=before)
    run.save_checkpoint(tmp_path / "stop.ckpt")
    second, run = fit(tmp_path, 7, tmp_path / "stop.ckpt", data=make(), accumulate_grad_batches=after)
    assert rows(first) + rows(second) == rows(whole) and run.global_step == 7
    assert [len(uids) for _, uids in first.seen + second.seen] == [4 // before] * 3 * before + [
        4 // after
    ] * 4 * after
    assert torch.allclose(second.layer.weight, whole.layer.weight, atol=1e-5)


def test_a_checkpoint_between_accumulated_batches_repeats_the_step(tmp_path):
    """As SIGTERM may make it: what was accumulated is lost, so the step begins anew."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 7:  # the second of the third step's three
                trainer.save_checkpoint(tmp_path / "stop.ckpt")

    options = {"accumulate_grad_batches": 3}
    whole, _ = fit(tmp_path, 5, data=RampData(batch_size=6), callbacks=[Stop()], **options)
    second, run = fit(tmp_path, 5, tmp_path / "stop.ckpt", data=RampData(batch_size=6), **options)
    assert rows(second) == rows(whole)[12:] and run.global_step == 5
    assert torch.equal(second.layer.weight, whole.layer.weight)


def test_epochs_of_lightning_end_with_a_step(tmp_path):
    with pytest.raises(ValueError, match="limit_train_batches 3 must be a multiple of .* 2"):
        fit(tmp_path, 4, accumulate_grad_batches=2, limit_train_batches=3)


def test_changed_data_is_said_on_resuming(tmp_path):
    _, run = fit(tmp_path, 2)
    run.save_checkpoint(tmp_path / "stop.ckpt")
    with pytest.warns(UserWarning, match=r"num_samples was 22, is 21\): the order is another"):
        fit(tmp_path, 4, tmp_path / "stop.ckpt", data=RampData(num=21))


# --- cropping and flipping ----------------------------------------------------------------------------------


def test_crop_and_flip_are_functions_of_seed_and_position():
    pictures = Pictures(Ramps(height=20, width=30), size=20, crop="random", use_flip=True, seed=5)
    again = Pictures(Ramps(height=20, width=30), size=20, crop="random", use_flip=True, seed=5)
    batches = [pictures[position, 0] for position in range(200)]
    for position in (3, 150):
        assert torch.equal(again[position, 0].images, batches[position].images)
    flips = 0
    for batch in batches:
        columns = ((batch.images[0, 1] + 1) * 127.5).round()
        flipped = bool(columns[0, 0] > columns[0, -1])
        flips += flipped
        left = int(batch.crop[0, 1])
        whole = torch.arange(30.0).flip(0) if flipped else torch.arange(30.0)  # crop is of what is seen
        assert torch.equal(columns[0], whole[left : left + 20])
    assert 70 < flips < 130
    assert {int(batch.crop[0, 1]) for batch in batches} == set(range(11))  # every place, both ends included
    other = Pictures(Ramps(height=20, width=30), size=20, crop="random", use_flip=True, seed=6)
    assert any(not torch.equal(other[p, 0].images, batches[p].images) for p in range(5))


def test_centre_crop_and_sizes():
    batch = Pictures(Ramps(height=8, width=13), 8)[0, 7]
    assert batch.crop.tolist() == [[0, 2]] and batch.original_size.tolist() == [[8, 13]]
    assert batch.target_size.tolist() == [[8, 8]]
    assert torch.equal(((batch.images + 1) * 127.5).round()[0, 1, 0], torch.arange(2.0, 10.0))
    assert batch.images[0, 2].unique().item() == pytest.approx(7 / 127.5 - 1)


@pytest.mark.parametrize(("height", "width"), [(100, 64), (64, 100), (33, 32), (1000, 3), (7, 9)])
def test_any_shape_becomes_the_square(height, width):
    batch = Pictures(Ramps(height=height, width=width), 16)[0, 0]
    assert batch.images.shape == (1, 3, 16, 16) and batch.images.abs().max() <= 1
    assert batch.original_size.tolist() == [[height, width]]


def test_shrinking_is_antialiased():
    class Stripes(Ramps):
        def __getitem__(self, index):
            image = np.zeros((64, 64, 3), np.uint8)
            image[:, ::2] = 255
            return Sample(image, "stripes", "s", (64, 64))

    inner = Pictures(Stripes(), 16)[0, 0].images[..., 2:-2]  # without it: +-1
    assert inner.abs().max() < 0.05


@pytest.mark.parametrize("place", [(0, 0), (3, 7), (16, 21)])
def test_resizing_a_crop_is_cropping_what_is_resized(place: tuple[int, int]) -> None:
    """To one of 255 levels: where a filter is sampled is rounded, once in the picture, once in the crop."""
    pixels = np.random.default_rng(0).integers(0, 256, (150, 190, 3), np.uint8)
    image = Image.fromarray(pixels)
    top, left = place
    whole = image.resize((61, 48), Image.Resampling.LANCZOS).crop((left, top, left + 40, top + 32))
    part = resized_crop(image, (48, 61), top, left, 32, 40)
    assert part.size == (40, 32)
    difference = np.abs(np.asarray(part, np.int16) - np.asarray(whole, np.int16))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_picture_covers_its_own_size_and_is_cropped_once(crop):
    """40 x 60 into 10 x 18: resized to 12 x 18, rows cropped; into 20 x 10: to 20 x 30, columns cropped."""
    sizes = np.array([[10, 18], [20, 10]])
    rows_of, columns_of = (Pictures(Gradient(axis), sizes, crop, seed=3) for axis in (0, 1))
    for position in range(30):
        for index, (height, width), (tall, wide) in ((0, (10, 18), (12, 18)), (1, (20, 10), (20, 30))):
            batch = rows_of[position, index]
            top, left = batch.crop[0].tolist()
            assert batch.images.shape == (1, 3, height, width) and batch.target_size.tolist() == [
                [height, width]
            ]
            assert batch.original_size.tolist() == [[40, 60]]
            assert 0 <= top <= tall - height and 0 <= left <= wide - width
            if crop == "center":
                assert (top, left) == ((tall - height) // 2, (wide - width) // 2)
            # A gradient stays one when resized, so that its value tells the place in the original.
            row = (batch.images[0, 0, 5, 5] + 1) * 127.5
            column = (columns_of[position, index].images[0, 0, 5, 5] + 1) * 127.5
            assert row == pytest.approx((top + 5.5) * 40 / tall * 2, abs=3)
            assert column == pytest.approx((left + 5.5) * 60 / wide * 2, abs=3)


# --- buckets ------------------------------------------------------------------------------------------------


class Gradient(Source):
    """Two pictures of 40 x 60 whose pixels are twice their row or column."""

    def __init__(self, axis):
        self.axis = axis

    def __len__(self):
        return 2

    def __getitem__(self, index):
        image = np.repeat((np.mgrid[:40, :60][self.axis] * 2)[..., None], 3, -1).astype(np.uint8)
        return Sample(image, "gradient", "g", (40, 60))

    def fingerprint(self):
        return "gradient"


def bucketed_batches(data, num):
    return [batch for batch, _ in zip(data.train_dataloader(), range(num), strict=False)]


def test_a_batch_has_one_shape_and_every_picture_its_turn():
    batches = bucketed_batches(MixedData(), 60)
    nearest = {"8x8": (8, 8), "8x14": (6, 10), "9x11": (8, 8)}
    counts = {}
    for batch in batches:
        shape = tuple(batch.images.shape[2:])
        assert batch.target_size.tolist() == [list(shape)] * 4
        for uid, (height, width) in zip(batch.uids, batch.original_size.tolist(), strict=True):
            # The three tall ones are too few for a batch of four: they joined the squares, the nearest left.
            assert shape == nearest.get(f"{height}x{width}", (8, 8))
            counts[uid] = counts.get(uid, 0) + 1
    assert len(counts) == 22  # 240 places: about eleven for each
    assert min(counts.values()) >= 9 and max(counts.values()) <= 13


def test_small_buckets_are_said_at_the_start(tmp_path, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        data = MixedData(num_val=0)
        data.train_dataloader()
    assert "bucket 8 x 8: 15 pictures" in caplog.text and "bucket 6 x 10: 7 pictures" in caplog.text
    assert "bucket 10 x 6 has 3 pictures, too few for a batch: they join the nearest" in caplog.text


def test_validation_shows_each_picture_once_bucket_by_bucket():
    batches = list(MixedData(batch_size=4).val_dataloader())
    uids = [uid for batch in batches for uid in batch.uids]
    assert sorted(uids) == sorted(f"r{i}" for i in range(22))
    assert [position for batch in batches for position in batch.positions] == list(range(22))
    shapes = [tuple(batch.images.shape[2:]) for batch in batches]
    assert len(set(shapes)) == 3 and sorted(shapes) == shapes  # a bucket after another, none of them merged


def test_a_broken_picture_is_replaced_at_the_size_of_its_bucket():
    batches = bucketed_batches(MixedData(broken=(9, 16)), 40)
    assert {name for batch in batches for name in batch.broken} == {"bad-9.png", "bad-16.png"}
    assert all(len({*map(tuple, batch.target_size.tolist())}) == 1 for batch in batches)


def test_another_batch_size_with_buckets_is_said_and_begins_at_a_whole_step():
    data = MixedData(batch_size=4)
    data.consumed_samples = 20
    resumed = MixedData(batch_size=8)
    with pytest.warns(UserWarning, match="buckets was .* x 4, is .* x 8.*: the order is another"):
        resumed.load_state_dict(data.state_dict())
    assert resumed.consumed_samples == 24
    with pytest.warns(UserWarning, match="buckets was none"):
        MixedData().load_state_dict(RampData(num=22).state_dict())


# --- validation, subsets ------------------------------------------------------------------------------------


def test_validation_shows_each_picture_once_in_order(tmp_path):
    module = Toy()
    trainer(tmp_path, 1).validate(module, RampData(), verbose=False)
    assert module.validated == [["r0", "r1", "r2", "r3"], ["r4"]]
    trainer(tmp_path, 1).test(module, RampData(), verbose=False)
    assert module.validated[2:] == module.validated[:2]


def test_validation_inside_training_does_not_count(tmp_path):
    data = RampData()
    module, _ = fit(tmp_path, 7, data=data)
    assert len(module.validated) > 4 and data.consumed_samples == 28


def test_no_validation_pictures_is_fine(tmp_path):
    module, _ = fit(tmp_path, 4, data=RampData(num_val=0))
    assert module.validated == [] and len(module.seen) == 4


def test_selection_then_subset(tmp_path):
    (tmp_path / "chosen.txt").write_text("\n".join(f"r{i}" for i in range(10, 20)))
    data = RampData(selection=str(tmp_path / "chosen.txt"))
    assert data.source("train").uids() == [f"r{i}" for i in range(10, 20)]
    small, large = (RampData(selection=str(tmp_path / "chosen.txt"), subset_size=size) for size in (3, 6))
    assert (
        set(small.source("train").uids())
        < set(large.source("train").uids())
        < set(data.source("train").uids())
    )
    assert len(small.source("train")) == 3 and small.source("val").uids() == RampData().source("val").uids()


# --- broken files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_pictures_are_replaced_and_named(tmp_path, capsys, num_workers):
    data = RampData(broken=(3, 4, 20), num_workers=num_workers, num_val=0)
    module, _ = fit(tmp_path, 11, data=data, callbacks=[BrokenFileReport()])
    seen = [uid for _, uids in module.seen for uid in uids]
    assert len(seen) == 44 and not {"r3", "r4", "r20"} & set(seen)
    assert seen.count("r5") == 6 and seen.count("r21") == 4  # they stand in for those before them
    message = "3 broken files were skipped: bad-20.png, bad-3.png, bad-4.png"
    assert capsys.readouterr().out.count(message) == 1
    assert (tmp_path / "broken_files.txt").read_text() == "bad-20.png\nbad-3.png\nbad-4.png\n"


def test_the_report_covers_what_a_killed_run_met(tmp_path, capsys):
    data = RampData(broken=(3,), num_val=0)
    _, run = fit(tmp_path, 6, data=data, callbacks=[BrokenFileReport()])
    run.save_checkpoint(tmp_path / "stop.ckpt")
    capsys.readouterr()
    (tmp_path / "broken_files.txt").unlink()
    fit(
        tmp_path,
        7,
        tmp_path / "stop.ckpt",
        data=RampData(broken=(3,), num_val=0),
        callbacks=[BrokenFileReport()],
    )
    assert "1 broken file was skipped: bad-3.png (listed in" in capsys.readouterr().out


def test_a_sound_run_reports_nothing(tmp_path, capsys):
    fit(tmp_path, 6, callbacks=[BrokenFileReport()])
    assert "broken" not in capsys.readouterr().out and not (tmp_path / "broken_files.txt").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_only_broken_pictures_end_the_run(tmp_path, num_workers):
    with pytest.raises(ValueError, match=r"none of the 3 images can be decoded \(the first: bad-\d.png\)"):
        fit(tmp_path, 2, data=RampData(num=3, broken=(0, 1, 2), num_val=0, num_workers=num_workers))


def test_a_folder_with_a_truncated_photograph_trains(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (6, 40, 60, 3), dtype=np.uint8)
    for i, image in enumerate(noise):
        Image.fromarray(image).save(pictures / f"{i}.jpg")
        (pictures / f"{i}.txt").write_text(f"noise {i}")
    (pictures / "2.jpg").write_bytes((pictures / "2.jpg").read_bytes()[:900])
    data = FolderData(str(pictures), val_fraction=0, resolution=8, batch_size=3, num_workers=0)
    module, _ = fit(tmp_path, 4, data=data, callbacks=[BrokenFileReport()])
    seen = [uid for _, uids in module.seen for uid in uids]
    assert "2.jpg" not in seen and seen.count("3.jpg") == 4
    assert "1 broken file was skipped: 2.jpg" in capsys.readouterr().out


# --- configuration ------------------------------------------------------------------------------------------


def test_options_are_typed_and_checked():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageData, "data")
    data = parser.instantiate(
        parser.parse_args(
            [
                "--data=emu_lightning.data.folder.FolderData",
                "--data.path=photos",
                "--data.crop=random",
                "--data.resolution=32",
            ]
        )
    ).data
    assert isinstance(data, FolderData)
    assert (data.path, data.crop, data.resolution, data.batch_size) == ("photos", "random", 32, 64)
    for wrong in ("--data.crop=corner", "--data.resolutoin=3", "--data.batch_size=many"):
        with pytest.raises(Exception, match=wrong.split("=")[0].removeprefix("--data.")):
            parser.parse_args(["--data=emu_lightning.data.folder.FolderData", "--data.path=photos", wrong])


def test_the_world_as_data():
    data = WorldData(pool_size=16, val_size=6, resolution=16, batch_size=4, num_workers=0)
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (4, 3, 16, 16) and all(batch.texts) and batch.images.min() >= -1
    assert [len(batch) for batch in data.val_dataloader()] == [4, 2]
    uids = [set(data.source(stage).uids()) for stage in ("train", "val", "test")]
    assert [len(each) for each in uids] == [16, 6, 6] and len(set().union(*uids)) == 28
