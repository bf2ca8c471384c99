"""Training over two processes, and what it must equal: the same training in one.

Processes come from a fork server that imports once, and one start trains many cases. They find each other as
under torchrun, by the environment.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # as in conftest.py, for benchmarks

import torch  # noqa: E402
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, Strategy  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset  # noqa: E402

from emu_lightning.callbacks import Acceleration  # noqa: E402
from emu_lightning.data.batch import Batch, collate  # noqa: E402
from emu_lightning.models import (  # noqa: E402
    EMA,
    Autoencoder,
    MaskedTransformer,
    PatchDiscriminator,
    RandomFeatures,
    VQAutoencoder,
)
from emu_lightning.models.lora import Lora  # noqa: E402
from emu_lightning.modules import (  # noqa: E402
    AutoencoderModule,
    CascadeModule,
    DiffusionModule,
    MaskedModule,
    MaskedSuperResolutionModule,
    PipelineModule,
    QualityTuningModule,
)
from emu_lightning.parallel import Sharded, blocks  # noqa: E402
from emu_lightning.processes import Diffusion  # noqa: E402
from emu_lightning.processes.seeding import Rng  # noqa: E402
from tests.letters import Letters  # noqa: E402
from tests.pipelines import make_pipeline  # noqa: E402
from tests.tiny import (  # noqa: E402
    make_batch,
    make_trainer,
    tiny_generator,
    tiny_text,
    tiny_unet,
    tiny_upsampler,
)

WORLD = 2
BATCH_SIZE, NUM_STEPS = 4, 3

# --- processes ----------------------------------------------------------------------------------------------


def start(function: Callable[..., Any], *arguments: Any, world: int = WORLD) -> list[Any]:
    """Processes that call ``function(rank, *arguments)``; arguments and function have to be picklable."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "open_clip", "emu_lightning.verbs.train"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        process = context.Process(target=_run, args=(rank, world, port, function, *arguments))
        process.start()
        processes.append(process)
    return processes


def wait(processes: list[Any]) -> list[int]:
    """Their exit codes; where one fails the others are ended, as torchrun would."""
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in connection.wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode not in (0, 143):
                for other in running.values():
                    other.kill()
    return [process.exitcode for process in processes]


def _run(rank: int, world: int, port: int, function: Callable[..., Any], *arguments: Any) -> None:
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "GROUP_RANK": 0,
    }
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="tests")
    sys.argv = ["main.py"]
    torch.set_num_threads(1)
    function(rank, *arguments)


# --- cases --------------------------------------------------------------------------------------------------


class Samples(IterableDataset):
    """Batches of one process: its part of every micro-batch of the global stream."""

    def __init__(self, rank: int, world: int, accumulate: int) -> None:
        self.rank, self.world, self.size = rank, world, BATCH_SIZE // (world * accumulate)

    def __iter__(self) -> Iterator[Batch]:
        for index in count():
            first = (index * self.world + self.rank) * self.size
            samples = [
                make_batch(position, 1, 16, [f"{position} balls in the snow"])
                for position in range(first, first + self.size)
            ]
            yield collate(samples)


