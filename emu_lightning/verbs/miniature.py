"""`emu miniature`: a carried base model, from nothing."""

from __future__ import annotations

import json
import textwrap
from inspect import signature
from pathlib import Path
from typing import Any

from emu_lightning.files import write_whole
from emu_lightning.resources import miniature_path
from emu_lightning.verbs.arguments import call
from emu_lightning.verbs.recipes import Recipe, Stage, fill, read_recipe

NUM_PROMPTS = 360


def make_base(recipe: Recipe, run: Path, device: str) -> tuple[Path, dict[str, float]]:
    """Trains the recipe's stages, each resumable, and assembles what they made.

    Returns:
        The generator's folder, and the seconds of each stage over all its starts.
    """
    from emu_lightning.modules.generator import build_learner
    from emu_lightning.verbs.stages import device_options, run_stage

    seconds = {
        name: run_stage(stage.config, run / name, [*stage.arguments(run), *device_options(device)])
        for name, stage in recipe.stages.items()
    }
    return build_learner(fill(recipe.generator, run)).save_pretrained(run / "pretrained"), seconds


def miniature(
    recipe: str = "latent", run_dir: str = "runs/miniature", out: str | None = None, device: str = "auto"
) -> None:
    """Trains a miniature base (at most 90 minutes on two cores), judges it, and writes it in half precision.

    Args:
        recipe: which one: the name of a file in configs/recipes.
        run_dir: its stages train below the folder of the recipe's name in here; a killed run goes on.
        out: folder for the weights and the model card; the carried model's own place when left out.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    import torch

    from emu_lightning.evaluation.comparison_page import environment
    from emu_lightning.evaluation.generation import generate_folder
    from emu_lightning.modules import load_generator, weights_sha256
    from emu_lightning.verbs.stages import torch_device
    from emu_lightning.verbs.world_checks import autoencoder_psnr, held_out_prompts, read_all, share_all_three

    made_by, run = read_recipe(recipe), Path(run_dir) / recipe
    folder = Path(out) if out else miniature_path(recipe)
    base, seconds = make_base(made_by, run, device)
    load_generator(base).save_pretrained(folder, torch.float16)
    generator = load_generator(folder).to(torch_device(device)).eval()  # judged as it is carried
    prompts = held_out_prompts(NUM_PROMPTS)
    weights = weights_sha256(folder)
    pictures = generate_folder(
        generator, prompts, range(len(prompts)), run / f"pictures-{weights[:8]}", settings={"sha256": weights}
    )
    figures: dict[str, Any] = {
        "autoencoders": {
            name: autoencoder_psnr(generator.get_submodule(name), side)
            for name, side in made_by.autoencoders.items()
        },
        "pretrained": share_all_three(read_all(pictures, "reading"), prompts),
        "parameters": sum(weight.numel() for weight in generator.sampling_state().values()),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "sha256": weights,
        "seconds": seconds,
        "seed": 0,
        "command": f"emu miniature --recipe {recipe}",
        **environment(),
    }
    write_whole(folder / "figures.json", json.dumps(figures, indent=1) + "\n")
    write_whole(folder / "README.md", model_card(made_by, figures))
    print(f"{folder}: {json.dumps(figures['pretrained'])}, {sum(seconds.values()) / 60:.0f} min")


def model_card(recipe: Recipe, figures: dict[str, Any]) -> str:
    """What travels beside the weights, in Markdown, from the ``figures`` that `emu miniature` keeps."""
    pretrained, seconds = figures["pretrained"], figures["seconds"]
    low, high = pretrained["ci95"]
    facts = ", ".join(f"{fact} {share:.1%}" for fact, share in pretrained["facts"].items())
    rows = {
        "files": f"`generator.yaml` (architecture), `model.safetensors` (half precision, "
        f"{figures['bytes'] / 1e6:.1f} MB)",
        "parameters": f"{figures['parameters'] / 1e6:.2f} M in all",
        "data": "pictures of the synthetic world (`emu_lightning/data/world.py`)",
        "command": f"`{figures['command']}`, seed {figures['seed']}",
        **{
            f"stage {name}": f"`configs/{stage.config}`: {seconds[name] / 60:.0f} min, {_pool(stage)}"
            for name, stage in recipe.stages.items()
        },
        "time": f"{sum(seconds.values()) / 60:.0f} min",
        "machine": f"{figures['machine']}; {figures['date']}; {figures['versions']}",
        **{
            f"`{name}`": f"{found['psnr_db']:.1f} dB PSNR on {found['pictures']} held-out pictures of "
            f"{recipe.autoencoders[name]} pixels"
            for name, found in figures["autoencoders"].items()
        },
        "faithfulness": f"{pretrained['faithfulness']:.1%} ({low:.1%} to {high:.1%}) of "
        f"{pretrained['prompts']} held-out captions: subject, colour and background all right",
        "fact by fact": facts,
        "sha256": f"`{figures['sha256']}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    about = f"{recipe.about} It draws what a caption says and shoots it like an everyday snapshot."
    limits = (
        "Held out are combinations of subject, colour and background that no training draws. It knows six "
        f"shapes, six colours, five backgrounds and two styles, and nothing else. {recipe.limits}"
    )
    return f"""# {recipe.title}: miniature base of the synthetic world

{textwrap.fill(about, 110)}

| | |
|---|---|
{table}

{textwrap.fill(limits, 110)}

Licence: Apache-2.0.
"""


def _pool(stage: Stage) -> str:
    """What a stage learns from, in words."""
    from emu_lightning.data import WorldData

    arguments = stage.settings()["data"]["init_args"]
    size, skilled = (
        arguments.get(name, signature(WorldData).parameters[name].default)
        for name in ("pool_size", "skilled_fraction")
    )
    return f"{size:,} pictures, {skilled:.0%} by a skilled hand"


def main(argv: list[str]) -> None:
    call(miniature, argv, "emu miniature")
