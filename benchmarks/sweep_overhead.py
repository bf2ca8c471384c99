"""What a sweep costs: a run of `emu sweep`, with W&B's offline files, against the same training by `emu fit`.

    OMP_NUM_THREADS=2 python benchmarks/sweep_overhead.py --out results/sweep_overhead

Both are commands of their own and take turns, each first in every other round. `run` is what the sweep's
program takes, from its start to its end, over the wall time of the bare command; `once` is what `emu sweep`
takes besides, for a whole sweep: it reads the file and has the real parser read every value before the first
run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from emu_lightning.evaluation.comparison_page import environment
from emu_lightning.files import write_whole

TARGET = 1.05
MAIN = Path(__file__).resolve().parent.parent / "main.py"
CONFIGS = MAIN.parent / "configs"
TRAINING = [f"--config={CONFIGS}/autoencoder/channels.yaml", "--data.pool_size=2000", "--data.val_size=64"]


def measure(folder: Path, steps: int, sweep_first: bool) -> dict[str, float]:
    """Seconds of a bare command, of the run of a sweep, and of all of `emu sweep`."""
    options = [*TRAINING, f"--trainer.max_steps={steps}", "--trainer.enable_progress_bar=false"]
    bare = ["fit", *options, "--model.autoencoder.latent_channels=4", f"--run_dir={folder}/bare"]
    logged = [f"--config={CONFIGS}/loggers/wandb.yaml", f"--run_dir={folder}/swept/$WANDB_RUN_ID"]
    file = folder / "one.yaml"
    sweep = {
        "program": str(MAIN),
        "method": "grid",
        "parameters": {"model.autoencoder.latent_channels": {"values": [4]}},
        "command": ["${env}", "${interpreter}", "${program}", "fit", *options, "${args}", *logged],
    }
    file.write_text(yaml.safe_dump(sweep))
    commands = {"bare": bare, "sweep": ["sweep", str(file), f"--out={folder}/sweep"]}
    order = sorted(commands, reverse=sweep_first)  # "bare" is before "sweep"
    seconds = {name: _timed(commands[name], folder) for name in order}
    (run,) = json.loads((folder / "sweep" / "sweep.json").read_text())["runs"]
    return seconds | {"run": run["seconds"]}


def _timed(arguments: list[str], folder: Path) -> float:
    start = time.perf_counter()
    # Without a key W&B is offline; with one this would measure the network.
    environment_ = os.environ | {"WANDB_MODE": "offline"}
    subprocess.run(
        [sys.executable, str(MAIN), *arguments],
        cwd=folder,
        env=environment_,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def summarise(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the rounds' ratios, with the least and the greatest."""
    ratios = [each["run"] / each["bare"] for each in rounds]
    return {
        "run_over_bare": float(np.median(ratios)),
        "range": [min(ratios), max(ratios)],
        "bare_seconds": float(np.median([each["bare"] for each in rounds])),
        "once_seconds": float(np.median([each["sweep"] - each["run"] for each in rounds])),
        "rounds": len(rounds),
        "target": TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300, help="of a training")
    args = parser.parse_args()
    rounds = []
    for index in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(measure(Path(folder), args.steps, sweep_first=index % 2 == 0))
        print(rounds[-1], flush=True)
    command = (
        f"python benchmarks/sweep_overhead.py --out {args.out} --rounds {args.rounds} --steps {args.steps}"
    )
    result = {"command": command, **environment(), **summarise(rounds), "measured": rounds}
    write_whole(args.out / "results.json", json.dumps(result, indent=2) + "\n")
    print(json.dumps(summarise(rounds), indent=2))


if __name__ == "__main__":
    main()
