"""Optimizers against their formulas, and all of them through `emu fit`: from YAML, killed and resumed."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers.optimization import get_cosine_schedule_with_warmup
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from emu_lightning.optimizers import AdamW, Muon, WarmupCosine
from emu_lightning.optimizers.eight_bit import AdamW8bit
from emu_lightning.optimizers.muon import NEWTON_SCHULZ, orthogonalize
from emu_lightning.verbs import train
from tests.toy import Denoiser, ToyModule


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stepped(optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
    """One step of every parameter of the optimizer with its gradient."""
    params = [each for group in optimizer.param_groups for each in group["params"]]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.clone()
    optimizer.step()


# --- Muon ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_orthogonalizing_iterates_the_quintic_on_every_singular_value(shape: tuple[int, int]) -> None:
    matrix = random(*shape).double()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()  # the Frobenius norm
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalize(matrix), u @ torch.diag(s) @ v)
    assert 0.6 < s.min() and s.max() < 1.3


def test_three_steps_of_muon_are_those_of_torch() -> None:
    """Which has its own momentum, scaled otherwise, and its own iteration; both compute in bfloat16."""
    ours, theirs = nn.Parameter(random(64, 96)), nn.Parameter(random(64, 96))
    muon = Muon([ours], lr=0.1, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for optimizer in (muon, reference):
            stepped(optimizer, [random(64, 96, seed=step + 1)])
    assert (theirs - random(64, 96)).norm() > 1
    assert (ours - theirs).norm() < 0.03 * (theirs - random(64, 96)).norm()


def test_the_steps_of_muon_are_as_large_as_those_of_adamw() -> None:
    """Entries of 0.2 lr, whatever the shape: so one learning rate serves both."""
    for shape in [(64, 64), (64, 512), (512, 64)]:
        weight = nn.Parameter(torch.zeros(shape))
        stepped(Muon([weight], lr=1.0, weight_decay=0.0), [random(*shape)])
        assert 0.15 < weight.square().mean().sqrt() < 0.25


def test_a_convolution_is_the_matrix_of_its_outputs() -> None:
    convolution, matrix = nn.Parameter(random(64, 8, 3, 3)), nn.Parameter(random(64, 8, 3, 3).flatten(1))
    gradient = random(64, 8, 3, 3, seed=1)
    stepped(Muon([convolution]), [gradient.contiguous(memory_format=torch.channels_last)])
    stepped(Muon([matrix]), [gradient.flatten(1)])
    assert torch.equal(convolution.flatten(1), matrix)


def test_what_is_no_hidden_matrix_is_moved_by_adamw() -> None:
    """Bias, output layer, embedding and LoRA factor, bit for bit as torch's AdamW does."""
    shapes = [(64,), (4, 64, 3, 3), (1000, 32), (8, 640)]
    ours = [nn.Parameter(random(*shape)) for shape in shapes]
    theirs = [nn.Parameter(random(*shape)) for shape in shapes]
    muon = Muon(ours, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(3):
        for optimizer in (muon, reference):
            stepped(optimizer, [random(*shape, seed=step + 1) for shape in shapes])
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_muon_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="momentum=1.0"):
        Muon([nn.Parameter(random(2))], momentum=1.0)
    with pytest.raises(ValueError, match="empty parameter list"):
        Muon([])


# --- the others ---------------------------------------------------------------------------------------------


def test_adamw_is_that_of_torch_and_fused() -> None:
    ours, theirs = nn.Parameter(random(64, 64)), nn.Parameter(random(64, 64))
    fused, reference = AdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for step in range(3):
        for optimizer in (fused, reference):
            stepped(optimizer, [random(64, 64, seed=step + 1)])
    torch.testing.assert_close(ours, theirs)
    assert fused.param_groups[0]["fused"]


def test_adamw_takes_gradients_of_another_memory_order() -> None:
    """As compiled 1 x 1 convolutions have them; the fused step reads memory in the weights' order."""
    for shape, order in {(8, 4, 1, 1): (4, 1, 4, 4), (8, 4, 3, 3): (36, 1, 12, 4)}.items():
        ours, theirs = nn.Parameter(random(*shape)), nn.Parameter(random(*shape))
        fused, reference = AdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
        for step in range(2):
            gradient = random(*shape, seed=step + 1)
            theirs.grad = gradient
            ours.grad = torch.empty_strided(shape, order).copy_(gradient)
            fused.step()
            reference.step()
        torch.testing.assert_close(ours, theirs)


