"""The benchmark of caches runs, at a size that measures nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import caching


@pytest.mark.smoke
def test_both_epochs_see_the_same_pictures(in_tmp_path: Path) -> None:
    network = ["--model.denoiser.block_channels=[32]", "--model.denoiser.transformer_layers=[1]"]
    data = ["--data.batch_size=2", "--data.resolution=32", "--data.num_workers=0"]
    size = ["--pictures=4", "--side=32", "--rounds=1", "--trainer.accelerator=cpu"]
    results = caching.main(["--out=out", *size, *network, *data])
    assert results["cache_speedup"] > 0 and results["latents_speedup"] > 0
    assert results["cache_megabytes"] > 0
    assert json.loads(Path("out/results.json").read_text()) == results
