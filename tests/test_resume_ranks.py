"""Stopping and going on, on one rank and two: the whole matrix, and two ranks killed at a random moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.resume_matrix import resume_matrix
from tests.shipped import CONFIGS, ROOT, make_workplace, tiny_options
from tests.test_resume import NUM_STEPS, assert_equal, last, logged_steps

pytestmark = pytest.mark.smoke

CONFIG = "diffusion/miniature.yaml"


def test_no_way_to_stop_and_go_on_shows_in_the_result(tmp_path):
    cases = resume_matrix(tmp_path)
    assert len(cases) == 64
    assert [case.name for case in cases if not case.exact] == []


def start(folder: Path, run: str, *options: str) -> subprocess.Popen[bytes]:
    """`emu fit` on two ranks and with two accumulated batches, in a process group of its own."""
    settings = [
        *tiny_options(CONFIG),
        f"--run_dir={run}",
        f"--trainer.max_steps={NUM_STEPS}",
        "--trainer.strategy=ddp",
        "--trainer.devices=2",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.val_check_interval=50",
        "--trainer.callbacks.every_n_train_steps=20",
        "--checkpoint.every_n_train_steps=5",
        "--data.batch_size=4",
    ]
    argv = [sys.executable, str(ROOT / "main.py"), "fit", f"--config={CONFIGS / CONFIG}", *settings, *options]
    with (folder / f"{run}.txt").open("ab") as output:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            argv, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )


@pytest.mark.slow
@pytest.mark.timeout(600)  # six starts of a process
def test_two_ranks_killed_go_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_workplace(tmp_path)
    moment, end = random.randint(6, 35), time.monotonic() + 250
    process = start(tmp_path, "killed")
    while logged_steps(tmp_path) < moment:
        assert process.poll() is None and time.monotonic() < end, Path("killed.txt").read_text()
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.02))  # a step takes longer: the kill hits any part of one
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = last("killed")["global_step"]
    assert 5 <= step < NUM_STEPS

    runs = {"killed": start(tmp_path, "killed", "--ckpt_path=last"), "whole": start(tmp_path, "whole")}
    for name, run in runs.items():
        assert run.wait() == 0, Path(f"{name}.txt").read_text()
    ours, theirs = last("killed"), last("whole")
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "WorldData"):
        assert_equal(ours[part], theirs[part], f"killed at {step}: {part}")
