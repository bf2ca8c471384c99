from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from functools import partial

import pytest
import torch

from emu_lightning.data import text_cache
from emu_lightning.data.datamodule import ImageData
from emu_lightning.data.text_cache import TextCache
from emu_lightning.models import Autoencoder
from emu_lightning.modules import AutoencoderModule, QualityTuningModule
from tests.data.test_latents import Squares
from tests.letters import Letters
from tests.tiny import make_trainer, tiny_autoencoder, tiny_generator

TEXTS = [f"{number} squares" for number in range(10)]
fork = multiprocessing.get_context("fork")  # spawning would import everything anew


@pytest.fixture(autouse=True)
def nothing_embedded_yet(monkeypatch):
    monkeypatch.setattr(Letters, "embedded", [])
    monkeypatch.setattr(text_cache, "CHUNK", 4)


def cache_of(tmp_path, seed=0, dtype="float32", encoder=Letters):
    return TextCache(encoder(seed), tmp_path / "cache", dtype)


def assert_holds(cache, texts):
    cached, embedded = cache.load()(texts), Letters().embed(texts)
    assert cached.keys() == embedded.keys()
    assert all(torch.equal(cached[name], embedded[name]) for name in embedded)


def test_embeddings_are_those_of_the_encoder(tmp_path):
    cache = cache_of(tmp_path)
    cache.build([*TEXTS, TEXTS[0]])
    assert sorted(Letters.embedded) == sorted(["", *TEXTS])  # each once
    assert_holds(cache, [TEXTS[7], "", TEXTS[2], TEXTS[7]])
    assert not cache.encoder.frozen.is_loaded  # what encoded is gone, with its memory


def test_a_data_worker_is_given_names_not_tensors(tmp_path):
    cache = cache_of(tmp_path)
    cache.build(TEXTS)
    pickled = pickle.dumps(cache.load())
    assert len(pickled) < 500
    cached, embedded = pickle.loads(pickled)(TEXTS), Letters().embed(TEXTS)
    assert all(torch.equal(cached[name], value) for name, value in embedded.items())


