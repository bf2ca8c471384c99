"""The real `wandb sweep` and `wandb agent`, against a stand-in of their service, do what `emu sweep` does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emu_lightning import cli
from tests.sweeps.service import SWEEP, Service, service

pytestmark = [pytest.mark.smoke, pytest.mark.slow]
ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
PROGRAM = """
import json, os, sys, wandb
with wandb.init() as run:
    for step in range(3):
        run.log({"loss": 1 / (1 + step), "trainer/global_step": step})
    seen = {"argv": sys.argv[1:], "config": dict(run.config), "sweep": run.sweep_id, "run": run.id}
    with open("seen.jsonl", "a") as file:
        file.write(json.dumps(seen) + "\\n")
"""
SWEEP_FILE = """
program: program.py
method: grid
parameters:
  model.lr: {values: [1.0e-4, true]}
  model.list: {values: [[0, 1], null]}
  data.kind: {value: a b}
command: ["${env}", "${interpreter}", "${program}", fit, "${args}", --run_dir=runs/$WANDB_RUN_ID]
"""


@pytest.fixture
def wandb_service(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """The stand-in; a home with no key in it, and an environment that knows of no other service."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(in_tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    with service() as started:
        yield started


def wandb(told: Service, *arguments: str) -> str:
    done = subprocess.run(
        [BIN / "wandb", *arguments],
        env=os.environ | told.environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    return done.stderr


def seen() -> list[dict[str, Any]]:
    lines = Path("seen.jsonl").read_text().splitlines()
    Path("seen.jsonl").unlink()
    return [json.loads(line) for line in lines]


def as_set(runs: list[dict[str, Any]]) -> set[str]:
    """Of what was run, without whose run it was; options in the order of their names."""
    return {json.dumps([sorted(run["argv"]), sorted(run["config"].items(), key=str)]) for run in runs}


def test_agent_and_emu_sweep_run_the_same(wandb_service: Service) -> None:
    Path("program.py").write_text(PROGRAM)
    Path("sweep.yaml").write_text(SWEEP_FILE)
    assert SWEEP in wandb(wandb_service, "sweep", "--project", "tests", "sweep.yaml")
    wandb(wandb_service, "agent", f"us/tests/{SWEEP}")
    by_agent = seen()
    assert len(by_agent) == 4 and {run["sweep"] for run in by_agent} == {SWEEP}
    assert [run["run"] for run in by_agent] == list(wandb_service.given)
    assert set(wandb_service.exit_codes.values()) == {0}

    cli.main(["sweep", "sweep.yaml", "--workers", "2"])
    here = seen()
    assert as_set(here) == as_set(by_agent) and len(here) == 4
    assert {run["sweep"] for run in here} == {"sweep"}
    assert {run["run"] for run in here} >= {"lr_0.0001-list_0_1", "lr_True-list_None"}

    assert not {run["run"] for run in here} & set(wandb_service.runs)  # until they are synced
    folders = sorted(map(str, Path("runs/sweeps/sweep/wandb").glob("offline-run-*")))
    wandb(wandb_service, "sync", "--yes", *folders)
    for run in here:
        told = wandb_service.runs[run["run"]]
        assert told["sweep"] == "sweep"
        config = json.loads(told["config"])
        assert {name: config[name]["value"] for name in run["config"]} == run["config"]
        rows = wandb_service.history[run["run"]].values()
        assert [row["trainer/global_step"] for row in rows] == [0, 1, 2]
