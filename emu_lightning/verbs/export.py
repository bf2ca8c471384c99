"""`emu export`: a checkpoint as a generator folder."""

from __future__ import annotations

from typing import Literal

from emu_lightning.verbs.arguments import call


def export(model: str, out: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> None:
    """Writes generator.yaml and model.safetensors, with the averaged weights, no optimizer and no pickle.

    Args:
        model: checkpoint or generator folder.
        out: folder to write.
        dtype: of the weights in the file.
    """
    import torch

    from emu_lightning.modules import load_generator

    folder = load_generator(model).save_pretrained(out, getattr(torch, dtype))
    megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{folder}: {megabytes:.1f} MB; `emu sample --model {folder}` draws with it")


def main(argv: list[str]) -> None:
    call(export, argv, "emu export")