class Losses(Callback):
    """Mean of all processes, of every micro-batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.values.append(trainer.callback_metrics["train/loss"].item())


def adamw(parameters: Any) -> torch.optim.Optimizer:
    # With the usual eps of 1e-8, rounding alone would decide where a weight with next to no gradient goes.
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5)


def diffusion(folder: Path) -> LightningModule:
    return tiny_generator(in_pixels=False, process=Diffusion(noise_offset=0.02), optimizer=adamw)


def quality_tuning(folder: Path) -> LightningModule:
    return QualityTuningModule(str(folder / "base"), {"process.noise_offset": 0.1}, optimizer=adamw)


class CachedText(DiffusionModule):
    """Every other batch comes with its embeddings, as from a cache."""

    def loss(self, batch: Batch, rng: Rng) -> torch.Tensor:
        encoder = self.text_encoder
        assert isinstance(encoder, Letters)
        if batch.position // BATCH_SIZE % 2:
            batch.embeddings, batch.empty_embeddings = encoder.embed(batch.texts), encoder.embed([""])
        return super().loss(batch, rng)


def cached_text(folder: Path) -> LightningModule:
    torch.manual_seed(0)
    return CachedText(tiny_unet(3), Letters(), Diffusion(), optimizer=adamw)


def cascade(folder: Path) -> LightningModule:
    base = tiny_generator(process=Diffusion(noise_offset=0.02))
    return CascadeModule(base, [tiny_upsampler()], optimizer=adamw)


def masked(folder: Path) -> LightningModule:
    torch.manual_seed(0)
    vqs = [VQAutoencoder(16, 4, (8, 16), norm_groups=4, use_mid_attention=False).eval() for _ in range(2)]
    sizes: dict[str, Any] = {"dim": 8, "num_layers": 2, "num_heads": 2, "sequence_dim": 8}
    base = MaskedModule(transformer=MaskedTransformer(16, 4, **sizes), text_encoder=tiny_text(), vq=vqs[0])
    transformer = MaskedTransformer(16, 8, low_codebook_size=16, low_side=4, **sizes)
    upsampler = MaskedSuperResolutionModule(
        low_vq=vqs[0], transformer=transformer, text_encoder=tiny_text(), vq=vqs[1]
    )
    return CascadeModule(base, [upsampler], optimizer=adamw)


def lora(folder: Path) -> LightningModule:
    torch.manual_seed(0)
    return PipelineModule(str(folder / "pipeline"), Lora(rank=2), optimizer=adamw)


def autoencoder(folder: Path) -> LightningModule:
    torch.manual_seed(0)
    return AutoencoderModule(
        Autoencoder(4, (8, 16), norm_groups=4),
        PatchDiscriminator(channels=8, num_layers=1, norm_groups=4),
        RandomFeatures((4, 8)),
        adversarial_start=1,
        gradient_clip=0.5,
        optimizer=adamw,
        discriminator_optimizer=adamw,
        num_latent_batches=1,
    )


@dataclass(frozen=True)
class Case:
    """Training of one module by one strategy.

    Attributes:
        make: makes the module.
        strategy: makes the strategy; None is one process.
        accumulate: batches per optimizer step.
        callbacks: what else takes part.
    """

    make: Callable[[Path], LightningModule]
    strategy: Callable[[], Strategy] | None = None
    accumulate: int = 1
    callbacks: Sequence[Callback] = ()

    def fit(self, folder: Path) -> tuple[list[float], LightningModule, Trainer]:
        """Losses of the optimizer steps, the trained module and its trainer."""
        module, losses = self.make(folder), Losses()
        world = 1 if self.strategy is None else int(os.environ["WORLD_SIZE"])
        trainer = make_trainer(
            folder,
            strategy="auto" if self.strategy is None else self.strategy(),
            devices=world,
            max_steps=NUM_STEPS,
            log_every_n_steps=1,  # in other steps each process would have its own loss
            accumulate_grad_batches=self.accumulate,
            gradient_clip_val=None if self.make is autoencoder else 0.5,
            callbacks=[losses, *self.callbacks],
            use_distributed_sampler=False,
        )
        samples = Samples(trainer.global_rank, world, self.accumulate)
        trainer.fit(module, DataLoader(samples, batch_size=None))
        per_step = torch.tensor(losses.values).view(NUM_STEPS, self.accumulate)
        return per_step.mean(1).tolist(), module, trainer


class CompileBlock(Callback):
    """As Acceleration compiles, but one block and without waiting for a C++ compiler."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        blocks(pl_module)[0].compile(backend="eager")


