"""`emu sample`: pictures of prompts."""

from __future__ import annotations

from pathlib import Path

from emu_lightning.resources import miniature_path
from emu_lightning.verbs.arguments import call


def sample(
    prompts: list[str] | None = None,
    prompts_file: str | None = None,
    model: str | None = None,
    out: str = "runs/sample",
    seed: int = 0,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Writes a picture a prompt, a grid of all, and manifest.json; what is there is not made again.

    Args:
        prompts: the texts.
        prompts_file: file of texts, one a line, instead.
        model: generator folder or checkpoint; the carried miniature when left out.
        out: folder for the pictures.
        seed: of the first picture; the next has seed + 1.
        num_steps: sampling steps; the model's own default when left out.
        guidance_scale: 1.0 is off; the model's own default when left out.
        negative_prompt: what guidance moves away from, in place of no text.
        batch_size: pictures made at once.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    from emu_lightning.callbacks.samples import picture_grid
    from emu_lightning.evaluation.generation import generate_folder, write_png
    from emu_lightning.evaluation.prompts import read_lines
    from emu_lightning.modules import load_generator, weights_sha256
    from emu_lightning.verbs.stages import torch_device

    if (prompts is None) == (prompts_file is None):
        raise ValueError(
            "give --prompts '[\"a red ball in the snow\"]' or --prompts_file FILE, one of the two"
        )
    texts = prompts if prompts is not None else list(read_lines(str(prompts_file)).prompts)
    path = model or str(miniature_path())
    generator = load_generator(path).to(torch_device(device)).eval()
    settings = {"weights": weights_sha256(path), "num_steps": num_steps, "guidance_scale": guidance_scale}
    if negative_prompt:  # folders of before there were any stay valid
        settings["negative_prompt"] = negative_prompt
    pictures = generate_folder(
        generator, texts, range(seed, seed + len(texts)), out, settings=settings, batch_size=batch_size
    )
    grid = Path(out) / "grid.png"
    write_png(grid, picture_grid(pictures, min(8, len(pictures))))
    print(f"{len(pictures)} pictures in {out}, all together in {grid}")


def main(argv: list[str]) -> None:
    call(sample, argv, "emu sample")
