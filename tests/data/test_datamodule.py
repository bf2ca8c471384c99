from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image
from torch import nn

from emu_lightning.callbacks.data_errors import BrokenFileReport
from emu_lightning.data.datamodule import ImageData
from emu_lightning.data.folder import FolderData
from emu_lightning.data.pictures import Pictures
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


class Toy(LightningModule):
    """Learns from the very pixels, so that equal weights mean equal data in equal order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 8 * 8, 1)
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch.position, batch.uids))
        return self.layer(batch.images.flatten(1)).square().mean()

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


def test_changed_data_is_said_on_resuming(tmp_path):
    _, run = fit(tmp_path, 2)
    run.save_checkpoint(tmp_path / "stop.ckpt")
    with pytest.warns(UserWarning, match=r"num_samples was 22, is 21\): the order is another"):
        fit(tmp_path, 4, tmp_path / "stop.ckpt", data=RampData(num=21))


# --- cropping and flipping ----------------------------------------------------------------------------------


def test_crop_and_flip_are_functions_of_seed_and_position():
    pictures = Pictures(Ramps(height=20, width=30), resolution=20, crop="random", use_flip=True, seed=5)
    again = Pictures(Ramps(height=20, width=30), resolution=20, crop="random", use_flip=True, seed=5)
    batches = [pictures[position, 0] for position in range(200)]
    for position in (3, 150):
        assert torch.equal(again[position, 0].images, batches[position].images)
    flips = 0
    for batch in batches:
        columns = ((batch.images[0, 1] + 1) * 127.5).round()
        flipped = bool(columns[0, 0] > columns[0, -1])
        flips += flipped
        left = int(batch.crop[0, 1])
        expected = torch.arange(left, left + 20.0)
        assert torch.equal(columns[0], expected.flip(0) if flipped else expected)  # as crop says
    assert 70 < flips < 130
    assert {int(batch.crop[0, 1]) for batch in batches} == set(range(11))  # every place, both ends included
    other = Pictures(Ramps(height=20, width=30), resolution=20, crop="random", use_flip=True, seed=6)
    assert any(not torch.equal(other[p, 0].images, batches[p].images) for p in range(5))


def test_centre_crop_and_sizes():
    batch = Pictures(Ramps(height=8, width=13), resolution=8)[0, 7]
    assert batch.crop.tolist() == [[0, 2]] and batch.original_size.tolist() == [[8, 13]]
    assert batch.target_size.tolist() == [[8, 8]]
    assert torch.equal(((batch.images + 1) * 127.5).round()[0, 1, 0], torch.arange(2.0, 10.0))
    assert batch.images[0, 2].unique().item() == pytest.approx(7 / 127.5 - 1)


@pytest.mark.parametrize(("height", "width"), [(100, 64), (64, 100), (33, 32), (1000, 3), (7, 9)])
def test_any_shape_becomes_the_square(height, width):
    batch = Pictures(Ramps(height=height, width=width), resolution=16)[0, 0]
    assert batch.images.shape == (1, 3, 16, 16) and batch.images.abs().max() <= 1
    assert batch.original_size.tolist() == [[height, width]]


def test_shrinking_is_antialiased():
    class Stripes(Ramps):
        def __getitem__(self, index):
            image = np.zeros((64, 64, 3), np.uint8)
            image[:, ::2] = 255
            return Sample(image, "stripes", "s", (64, 64))

    inner = Pictures(Stripes(), resolution=16)[0, 0].images[..., 2:-2]  # without it: +-1
    assert inner.abs().max() < 0.05


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
