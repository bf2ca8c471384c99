"""`emu fit` of every stage, killed at a random moment and run again, ends as if it had not been killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from emu_lightning import cli
from tests.shipped import CONFIGS, ROOT, make_workplace, tiny_options

pytestmark = pytest.mark.smoke

NUM_STEPS = 60
STAGES = {
    "autoencoder": "autoencoder/adversarial.yaml",
    "diffusion": "diffusion/miniature.yaml",
    "quality_tuning": "quality_tuning/miniature.yaml",
}


def command(stage: str, run: str) -> list[str]:
    return [
        "fit",
        f"--config={CONFIGS / STAGES[stage]}",
        f"--run_dir={run}",
        *tiny_options(STAGES[stage]),
        f"--trainer.max_steps={NUM_STEPS}",
        "--trainer.val_check_interval=25",
        "--checkpoint.every_n_train_steps=5",
        *([] if stage == "autoencoder" else ["--trainer.callbacks.every_n_train_steps=20"]),
    ]


def start(folder: Path, stage: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, str(ROOT / "main.py"), *command(stage, "killed")]
    with (folder / "output.txt").open("wb") as output:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(argv, cwd=folder, env=environment, stdout=output, stderr=output)


def logged_steps(folder: Path) -> int:
    metrics = folder / "killed/metrics.csv"
    return metrics.read_bytes().count(b"\n") - 1 if metrics.exists() else 0


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per stage with a run that was killed at some moment after its first checkpoint.

    The processes start together, because most of their time is imports.
    """
    folders = {stage: tmp_path_factory.mktemp(stage) for stage in STAGES}
    for folder in folders.values():
        make_workplace(folder)
    processes = {stage: start(folder, stage) for stage, folder in folders.items()}
    moments = {stage: random.randint(6, 35) for stage in STAGES}
    end = time.monotonic() + 200
    while any(process.poll() is None for process in processes.values()):
        for stage, process in processes.items():
            if logged_steps(folders[stage]) >= moments[stage] or time.monotonic() > end:
                time.sleep(random.uniform(0, 0.02))  # a step takes longer: the kill hits any part of one
                process.send_signal(signal.SIGKILL)
        time.sleep(0.005)
    assert time.monotonic() < end, "the processes did not come to train"
    for stage, process in processes.items():
        assert process.returncode == -signal.SIGKILL, (folders[stage] / "output.txt").read_text()
    return folders


def last(run: str) -> dict[str, Any]:
    return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)


def assert_equal(ours: Any, theirs: Any, place: str) -> None:
    """Bit for bit, through all of a checkpoint."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), place
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{place}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), place
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{place}.{index}")
    else:
        assert ours == theirs, place


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_goes_on_to_the_same_weights(
    stage: str, killed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(killed[stage])
    step = last("killed")["global_step"]
    assert 5 <= step < NUM_STEPS
    cli.main([*command(stage, "killed"), "--ckpt_path=last"])
    cli.main(command(stage, "whole"))
    ours, theirs = last("killed"), last("whole")
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(ours[part], theirs[part], f"killed at {step}: {part}")
    if stage != "autoencoder":
        weights = "pretrained/model.safetensors"
        assert Path("killed", weights).read_bytes() == Path("whole", weights).read_bytes()
    for name in ("preference.jsonl", "chosen.json"):
        if Path("whole", name).exists():
            assert Path("killed", name).read_text() == Path("whole", name).read_text(), f"killed at {step}"
    # A step's row is written just after its checkpoint: a kill between the two loses that row, no other.
    rows, expected = (Path(run, "metrics.csv").read_text().splitlines() for run in ("killed", "whole"))
    assert set(rows) <= set(expected) and len(rows) >= len(expected) - 1, f"killed at {step}"
