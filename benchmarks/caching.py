"""What cached latents are worth: an epoch over them against an epoch that encodes its pictures on the fly.

    OMP_NUM_THREADS=2 python benchmarks/caching.py --out results/caching

Both epochs see the same JPEG files (of the synthetic world, made here) in the same order through the same
data module and diffusion module; they take turns. On the fly, a picture is decoded, resized, cropped and
encoded. Options of `emu fit` change networks, resolution, batch size, workers or device, such as
--data.resolution=128.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from copy import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from emu_lightning.data import World
from emu_lightning.data.batch import Batch
from emu_lightning.data.datamodule import ImageData
from emu_lightning.evaluation.comparison_page import environment
from emu_lightning.models import Autoencoder
from emu_lightning.modules import DiffusionModule
from emu_lightning.processes.seeding import generators_for
from emu_lightning.resources import config_path
from emu_lightning.verbs.train import EmuCLI

KINDS = ("cached", "on_the_fly")


def make_jpegs(folder: Path, num: int, side: int) -> None:
    """Writes `num` captioned pictures of the synthetic world."""
    folder.mkdir()
    world = World(size=side, num_images=num, seed=3)
    for index in range(num):
        sample = world[index]
        Image.fromarray(sample.image).save(folder / f"{index:06d}.jpg", quality=90)
        (folder / f"{index:06d}.txt").write_text(sample.text)


class Benchmark(EmuCLI):
    """Parses and makes what `emu fit` does, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def configure(folder: Path, num_pictures: int, side: int, options: list[str]) -> Benchmark:
    """The miniature's diffusion stage on JPEG files, with an untrained autoencoder; all in ``folder``."""
    make_jpegs(folder / "pictures", num_pictures, side)
    settings = yaml.safe_load(config_path("autoencoder/miniature.yaml").read_text())
    Autoencoder(**settings["model"]["init_args"]["autoencoder"]["init_args"]).save(folder / "autoencoder")
    config = yaml.safe_load(config_path("diffusion/miniature.yaml").read_text())
    config["run_dir"] = str(folder / "run")
    config["model"]["init_args"]["autoencoder"]["init_args"]["folder"] = str(folder / "autoencoder")
    config["trainer"]["callbacks"] = None
    config["data"] = {
        "class_path": "emu_lightning.data.FolderData",
        "init_args": {
            "path": str(folder / "pictures"),
            "val_fraction": 0.0,
            "resolution": 64,
            "batch_size": 64,
            "latents_from": str(folder / "autoencoder"),
            "cache_dir": str(folder / "cache"),
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return Benchmark(["fit", "--config", str(folder / "config.yaml"), *options])


def epoch(
    data: ImageData, module: DiffusionModule, num_batches: int, precision: torch.dtype | None, trains: bool
) -> tuple[float, list[str]]:
    """Seconds of `num_batches` batches after a first one, and the names of all their pictures.

    With `trains` each is a training step, else it ends with the latents.
    """
    optimizer = module.configure_optimizers()["optimizer"]
    uids: list[str] = []
    device = module.device

    def step(batch: Batch) -> None:
        uids.extend(batch.uids)
        for name in ("images", "latents", "original_size", "crop", "target_size"):
            value = getattr(batch, name)
            setattr(batch, name, None if value is None else value.to(device))
        rng = generators_for(0, batch.positions, device)
        with torch.autocast(device.type, precision, enabled=precision is not None):
            if not trains:
                module._latents(batch, rng)
                return
            loss = module.loss(batch, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.update_average()

    batches = iter(data.train_dataloader())
    step(next(batches))
    start = now(device)
    for _ in range(num_batches):
        step(next(batches))
    return now(device) - start, uids


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: list[str]) -> dict[str, Any]:
    """Measures, prints a table, writes ``<out>/results.json``, and returns what is in it."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("results/caching"), help="folder")
    parser.add_argument("--pictures", type=int, default=1024, help="in an epoch")
    parser.add_argument("--side", type=int, default=256, help="of the JPEG files, pixels")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each kind")
    arguments, options = parser.parse_known_args(argv)

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = configure(Path(folder), arguments.pictures, arguments.side, options)
        cached, module, device = run.datamodule, run.model, run.trainer.strategy.root_device
        module = module.to(device).train()
        on_the_fly = copy(cached)
        on_the_fly.latents_from = None
        built = now(device)
        (cache,) = cached.build_caches(["train"], module, device).values()
        built = now(device) - built
        num_batches = arguments.pictures // cached.batch_size
        precision = torch.bfloat16 if run.trainer.precision == "bf16-mixed" else None
        seconds: dict[str, dict[str, list[float]]] = {}
        for name, trains in (("latents", False), ("training", True)):
            seconds[name] = {kind: [] for kind in KINDS}
            for _ in range(arguments.rounds):
                seen = []
                for kind, data in zip(KINDS, (cached, on_the_fly), strict=True):
                    took, uids = epoch(data, module, num_batches, precision, trains)
                    seconds[name][kind].append(took)
                    seen.append(uids)
                if seen[0] != seen[1]:
                    raise ValueError("the two epochs saw different pictures")
        cache_megabytes = cache.num_bytes / 1e6

    medians = {
        name: {kind: statistics.median(each[kind]) for kind in KINDS} for name, each in seconds.items()
    }
    speedups = {name: each["on_the_fly"] / each["cached"] for name, each in medians.items()}
    results = {
        "cache_speedup": speedups["training"],
        "latents_speedup": speedups["latents"],
        "epoch_seconds": medians,
        "all_epoch_seconds": seconds,
        "build_seconds": built,
        "cache_megabytes": cache_megabytes,
        "settings": {
            "pictures": num_batches * cached.batch_size,
            "side": arguments.side,
            "resolution": cached.resolution,
            "batch_size": cached.batch_size,
            "num_workers": cached.num_workers,
            "rounds": arguments.rounds,
            "options": options,
            "threads": torch.get_num_threads(),
            "device": str(device),
        },
        "seconds": round(time.monotonic() - started, 1),
        "command": shlex.join(["python", "benchmarks/caching.py", *argv]),
        **environment(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    print(f"\n{'seconds of an epoch':<24}{'cached':>10}{'on the fly':>12}{'speed-up':>10}")
    for name, label in (("latents", "to the latents"), ("training", "with training")):
        each = medians[name]
        print(f"{label:<24}{each['cached']:>10.3f}{each['on_the_fly']:>12.3f}{speedups[name]:>10.2f}")
    print(f"made once in {built:.1f} s, {cache_megabytes:.1f} MB; {arguments.out}/results.json")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
