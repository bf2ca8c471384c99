from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from emu_lightning.data import latents
from emu_lightning.data.datamodule import ImageData
from emu_lightning.data.latents import LatentCache
from emu_lightning.data.pictures import Pictures
from emu_lightning.data.source import BrokenImage, Sample, Source
from emu_lightning.models import Autoencoder


class Squares(Source):
    """Grey squares; some are broken."""

    def __init__(self, num=10, broken=(), caption="square", shade=0):
        self.num, self.broken, self.caption, self.shade = num, broken, caption, shade

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenImage(f"bad-{index}.png", "torn")
        image = np.full((8, 10, 3), 3 * index + self.shade, np.uint8)
        return Sample(image, self.text(index), f"sq-{index}", (8, 10))

    def text(self, index):
        return f"{self.caption} {index}"

    def fingerprint(self):
        return f"squares:{self.num}:{self.broken}:{self.shade}"


class Halve:
    """An autoencoder that notes every picture it encodes, in memory and, for other processes, in a file."""

    calls = 0

    def __init__(self, log: Path | None = None, dies_after: int | None = None):
        self.log, self.dies_after = log, dies_after

    def encode(self, images):
        if self.dies_after is not None and Halve.calls >= self.dies_after:
            raise KeyboardInterrupt
        Halve.calls += len(images)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write("x" * len(images))
        return torch.nn.functional.avg_pool2d(images, 2)[:, :2]


def load(folder, device):
    return Halve()


@pytest.fixture
def autoencoder(tmp_path):
    folder = tmp_path / "autoencoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"latent_channels": 2, "_diffusers_version": "1"}))
    save_file({"weight": torch.ones(3)}, folder / "diffusion_pytorch_model.safetensors")
    Halve.calls = 0
    return folder


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(latents, "CHUNK", 4)


def cache_of(source, autoencoder, tmp_path, size=8, dtype="float32"):
    return LatentCache(source, autoencoder, size, tmp_path / "cache", dtype)


def all_of(cache):
    """Every sample of a cache, in order, one by one: sizes may differ."""
    cached = cache.load()
    return [cached[index, index] for index in range(len(cached))]


