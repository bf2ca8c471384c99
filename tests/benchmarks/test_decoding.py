"""The benchmark runs, at a size that measures nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import decoding


@pytest.mark.smoke
@pytest.mark.skipif(sys.platform != "linux", reason="reads the clock of another process")
def test_the_data_path_is_compared_with_bare_decoding(in_tmp_path: Path) -> None:
    sizes = ["--pictures=8", "--width=64", "--height=48", "--resolution=16", "--batch_size=2", "--batches=2"]
    results = decoding.main(["--out=out", "--rounds=2", *sizes])
    for source in ("folder", "shards"):
        assert 0 < results["decode_ratio"] <= results[source]["ratio"]
        assert results[source]["images_per_second"] > 0
    assert json.loads(Path("out/results.json").read_text()) == results
