"""Ways to stop and go on that must not show in the result: stops, workers, ranks, buckets, accumulation.

A run is compared by what it learned, sample by sample: step, position, uid, noise and loss. On as many ranks
as before all of that and the weights have to be equal bit by bit. On another number gradients are summed in
another order, so losses have to agree to 1e-6 of their size, weights to 1e-6, the rest exactly.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, multiprocessing, nn
from torch.nn.functional import adaptive_avg_pool2d

from emu_lightning.callbacks.checkpoint import RunCheckpoint
from emu_lightning.data.batch import Batch
from emu_lightning.data.buckets import Buckets
from emu_lightning.data.datamodule import ImageData
from emu_lightning.data.source import Sample, Source
from emu_lightning.processes.seeding import generators_for, normal

NUM_STEPS = 14
BATCH_SIZE = 4
STOPS = (6, 11)  # 22 samples: in the midst of a pass, and at the end of one
SHAPES = [(8, 8)] * 8 + [(8, 14)] * 7 + [(15, 8)] * 5 + [(8, 11)] * 2  # (8, 11) has too few for a batch


@dataclass(frozen=True)
class Case:
    name: str
    exact: bool


@dataclass(frozen=True)
class Setting:
    """What does not change when a run is stopped and goes on."""

    num_workers: int
    use_buckets: bool
    num_accumulated: int

    def __str__(self) -> str:
        order = "buckets" if self.use_buckets else "squares"
        return f"{order}, {self.num_workers} workers, {self.num_accumulated} accumulated"


SETTINGS = [Setting(*each) for each in product((0, 2), (False, True), (1, 2))]


class Shapes(Source):
    """Pictures of several shapes, each of one grey."""

    def __len__(self) -> int:
        return len(SHAPES)

    def __getitem__(self, index: int) -> Sample:
        image = np.full((*SHAPES[index], 3), 10 * index, np.uint8)
        return Sample(image, f"shape {index}", f"s{index}", SHAPES[index])

    def size(self, index: int) -> tuple[int, int]:
        return SHAPES[index]

    def fingerprint(self) -> str:
        return "shapes"


class ShapesData(ImageData):
    def train_source(self) -> Source:
        return Shapes()

    def val_source(self) -> None:
        return None


class Learner(LightningModule):
    """Learns from the very pixels and from noise, so that equal weights mean equal data in equal order."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 4 * 4, 3)
        generator = torch.Generator().manual_seed(0)
        nn.init.normal_(self.layer.weight, std=0.1, generator=generator)
        nn.init.zeros_(self.layer.bias)
        self.seen: list[tuple[int, int, str, float, float]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert batch.images is not None
        noise = normal(len(batch), generators_for(5, batch.positions))
        features = adaptive_avg_pool2d(batch.images, 4).flatten(1)
        losses = (self.layer(features).sum(1) - noise).square()
        rows = zip(batch.positions, batch.uids, noise.tolist(), losses.tolist(), strict=True)
        self.seen += [(self.global_step, *row) for row in rows]
        return losses.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)  # Adam would magnify what is rounded


def fit(folder: Path, setting: Setting, num_ranks: int, ckpt_path: Path | None = None) -> None:
    """Trains to the end, keeps checkpoints of `STOPS`, and writes what each rank saw and the weights."""
    module = Learner()
    buckets = Buckets(8, step=2, max_ratio=3.0) if setting.use_buckets else None
    data = ShapesData(8, BATCH_SIZE, num_workers=setting.num_workers, crop="random", buckets=buckets)
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=NUM_STEPS,
        accumulate_grad_batches=setting.num_accumulated,
        accelerator="cpu",
        devices=num_ranks,
        strategy="ddp" if num_ranks > 1 else "auto",
        use_distributed_sampler=False,
        callbacks=[RunCheckpoint(keep_steps=STOPS)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    (folder / f"seen-{trainer.global_rank}.json").write_text(json.dumps(module.seen))


def run_name(setting: Setting, num_ranks: int, stop: int = 0, ranks_before: int = 0) -> str:
    return f"{setting}, {num_ranks} ranks, {stop} from {ranks_before}".replace(", ", "-").replace(" ", "-")


def fit_whole(folder: Path, num_ranks: int) -> None:
    for setting in SETTINGS:
        fit(folder / run_name(setting, num_ranks), setting, num_ranks)


def fit_resumed(folder: Path, num_ranks: int, ranks_before: int) -> None:
    for setting, stop in product(SETTINGS, STOPS):
        stopped = folder / run_name(setting, ranks_before) / "checkpoints" / f"step-{stop}.ckpt"
        fit(folder / run_name(setting, num_ranks, stop, ranks_before), setting, num_ranks, stopped)


def _fit_on_two(rank: int, folder: Path, port: int) -> None:
    """All runs on two ranks, in one process for each rank. What torchrun would set is set here."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
    }
    multiprocessing.set_start_method("fork", force=True)  # a spawned process would spawn its workers: slow
    torch.set_num_threads(1)
    fit_whole(folder, num_ranks=2)
    for ranks_before in (1, 2):
        fit_resumed(folder, 2, ranks_before)


def seen(run: Path) -> list[tuple[int, int, str, float, float]]:
    """(step, position, uid, noise, loss) of all ranks, by position."""
    rows = [tuple(row) for path in sorted(run.glob("seen-*.json")) for row in json.loads(path.read_text())]
    return sorted(rows, key=lambda row: row[1])


def weights(run: Path) -> Tensor:
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return torch.cat([value.flatten() for value in state.values()])


def is_exact(whole: Path, resumed: Path, stop: int, same_ranks: bool) -> bool:
    expected, rows = seen(whole)[stop * BATCH_SIZE :], seen(resumed)
    if [row[1] for row in seen(whole)] != list(range(NUM_STEPS * BATCH_SIZE)):
        return False
    if same_ranks:
        return rows == expected and torch.equal(weights(resumed), weights(whole))
    losses = np.array([[row[-1] for row in each] for each in (rows, expected)])
    return (
        [row[:-1] for row in rows] == [row[:-1] for row in expected]
        and np.allclose(losses[0], losses[1], rtol=1e-6, atol=1e-6)  # a sum's last bit is the processor's
        and bool((weights(resumed) - weights(whole)).abs().max() <= 1e-6)
    )


def cases(folder: Path, ranks: Sequence[tuple[int, int]]) -> Iterator[Case]:
    for (before, after), setting, stop in product(ranks, SETTINGS, STOPS):
        # Compared with the run that had no workers, so that these may not change anything either.
        alone = Setting(0, setting.use_buckets, setting.num_accumulated)
        whole = folder / run_name(alone, before)
        resumed = folder / run_name(setting, after, stop, before)
        name = f"{before} -> {after} ranks at step {stop}, {setting}"
        yield Case(name, is_exact(whole, resumed, stop, before == after))


def resume_matrix(folder: Path) -> list[Case]:
    """Runs all cases below `folder`, in half a minute on two idle cores."""
    fit_whole(folder, num_ranks=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(_fit_on_two, (folder, port), nprocs=2, start_method="spawn")
    for ranks_before in (1, 2):
        fit_resumed(folder, 1, ranks_before)
    return list(cases(folder, [(1, 1), (2, 2), (2, 1), (1, 2)]))