def test_only_new_captions_are_encoded_and_only_in_new_files(tmp_path):
    cache = cache_of(tmp_path)
    cache.build(TEXTS)
    files = {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    Letters.embedded.clear()
    cache.build(TEXTS)
    assert Letters.embedded == []
    cache.build([*TEXTS[5:], "a circle"])
    assert Letters.embedded == ["a circle"]
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert len(list(cache.folder.iterdir())) == len(files) + 1
    assert_holds(cache, ["a circle", *TEXTS])


def test_another_encoder_or_dtype_is_another_folder(tmp_path):
    caches = [cache_of(tmp_path, 0), cache_of(tmp_path, 1), cache_of(tmp_path, 0, "float16")]
    assert len({cache.folder for cache in caches}) == 3
    for cache in caches:
        cache.build(TEXTS)
    whole, _, half = (cache.load()(TEXTS) for cache in caches)
    assert torch.equal(whole["letters"].half(), half["letters"]) and half["mask"].dtype == torch.bool
    for path in caches[0].folder.iterdir():
        path.unlink()
    for path in caches[1].folder.iterdir():
        path.rename(caches[0].folder / path.name)
    with pytest.raises(ValueError, match="holds embeddings of another text encoder: delete it"):
        caches[0].load()


def test_a_narrow_encoder_is_not_widened(tmp_path):
    class Half(Letters):
        def embed(self, texts):
            return {name: value.bfloat16() for name, value in super().embed(texts).items()}

    cache = cache_of(tmp_path, encoder=Half)
    cache.build(TEXTS)
    assert cache.load()(TEXTS)["letters"].dtype == torch.bfloat16


def test_a_damaged_file_is_named_and_made_again_once_deleted(tmp_path):
    cache = cache_of(tmp_path)
    cache.build(TEXTS[:6])
    cache.build(TEXTS)
    path = next(cache.folder.iterdir())
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{path.name} is damaged .*: delete it"):
        cache.build(TEXTS)
    path.unlink()
    cache.build(TEXTS)
    assert_holds(cache, TEXTS)


def test_a_caption_that_is_not_there_is_named(tmp_path):
    cache = cache_of(tmp_path)
    with pytest.raises(ValueError, match="'a circle' is not in the text cache"):
        cache.load()(["a circle"])
    cache.build(TEXTS)
    with pytest.raises(ValueError, match="'a circle' is not in the text cache"):
        cache.load()([TEXTS[0], "a circle"])


def test_several_processes_share_the_work_and_a_killed_one_is_replaced(tmp_path):
    log = tmp_path / "log"

    class Slow(Letters):
        def embed(self, texts):
            with log.open("a") as file:
                file.write("x" * len(texts))
            time.sleep(60 if os.getpid() in hanging else 0.02)
            return super().embed(texts)

    hanging = set()

    def hang(build):
        hanging.add(os.getpid())
        build()

    texts = [str(number) for number in range(47)]  # with "", twelve files
    cache = cache_of(tmp_path, encoder=Slow)
    build = partial(cache.build, texts, show_progress=False)
    victim = fork.Process(target=hang, args=(build,))
    victim.start()
    while not log.is_file():
        time.sleep(0.01)
    helpers = [fork.Process(target=build) for _ in range(2)]
    for helper in helpers:
        helper.start()
    while len(list(cache.folder.glob("*.safetensors"))) < 11:
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    for helper in helpers:
        helper.join(20)
    assert [helper.exitcode for helper in helpers] == [0, 0]
    assert log.read_text() == "x" * (48 + 4)  # the four of the killed one twice
    assert_holds(cache, ["", *texts])


# --- through the data module --------------------------------------------------------------------------------


class SquareData(ImageData):
    def __init__(self, tmp_path, num_val=3, **options):
        super().__init__(8, 4, num_workers=0, cache_dir=str(tmp_path / "cache"), **options)
        self.num_val = num_val

    def train_source(self):
        return Squares(11, broken=(2,))

    def val_source(self):
        return Squares(self.num_val, caption="other") if self.num_val else None


def fit(tmp_path, module=None, steps=5, data_options=(), **options):
    module = module or tiny_generator(text_encoder=Letters(), text_dropout=0.5)
    trainer = make_trainer(tmp_path, max_steps=steps, use_distributed_sampler=False, **options)
    trainer.fit(module, SquareData(tmp_path, **dict(data_options)))
    return module.state_dict()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_on_cached_text_is_training_without(tmp_path, num_workers):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    plain = fit(tmp_path, limit_val_batches=1)
    torch.set_rng_state(state)
    Letters.embedded.clear()
    module = tiny_generator(text_encoder=Letters(), text_dropout=0.5)
    cached = fit(tmp_path, module, limit_val_batches=1, data_options={"cache_text": True})
    assert all(torch.equal(cached[name], value) for name, value in plain.items())
    captions = {"", *(f"square {i}" for i in range(11)), *(f"other {i}" for i in range(3))}
    assert sorted(Letters.embedded) == sorted(captions)
    assert not module.text_encoder.frozen.is_loaded


def test_tuning_and_cached_latents_go_with_it(tmp_path):
    start = tiny_generator(in_pixels=False).save_pretrained(tmp_path / "start")
    tiny_autoencoder().save(tmp_path / "autoencoder")
    module = QualityTuningModule(str(start))
    module.generator.text_encoder = Letters()
    options = {"cache_text": True, "latents_from": str(tmp_path / "autoencoder"), "num_val": 0}
    data = SquareData(tmp_path, **options)
    caches = data.build_caches(["train", "val"], module, torch.device("cpu"))
    assert list(caches) == ["latents of train", "embeddings of captions"]
    assert all(cache.num_bytes > 0 for cache in caches.values())
    batch = next(iter(data.train_dataloader()))
    assert batch.images is None and batch.latents.shape == (4, 4, 4, 4)
    embedded = Letters().embed(batch.texts)
    assert all(torch.equal(batch.embeddings[name], value) for name, value in embedded.items())
    assert batch.empty_embeddings["letters"].shape == (1, 8, 4)


def test_latents_of_another_autoencoder_than_the_models_are_refused(tmp_path):
    tiny_autoencoder(seed=1).save(tmp_path / "other")
    Autoencoder(8, (8, 16), norm_groups=4, use_mid_attention=False).save(tmp_path / "wide")
    for name, module, found in (
        ("other", tiny_generator(in_pixels=False), "4 x 32 x 32, the model's own 4 x 32 x 32"),
        ("wide", tiny_generator(in_pixels=False), "8 x 32 x 32, the model's own 4 x 32 x 32"),
        ("other", tiny_generator(), "4 x 32 x 32, the model's own 3 x 64 x 64"),
    ):
        with pytest.raises(ValueError, match=f"{name} is not the autoencoder of the model: .* makes {found}"):
            fit(tmp_path, module, data_options={"latents_from": str(tmp_path / name)})
    assert not (tmp_path / "cache").exists()


def test_a_trained_text_encoder_is_refused(tmp_path):
    cached = {"cache_text": True}
    with pytest.raises(ValueError, match="needs a frozen text encoder, which DiffusionModule does not have"):
        fit(tmp_path, tiny_generator(), data_options=cached)
    with pytest.raises(ValueError, match="which AutoencoderModule does not have"):
        SquareData(tmp_path, **cached).build_caches(
            ["train"], AutoencoderModule(tiny_autoencoder()), torch.device("cpu")
        )
    with pytest.raises(ValueError, match="call build_caches, or use a Trainer"):
        SquareData(tmp_path, **cached).train_dataloader()
