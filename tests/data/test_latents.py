from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from emu_lightning.data import latents
from emu_lightning.data.datamodule import ImageData
from emu_lightning.data.latents import LatentCache
from emu_lightning.data.pictures import Pictures
from emu_lightning.data.source import BrokenImage, Sample, Source


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
    calls = 0

    def encode(self, images):
        Halve.calls += len(images)
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


def cache_of(source, autoencoder, tmp_path, resolution=8):
    return LatentCache(source, autoencoder, resolution, tmp_path / "cache")


def test_latents_are_those_of_the_pictures(autoencoder, tmp_path):
    cache = cache_of(Squares(), autoencoder, tmp_path)
    cache.build(load=load)
    places = [(100, 3), (101, 0), (102, 3)]
    batch = cache.load().__getitems__(places)[0]
    one_by_one = [Pictures(Squares(), 8)[place] for place in places]
    expected = Halve().encode(torch.cat([item.images for item in one_by_one]))
    assert torch.equal(batch.latents, expected) and batch.images is None
    assert batch.texts == ["square 3", "square 0", "square 3"] and batch.uids == ["sq-3", "sq-0", "sq-3"]
    assert batch.original_size.tolist() == [[8, 10]] * 3 and batch.crop.tolist() == [[0, 1]] * 3
    assert batch.target_size.tolist() == [[8, 8]] * 3 and batch.position == 100
    assert batch.original_size.dtype == batch.crop.dtype == batch.target_size.dtype == torch.int64


def test_a_second_build_encodes_nothing(autoencoder, tmp_path):
    cache_of(Squares(), autoencoder, tmp_path).build(load=load)
    cache_of(Squares(caption="another caption"), autoencoder, tmp_path).build(load=load)
    assert Halve.calls == 10
    texts = cache_of(Squares(caption="another caption"), autoencoder, tmp_path).load().texts
    assert texts[2] == "another caption 2"
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lock", ".safetensors"]


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


def test_key_follows_weights_config_pictures_and_resolution(autoencoder, tmp_path):
    def key(source=None, resolution=8):
        return cache_of(source or Squares(), autoencoder, tmp_path, resolution).key

    first = key()
    assert key() == first and key(Squares(caption="other")) == first
    keys = {first, key(Squares(shade=1)), key(resolution=16)}
    (autoencoder / "config.json").write_text(json.dumps({"latent_channels": 2, "_diffusers_version": "2"}))
    assert key() == first  # a newer library is not another autoencoder
    (autoencoder / "config.json").write_text(json.dumps({"latent_channels": 4}))
    keys.add(key())
    save_file({"weight": torch.zeros(3)}, autoencoder / "diffusion_pytorch_model.safetensors")
    keys.add(key())
    assert len(keys) == 5


def test_a_file_made_by_something_else_is_refused(autoencoder, tmp_path):
    cache, other = (
        cache_of(Squares(), autoencoder, tmp_path),
        cache_of(Squares(shade=1), autoencoder, tmp_path),
    )
    other.build(load=load)
    other.path.rename(cache.path)
    with pytest.raises(
        ValueError, match="holds latents of another autoencoder or of other pictures: delete it"
    ):
        cache.load()


def test_a_damaged_file_is_named(autoencoder, tmp_path):
    cache = cache_of(Squares(), autoencoder, tmp_path)
    cache.build(load=load)
    cache.path.write_bytes(cache.path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged"):
        cache.load()


def test_a_killed_build_goes_on_and_gives_the_same_bits(autoencoder, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "CHUNK", 4)
    whole = LatentCache(Squares(broken=(3,)), autoencoder, 8, tmp_path / "whole")
    whole.build(load=load)

    class Dies(Halve):
        def encode(self, images):
            if Halve.calls >= 18:
                raise KeyboardInterrupt
            return super().encode(images)

    cache = cache_of(Squares(broken=(3,)), autoencoder, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.build(load=lambda folder, device: Dies())
    assert not cache.path.exists()
    cache.build(load=load)
    assert Halve.calls == 20  # 8 pictures before the kill, 2 after, none twice
    one, other = cache.load(), whole.load()
    assert all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())
    assert (one.uids, one.texts, one.broken) == (other.uids, other.texts, other.broken)
    assert not cache.path.with_suffix(".parts").exists()


def test_building_leaves_the_global_random_state_alone(autoencoder, tmp_path):
    def load_and_draw(folder, device):
        torch.rand(3)  # as initialising a network does
        return Halve()

    before = torch.get_rng_state()
    cache_of(Squares(), autoencoder, tmp_path).build(load=load_and_draw)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not an autoencoder"):
        cache_of(Squares(), tmp_path / "nowhere", tmp_path)
    with pytest.raises(FileNotFoundError, match="not cached"):
        (tmp_path / "ae").mkdir()
        (tmp_path / "ae" / "config.json").write_text("{}")
        save_file({"weight": torch.ones(1)}, tmp_path / "ae" / "model.safetensors")
        cache_of(Squares(), tmp_path / "ae", tmp_path).load()


class SquareData(ImageData):
    def train_source(self):
        return Squares(64)

    def val_source(self):
        return Squares(6)


def test_the_real_autoencoder_through_the_data_module(tmp_path):
    from emu_lightning.models.autoencoder import Autoencoder

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
    (cached, *_) = (tmp_path / "cache").glob("*.safetensors")
    assert load_file(cached)["latents"].dtype == torch.float32


def test_a_batch_costs_next_to_nothing(autoencoder, tmp_path, monkeypatch):
    monkeypatch.setattr(LatentCache.build, "__defaults__", ("cpu", 0, load))
    data = SquareData(
        resolution=8, batch_size=64, latents_from=str(autoencoder), cache_dir=str(tmp_path / "cache")
    )
    batches = iter(data.train_dataloader())
    next(batches)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 2e-3


def test_cached_latents_refuse_augmentation(autoencoder):
    for options in ({"crop": "random"}, {"use_flip": True}):
        with pytest.raises(ValueError, match="cached latents are of fixed pictures"):
            SquareData(latents_from=str(autoencoder), **options)