def assert_equal(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one.latents, other.latents)
        for name in ("original_size", "crop", "target_size"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert (one.uids, one.texts, one.broken) == (other.uids, other.texts, other.broken)


def test_latents_are_those_of_the_pictures(autoencoder, tmp_path, small_chunks):
    cache = cache_of(Squares(), autoencoder, tmp_path)
    cache.build(load=load)
    places = [(100, 3), (101, 0), (102, 9), (103, 3)]
    batch = cache.load().__getitems__(places)[0]
    one_by_one = [Pictures(Squares(), 8)[place] for place in places]
    expected = Halve().encode(torch.cat([item.images for item in one_by_one]))
    assert torch.equal(batch.latents, expected) and batch.images is None
    assert batch.texts == [f"square {i}" for i in (3, 0, 9, 3)]
    assert batch.uids == [f"sq-{i}" for i in (3, 0, 9, 3)]
    assert batch.original_size.tolist() == [[8, 10]] * 4 and batch.crop.tolist() == [[0, 1]] * 4
    assert batch.target_size.tolist() == [[8, 8]] * 4 and batch.position == 100
    assert batch.original_size.dtype == batch.crop.dtype == batch.target_size.dtype == torch.int64


def test_pictures_of_several_sizes_keep_theirs(autoencoder, tmp_path, small_chunks):
    sizes = np.array([(8, 8), (4, 10), (8, 6)])[np.arange(20) % 3]
    cache = cache_of(Squares(20, broken=(5,)), autoencoder, tmp_path, sizes)
    cache.build(load=load)
    direct = Pictures(Squares(20, broken=(5,)), sizes)
    for index, cached in enumerate(all_of(cache)):
        whole = direct[index, index]
        assert torch.equal(cached.latents, Halve().encode(whole.images))
        assert torch.equal(cached.target_size, whole.target_size) and torch.equal(cached.crop, whole.crop)
        assert (cached.uids, cached.texts, cached.broken) == (whole.uids, whole.texts, whole.broken)
    assert cache.load().__getitems__([(0, 1), (1, 16), (2, 4)])[0].latents.shape == (3, 2, 2, 5)
    assert len(list(cache.folder.iterdir())) == 6  # 7 + 7 + 6 pictures, at most four of one size in a file


def test_a_second_build_encodes_nothing(autoencoder, tmp_path):
    cache_of(Squares(), autoencoder, tmp_path).build(load=load)
    other = cache_of(Squares(caption="another caption"), autoencoder, tmp_path)
    assert other.is_complete
    other.build(load=load)
    assert Halve.calls == 10
    assert other.load().texts[2] == "another caption 2"
    assert [path.suffix for path in (tmp_path / "cache").rglob("*.*")] == [".safetensors"]


def test_broken_pictures_are_stepped_over_as_without_a_cache(autoencoder, tmp_path):
    source = Squares(broken=(3, 4, 9))
    cache = cache_of(source, autoencoder, tmp_path)
    cache.build(load=load)
    cached, direct = cache.load(), Pictures(source, 8)
    for index in range(10):
        one, other = cached[index, index], direct[index, index]
        assert (one.uids, one.texts, one.broken) == (other.uids, other.texts, other.broken)
    assert cached[3, 3].uids == ["sq-5"] and cached[3, 3].broken == ["bad-3.png", "bad-4.png"]
    assert cached[9, 9].uids == ["sq-0"]
    assert cached.__getitems__([(0, 3), (1, 9), (2, 1)])[0].broken == ["bad-3.png", "bad-4.png", "bad-9.png"]


def test_only_broken_pictures_is_an_error(autoencoder, tmp_path):
    with pytest.raises(ValueError, match="none of the 2 images can be decoded"):
        cache_of(Squares(2, broken=(0, 1)), autoencoder, tmp_path).build(load=load)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_halves_the_files_and_batches_stay_float32(autoencoder, tmp_path, dtype):
    whole, half = (cache_of(Squares(), autoencoder, tmp_path, dtype=name) for name in ("float32", dtype))
    whole.build(load=load)
    half.build(load=load)
    assert whole.folder != half.folder
    for one, other in zip(all_of(whole), all_of(half), strict=True):
        assert other.latents.dtype == torch.float32
        assert torch.equal(one.latents.to(getattr(torch, dtype)).float(), other.latents)
    sizes = [load_file(*cache.folder.glob("*"))["latents"].nbytes for cache in (whole, half)]
    assert sizes[0] == 2 * sizes[1]


def test_values_that_do_not_fit_are_refused(autoencoder, tmp_path):
    class Large(Halve):
        def encode(self, images):
            return super().encode(images) - 1e5

    cache = cache_of(Squares(), autoencoder, tmp_path, dtype="float16")
    with pytest.raises(ValueError, match="latents of sq-0.* not finite in torch.float16: is cache_dtype"):
        cache.build(load=lambda folder, device: Large())
    assert not cache.is_complete


def test_key_follows_weights_config_pictures_sizes_and_dtype(autoencoder, tmp_path):
    def key(source=None, size=8, dtype="float32"):
        return cache_of(source or Squares(), autoencoder, tmp_path, size, dtype).key

    first = key()
    assert key() == first and key(Squares(caption="other")) == first
    assert key(size=np.full((10, 2), 8)) == first  # one bucket of squares is squares
    keys = {first, key(Squares(shade=1)), key(size=16), key(dtype="bfloat16")}
    keys.add(key(size=np.array([(8, 8)] * 9 + [(8, 6)])))
    (autoencoder / "config.json").write_text(json.dumps({"latent_channels": 2, "_diffusers_version": "2"}))
    assert key() == first  # a newer library is not another autoencoder
    (autoencoder / "config.json").write_text(json.dumps({"latent_channels": 4}))
    keys.add(key())
    save_file({"weight": torch.zeros(3)}, autoencoder / "diffusion_pytorch_model.safetensors")
    keys.add(key())
    assert len(keys) == 7


def test_files_made_by_something_else_are_refused(autoencoder, tmp_path):
    cache, other = (
        cache_of(Squares(), autoencoder, tmp_path),
        cache_of(Squares(shade=1), autoencoder, tmp_path),
    )
    other.build(load=load)
    other.folder.rename(cache.folder)
    with pytest.raises(
        ValueError, match="holds latents of another autoencoder or of other pictures: delete it"
    ):
        cache.load()


def test_a_damaged_file_is_named_and_made_again_once_deleted(autoencoder, tmp_path, small_chunks):
    cache = cache_of(Squares(), autoencoder, tmp_path)
    cache.build(load=load)
    path = sorted(cache.folder.iterdir())[1]
    before = [batch.latents.clone() for batch in all_of(cache)]
    for content in (path.read_bytes()[:-10], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} is damaged .*: delete it"):
            cache.load()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="not cached"):
        cache.load()
    cache.build(load=load)
    assert Halve.calls == 14
    assert all(torch.equal(one.latents, other) for one, other in zip(all_of(cache), before, strict=True))


