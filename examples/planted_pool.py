"""Writes a pool of pictures with planted defects, to try curation on at once, and the truth about it.

    python -m examples.planted_pool planted
    emu curate --config configs/curation/miniature.yaml --pool.path planted/pool

Most pictures are of the synthetic world; where scikit-image is installed, crops of the photographs that it
carries lie among them. `planted/truth.parquet` says what is planted where, and `planted/labels.parquet` has
it as people's labels, which `emu head` learns from.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from emu_lightning.curation.planted import write_planted_pool
from emu_lightning.data.manifest import write_table
from examples.photographs import write_photographs

LABELS = ("offensive", "photogenic")


def write_pool(folder: Path, num: int, seed: int, tens: int = 1) -> None:
    """Writes `pool`, `truth.parquet` and `labels.parquet` into `folder`.

    Args:
        folder: made where it is missing.
        num, seed: see :func:`write_planted_pool`.
        tens: how often ten crops of each photograph are taken.
    """
    with tempfile.TemporaryDirectory() as photographs:
        try:
            paths = write_photographs(photographs)
        except ModuleNotFoundError:
            print("without photographs, which scikit-image carries: pip install scikit-image")
            paths = []
        photographs = [Image.open(path) for path in paths] * tens
        truth = pq.read_table(write_planted_pool(folder / "pool", num, seed, photographs))
    labels = truth.select(["uid"])
    for label in LABELS:
        labels = labels.append_column(label, pc.equal(truth["planted"], label))
    write_table(labels, folder / "labels.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="made where it is missing")
    parser.add_argument("--num", type=int, default=900, help="pictures of the world")
    parser.add_argument("--tens", type=int, default=1, help="of crops of each photograph")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_pool(arguments.folder, arguments.num, arguments.seed, arguments.tens)
    print(f"emu curate --config configs/curation/miniature.yaml --pool.path {arguments.folder}/pool")


if __name__ == "__main__":
    main()
