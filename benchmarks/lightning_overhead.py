"""What Lightning costs: a training step under the Trainer against the same step in a bare PyTorch loop.

    OMP_NUM_THREADS=2 python benchmarks/lightning_overhead.py --out results/lightning_overhead

Lightning's side is `emu fit` itself: its configuration, callbacks, metrics file and data path. The other side
is a copy of its module before the first step, and a loop as one would write it by hand. Both train in one
process and take turns, some steps each: bare, Lightning without the progress bar, bare, Lightning with it. A
block of Lightning is compared with the mean of the bare blocks before and after it, so that a machine that
slows down slows both, and the median over blocks is reported. At the end both must have the same weights, bit
for bit on a CPU: they did the same work.

What comes every few hundred steps (checkpoints, sample grids, validation) is not part of a step and not
measured. Options that are not listed below go to `emu fit`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from emu_lightning.callbacks.progress import StepProgressBar
from emu_lightning.data.batch import Batch, collate
from emu_lightning.data.latents import LatentPictures
from emu_lightning.data.sampler import ResumableBatchSampler
from emu_lightning.evaluation.comparison_page import environment
from emu_lightning.models import Autoencoder
from emu_lightning.modules import DiffusionModule
from emu_lightning.processes.seeding import generators_for
from emu_lightning.resources import config_path
from emu_lightning.verbs.train import EmuCLI

TARGET = 1.03
NUM_PICTURES = 128  # in the latent cache; a step takes the same time whatever they show
WITHOUT_BAR, WITH_BAR = "lightning", "lightning, progress bar"


class BareLoop:
    """The training loop of the diffusion module without Lightning.

    Args:
        module: a copy of the trained module that no Trainer has seen.
        dataset: the Trainer's.
        trainer: its settings are read (device, precision, gradient clip), nothing of it runs.
    """

    def __init__(self, module: DiffusionModule, dataset: LatentPictures, trainer: Trainer) -> None:
        settings: Any = trainer  # Lightning does not declare all of its attributes
        self.device = trainer.strategy.root_device
        self.module = module.to(self.device).train()
        self.use_bfloat16 = trainer.precision == "bf16-mixed"
        self.gradient_clip = trainer.gradient_clip_val
        self.log_every_n_steps = settings.log_every_n_steps
        self.num_steps = 0
        self.losses: list[float] = []
        configured = module.configure_optimizers()
        self.optimizer = configured["optimizer"]
        self.lr_scheduler = configured["lr_scheduler"]["scheduler"]
        data = settings.datamodule
        sampler = ResumableBatchSampler(data.stream(), data.batch_size)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
        self.batches: Iterator[Batch] = iter(loader)

    def run(self, steps: int) -> None:
        """The next ``steps`` training steps."""
        for _ in range(steps):
            batch = next(self.batches)
            for each in fields(batch):
                value = getattr(batch, each.name)
                if isinstance(value, Tensor):
                    setattr(batch, each.name, value.to(self.device))
            rng = generators_for(self.module._seed, batch.positions, self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bfloat16):
                loss = self.module.loss(batch, rng)
            self.optimizer.zero_grad()
            loss.backward()
            if self.gradient_clip:
                torch.nn.utils.clip_grad_norm_(self.module.trainable_parameters(), self.gradient_clip)
            self.optimizer.step()
            self.module.update_average()
            self.lr_scheduler.step()
            self.num_steps += 1
            if self.num_steps % self.log_every_n_steps == 0:
                self.losses.append(loss.item())


class TakeTurns(Callback):
    """Runs a block of the bare loop after every block of the Trainer's, and keeps the seconds of both.

    A block of the Trainer's lasts from the end of this callback to its next call, so nothing is left out.

    Args:
        module: a copy of the module before training.
        steps: of a block.
        rounds: blocks with, and as many without the progress bar.
    """

    def __init__(self, module: DiffusionModule, steps: int, rounds: int) -> None:
        self.module, self.steps, self.rounds = module, steps, rounds
        self.bare_seconds: list[float] = []  # one more than Trainer's blocks: each lies between two
        self.seconds: dict[str, list[float]] = {WITHOUT_BAR: [], WITH_BAR: []}
        self.weights_are_equal = False
        self._block = 0  # the first is not measured: memory is allocated and caches are cold
        self._kind = WITH_BAR

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self.bar,) = (each for each in trainer.callbacks if isinstance(each, StepProgressBar))  # type: ignore[attr-defined]
        self.bar.seconds = 0.5  # as on a terminal, whatever this runs on
        loader: Any = trainer.train_dataloader
        self.bare = BareLoop(self.module, loader.dataset, trainer)
        self._start = self._now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.steps:
            return
        seconds = self._now() - self._start
        if self._block:
            self.seconds[self._kind].append(seconds)
        else:
            self.bare.run(self.steps)
        if self._block == 2 * self.rounds:
            self.weights_are_equal = _equal_weights(self.bare.module, pl_module)
        self.bare_seconds.append(self._timed(lambda: self.bare.run(self.steps)))
        self._block += 1
        self._kind = WITHOUT_BAR if self._block % 2 else WITH_BAR
        self._show_bar(trainer, self._kind == WITH_BAR)
        self._start = self._now()

    def _show_bar(self, trainer: Trainer, shown: bool) -> None:
        others = [each for each in trainer.callbacks if each is not self.bar]  # type: ignore[attr-defined]
        trainer.callbacks = [self.bar, *others] if shown else others  # type: ignore[attr-defined]

    def _timed(self, run: Callable[[], None]) -> float:
        start = self._now()
        run()
        return self._now() - start

    def _now(self) -> float:
        if self.bare.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _equal_weights(one: LightningModule, other: LightningModule) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


class Benchmark(EmuCLI):
    """`emu fit` with the bare loop between its steps."""

    steps: int
    rounds: int

    def before_fit(self) -> None:
        super().before_fit()
        self.turns = TakeTurns(deepcopy(self.model), self.steps, self.rounds)
        self.trainer.callbacks.append(self.turns)  # type: ignore[attr-defined]


def fit(folder: Path, options: list[str], steps: int, rounds: int) -> Benchmark:
    """Trains the miniature's U-Net on latents of an untrained autoencoder; all files stay in ``folder``."""
    settings = yaml.safe_load(config_path("autoencoder/miniature.yaml").read_text())
    Autoencoder(**settings["model"]["init_args"]["autoencoder"]["init_args"]).save(folder / "autoencoder")
    Benchmark.steps, Benchmark.rounds = steps, rounds
    settled = {
        "config": config_path("diffusion/miniature.yaml"),
        "run_dir": folder / "run",
        "model.autoencoder.init_args.folder": folder / "autoencoder",
        "data.latents_from": folder / "autoencoder",
        "data.cache_dir": folder / "cache",
        "data.pool_size": NUM_PICTURES,
        "data.val_size": 32,
        "trainer.num_sanity_val_steps": 0,
        "trainer.max_steps": steps * (2 * rounds + 1),
    }
    return Benchmark(["fit", *(f"--{key}={value}" for key, value in settled.items()), *options])


