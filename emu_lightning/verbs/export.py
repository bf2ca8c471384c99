"""`emu export`: a checkpoint as a folder: of a generator of ours, or of a diffusers pipeline."""

from __future__ import annotations

from typing import Literal

from emu_lightning.verbs.arguments import call


def export(model: str, out: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> None:
    """Writes a folder of safetensors with the averaged weights, no optimizer and no pickle.

    What was tuned from a pipeline becomes a pipeline that diffusers loads; any other generator, and any
    super-resolution stage, becomes generator.yaml and model.safetensors.

    Args:
        model: checkpoint, generator folder or pipeline.
        out: folder to write.
        dtype: of the weights in the file.
    """
    import torch

    from emu_lightning.modules import load_learner

    learner = load_learner(model)
    folder = learner.save_pretrained(out, getattr(torch, dtype))
    megabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    print(f"{folder}: {megabytes:.1f} MB; `emu {learner.verb} --model {folder}` draws with it")


def main(argv: list[str]) -> None:
    call(export, argv, "emu export")