def test_adamw_goes_on_in_another_memory_order() -> None:
    """A run may be resumed with `channels_last` that began without."""
    before, after = (nn.Parameter(random(8, 4, 3, 3)) for _ in range(2))
    first, second = AdamW([before], lr=0.1), AdamW([after], lr=0.1)
    stepped(first, [random(8, 4, 3, 3, seed=1)])
    after.data = before.data.clone(memory_format=torch.channels_last)
    second.load_state_dict(deepcopy(first.state_dict()))
    assert second.state[after]["exp_avg"].stride() == after.stride()
    for optimizer in (first, second):
        stepped(optimizer, [random(8, 4, 3, 3, seed=2)])
    torch.testing.assert_close(after, before)


def test_gradients_are_clipped_before_a_fused_step_in_mixed_precision(in_tmp_path: Path) -> None:
    """Lightning would refuse torch's own. AdamW's first step hides its gradient's size, but not from eps."""
    options = [
        "--model.optimizer.eps=1",
        "--model.optimizer.weight_decay=0",
        "--trainer.precision=bf16-mixed",
    ]
    free = fit("free", "adamw", 2, *options)
    clipped = fit("clipped", "adamw", 2, *options, "--trainer.gradient_clip_val=1e-3")
    start = fit("start", "adamw", 0)
    weight = "denoiser.layer.bias"
    moved = [(each["state_dict"][weight] - start["state_dict"][weight]).norm() for each in (free, clipped)]
    assert moved[1] < 0.1 * moved[0]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao compiles its step, which takes long."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_eight_bit_adamw_steps_as_adamw_and_remembers_in_bytes(uncompiled: None) -> None:
    ours, theirs = nn.Parameter(random(64, 64)), nn.Parameter(random(64, 64))
    eight_bit, reference = AdamW8bit([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for optimizer in (eight_bit, reference):
        stepped(optimizer, [random(64, 64, seed=1)])
    torch.testing.assert_close(ours, theirs)
    for optimizer in (eight_bit, reference):
        stepped(optimizer, [random(64, 64, seed=2)])
    assert (ours - theirs).abs().mean() < 0.02 * 0.2  # two steps of 0.1
    assert eight_bit.state[ours]["exp_avg"].codes.dtype == torch.uint8


def test_the_first_step_of_adafactor_is_that_of_the_paper() -> None:
    """Shazeer & Stern 2018, algorithm 4: second moments of rank one, clipped, relative to the weights."""
    weight, gradient = random(6, 9).double().numpy(), random(6, 9, seed=1).double().numpy()
    param = nn.Parameter(torch.from_numpy(weight.copy()))
    stepped(torch.optim.Adafactor([param], lr=0.01, weight_decay=0.0), [torch.from_numpy(gradient)])
    square = gradient**2
    second = np.outer(square.mean(1), square.mean(0)) / square.mean()
    update = gradient / np.sqrt(second)
    update /= max(1.0, np.sqrt((update**2).mean()))
    expected = weight - 0.01 * np.sqrt((weight**2).mean()) * update
    np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-6)


def test_the_schedule_is_that_of_diffusers() -> None:
    optimizers = [torch.optim.SGD([nn.Parameter(random(1))], lr=0.3) for _ in range(2)]
    ours = WarmupCosine(optimizers[0], num_warmup_steps=5, num_steps=20)
    theirs = get_cosine_schedule_with_warmup(optimizers[1], 5, 20)
    for _ in range(20):
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr(), abs=1e-12)
        for optimizer, schedule in zip(optimizers, (ours, theirs), strict=True):
            optimizer.step()
            schedule.step()