def test_a_killed_build_goes_on_and_gives_the_same_bits(autoencoder, tmp_path, small_chunks):
    whole = LatentCache(Squares(broken=(3,)), autoencoder, 8, tmp_path / "whole")
    whole.build(load=load)
    cache = cache_of(Squares(broken=(3,)), autoencoder, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.build(load=lambda folder, device: Halve(dies_after=18))
    assert not cache.is_complete
    cache.build(load=load)
    assert Halve.calls == 20  # 8 pictures before the kill, 2 after, none twice
    assert_equal(all_of(cache), all_of(whole))


# --- several processes --------------------------------------------------------------------------------------

fork = multiprocessing.get_context("fork")  # spawning would import everything anew


class Slow(Squares):
    """Takes a while to decode, so that no process is done before the others begin."""

    def __getitem__(self, index):
        time.sleep(0.005)
        return super().__getitem__(index)


def test_several_processes_share_the_work(autoencoder, tmp_path, small_chunks):
    log = tmp_path / "log"
    cache = cache_of(Slow(40), autoencoder, tmp_path)
    build = partial(cache.build, load=lambda folder, device: Halve(log), show_progress=False)
    helpers = [fork.Process(target=build) for _ in range(3)]
    for helper in helpers:
        helper.start()
    while not log.is_file():
        time.sleep(0.001)
    build()
    assert cache.is_complete  # the moment that any of them returns
    for helper in helpers:
        helper.join()
    assert [helper.exitcode for helper in helpers] == [0, 0, 0]
    assert log.read_text() == "x" * 40 and Halve.calls < 40  # each picture once, not all of them here
    alone = LatentCache(Slow(40), autoencoder, 8, tmp_path / "alone")
    alone.build(load=load)
    assert_equal(all_of(cache), all_of(alone))


def test_what_a_killed_process_had_claimed_is_made_by_another(autoencoder, tmp_path, small_chunks):
    log = tmp_path / "log"

    class Hangs(Halve):
        def encode(self, images):
            encoded = super().encode(images)
            if Halve.calls > 4:  # in its second file
                time.sleep(60)
            return encoded

    cache = cache_of(Squares(12), autoencoder, tmp_path)
    victim = fork.Process(target=cache.build, kwargs={"load": lambda folder, device: Hangs(log)})
    victim.start()
    while not log.is_file() or len(log.read_text()) < 8:
        time.sleep(0.01)
    survivor = fork.Process(target=cache.build, kwargs={"load": load})  # waits for the file of the victim
    survivor.start()
    while len(list(cache.folder.glob("*.safetensors"))) < 2:
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    survivor.join(20)
    assert survivor.exitcode == 0 and cache.is_complete
    assert [len(batch.uids) for batch in all_of(cache)] == [1] * 12


# --- the rest -----------------------------------------------------------------------------------------------


def test_latents_stay_in_their_file_until_they_are_asked_for(autoencoder, tmp_path):
    if not Path("/proc/self/maps").is_file():
        pytest.skip("how memory is mapped can be read on Linux only")
    cache = cache_of(Squares(), autoencoder, tmp_path)
    cache.build(load=load)
    cached = cache.load()
    (path,) = cache.folder.iterdir()
    assert str(path) in Path("/proc/self/maps").read_text()
    assert not any(str(path) == os.path.realpath(each) for each in Path("/proc/self/fd").iterdir())
    del cached
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_building_leaves_the_global_random_state_alone(autoencoder, tmp_path):
    def load_and_draw(folder, device):
        torch.rand(3)  # as initialising a network does
        return Halve()

    before = torch.get_rng_state()
    cache_of(Squares(), autoencoder, tmp_path).build(load=load_and_draw)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_without_weights_is_named(autoencoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not an autoencoder"):
        cache_of(Squares(), tmp_path / "nowhere", tmp_path)
    with pytest.raises(FileNotFoundError, match="not cached"):
        cache_of(Squares(), autoencoder, tmp_path).load()


class SquareData(ImageData):
    def train_source(self):
        return Squares(64)

    def val_source(self):
        return Squares(6)


def test_the_real_autoencoder_through_the_data_module(tmp_path):
    torch.manual_seed(0)
    autoencoder = Autoencoder(block_channels=(8, 8), norm_groups=4, use_mid_attention=False)
    autoencoder.save_pretrained(tmp_path / "ae")
    data = SquareData(
        resolution=8, batch_size=4, latents_from=str(tmp_path / "ae"), cache_dir=str(tmp_path / "cache")
    )
    batch = next(iter(data.train_dataloader()))
    pictures = Pictures(Squares(64), 8)
    expected = [autoencoder.eval().encode(pictures[0, int(uid[3:])].images) for uid in batch.uids]
    assert batch.latents.shape == (4, 4, 4, 4)
    torch.testing.assert_close(batch.latents, torch.cat(expected).detach())
    assert [len(batch) for batch in data.val_dataloader()] == [4, 2]
    (cached, *_) = (tmp_path / "cache").rglob("*.safetensors")
    assert load_file(cached)["latents"].dtype == torch.float32


def test_the_autoencoder_of_a_diffusers_pipeline(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    cache = cache_of(Squares(), tmp_path / "pipeline", tmp_path)
    cache.build()
    with torch.no_grad():
        mean = vae.encode(Pictures(Squares(), 8)[0, 7].images).latent_dist.mode()
    torch.testing.assert_close(cache.load()[0, 7].latents, 0.5 * (mean - 0.25))


def test_cached_latents_refuse_augmentation(autoencoder):
    for options in ({"crop": "random"}, {"use_flip": True}):
        with pytest.raises(ValueError, match="cached latents are of fixed pictures"):
            SquareData(latents_from=str(autoencoder), **options)
