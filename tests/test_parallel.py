"""Sharded and distributed training over two processes on the CPU (gloo)."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from emu_lightning import cli, parallel
from emu_lightning.callbacks import checkpoint
from emu_lightning.callbacks.checkpoint import last_checkpoint
from emu_lightning.models import Autoencoder
from emu_lightning.modules import load_generator
from emu_lightning.parallel import (
    Sharded,
    blocks,
    consolidate,
    gathered,
    is_sharded,
    mean_where_logged,
)
from tests import parallel_cases
from tests.parallel_cases import CASES, LOOKED_INTO, autoencoder
from tests.shipped import CONFIGS, ROOT, make_workplace, tiny_options
from tests.tiny import make_trainer, tiny_unet

pytestmark = pytest.mark.smoke

# --- equal to one process -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("cases")
    return folder, parallel_cases.loss_differences(folder)


@pytest.mark.parametrize("name", CASES)
def test_the_losses_of_two_processes_are_those_of_one(name: str, trained: tuple[Path, dict]) -> None:
    assert trained[1][name] < 1e-6


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.make is not autoencoder])
def test_the_averaged_weights_of_two_processes_are_those_of_one(
    name: str, trained: tuple[Path, dict]
) -> None:
    folder, _ = trained
    alone, together = (
        load_generator(folder / path).sampling_state() for path in (CASES[name].make.__name__, name)
    )
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        assert torch.allclose(value, together[key], atol=2e-5), key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.make is autoencoder])
def test_an_autoencoder_of_two_processes_reconstructs_like_that_of_one(name: str, trained) -> None:
    folder, _ = trained
    alone, together = (Autoencoder.from_pretrained(folder / path) for path in ("autoencoder", name))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(alone.reconstruct(images), together.reconstruct(images), atol=1e-4)
    assert (together.latent_std != 1).all()


@pytest.mark.parametrize("name", LOOKED_INTO)
def test_a_sharded_generator_draws_what_it_draws_when_whole(name: str, trained: tuple[Path, dict]) -> None:
    folder, _ = trained
    whole = load_generator(folder / name).generate(["a box"], [0])
    drawn = [torch.load(folder / f"{name}, {rank}.pictures") for rank in range(parallel_cases.WORLD)]
    assert torch.equal(*drawn) and torch.allclose(drawn[0], whole, atol=1e-6)


@pytest.mark.parametrize("name", LOOKED_INTO)
def test_every_process_holds_a_part(name: str, trained: tuple[Path, dict]) -> None:
    """Of weights, averages and optimizer moments, half; an odd length makes it a little more."""
    folder, _ = trained
    held = torch.load(folder / f"{name}.held")
    for part, (local, whole) in held.items():
        assert 0.45 < local / whole < 0.6, part


@pytest.mark.parametrize("name", LOOKED_INTO)
def test_a_consolidated_checkpoint_is_what_was_handed_over(name: str, trained: tuple[Path, dict]) -> None:
    folder, _ = trained
    checkpoint = folder / f"{name}.ckpt"
    assert is_sharded(checkpoint)
    loaded = load_generator(checkpoint)
    expected = load_file(folder / name / "model.safetensors")
    state = loaded.sampling_state()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    cli.main(["export", f"--model={checkpoint}", f"--out={folder / 'exported' / name}"])
    exported = load_file(folder / "exported" / name / "model.safetensors")
    assert all(torch.equal(exported[key], expected[key]) for key in expected)


# --- checkpoints that are broken, or more than data ---------------------------------------------------------


class Planted:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def spoil_index(folder: Path, trap: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Planted(trap)))


def spoil_remainder(folder: Path, trap: Path) -> None:
    torch.save({"generator": Planted(trap)}, folder / "meta.pt")


def spoil_value(folder: Path, trap: Path) -> None:
    """Replaces a value that is not a tensor by a trap, in a shard whose index is in order."""
    index = FileSystemReader(folder).read_metadata()
    buffer = io.BytesIO()
    torch.save(Planted(trap), buffer)
    for place, stored in index.storage_data.items():
        if place.fqn.endswith("param_groups.weight_decay") or "weight_decay" in place.fqn:
            shard = folder / stored.relative_path
            stored.offset, stored.length = shard.stat().st_size, buffer.getbuffer().nbytes
            shard.write_bytes(shard.read_bytes() + buffer.getvalue())
            (folder / ".metadata").write_bytes(pickle.dumps(index))
            return
    raise AssertionError("there is no such value")


def leave_out_remainder(folder: Path, trap: Path) -> None:
    (folder / "meta.pt").unlink()


def truncate_shard(folder: Path, trap: Path) -> None:
    shard = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:1000])


@pytest.mark.parametrize(
    "spoil", [spoil_index, spoil_remainder, spoil_value, leave_out_remainder, truncate_shard]
)
def test_a_checkpoint_that_is_broken_or_holds_code_is_refused(spoil, trained, tmp_path: Path) -> None:
    shutil.copytree(trained[0] / f"{LOOKED_INTO[0]}.ckpt", tmp_path / "spoilt.ckpt")
    spoil(tmp_path / "spoilt.ckpt", tmp_path / "trap")
    with pytest.raises((ValueError, FileNotFoundError), match="spoilt.ckpt") as refused:
        load_generator(tmp_path / "spoilt.ckpt")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "trap").exists(), "code ran"
    if spoil is not truncate_shard:  # what resuming reads before torch does
        with pytest.raises(ValueError, match="spoilt.ckpt"):
            consolidate(tmp_path / "spoilt.ckpt")


# --- parts --------------------------------------------------------------------------------------------------


def test_blocks_are_the_smallest_that_diffusers_keeps_whole() -> None:
    found = blocks(tiny_unet(4))
    assert {type(block).__name__ for block in found} == {"BasicTransformerBlock", "ResnetBlock2D"}
    inside = {id(module) for block in found for module in block.modules() if module is not block}
    assert not inside & {id(block) for block in found}
    assert blocks(torch.nn.Linear(2, 2)) == []


def test_gathering_leaves_plain_tensors_as_they_are() -> None:
    state = {"a": torch.ones(2)}
    assert torch.equal(gathered(state)["a"], state["a"])


def test_processes_wait_for_each_other_in_steps_that_are_logged_only() -> None:
    loop = SimpleNamespace(_batches_that_stepped=0)
    trainer: Any = SimpleNamespace(
        world_size=2,
        log_every_n_steps=3,
        fit_loop=SimpleNamespace(epoch_loop=loop),
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value + 1),
    )
    values = []
    for loop._batches_that_stepped in range(6):  # noqa: B007
        values.append(mean_where_logged(trainer, torch.zeros(())).item())
    assert values == [0, 0, 1, 0, 0, 1]


def test_replicas_have_to_divide_the_processes(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy=Sharded(num_replicas=2), devices=3, max_steps=1)
    with pytest.raises(ValueError, match="3 processes cannot hold num_replicas=2"):
        trainer.strategy.setup_environment()


def test_two_networks_in_turn_need_another_ddp(tmp_path: Path) -> None:
    module = autoencoder(tmp_path)
    for strategy in ("auto", "ddp_find_unused_parameters_true", "ddp"):
        module.trainer = make_trainer(tmp_path, strategy=strategy, devices=1 if strategy == "auto" else 2)
        if strategy == "ddp":
            with pytest.raises(ValueError, match="ddp_find_unused_parameters_true"):
                module.on_fit_start()
        else:
            module.on_fit_start()


def test_a_sharded_checkpoint_is_resumed_by_a_sharded_run_only(trained, in_tmp_path: Path, capsys) -> None:
    make_workplace(in_tmp_path)
    sharded = trained[0] / f"{LOOKED_INTO[0]}.ckpt"
    argv = ["fit", f"--config={CONFIGS / CONFIG}", "--run_dir=run", *tiny_options(CONFIG)]
    with pytest.raises(SystemExit) as ended:
        cli.main([*argv, f"--ckpt_path={sharded}"])
    assert ended.value.code == 2
    assert "configs/hardware/fsdp.yaml" in capsys.readouterr().err


# --- runs ---------------------------------------------------------------------------------------------------

CONFIG, NUM_STEPS = "diffusion/miniature.yaml", 12


def command(run: str, *more: str) -> list[str]:
    return [
        "fit",
        f"--config={CONFIGS / CONFIG}",
        f"--run_dir={run}",
        *tiny_options(CONFIG),
        "--model.denoiser.block_channels=[8]",
        "--model.denoiser.transformer_layers=[1]",
        "--model.denoiser.layers_per_block=1",
        f"--trainer.max_steps={NUM_STEPS}",
        "--trainer.precision=32-true",
        "--trainer.val_check_interval=8",
        "--trainer.callbacks.every_n_train_steps=10",
        "--trainer.strategy.class_path=emu_lightning.parallel.Sharded",
        f"--trainer.devices={parallel_cases.WORLD}",
        "--checkpoint.every_n_train_steps=3",
        "--checkpoint.keep_steps=[6]",
        *more,
    ]


def logged_steps(run: Path) -> int:
    metrics = run / "metrics.csv"
    return metrics.read_bytes().count(b"\n") - 1 if metrics.exists() else 0


def wait_for(condition: Any, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def whole_and_terminated(rank: int, folder: Path) -> None:
    """Both in one start: of the second one process 1 gets SIGTERM; both end, and go on."""

    def terminate() -> None:
        wait_for(lambda: logged_steps(folder / "terminated") >= 3)
        os.kill(os.getpid(), signal.SIGTERM)

    os.chdir(folder)
    cli.main(command("whole"))
    checkpoint.STEPS_BETWEEN_ASKING = 1
    if rank == 1:
        threading.Thread(target=terminate, daemon=True).start()
    try:
        cli.main(command("terminated", "--checkpoint.every_n_train_steps=1000"))
    except SystemExit as error:
        Path(f"terminated {rank}").write_text(str(error.code))
    shutil.copytree("terminated", f"copy {rank}", symlinks=True)
    cli.main(command("terminated", "--ckpt_path=last"))


def go_on(rank: int, folder: Path, argv: list[str]) -> None:
    os.chdir(folder)
    cli.main(argv)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: `whole`, `terminated`, `killed`, all of them ended, and `fewer`, gone on with by one
    process where `killed` was killed."""
    folder = tmp_path_factory.mktemp("runs")
    make_workplace(folder)
    argv = [sys.executable, str(ROOT / "main.py"), *command("killed")]
    with (folder / "output.txt").open("wb") as output:
        started = subprocess.Popen(
            argv, cwd=folder, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    ranks = parallel_cases.start(whole_and_terminated, folder)

    moment = random.randint(4, NUM_STEPS // 2)
    wait_for(lambda: logged_steps(folder / "killed") >= moment or started.poll() is not None)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    ranks_killed = [started.pid, *map(int, children)][: parallel_cases.WORLD]
    time.sleep(random.uniform(0, 0.05))
    os.kill(random.choice(ranks_killed), signal.SIGKILL)
    started.wait(60)  # whichever process it was, the others end too
    wait_for(lambda: not any(is_running(pid) for pid in ranks_killed))
    assert parallel_cases.wait(ranks) == [0, 0]

    shutil.copytree(folder / "killed", folder / "fewer", symlinks=True)
    fewer = parallel_cases.start(
        go_on, folder, command("fewer", "--ckpt_path=last", "--trainer.devices=1"), world=1
    )
    resumed = parallel_cases.start(go_on, folder, command("killed", "--ckpt_path=last"))
    assert parallel_cases.wait(resumed) == [0, 0] and parallel_cases.wait(fewer) == [0]
    return folder


def everything_in(path: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and optimizer moments of a sharded checkpoint, whole."""
    index = parallel.read_index(path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    torch.distributed.checkpoint.load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return tensors


@pytest.mark.parametrize("run", ["killed", "terminated"])
def test_an_interrupted_sharded_run_goes_on_to_the_same_bits(run: str, runs: Path) -> None:
    ours, whole = (everything_in(last_checkpoint(runs / name)) for name in (run, "whole"))
    assert ours.keys() == whole.keys() and any("exp_avg" in name for name in whole)
    for name, value in whole.items():
        assert torch.equal(ours[name], value), name
    weights = "pretrained/model.safetensors"
    assert (runs / run / weights).read_bytes() == (runs / "whole" / weights).read_bytes()


def test_sigterm_to_one_process_ends_all_between_the_same_steps(runs: Path) -> None:
    assert [(runs / f"terminated {rank}").read_text() for rank in range(2)] == ["143", "143"]
    step = consolidate(last_checkpoint(runs / "copy 0"))["global_step"]
    assert 2 <= step < NUM_STEPS


def test_a_sharded_run_goes_on_in_fewer_processes(runs: Path) -> None:
    ours, whole = (everything_in(last_checkpoint(runs / name)) for name in ("fewer", "whole"))
    assert all(torch.allclose(ours[name], value, atol=1e-5) for name, value in whole.items())
    rows, expected = ((runs / name / "metrics.csv").read_text().splitlines() for name in ("fewer", "whole"))
    assert len(rows) == len(expected)


def test_a_run_folder_is_written_by_the_first_process_only(runs: Path) -> None:
    whole = runs / "whole"
    names = {path.name for path in whole.iterdir()} - {"speed.csv"}
    assert names == {"checkpoints", "config.yaml", "finished.json", "metrics.csv", "pretrained", "samples"}
    assert logged_steps(whole) == NUM_STEPS + 1 and (whole / "samples/step-000010.png").is_file()  # 1 of val
    checkpoints = whole / "checkpoints"
    assert is_sharded(checkpoints / "last.ckpt") and is_sharded(checkpoints / "step-6.ckpt")
    assert consolidate(checkpoints / "step-6.ckpt")["global_step"] == 6
    assert len(list(checkpoints.iterdir())) == 4  # two links and what they stand for


# --- hardware -----------------------------------------------------------------------------------------------

OVERLAYS = sorted((CONFIGS / "hardware").glob("*.yaml"))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
@pytest.mark.parametrize("config", ["diffusion/miniature.yaml", "autoencoder/adversarial.yaml"])
def test_a_hardware_overlay_fits_any_run(overlay: Path, config: str, capsys, in_tmp_path: Path) -> None:
    argv = ["fit", f"--config={CONFIGS / config}", f"--config={overlay}", "--print_config"]
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    resolved, changed = yaml.safe_load(printed.out), yaml.safe_load(overlay.read_text())
    for name, value in changed["trainer"].items():
        if name.endswith("+"):
            own = yaml.safe_load((CONFIGS / config).read_text())["trainer"].get("callbacks", [])
            assert len(resolved["trainer"]["callbacks"]) == len(own) + len(value)
        elif isinstance(value, dict):
            assert resolved["trainer"][name]["class_path"] == value["class_path"]
        else:
            assert resolved["trainer"][name] == value
    assert f"configs/hardware/{overlay.name}" in overlay.read_text().splitlines()[0]


def test_the_slurm_script_ends_the_run_in_time_and_queues_it_again(tmp_path: Path) -> None:
    """With stand-ins for SLURM's programs: `srun` runs until it gets SIGTERM, as a training does."""
    for name, body in {
        "srun": 'echo "$@" > srun.txt; trap "exit 143" TERM; while :; do sleep 0.05; done',
        "scontrol": 'echo "$@" > scontrol.txt; [ "$1" != show ] || echo node0',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    script = CONFIGS / "hardware" / "slurm.sh"
    job = subprocess.Popen(["bash", str(script), "--config", "a.yaml"], cwd=tmp_path, env=environment)
    wait_for((tmp_path / "srun.txt").exists, 20)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    assert "--config a.yaml" in (tmp_path / "srun.txt").read_text()
    assert (tmp_path / "scontrol.txt").read_text().split() == ["requeue", "77"]
