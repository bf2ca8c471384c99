"""What the data path costs: images per second of one core against bare decoding and resizing.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py --out results/decoding

One side is the training loader of `FolderData` and of `ShardData` with one worker: reading, decoding, turning
upright, resizing, cropping, tensors, batches, and their way to the training process. The other is a plain
loop over the same JPEG files: `Image.open(path).resize(...)`, no more. Both use Pillow's full decoding (no
draft mode) and Lanczos. They take turns in one process, and processor time is counted, of the worker and of
the process that receives, so that other work on the machine hardly matters. A block of the loader is compared
with the mean of the plain blocks before and after it; the median over blocks is reported.

Linux only: the clock of another process is read.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emu_lightning.data import FolderData, ShardData
from emu_lightning.data.batch import Batch
from emu_lightning.data.datamodule import ImageData
from emu_lightning.evaluation.comparison_page import environment

TARGET = 0.9
NUM_AHEAD = 3  # batches that a worker has made while nobody asked: not measured


def write_pictures(folder: Path, num: int, width: int, height: int, quality: int) -> None:
    """JPEG files with the detail of photographs (about 2.5 bits a pixel), as a folder and as a shard."""
    rng = np.random.default_rng(0)
    (folder / "folder").mkdir()
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for number in range(num):
            small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
            noisy = smooth + rng.normal(0, 6, smooth.shape)
            buffer = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=quality)
            for suffix, content in (("jpg", buffer.getvalue()), ("txt", b"a picture")):
                (folder / "folder" / f"{number:09d}.{suffix}").write_bytes(content)
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def bare_loop(paths: list[Path], resolution: int) -> None:
    """Decodes and resizes, and drops the result."""
    for path in paths:
        with Image.open(path) as image:
            scale = resolution / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            image.resize(size, Image.Resampling.LANCZOS)


def cpu_seconds() -> float:
    """Processor time of this process and of its children that live."""
    clocks = [(~child.pid << 3) | 2 for child in multiprocessing.active_children() if child.pid is not None]
    return time.process_time() + sum(time.clock_gettime(clock) for clock in clocks)  # clock_getcpuclockid(3)


def timed(run: Callable[[], None]) -> float:
    """Processor seconds of `run`."""
    start = cpu_seconds()
    run()
    return cpu_seconds() - start


def compare(
    loader: Iterator[Batch], bare: Callable[[int], None], batch_size: int, num_batches: int, rounds: int
) -> dict[str, Any]:
    """Images per second of one core on both sides, which take turns; and the median of their ratios."""

    def take(num: int) -> None:
        for _ in range(num):
            assert len(next(loader)) == batch_size

    num = num_batches * batch_size
    bare_rates, path_rates = [], []
    for block in range(rounds + 1):
        take(NUM_AHEAD)  # the worker is behind again, and sleeps while the loop runs once the queue is full
        if block:
            path_rates.append(num / timed(lambda: take(num_batches)))
        time.sleep(0.5)
        bare_rates.append(num / timed(lambda: bare(num)))
    around = (np.array(bare_rates[:-1]) + np.array(bare_rates[1:])) / 2
    return {
        "images_per_second": float(np.median(path_rates)),
        "bare_images_per_second": float(np.median(bare_rates)),
        "ratio": float(np.median(np.array(path_rates) / around)),
        "ratios": (np.array(path_rates) / around).tolist(),
    }


def main(argv: list[str]) -> dict[str, Any]:
    """Measures, prints a table, writes `<out>/results.json`, and returns what is in it."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("results/decoding"), help="folder")
    parser.add_argument("--pictures", type=int, default=64, help="different ones")
    parser.add_argument("--width", type=int, default=1024, help="pixels")
    parser.add_argument("--height", type=int, default=768, help="pixels")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG")
    parser.add_argument("--resolution", type=int, default=512, help="what is trained on, pixels")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures")
    parser.add_argument("--batches", type=int, default=6, help="of a block")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each side")
    options = parser.parse_args(argv)

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, options.pictures, options.width, options.height, options.quality)
        paths = sorted((folder / "folder").glob("*.jpg"))
        settings: dict[str, Any] = {
            "resolution": options.resolution,
            "batch_size": options.batch_size,
            "num_workers": 1,
            "cache_dir": str(folder / "cache"),
        }
        sources: dict[str, ImageData] = {
            "folder": FolderData(str(folder / "folder"), val_fraction=0.0, **settings),
            "shards": ShardData(str(folder / "00000.tar"), **settings),
        }

        def bare(num: int) -> None:
            bare_loop([paths[index % len(paths)] for index in range(num)], options.resolution)

        results: dict[str, Any] = {}
        for source, data in sources.items():
            loader = iter(data.train_dataloader())
            results[source] = compare(loader, bare, options.batch_size, options.batches, options.rounds)
            del loader  # ends the worker
    results |= {
        "decode_ratio": min(results[source]["ratio"] for source in sources),
        "target_ratio": TARGET,
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "seconds": round(time.monotonic() - started, 1),
        "command": shlex.join(["python", "benchmarks/decoding.py", *argv]),
        **environment(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    print(f"\n{'images/s of one core':<24}{'data path':>12}{'bare':>12}{'ratio':>9}")
    for source in sources:
        values = results[source]
        print(
            f"{source:<24}{values['images_per_second']:>12.1f}{values['bare_images_per_second']:>12.1f}"
            f"{values['ratio']:>9.3f}"
        )
    verdict = "met" if results["decode_ratio"] >= TARGET else "MISSED"
    print(f"target: at least {TARGET}: {verdict}; {options.out}/results.json")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
