"""The first twenty losses of every stage against recorded ones.

A change that is not meant to change numbers must not change these. Where it is meant to:

    python -m tests.test_golden --record

writes `tests/golden.json` anew; say why in the CHANGELOG.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

# As in conftest.py, for --record: sums over several threads depend on how the work is split.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch import Callback, LightningModule  # noqa: E402

from emu_lightning.data import WorldData  # noqa: E402
from emu_lightning.models import Autoencoder, PatchDiscriminator, RandomFeatures  # noqa: E402
from emu_lightning.modules import AutoencoderModule, QualityTuningModule  # noqa: E402
from emu_lightning.processes import Diffusion  # noqa: E402
from tests.tiny import make_trainer, tiny_generator  # noqa: E402

pytestmark = pytest.mark.golden

GOLDEN = Path(__file__).with_name("golden.json")
NUM_STEPS = 20
SIDE = 16


def gentle(parameters: Any) -> torch.optim.Optimizer:
    """Steps so small that rounding, which differs from computer to computer, does not grow."""
    return torch.optim.AdamW(parameters, lr=3e-4)


def autoencoder() -> LightningModule:
    """All losses, the adversarial one from step 5 on."""
    torch.manual_seed(0)
    return AutoencoderModule(
        Autoencoder(4, (8, 16), fourier_frequencies=(0, 1), norm_groups=4),
        PatchDiscriminator(channels=8, num_layers=1, norm_groups=4),
        RandomFeatures((4, 8)),
        kl_weight=1e-4,
        adversarial_start=5,
        gradient_clip=1.0,
        optimizer=gentle,
        num_latent_batches=1,
    )


def diffusion() -> LightningModule:
    """In latents, with offset noise and dropped captions."""
    process = Diffusion(noise_offset=0.02)
    return tiny_generator(in_pixels=False, image_size=SIDE, process=process, optimizer=gentle, seed=1)


def quality_tuning() -> LightningModule:
    """As the paper's: offset noise 0.1."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_generator(in_pixels=False, image_size=SIDE, seed=2).save_pretrained(folder)
        return QualityTuningModule(folder, {"process.noise_offset": 0.1}, optimizer=gentle)


STAGES = {"autoencoder": autoencoder, "diffusion": diffusion, "quality_tuning": quality_tuning}


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.values.append(trainer.callback_metrics["train/loss"].item())


def losses_of(stage: str) -> list[float]:
    """Twenty training losses on the synthetic world."""
    losses = Losses()
    data = WorldData(resolution=SIDE, batch_size=4, pool_size=32, val_size=4, num_workers=0)
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(Path(folder), max_steps=NUM_STEPS, callbacks=[losses]).fit(STAGES[stage](), data)
    return losses.values


def computer() -> dict[str, str]:
    """What the last bits depend on: the kernels that torch, oneDNN and MKL choose."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processor": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_losses_are_the_recorded_ones(stage: str) -> None:
    """Bit for bit on the computer and torch that recorded them, to 1e-4 elsewhere."""
    golden = json.loads(GOLDEN.read_text())
    losses, expected = losses_of(stage), golden["losses"][stage]
    assert losses_of(stage) == losses, "the same twice"
    assert len(set(losses)) == NUM_STEPS
    if golden["computer"] == computer():
        assert losses == expected
    else:
        assert losses == pytest.approx(expected, rel=1e-4)


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        raise SystemExit("usage: python -m tests.test_golden --record")
    recorded = {"computer": computer(), "losses": {stage: losses_of(stage) for stage in STAGES}}
    GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"wrote {GOLDEN}")