def summarise(seconds: list[float], bare: list[float], steps: int) -> dict[str, Any]:
    """Median seconds of a step, and its ratio to a bare one with a 95 % interval (bootstrap over blocks).

    Args:
        seconds: of n blocks under the Trainer.
        bare: mean of the two bare blocks around each.
        steps: of a block.
    """
    ratios = np.array(seconds) / bare
    draws = np.random.default_rng(0).integers(len(ratios), size=(10_000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return {
        "step_seconds": float(np.median(seconds)) / steps,
        "ratio": float(np.median(ratios)),
        "ratio_ci95": [float(low), float(high)],
        "milliseconds_more": float(np.median(np.subtract(seconds, bare))) / steps * 1000,
        "block_seconds": seconds,
    }


def main(argv: list[str]) -> dict[str, Any]:
    """Measures, prints a table, writes ``<out>/results.json``, and returns what is in it."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("results/lightning_overhead"), help="folder")
    parser.add_argument("--steps", type=int, default=10, help="training steps of a block")
    parser.add_argument("--rounds", type=int, default=12, help="blocks of each kind")
    arguments, options = parser.parse_known_args(argv)

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = fit(Path(folder), options, arguments.steps, arguments.rounds)
    turns = run.turns
    bare = np.array(turns.bare_seconds)
    around = (bare[:-1] + bare[1:]) / 2  # of Lightning's blocks, which alternate: without the bar, with it
    kinds = {
        kind: summarise(turns.seconds[kind], around[first::2].tolist(), arguments.steps)
        for first, kind in enumerate(turns.seconds)
    }
    bare_seconds = float(np.median(bare)) / arguments.steps
    results = {
        "bare": {"step_seconds": bare_seconds, "block_seconds": bare.tolist()},
        **kinds,
        "target_ratio": TARGET,
        "weights_are_equal": turns.weights_are_equal,
        "settings": {
            "steps": arguments.steps,
            "rounds": arguments.rounds,
            "config": "configs/diffusion/miniature.yaml",
            "options": options,
            "threads": torch.get_num_threads(),
            "device": str(turns.bare.device),
            "precision": run.trainer.precision,
        },
        "seconds": round(time.monotonic() - started, 1),
        "command": shlex.join(["python", "benchmarks/lightning_overhead.py", *argv]),
        **environment(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    print(f"\n{'a training step':<26}{'ms':>9}{'ms more':>10}{'ratio':>9}   95 % interval")
    print(f"{'bare PyTorch loop':<26}{bare_seconds * 1000:>9.2f}")
    for kind, values in kinds.items():
        low, high = values["ratio_ci95"]
        print(
            f"{kind:<26}{values['step_seconds'] * 1000:>9.2f}{values['milliseconds_more']:>10.2f}"
            f"{values['ratio']:>9.4f}   {low:.4f} to {high:.4f}"
        )
    verdict = "met" if all(values["ratio"] <= TARGET for values in kinds.values()) else "MISSED"
    same = "equal bit for bit" if turns.weights_are_equal else "DIFFERENT"
    print(f"target: at most {TARGET}: {verdict}; weights of both loops: {same}; {arguments.out}/results.json")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
