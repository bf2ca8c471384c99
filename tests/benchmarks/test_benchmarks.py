"""The benchmarks run, at a size that measures nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from benchmarks import autoencoder_channels, lightning_overhead
from emu_lightning.verbs import train

QUIET = ["--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.mark.smoke
def test_lightning_and_the_bare_loop_do_the_same_work(in_tmp_path: Path) -> None:
    network = ["--model.denoiser.block_channels=[32]", "--model.denoiser.transformer_layers=[1]"]
    data = ["--data.batch_size=4", "--data.pool_size=16", "--data.val_size=4"]
    results = lightning_overhead.main(["--out=out", "--steps=2", "--rounds=2", *network, *data, *QUIET])
    assert results["weights_are_equal"]
    for kind in (lightning_overhead.WITHOUT_BAR, lightning_overhead.WITH_BAR):
        assert 0.2 < results[kind]["ratio"] < 5  # a smaller one would mean that nothing ran
    assert json.loads(Path("out/results.json").read_text()) == results


@pytest.mark.smoke
def test_channels_are_compared_and_not_trained_again(
    in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--data.batch_size=2", "--data.val_size=4", "--data.num_workers=0"]
    tiny = ["--model.autoencoder.block_channels=[8,8,8,8]", "--trainer.max_steps=2", *data, *QUIET]
    options = ["--out=out", "--pictures=8", *tiny, "--trainer.enable_progress_bar=false"]
    results = autoencoder_channels.main(options)
    variants = results["variants"]
    assert [variants[name]["latent_channels"] for name in ("4", "8", "16", "16+Fourier")] == [4, 8, 16, 16]
    gain = results["differences"]["8 minus 4"]["psnr"]
    assert gain["value"] == pytest.approx(variants["8"]["psnr"]["value"] - variants["4"]["psnr"]["value"])
    assert Path("out/reconstructions.png").is_file()

    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("trained again"))
    again = autoencoder_channels.main(options)
    assert again["variants"] == variants
    with pytest.raises(ValueError, match="other options"):
        autoencoder_channels.main([*options, "--trainer.max_steps=3"])


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(200, 3, 4, 4, generator=rng, dtype=torch.float64)
    y = torch.rand(200, 3, 4, 4, generator=rng, dtype=torch.float64) * 0.8
    metric = FrechetInceptionDistance(torch.nn.Flatten(), normalize=True, input_img_size=(3, 4, 4))
    metric.set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    ours = autoencoder_channels.frechet_distance(x.flatten(1).numpy(), y.flatten(1).numpy())
    assert ours == pytest.approx(float(metric.compute()))
