"""`emu sweep` on a program that writes a line when it begins and one when it ends."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import yaml

from emu_lightning import cli
from emu_lightning.sweeps.records import Records, Run
from tests.test_cli import QUIET, TOY

PROGRAM = """
import json, os, signal, sys, time
begun = time.time()
given = dict(part[2:].split("=", 1) for part in sys.argv[1:])
folder = os.path.expandvars(given["run_dir"])
os.makedirs(folder, exist_ok=True)

def note(what):
    with open("notes.txt", "a") as notes:  # appended whole
        notes.write(f"{what} {os.environ['WANDB_RUN_ID']} {time.time()}\\n")

def save(*_):
    note("saved")
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
note("begun")
time.sleep(float(given.get("seconds", 0.02)))
while os.path.exists("hold"):
    time.sleep(0.01)
if given["x"] == given.get("broken"):
    print("some", "\\rwritten over", "progress")
    sys.exit("there is no x of this kind")
with open(f"{folder}/metrics.csv", "w") as metrics:
    metrics.write(f"step,loss,other\\n1,100,\\n2,{(float(given['x']) - 3) ** 2},\\n3,,7\\n")
with open(f"{folder}/environment.json", "w") as file:
    json.dump({**os.environ, "argv": sys.argv}, file)
note("ended")
"""
COMMAND = [
    "${env}",
    "${interpreter}",
    "${program}",
    "${args}",
    "--run_dir=runs/$WANDB_SWEEP_ID/$WANDB_RUN_ID",
]


def write_sweep(parameters: dict[str, Any], *options: str, **settings: Any) -> None:
    """`sweep.yaml` and its program, in the working directory."""
    Path("program.py").write_text(PROGRAM)
    defaults: dict[str, Any] = {
        "program": "program.py",
        "method": "grid",
        "metric": {"name": "loss", "goal": "minimize"},
        "parameters": parameters,
        "command": [*COMMAND, *options],
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(defaults | settings, sort_keys=False))


def notes(what: str) -> list[str]:
    lines = [line.split() for line in Path("notes.txt").read_text().splitlines()]
    return [line[1] for line in lines if line[0] == what]


def runs_of(out: str = "runs/sweeps/sweep") -> list[dict[str, Any]]:
    return json.loads(Path(out, "sweep.json").read_text())["runs"]


def sweep(*options: str) -> int:
    """The exit code of `emu sweep`."""
    try:
        cli.main(["sweep", "sweep.yaml", *options])
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def begin(*options: str) -> subprocess.Popen[str]:
    """`emu sweep` in a process of its own."""
    code = "import sys; from emu_lightning.cli import main; main(sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    command = [sys.executable, "-c", code, "sweep", "sweep.yaml", *options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_grid_is_run_and_told_of(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep({"x": {"values": [1, 3]}, "model.y": {"values": [True, "b c"]}}, "--seconds=0.2")
    assert sweep() == 0
    out = Path("runs/sweeps/sweep")
    with (out / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["x"], row["model.y"], float(row["loss"]), row["state"]) for row in rows] == [
        ("1", "True", 4.0, "finished"),
        ("1", "b c", 4.0, "finished"),
        ("3", "True", 0.0, "finished"),
        ("3", "b c", 0.0, "finished"),
    ]
    assert [run["parameters"] for run in runs_of()][1] == {"x": 1, "model.y": "b c"}
    assert rows[1]["folder"] == "runs/sweep/x_1-y_b_c" and Path(rows[1]["folder"], "metrics.csv").is_file()
    assert all(float(row["seconds"]) >= 0.2 and row["starts"] == "1" for row in rows)
    printed = capsys.readouterr().out
    assert "x_3-y_b_c   finished     0" in printed and "4 of 4 runs finished" in printed
    before = Path("notes.txt").read_text()
    assert sweep() == 0
    assert Path("notes.txt").read_text() == before  # nothing is run twice


def test_a_program_is_told_what_the_agent_would_tell_it(in_tmp_path: Path, monkeypatch) -> None:
    write_sweep({"x": {"values": [1]}, "y.z": {"values": ["a"]}}, project="ablations", entity="us")
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SERVICE", "of another process")
    assert sweep("--out", "elsewhere/mine") == 0
    told = json.loads(Path("runs/mine/run/environment.json").read_text())
    assert {name: value for name, value in told.items() if name.startswith("WANDB_")} == {
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": "ablations",
        "WANDB_ENTITY": "us",
        "WANDB_SWEEP_ID": "mine",
        "WANDB_RUN_ID": "run",
        "WANDB_NAME": "run",
        "WANDB_DIR": str(in_tmp_path / "elsewhere/mine"),
        "WANDB_SWEEP_PARAM_PATH": str(in_tmp_path / "elsewhere/mine/parameters/run.yaml"),
    }
    from wandb.sdk.lib.config_util import dict_from_config_file  # what W&B reads it with

    assert dict_from_config_file(told["WANDB_SWEEP_PARAM_PATH"]) == {"x": 1, "y.z": "a"}
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_SWEEP_ID", "on_a_server")
    assert sweep("--out", "elsewhere/other") == 0
    told = json.loads(Path("runs/on_a_server/run/environment.json").read_text())
    assert told["WANDB_MODE"] == "online" and told["WANDB_SWEEP_ID"] == "on_a_server"


def test_a_failure_is_told_of_stops_no_other_and_is_tried_again(in_tmp_path: Path, capsys) -> None:
    write_sweep({"x": {"values": [1, 2, 3]}}, "--broken=2")
    assert sweep() == 1
    failed = runs_of()[1]
    assert [run["state"] for run in runs_of()] == ["finished", "failed", "finished"]
    assert failed["exit_code"] == 1 and failed["metric"] is None
    assert failed["last_lines"][-2:] == ["written over progress", "there is no x of this kind"]
    printed = capsys.readouterr()
    assert "emu sweep: failed x_2: there is no x of this kind" in printed.err
    assert "tries x_2 again" in printed.err and "2 of 3 runs finished" in printed.out
    program = Path("program.py")
    program.write_text(program.read_text().replace("there is no x", "still no x"))
    assert sweep() == 1
    assert Counter(notes("begun")) == {"x_1": 1, "x_2": 2, "x_3": 1}
    assert runs_of()[1]["starts"] == 2 and runs_of()[1]["last_lines"][-1] == "still no x of this kind"
    program.write_text(PROGRAM.replace('given.get("broken")', '"repaired"'))
    assert sweep() == 0
    assert [(run["state"], run["last_lines"]) for run in runs_of()] == [("finished", [])] * 3


def test_a_program_that_is_missing_is_a_failure(in_tmp_path: Path) -> None:
    write_sweep({"x": {"values": [1]}}, command=["no_such_program", "${args}"])
    assert sweep() == 1
    assert runs_of()[0]["exit_code"] == 127 and "no_such_program" in runs_of()[0]["last_lines"][-1]


def test_workers_run_at_the_same_time(in_tmp_path: Path) -> None:
    write_sweep({"x": {"min": 1, "max": 5}}, "--seconds=1")
    assert sweep("--workers", "3") == 0
    lines = [line.split() for line in Path("notes.txt").read_text().splitlines()]
    under_way = most = 0
    for what, *_ in sorted(lines, key=lambda line: float(line[2])):
        under_way += 1 if what == "begun" else -1
        most = max(most, under_way)
    assert most == 3 and len(notes("ended")) == 5


def kill_all(process: subprocess.Popen[str]) -> None:
    """The sweep, and by its session each program with its shell: what a machine does that goes down."""
    process.kill()
    process.wait()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            is_ours = f"WANDB_DIR={Path.cwd()}".encode() in path.read_bytes()
            if is_ours:
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue


@pytest.mark.slow
def test_a_sweep_of_24_runs_killed_three_times_ends_complete_with_no_run_twice(in_tmp_path: Path) -> None:
    write_sweep({"x": {"min": 1, "max": 12}, "y": {"values": ["a", "b"]}}, "--seconds=0.3")
    hold, num_lost = Path("hold"), 0
    for num_ended, kill in ((4, subprocess.Popen.kill), (10, kill_all), (16, subprocess.Popen.kill)):
        process = begin("--workers", "2")
        wait_until(lambda least=num_ended: Path("notes.txt").exists() and len(notes("ended")) >= least)
        hold.touch()  # else one might have ended, but not told its shell
        time.sleep(0.5)
        wait_until(lambda lost=num_lost: len(notes("begun")) == len(notes("ended")) + 2 + lost)
        kill(process)
        num_lost += 2 if kill is kill_all else 0
        process.wait()
        hold.unlink()
    assert len(notes("ended")) < 24
    assert sweep("--workers", "2") == 0
    assert len(runs_of()) == 24 and {run["state"] for run in runs_of()} == {"finished"}
    assert Counter(notes("ended")) == {run["name"]: 1 for run in runs_of()}
    again = Counter(notes("begun")) - Counter(notes("ended"))
    assert again.total() == 2  # those of the two workers whose programs were killed, too
    assert sum(run["starts"] for run in runs_of()) == 26


def killed_within_a_run() -> None:
    """The sweep alone; its program waits for the end of `hold`."""
    Path("hold").touch()
    process = begin()
    wait_until(lambda: Path("notes.txt").exists())
    process.kill()
    process.wait()
    assert [run["state"] for run in runs_of()] == ["running"]


def test_a_run_that_outlived_its_sweep_is_waited_for(in_tmp_path: Path) -> None:
    write_sweep({"x": {"values": [1]}})
    killed_within_a_run()
    Timer(1.0, Path("hold").unlink).start()
    assert sweep() == 0
    assert notes("begun") == notes("ended") == ["run"]
    assert runs_of()[0]["starts"] == 1 and runs_of()[0]["seconds"] >= 1
    assert runs_of()[0]["metric"] == 4


def test_a_run_that_ended_after_its_sweep_is_not_run_again(in_tmp_path: Path) -> None:
    write_sweep({"x": {"values": [1]}})
    killed_within_a_run()
    Path("hold").unlink()
    wait_until(lambda: Path("runs/sweeps/sweep/logs/run.1.exit").exists())
    assert sweep() == 0
    assert notes("begun") == ["run"] and runs_of()[0]["metric"] == 4


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_told_to_end_tells_its_programs(in_tmp_path: Path, signum: int) -> None:
    write_sweep({"x": {"values": [1, 2]}}, "--seconds=30")
    process = begin()
    wait_until(lambda: Path("notes.txt").exists())
    process.send_signal(signum)
    assert process.wait(30) == 128 + signum
    assert notes("saved") == ["x_1"]
    assert [run["state"] for run in runs_of()] == ["stopped", "waiting"]
    write_sweep({"x": {"values": [1, 2]}}, "--seconds=30")
    Path("program.py").write_text(PROGRAM.replace('float(given.get("seconds", 0.02))', "0"))
    assert sweep() == 0  # goes on with the one that was begun
    assert [run["starts"] for run in runs_of()] == [2, 1] and notes("ended") == ["x_1", "x_2"]


def test_a_folder_belongs_to_one_sweep_and_one_process(in_tmp_path: Path, capsys) -> None:
    write_sweep({"x": {"values": [1]}}, run_cap=1)
    assert sweep() == 0
    with Path("runs/sweeps/sweep/lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep() == 2
        assert "is being run by another emu sweep" in capsys.readouterr().err
    write_sweep({"x": {"values": [1]}}, run_cap=2, description="more")  # what may change
    assert sweep() == 0
    write_sweep({"x": {"values": [1, 2]}})
    assert sweep() == 2
    assert (
        "holds a sweep of another definition than sweep.yaml: name another --out" in capsys.readouterr().err
    )


def test_a_search_runs_so_many_and_goes_on(in_tmp_path: Path, capsys) -> None:
    space = {"x": {"min": -10.0, "max": 10.0}}
    write_sweep(space, method="bayes")
    assert sweep() == 2
    assert "method bayes has no end: give --count, or run_cap in the file" in capsys.readouterr().err
    assert sweep("--count", "3") == 0
    first = runs_of()
    assert sweep("--count", "5", "--workers", "2") == 0
    assert runs_of()[:3] == first and len(runs_of()) == 5
    for run in runs_of():
        assert run["metric"] == pytest.approx((run["parameters"]["x"] - 3) ** 2)
    write_sweep(space, method="bayes", command=COMMAND[:-1], run_cap=3)
    assert sweep("--out", "other") == 2
    assert "loss is read from metrics.csv in the folder that --run_dir" in capsys.readouterr().err


def test_count_limits_a_grid(in_tmp_path: Path) -> None:
    write_sweep({"x": {"min": 1, "max": 4}})
    assert sweep("--count", "2") == 0
    assert notes("ended") == ["x_1", "x_2"]
    assert sweep() == 0
    assert notes("ended") == ["x_1", "x_2", "x_3", "x_4"]


def test_records_keep_what_they_are_given(tmp_path: Path) -> None:
    run = Run("a", {"x": [1, None], "y": 0.1}, "failed", 2, 3.5, 4.5, 1, 0.25, "two\nlines")
    records = Records(tmp_path / "runs.db")
    records.add([run, Run("b", {}), Run("a", {"x": "never"})])  # a name is added once
    run.metric = None
    records.save(run)
    records.close()
    assert Records(tmp_path / "runs.db").all() == [run, Run("b", {})]


@pytest.mark.smoke
@pytest.mark.slow
def test_a_training_that_was_killed_goes_on_from_its_checkpoint(in_tmp_path: Path) -> None:
    root = Path(cli.__file__).parent.parent
    command = ["${env}", f"PYTHONPATH={root}", "${interpreter}", "${program}", "fit", *TOY, *QUIET, "${args}"]
    options = [
        "--model.seconds_per_step=0.05",
        "--checkpoint.every_n_train_steps=5",
        "--trainer.max_steps=60",
    ]
    ours = ["--trainer.log_every_n_steps=1", "--run_dir=runs/$WANDB_RUN_ID", "--ckpt_path=last"]
    write_sweep(
        {"model.latent_channels": {"values": [4, 8]}},
        program=str(root / "main.py"),
        command=[*command, *options, *ours],
        metric={"name": "train/loss"},
    )
    process = begin()
    wait_until(lambda: Path("runs/latent_channels_4/checkpoints/last.ckpt").exists(), seconds=200)
    kill_all(process)
    assert not Path("runs/latent_channels_4/finished.json").exists()
    assert sweep() == 0
    assert [(run["state"], run["starts"]) for run in runs_of()] == [("finished", 2), ("finished", 1)]
    log = Path("runs/sweeps/sweep/logs/latent_channels_4.2.log").read_text()
    assert "Restored all states from the checkpoint at runs/latent_channels_4/checkpoints/last.ckpt" in log
    losses = [run["metric"] for run in runs_of()]
    assert losses[0] == losses[1] is not None  # of equal trainings, one of them interrupted
