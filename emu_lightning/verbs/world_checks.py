"""What the miniature's reports say about the world itself: its prompts, its judge, its autoencoder."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch.nn.functional import interpolate
from tqdm import tqdm

from emu_lightning.data import World
from emu_lightning.evaluation.generation import to_images
from emu_lightning.evaluation.judge import Reading, WorldJudge, facts_of, shows_all_three
from emu_lightning.evaluation.votes import wilson_ci95

SIZE = 64


def held_out_prompts(num: int, seed: int = 900) -> list[str]:
    """``num`` different captions of (subject, colour, background) triples that no training has seen."""
    world = World(SIZE, 100_000, seed, triples="held_out")
    prompts: dict[str, None] = {}
    for index in count():
        if len(prompts) == num:
            return list(prompts)
        if index == len(world):
            raise ValueError(
                f"the world has only {len(prompts)} different held-out captions, {num} were asked for"
            )
        prompts[world.text(index)] = None
    raise AssertionError("unreachable")


def world_pictures(world: World) -> tuple[np.ndarray, list[str]]:
    """All pictures (N, H, W, 3) and captions of a world."""
    samples = [world[i] for i in range(len(world))]
    return np.stack([np.asarray(sample.image) for sample in samples]), [sample.text for sample in samples]


class JudgeOnce(WorldJudge):
    """The exact judge, who looks at each picture once, however many figures are read off it."""

    def __init__(self) -> None:
        self._seen: dict[bytes, Reading] = {}

    def read(self, images: torch.Tensor) -> list[Reading]:
        readings = []
        for image in images:
            pixels = image.cpu().numpy().tobytes()
            if pixels not in self._seen:
                (self._seen[pixels],) = super().read(image[None])
            readings.append(self._seen[pixels])
        return readings


def read_all(pictures: np.ndarray, description: str, judge: WorldJudge | None = None) -> list[Reading]:
    """The judge's readings of (N, H, W, 3), with a progress bar."""
    judge = judge or WorldJudge()
    return [
        judge.read(to_images(picture[None]))[0]
        for picture in tqdm(pictures, desc=description, unit="picture")
    ]


def judge_figures(num: int = 500, seed: int = 901) -> dict[str, float]:
    """How right the judge is on fresh pictures, and how well it tells skilled from ordinary ones (AUC)."""
    ordinary, skilled = World(SIZE, num, seed, 0.0), World(SIZE, num, seed + 1, 1.0)
    right, appeals = [], []
    for world in (ordinary, skilled):
        pictures, captions = world_pictures(world)
        readings = read_all(pictures, "checking the judge")
        right += [shows_all_three(*pair) for pair in zip(readings, captions, strict=True)]
        appeals.append([reading.marks.appeal for reading in readings])
    auc = mannwhitneyu(appeals[1], appeals[0]).statistic / num**2
    return {"accuracy": float(np.mean(right)), "auc": float(auc), "pictures": 2 * num}


def share_all_three(readings: list[Reading], prompts: list[str]) -> dict[str, Any]:
    """Share of prompts whose picture shows subject, colour and background, with Wilson's 95 % interval.

    ``facts`` has the share for each fact alone, place included, among the prompts that name it.
    """
    right: dict[str, list[bool]] = {}
    for reading, prompt in zip(readings, prompts, strict=True):
        for fact, name in facts_of(prompt).items():
            right.setdefault(fact, []).append(getattr(reading, fact) == name)
    share = float(np.mean([shows_all_three(*pair) for pair in zip(readings, prompts, strict=True)]))
    return {
        "faithfulness": share,
        "ci95": list(wilson_ci95(share, len(prompts))),
        "prompts": len(prompts),
        "facts": {fact: float(np.mean(answers)) for fact, answers in right.items()},
    }


@torch.no_grad()
def autoencoder_psnr(autoencoder: Any, side: int = SIZE, num: int = 256, seed: int = 902) -> dict[str, float]:
    """Mean PSNR in dB over pictures of held-out triples of ``side`` pixels, through the posterior's mean
    where there is one."""
    images = to_images(world_pictures(World(SIZE, num, seed, triples="held_out"))[0])
    if side != SIZE:
        images = interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    device = next(autoencoder.parameters()).device
    decibels = []
    for part in images.split(32):
        error = (autoencoder.reconstruct(part.to(device)).clamp(-1, 1).cpu() - part) / 2
        decibels += (-10 * error.square().mean((1, 2, 3)).log10()).tolist()
    return {"psnr_db": float(np.mean(decibels)), "pictures": num}
