"""Running a training stage from another verb: done is skipped, begun is resumed."""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emu_lightning.callbacks.checkpoint import last_checkpoint
from emu_lightning.resources import config_path
from emu_lightning.verbs import train


def run_stage(config: str, run_dir: Path, options: Sequence[str] = ()) -> float:
    """`emu fit` of a shipped config into ``run_dir``, unless it has finished; goes on where it was killed.

    Returns:
        The seconds it took over all its starts, as `finished.json` has them.
    """
    finished = run_dir / "finished.json"
    if not finished.is_file():
        resume = ["--ckpt_path", "last"] if last_checkpoint(run_dir).exists() else []
        train.main(
            ["fit", "--config", str(config_path(config)), "--run_dir", str(run_dir), *options, *resume]
        )
    seconds: float = json.loads(finished.read_text())["seconds"]
    return seconds


def device_options(device: str) -> list[str]:
    """The trainer's options for `--device`: auto, cpu, cuda, cuda:1, mps."""
    kind, _, index = device.partition(":")
    options = ["--trainer.accelerator", {"cuda": "gpu"}.get(kind, kind), "--trainer.devices"]
    return [*options, f"[{index}]" if index else "1"]


def torch_device(device: str) -> Any:
    """torch's device for `--device`; auto is a GPU where there is one.

    Raises:
        ValueError: torch does not know it, or it is not there.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(device)


def peak_memory_gb() -> float:
    """The most memory this process has held, in 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
