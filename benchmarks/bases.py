"""What the carried bases have learnt, where sampling does not say it: of captions, and through ids.

    OMP_NUM_THREADS=2 python -m benchmarks.bases --out results/bases

Captions: the loss of each base's first stage on new pictures, with their own captions and with one word of
each exchanged for another of its kind (subject, colour, background, place), masks or noise and times equal.
Where the two losses are equal, the word is not read. Ids: for each VQ autoencoder the share of pictures whose
subject the judge still reads rightly, of all pictures and of well-shot ones, and the share of ids that are
the same when a decoded picture is encoded again. Takes two minutes. Writes `results.json`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from emu_lightning.data import World
from emu_lightning.data.batch import Batch
from emu_lightning.data.world import BACKGROUNDS, HUES, SUBJECTS
from emu_lightning.evaluation.comparison_page import environment
from emu_lightning.evaluation.generation import to_images
from emu_lightning.evaluation.judge import WorldJudge
from emu_lightning.models import VQAutoencoder
from emu_lightning.modules import load_generator
from emu_lightning.processes.seeding import generators_for
from emu_lightning.resources import miniature_path
from emu_lightning.verbs.recipes import recipe_names
from emu_lightning.verbs.world_checks import SIZE, world_pictures

WORDS = {
    "subject": list(SUBJECTS),
    "colour": list(HUES),
    "background": list(BACKGROUNDS.values()),
    "place": ["left", "right"],
}
SEEDS = {"all": (904, 0.1), "well shot": (905, 1.0)}  # of held-out triples; share by a skilled hand


def exchanged(text: str, words: Sequence[str], rng: np.random.Generator) -> str:
    """``text`` with the first of ``words`` in it replaced by another of them; unchanged where none is."""
    found = re.search(rf"\b({'|'.join(words)})\b", text)
    if found is None:
        return text
    others = [word for word in words if word != found[1]]
    return text[: found.start()] + str(rng.choice(others)) + text[found.end() :]


@torch.no_grad()
def caption_losses(name: str, num: int) -> dict[str, float]:
    """The loss with true captions, and how much higher it is with each kind of word exchanged."""
    generator = load_generator(miniature_path(name)).eval()
    stage = getattr(generator, "base", generator)  # of a cascade the first
    stage.text_dropout = 0.0
    pictures, texts = world_pictures(World(SIZE, num, SEEDS["all"][0], triples="held_out"))
    images = resized(to_images(pictures), stage.image_size)
    rng = np.random.default_rng(0)

    def loss(texts: list[str]) -> Tensor:
        """(B,) of each picture alone."""
        return torch.stack(
            [stage.loss(_batch(images[i], text), generators_for(0, [i])) for i, text in enumerate(texts)]
        )

    true = loss(texts)
    found = {"true": float(true.mean())}
    for kind, words in WORDS.items():
        other = [exchanged(text, words, rng) for text in texts]
        changed = torch.tensor([a != b for a, b in zip(texts, other, strict=True)])
        found[kind] = float((loss(other) - true)[changed].mean())
    return found


def _batch(image: Tensor, text: str) -> Batch:
    side = image.shape[-1]
    size = torch.tensor([[side, side]])
    return Batch(
        images=image[None],
        latents=None,
        texts=[text],
        uids=[""],
        original_size=size,
        crop=torch.zeros_like(size),
        target_size=size,
        position=0,
        broken=[],
    )


def resized(images: Tensor, side: int) -> Tensor:
    """(N, 3, side, side) of images (N, 3, H, W) in [-1, 1]."""
    return interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


@torch.no_grad()
def through_ids(vq: VQAutoencoder, side: int, num: int) -> dict[str, float]:
    """What is left of pictures of ``side`` pixels after their ids."""
    found: dict[str, float] = {}
    for kind, (seed, skilled) in SEEDS.items():
        world = World(SIZE, num, seed, skilled, triples="held_out")
        images = resized(to_images(world_pictures(world)[0]), side)
        ids = torch.cat([vq.ids(vq.encode(part)) for part in images.split(64)])
        decoded = torch.cat([vq.decode_ids(part).clamp(-1, 1) for part in ids.split(64)])
        again = torch.cat([vq.ids(vq.encode(part)) for part in decoded.split(64)])
        readings = WorldJudge().read(resized(decoded, SIZE))
        right = [
            reading.subject == world.describe(index)[0].subject for index, reading in enumerate(readings)
        ]
        found[f"subject, {kind}"] = float(np.mean(right))
        found[f"ids kept, {kind}"] = float((ids == again).float().mean())
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/bases"))
    parser.add_argument("--pictures", type=int, default=360)
    options = parser.parse_args(argv)
    names = [name for name in recipe_names() if miniature_path(name).is_dir()]
    results: dict[str, Any] = {
        "captions": {name: caption_losses(name, options.pictures) for name in names},
        "ids": {
            f"{name}, {where}": through_ids(vq, stage_side, options.pictures)
            for name in names
            for where, vq, stage_side in _vqs(name)
        },
        "pictures": options.pictures,
        "command": "python -m benchmarks.bases",
        **environment(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return results


def _vqs(name: str) -> list[tuple[str, VQAutoencoder, int]]:
    """The VQ autoencoders that stages draw with: name of the stage's network, it, its pictures' side."""
    generator = load_generator(miniature_path(name)).eval()
    return [
        (where, module.vq, module.image_size)
        for where, module in generator.named_modules()
        if isinstance(getattr(module, "vq", None), VQAutoencoder)
    ]


if __name__ == "__main__":
    main()
