"""The paper's question about the autoencoder, in miniature: what do latent channels and Fourier features buy?

    OMP_NUM_THREADS=2 python benchmarks/autoencoder_channels.py --out results/channels

Trains four autoencoders that differ in nothing else (steps, batch, learning rate, seed and pictures are the
same) and reconstructs the same held-out pictures with each. Writes `results.json` and `reconstructions.png`.
A killed run goes on, and what is trained is not trained again: delete `--run_dir` to start over. Options that
are not listed below go to `emu fit` for all four.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from emu_lightning.data import World
from emu_lightning.evaluation.comparison_page import environment
from emu_lightning.evaluation.generation import to_images, to_uint8
from emu_lightning.losses import perceptual_distance
from emu_lightning.models import Autoencoder, PooledFeatures, RandomFeatures
from emu_lightning.verbs.stages import run_stage

Array = NDArray[np.float64]

CONFIG = "autoencoder/channels.yaml"
VARIANTS: dict[str, dict[str, Any]] = {
    "4": {"latent_channels": 4, "fourier_frequencies": []},
    "8": {"latent_channels": 8, "fourier_frequencies": []},
    "16": {"latent_channels": 16, "fourier_frequencies": []},
    "16+Fourier": {"latent_channels": 16, "fourier_frequencies": [0, 1]},
}
WORLD_SEED = 903  # of the held-out pictures: triples that training never shows
NUM_SHOWN = 4  # pictures in the comparison
NUM_RESAMPLES = 400  # of the bootstrap over pictures


def train(name: str, folder: Path, options: list[str]) -> dict[str, Any]:
    """Trains a variant, unless it is there; returns its settings without what may differ among variants."""
    own = [f"--model.autoencoder.{key}={value}" for key, value in VARIANTS[name].items()]
    run_stage(CONFIG, folder, [*own, *options])
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    autoencoder = settings["model"]["init_args"]["autoencoder"]["init_args"]
    for key, value in VARIANTS[name].items():
        if autoencoder.pop(key) != value:
            raise ValueError(f"{folder} was trained with another {key} than {value}: delete it")
    for place in (settings, settings["trainer"]):
        place.pop("run_dir", None)
        place.pop("default_root_dir", None)
    return settings


def remember(path: Path, options: list[str]) -> None:
    """Keeps the options of the trained variants, and refuses to go on with others."""
    if path.is_file() and json.loads(path.read_text()) != options:
        raise ValueError(f"{path.parent} was trained with other options: delete it, or name a new --run_dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(options) + "\n")


@torch.no_grad()
def measure(
    autoencoder: Autoencoder, images: Tensor, network: RandomFeatures
) -> tuple[NDArray[np.uint8], dict[str, Array], Array]:
    """Reconstructs images (N, 3, H, W) in [-1, 1].

    Returns:
        The reconstructions (N, H, W, 3); PSNR, SSIM and perceptual distance of each, (N,) by name; and the
        features (2, N, D) of originals and reconstructions, for the Frechet distance.
    """
    pooled = PooledFeatures(network)
    pictures, values, features = [], [], []
    for part in images.split(32):
        made = autoencoder.reconstruct(part).clamp(-1, 1)
        x, y = made / 2 + 0.5, part / 2 + 0.5
        psnr = peak_signal_noise_ratio(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
        assert isinstance(ssim, Tensor)
        values.append(torch.stack([psnr, ssim, perceptual_distance(network(made), network(part))]))
        features.append(torch.stack([pooled((z * 255).round().byte()) for z in (y, x)]))
        pictures.append(to_uint8(made))
    names = ("psnr", "ssim", f"perceptual_{network.name}")
    by_name = dict(zip(names, torch.cat(values, dim=1).double().numpy(), strict=True))
    return np.concatenate(pictures), by_name, torch.cat(features, dim=1).double().numpy()


def frechet_distance(x: Array, y: Array) -> float:
    """Of two (N, D): squared 2-Wasserstein distance of Gaussians with their moments (Heusel et al. 2017)."""
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    shift = np.square(x.mean(0) - y.mean(0)).sum()
    return float(shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root)


def with_interval(resampled: Array) -> dict[str, Any]:
    """The whole sample's value (the first) and a 95 % interval from the others."""
    low, high = np.quantile(resampled[1:], [0.025, 0.975])
    return {"value": float(resampled[0]), "ci95": [float(low), float(high)]}


