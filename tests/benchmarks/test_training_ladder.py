"""The ladder stands, at a size that measures nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import training_ladder

RUNGS = ["bfloat16", "sdpa", "cache", "diffusers"]  # of both kinds of data; compiling takes long


@pytest.mark.smoke
def test_rungs_train_and_diffusers_beside_them(in_tmp_path: Path) -> None:
    size = ["--size=tiny", "--resolution=16", "--batch_size=2", "--steps=2", "--device=cpu", "--out=out"]
    results = training_ladder.main([*size, "--rungs", *RUNGS])
    measured = results["resolutions"]["16"]
    assert measured["flops_per_image"] > 6 * 10_000
    for rung in measured["rungs"].values():
        expected = rung["images_per_second"] * measured["flops_per_image"]
        assert rung["mfu"] == pytest.approx(expected / measured["matmul_flops_per_second"])
        assert rung["mfu"] > 0
    speed = {name: rung["images_per_second"] for name, rung in measured["rungs"].items()}
    assert measured["rungs"]["sdpa"]["gain"] == pytest.approx(speed["sdpa"] / speed["bfloat16"])
    assert measured["sdpa_over_diffusers"] == pytest.approx(speed["sdpa"] / speed["diffusers"])
    assert list(speed) == ["diffusers", "bfloat16", "sdpa", "cache"]  # in the ladder's order
    assert json.loads(Path("out/results.json").read_text()) == results


def test_what_the_cache_gives_trains_as_what_it_was_made_of_does(in_tmp_path: Path) -> None:
    """Latents and embeddings have the shapes that the networks make of the same pictures and captions."""
    unet, encoder, autoencoder = training_ladder.tiny()
    module = training_ladder.DiffusionModule(unet, encoder, training_ladder.Diffusion(), autoencoder)
    (batch, *_) = training_ladder.picture_batches(16, 2)
    (cached, *_) = training_ladder.cached(module, [batch], 16)
    assert cached.latents.shape == autoencoder.encode(batch.images).shape
    made = encoder.embed(batch.texts)
    assert {name: value.shape for name, value in cached.embeddings.items()} == {
        name: value.shape for name, value in made.items()
    }
    assert cached.images is None and cached.texts == batch.texts


def test_the_networks_have_the_published_sizes() -> None:
    def count(network: nn.Module) -> int:
        return sum(each.numel() for each in network.parameters())

    with torch.device("meta"):
        sizes = {name: count(training_ladder.SIZES[name]()[0]) for name in ("sd2", "sdxl", "emu")}
        assert sizes["sdxl"] == 2_567_463_684
        pooled = 1024 * 1280 + 1280 + 1280 * 1280 + 1280  # Stable Diffusion 2 has no pooled text
        assert sizes["sd2"] == 865_910_724 + pooled
        assert sizes["emu"] == pytest.approx(2.8e9, rel=0.01)
        assert count(training_ladder.RandomClip().make()) == 123_060_480
        assert count(training_ladder.RandomT5().make()) == pytest.approx(4.76e9, rel=0.01)