class Draw(Callback):
    """Makes the averaged weights whole in the middle of training, which must not change them."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.generate(["a box"], [0], num_steps=1)


def ddp() -> Strategy:
    return DDPStrategy(find_unused_parameters=True)  # the two networks of the autoencoder take turns


def ddp_of_all() -> Strategy:
    return DDPStrategy()  # refuses parameters that have no gradient


def hsdp() -> Strategy:
    return Sharded(num_replicas=2)


def all_gathered() -> Strategy:
    return Sharded(reshard_after_forward=False)


def frozen_too() -> Strategy:
    return Sharded(shard_frozen=True)


CASES = {
    "diffusion, ddp": Case(diffusion, ddp, accumulate=2),
    "diffusion, sharded": Case(diffusion, Sharded, accumulate=2, callbacks=(Draw(),)),
    "diffusion, hsdp": Case(diffusion, hsdp),
    "diffusion, whole weights kept": Case(diffusion, all_gathered),
    "diffusion, checkpointed and compiled": Case(
        diffusion,
        Sharded,
        callbacks=(Acceleration(activation_checkpointing=True, channels_last=True), CompileBlock()),
    ),
    "quality-tuning, sharded": Case(quality_tuning, Sharded),
    "cascade, ddp": Case(cascade, ddp_of_all),
    "cascade, sharded": Case(cascade, Sharded, accumulate=2, callbacks=(Draw(),)),
    "masked, ddp": Case(masked, ddp_of_all),
    "masked, sharded": Case(masked, frozen_too, callbacks=(Draw(),)),
    "cached text, sharded": Case(cached_text, frozen_too),
    "lora, sharded": Case(lora, frozen_too),
    "autoencoder, ddp": Case(autoencoder, ddp),
    "autoencoder, sharded": Case(autoencoder, Sharded),
}


LOOKED_INTO = ("diffusion, sharded", "cascade, sharded")


def prepare(folder: Path) -> None:
    tiny_generator(in_pixels=False).save_pretrained(folder / "base")
    make_pipeline("stable_diffusion_xl", folder / "pipeline")


def train_cases(rank: int, folder: Path) -> None:
    """Leaves in ``folder`` the losses of every case and its weights as handed over; of some, more."""
    for name, case in CASES.items():
        losses, module, trainer = case.fit(folder)
        torch.save(losses, folder / f"{name}, {rank}.losses")
        module.save_pretrained(folder / name)  # type: ignore[operator]
        if name in LOOKED_INTO:
            trainer.save_checkpoint(folder / f"{name}.ckpt", weights_only=False)
            torch.save(module.generate(["a box"], [0]), folder / f"{name}, {rank}.pictures")  # type: ignore[operator]
            torch.save(held(module), folder / f"{name}.held")


def held(module: Any) -> dict[str, tuple[int, int]]:
    """How many numbers this process has of all that there are."""
    tensors = {
        "weights": list(module.trainable_parameters()),
        "average": [
            weight for ema in module.modules() if isinstance(ema, EMA) for weight in ema.parameters()
        ],
        "moments": [state["exp_avg"] for state in module.optimizers(use_pl_optimizer=False).state.values()],
    }
    return {
        name: (sum(each.to_local().numel() for each in values), sum(each.numel() for each in values))
        for name, values in tensors.items()
    }


def loss_differences(folder: Path) -> dict[str, float]:
    """Largest difference of any step's loss from one process's, a case each."""
    prepare(folder)
    processes = start(train_cases, folder)
    alone = {}
    for make in {case.make: None for case in CASES.values()}:
        alone[make], module, _ = Case(make).fit(folder)
        module.save_pretrained(folder / make.__name__)  # type: ignore[operator]
    codes = wait(processes)
    if any(codes):
        raise RuntimeError(f"training in two processes ended with {codes}")
    return {
        name: max(
            abs(ours - theirs)
            for rank in range(WORLD)
            for ours, theirs in zip(
                torch.load(folder / f"{name}, {rank}.losses"), alone[case.make], strict=True
            )
        )
        for name, case in CASES.items()
    }


def fsdp2_loss_diff(folder: str | Path) -> float:
    """Largest difference between the losses of sharded training in two processes and in one."""
    differences = loss_differences(Path(folder))
    return max(value for name, value in differences.items() if "ddp" not in name)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        for case_name, difference in loss_differences(Path(temporary)).items():
            print(f"{case_name:32} {difference:.1e}")