def comparison_picture(pictures: dict[str, NDArray[np.uint8]], zoom: int) -> Image.Image:
    """A column for each name, a row for each picture; every pixel drawn ``zoom`` pixels wide."""
    columns = [np.concatenate(list(column)) for column in pictures.values()]
    grid = np.concatenate(columns, axis=1).repeat(zoom, 0).repeat(zoom, 1)
    width, head = grid.shape[1] // len(pictures), 18
    sheet = Image.new("RGB", (grid.shape[1], grid.shape[0] + head), "white")
    sheet.paste(Image.fromarray(grid), (0, head))
    for n, name in enumerate(pictures):
        ImageDraw.Draw(sheet).text((n * width + width // 2, head // 2), name, "black", anchor="mm")
    return sheet


def main(argv: list[str]) -> dict[str, Any]:
    """Trains, measures, prints a table, writes ``<out>/results.json``, and returns what is in it."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("results/channels"), help="folder for the results")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/channels"), help="folder for the runs")
    parser.add_argument("--pictures", type=int, default=512, help="held-out pictures to reconstruct")
    arguments, options = parser.parse_known_args(argv)

    started = time.monotonic()
    remember(arguments.run_dir / "options.json", options)
    settings: dict[str, Any] = {}
    for name in VARIANTS:
        trained = train(name, arguments.run_dir / name, options)
        if settings and trained != settings:
            raise ValueError(
                f"{arguments.run_dir / name} was trained with other settings than the others: delete "
                f"{arguments.run_dir}"
            )
        settings = trained

    resolution = settings["data"]["init_args"]["resolution"]
    world = World(resolution, arguments.pictures, WORLD_SEED, triples="held_out")
    originals = np.stack([np.asarray(world[i].image) for i in range(len(world))])
    images = to_images(originals)
    # Row 0 is the sample itself. All variants are judged on the same resamples, so differences are paired.
    draws = np.random.default_rng(0).integers(len(images), size=(1 + NUM_RESAMPLES, len(images)))
    draws[0] = np.arange(len(images))
    network = RandomFeatures(seed=1)  # as AutoencoderModule has it
    resampled: dict[str, dict[str, Array]] = {}
    variants: dict[str, dict[str, Any]] = {}
    shown = np.linspace(0, len(images) - 1, NUM_SHOWN).round().astype(int)
    columns = {"original": originals[shown]}
    for name in VARIANTS:
        run = arguments.run_dir / name
        autoencoder = Autoencoder.from_pretrained(run / "pretrained")
        pictures, values, features = measure(autoencoder, images, network)
        columns[name] = pictures[shown]
        resampled[name] = {metric: each[draws].mean(1) for metric, each in values.items()}
        frechet = [frechet_distance(*features[:, draw]) for draw in draws]
        resampled[name][f"rfd_{network.name}"] = np.array(frechet)
        variants[name] = {
            **VARIANTS[name],
            "parameters": sum(weight.numel() for weight in autoencoder.parameters()),
            "seconds": json.loads((run / "finished.json").read_text())["seconds"],
            **{metric: with_interval(each) for metric, each in resampled[name].items()},
        }
    names = list(VARIANTS)
    differences = {
        f"{after} minus {before}": {
            metric: with_interval(resampled[after][metric] - resampled[before][metric])
            for metric in resampled[after]
        }
        for before, after in zip(names, names[1:], strict=False)
    }
    results = {
        "variants": variants,
        "differences": differences,
        "pictures": len(images),
        "training": settings,
        "seconds": round(time.monotonic() - started, 1),
        "command": shlex.join(["python", "benchmarks/autoencoder_channels.py", *argv]),
        **environment(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    comparison_picture(columns, zoom=2).save(arguments.out / "reconstructions.png", optimize=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print_table(results, list(resampled[names[0]]))
    print(f"{arguments.out}/results.json, {arguments.out}/reconstructions.png")
    return results


def print_table(results: dict[str, Any], metrics: list[str]) -> None:
    """Values with intervals, then what each step from variant to variant changed."""
    for rows in (results["variants"], results["differences"]):
        print("\n" + " " * 24 + "".join(f"{metric:>32}" for metric in metrics))
        for name, row in rows.items():
            cells = ((row[metric]["value"], *row[metric]["ci95"]) for metric in metrics)
            print(
                f"{name:<24}" + "".join(f"{'{:.4g} ({:.4g} to {:.4g})'.format(*cell):>32}" for cell in cells)
            )
    print(f"\n95 % intervals over {results['pictures']} held-out pictures; differences are paired")


if __name__ == "__main__":
    main(sys.argv[1:])