def test_the_schedule_ends_at_its_final_share_and_stays_there() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(random(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, num_warmup_steps=0, num_steps=4, final=0.1)
    rates = []
    for _ in range(6):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    halfway = 0.2 + 1.8 * (1 + math.cos(math.pi / 2)) / 2
    assert rates[0] == 2 and rates[2] == pytest.approx(halfway) and rates[4:] == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_warmup_steps": 4, "num_steps": 4}, "num_warmup_steps=4"),
        ({"num_warmup_steps": 0, "num_steps": 4, "final": 2.0}, "final=2.0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmupCosine(torch.optim.SGD([nn.Parameter(random(1))], lr=1.0), **arguments)


# --- through `emu fit` --------------------------------------------------------------------------------------

WIDTH = 64  # Muon's smallest matrix, and 64 * 64 the smallest weight that 8 bits are used for
OPTIMIZERS = {
    "adamw": {"class_path": "emu_lightning.optimizers.AdamW", "init_args": {"lr": 0.01}},
    "adafactor": {"class_path": "torch.optim.Adafactor", "init_args": {"lr": 0.01}},
    "eight_bit": {"class_path": "emu_lightning.optimizers.eight_bit.AdamW8bit", "init_args": {"lr": 0.01}},
    "muon": {"class_path": "emu_lightning.optimizers.Muon", "init_args": {"lr": 0.01}},
    "schedule_free": {
        "class_path": "schedulefree.AdamWScheduleFree",
        "init_args": {"lr": 0.01, "weight_decay": 0.0},
    },
}
SCHEDULE = {
    "class_path": "emu_lightning.optimizers.WarmupCosine",
    "init_args": {"num_warmup_steps": 2, "num_steps": 6},
}


class ScheduledToy(ToyModule):
    """The toy with a schedule."""

    def __init__(
        self,
        denoiser: Denoiser,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(denoiser, optimizer=optimizer)
        self.lr_scheduler = lr_scheduler

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def fit(run: str, optimizer: str, max_steps: int, *options: str) -> dict:
    """Trains the toy from a file; returns its last checkpoint."""
    model = {"denoiser": {"class_path": "tests.toy.Denoiser", "init_args": {"width": WIDTH}}}
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "tests.test_optimizers.ScheduledToy",
            "init_args": {**model, "optimizer": OPTIMIZERS[optimizer]},
        },
        "data": {"class_path": "tests.toy.ToyData", "init_args": {"width": WIDTH}},
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
        },
    }
    if optimizer == "schedule_free":
        config["trainer"]["callbacks"] = [{"class_path": "emu_lightning.callbacks.ScheduleFree"}]
    else:
        config["model"]["init_args"]["lr_scheduler"] = SCHEDULE
    Path("config.yaml").write_text(yaml.safe_dump(config))
    limits = [f"--trainer.max_steps={max_steps}", f"--run_dir={run}"]
    train.main(["fit", "--config=config.yaml", *limits, *options])
    return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_ends_where_a_whole_one_does(
    optimizer: str, in_tmp_path: Path, uncompiled: None
) -> None:
    whole = fit("whole", optimizer, 6)
    start = fit("parts", optimizer, 3)
    resumed = fit("parts", optimizer, 6, "--ckpt_path=last")
    weight = "denoiser.layer.weight"
    assert not torch.equal(start["state_dict"][weight], whole["state_dict"][weight])
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    assert json.dumps(resumed["lr_schedulers"], default=str) == json.dumps(
        whole["lr_schedulers"], default=str
    )


def test_a_schedule_free_run_keeps_the_average_and_trains_beside_it(in_tmp_path: Path) -> None:
    """Against the recursion of Defazio et al. 2024, equations 6 to 8, in double precision."""
    checkpoint = fit("run", "schedule_free", 5)
    torch.manual_seed(0)
    beta, beta2, rate = 0.9, 0.999, 0.01
    found = {name: value.double() for name, value in checkpoint["state_dict"].items() if "layer" in name}
    fresh = fit("fresh", "schedule_free", 0)
    x = {name: fresh["state_dict"][name].double() for name in found}
    z, second = dict(x), {name: torch.zeros_like(value) for name, value in x.items()}
    for k in range(5):
        y = {name: ((1 - beta) * z[name] + beta * x[name]).requires_grad_() for name in x}
        noise = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(k)).double()
        output = noise @ y["denoiser.layer.weight"].T + y["denoiser.layer.bias"]
        gradients = torch.autograd.grad((output - 1).square().mean(), list(y.values()))
        for name, gradient in zip(y, gradients, strict=True):
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            denominator = (second[name] / (1 - beta2 ** (k + 1))).sqrt() + 1e-8
            z[name] = z[name] - rate * gradient / denominator
            x[name] = (1 - 1 / (k + 1)) * x[name] + z[name] / (k + 1)
    for name, value in found.items():
        torch.testing.assert_close(value, x[name], rtol=1e-4, atol=1e-5)


def test_the_schedule_free_callback_names_an_optimizer_that_is_not(in_tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Adafactor is none: leave the callback out"):
        fit("run", "adafactor", 1, "--trainer.callbacks=emu_lightning.callbacks.ScheduleFree")
