"""`emu miniature`: the carried base model, from nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from emu_lightning.files import write_whole
from emu_lightning.resources import miniature_path
from emu_lightning.verbs.arguments import call

AUTOENCODER_CONFIG, DIFFUSION_CONFIG = "autoencoder/miniature.yaml", "diffusion/miniature.yaml"
NUM_PROMPTS = 360


def make_base(run: Path, device: str) -> Path:
    """Trains autoencoder and U-Net, each resumable; returns the generator's folder."""
    from emu_lightning.verbs.stages import device_options, run_stage

    options = device_options(device)
    run_stage(AUTOENCODER_CONFIG, run / "autoencoder", options)
    autoencoder = run / "autoencoder" / "pretrained"
    options += ["--model.autoencoder.init_args.folder", str(autoencoder)]
    options += ["--data.latents_from", str(autoencoder), "--data.cache_dir", str(run / "cache")]
    run_stage(DIFFUSION_CONFIG, run / "diffusion", options)
    return run / "diffusion" / "pretrained"


def miniature(run_dir: str = "runs/miniature", out: str | None = None, device: str = "auto") -> None:
    """Trains the miniature base (about an hour on two cores), judges it, and writes it in half precision.

    Args:
        run_dir: where both stages train; a killed run goes on.
        out: folder for the weights and the model card; the carried model's own place when left out.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    import torch

    from emu_lightning.evaluation.comparison_page import environment
    from emu_lightning.evaluation.generation import generate_folder
    from emu_lightning.modules import load_generator
    from emu_lightning.verbs.stages import torch_device
    from emu_lightning.verbs.world_checks import autoencoder_psnr, held_out_prompts, read_all, share_all_three

    run, folder = Path(run_dir), Path(out) if out else miniature_path()
    load_generator(make_base(run, device)).save_pretrained(folder, torch.float16)
    generator = (
        load_generator(folder).to(torch_device(device)).eval()
    )  # judged as it is carried, in half precision
    prompts = held_out_prompts(NUM_PROMPTS)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    pictures = generate_folder(
        generator, prompts, range(len(prompts)), run / f"pictures-{weights[:8]}", settings={"sha256": weights}
    )
    seconds = {
        stage: json.loads((run / stage / "finished.json").read_text())["seconds"]
        for stage in ("autoencoder", "diffusion")
    }
    figures: dict[str, Any] = {
        "autoencoder": autoencoder_psnr(generator.autoencoder),
        "pretrained": share_all_three(read_all(pictures, "reading"), prompts),
        "parameters": sum(weight.numel() for weight in generator.sampling_state().values()),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "sha256": weights,
        "seconds": seconds,
        "seed": 0,
        "command": "make miniature",
        **environment(),
    }
    write_whole(folder / "figures.json", json.dumps(figures, indent=1) + "\n")
    write_whole(folder / "README.md", _card(figures))
    print(f"{folder}: {json.dumps(figures['pretrained'])}, {figures['autoencoder']['psnr_db']:.1f} dB")


def _card(figures: dict[str, Any]) -> str:
    pretrained, autoencoder = figures["pretrained"], figures["autoencoder"]
    share, (low, high) = pretrained["faithfulness"], pretrained["ci95"]
    facts = ", ".join(f"{fact} {share:.1%}" for fact, share in pretrained["facts"].items())
    megabytes, psnr = figures["bytes"] / 1e6, autoencoder["psnr_db"]
    minutes = {stage: seconds / 60 for stage, seconds in figures["seconds"].items()}
    return f"""# Miniature base of the synthetic world

A text-conditioned latent diffusion model of 64-pixel pictures of the project's synthetic world, to be
quality-tuned by `emu quickstart`. It draws what a caption says and shoots it like an everyday snapshot.

| | |
|---|---|
| files | `generator.yaml` (architecture), `model.safetensors` (half precision, {megabytes:.1f} MB) |
| parameters | {figures["parameters"] / 1e6:.2f} M: autoencoder, text encoder, U-Net (the averaged one) |
| configuration | `configs/{AUTOENCODER_CONFIG}`, then `configs/{DIFFUSION_CONFIG}` |
| data | the synthetic world (`emu_lightning/data/world.py`): 20,000 pictures, one in ten by a skilled hand |
| command | `make miniature`, seed {figures["seed"]} |
| time | autoencoder {minutes["autoencoder"]:.0f} min, U-Net {minutes["diffusion"]:.0f} min |
| machine | {figures["machine"]}; {figures["date"]}; {figures["versions"]} |
| autoencoder | {psnr:.1f} dB PSNR on {autoencoder["pictures"]} held-out pictures |
| faithfulness | {share:.1%} ({low:.1%} to {high:.1%}) of {pretrained["prompts"]} held-out captions: \
subject, colour and background all right |
| fact by fact | {facts} |
| sha256 | `{figures["sha256"]}` |

Held out are combinations of subject, colour and background that no training draws.

It knows six shapes, six colours, five backgrounds and two styles, and nothing else. Half of the places right
is guessing between left and right; that its U-Net has no positional encoding is the likely cause, not a
tested one. Licence: Apache-2.0.
"""


def main(argv: list[str]) -> None:
    call(miniature, argv, "emu miniature")
