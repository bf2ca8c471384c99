"""What `WandbRun` logs comes back from W&B as it lies in the run folder.

The real `wandb` uploads to a stand-in of the service, and the real `wandb.Api` reads from it.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import wandb
import yaml
from lightning.pytorch import Callback

from emu_lightning.callbacks import HeldOutEvaluation, PreferenceEvaluation, WandbRun
from emu_lightning.callbacks.metrics import MetricsFile
from emu_lightning.dashboard import wandb_project
from emu_lightning.dashboard.runs import read_run
from emu_lightning.dashboard.wandb_project import read_project
from emu_lightning.modules import QualityTuningModule
from tests.sweeps.service import Service
from tests.sweeps.test_agent import wandb as wandb_command
from tests.sweeps.test_agent import wandb_service  # noqa: F401  # a fixture
from tests.sweeps.test_held_out import PROMPTS, Redness
from tests.tiny import TinyData, make_trainer, tiny_generator

pytestmark = [pytest.mark.smoke, pytest.mark.slow]
CONFIG = {
    "seed_everything": 0,
    "data": {"class_path": "emu_lightning.data.WorldData", "init_args": {"subset_size": 100}},
}


@pytest.fixture
def online(wandb_service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:  # noqa: F811
    """The stand-in, and an environment with its key."""
    wandb.teardown()
    for name, value in wandb_service.environment.items():
        monkeypatch.setenv(name, value)
    yield wandb_service
    wandb.teardown()


def log(
    folder: str, rows: list[tuple[int, dict[str, Any]]], *, status: str = "success", **arguments: Any
) -> None:
    logger = WandbRun(project="tests", **arguments)
    logger.run_dir = folder
    logger.log_hyperparams({"cli": CONFIG})
    for step, values in rows:
        logger.log_metrics(values, step)
    logger.finalize(status)
    wandb.teardown()  # it keeps what the environment said


def sync(online: Service) -> None:
    wandb_command(online, "sync", "--yes", *sorted(map(str, Path("run/wandb").glob("offline-run-*"))))


def tune(max_steps: int, *callbacks: Callback, online: Service) -> None:
    """A tiny tuning with all loggers; offline, and synced when it has ended, as without a key."""
    base = tiny_generator(seed=1).save_pretrained("base")
    module = QualityTuningModule(str(base), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    logger = WandbRun(project="tests", name="tuned")
    logger.run_dir = "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        logger.log_hyperparams({"cli": CONFIG})
        loggers = [MetricsFile("run/metrics.csv"), logger]
        trainer = make_trainer(
            Path("run"),
            max_steps=max_steps,
            callbacks=list(callbacks),
            logger=loggers,
            log_every_n_steps=1,
        )
        trainer.fit(module, TinyData())
        wandb.teardown()
    sync(online)


def error_of(path: str) -> str:
    with pytest.raises(ValueError) as error:
        read_project(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_judged_tuning_comes_back_as_it_lies_in_its_folder(online: Service) -> None:
    """Curves and stops of a real training, against metrics.csv and held_out/results.json."""
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    tune(5, HeldOutEvaluation("prompts.txt", Redness(), at_steps=[2, 3]), online=online)

    (run,) = read_project("us/tests")
    written = defaultdict(list)
    with Path("run/metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    written[name].append((int(row["step"]) + 1, float(value)))
    assert {"train/loss", "held_out/appeal_win_minus_lose"} <= set(written)
    assert {
        name: list(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))
        for name, curve in run.curves.items()
    } == written

    entries = json.loads(Path("run/held_out/results.json").read_text())
    judged = [entries[f"step-00000{step}"] for step in (2, 3, 5)]
    for entry in judged:
        del entry["against_start"]  # intervals are only in the folder
    assert list(run.stops) == judged
    assert (run.name, run.sweep, run.state, run.pictures) == ("tuned", "", "finished", None)
    assert run.config == {
        "seed_everything": 0,
        "data": "emu_lightning.data.WorldData",
        "data.subset_size": 100,
    }
    assert run.folder == f"{online.url}/us/tests/runs/{Path('run/wandb/run_id').read_text()}"
    assert run.seconds is not None and 0 < run.seconds < 300

    # What the page reads is the same from either place.
    Path("run/config.yaml").write_text(yaml.safe_dump(CONFIG))
    here = read_run("run")
    assert here.config == run.config and here.last == run.last
    assert [stop["step"] for stop in here.stops] == [0, *(stop["step"] for stop in run.stops)]


def test_without_held_out_stops_there_are_those_that_chose(online: Service) -> None:
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    chooser = PreferenceEvaluation(Redness(), "prompts.txt", every_n_train_steps=2, max_faithfulness_loss=1)
    tune(4, chooser, HeldOutEvaluation("prompts.txt", Redness()), online=online)
    (run,) = read_project("us/tests")
    lines = Path("run/preference.jsonl").read_text().splitlines()
    assert list(run.stops) == [json.loads(line) for line in lines] and len(lines) == 2
    assert len(run.curves["held_out/appeal"].steps) == 1  # what was kept is judged once


def test_runs_of_a_sweep_have_states_and_names_of_their_own(
    online: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "tests")
    for number, (sweep, status) in enumerate([("one", "success"), ("one", "failed"), ("two", "success")]):
        monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
        monkeypatch.setenv("WANDB_RUN_ID", f"id{number}")
        log(f"run{number}", [(0, {"val/loss": number})], name="same", status=status)
    parameters = {"data.subset_size": {"value": 7}}
    online.runs["id3"] = {"project": "tests", "sweep": "one", "state": "pending"}
    online.runs["id3"]["config"] = json.dumps(parameters)
    online.runs["id4"] = {"project": "tests", "sweep": "two", "state": "crashed"}

    runs = read_project("us/tests/one")
    assert [(run.name, run.sweep, run.state) for run in runs] == [
        ("same id0", "one", "finished"),
        ("same id1", "one", "failed"),
        ("id3", "one", "waiting"),
    ]
    assert runs[2].config == {"data.subset_size": 7}  # it has not resolved any yet
    assert not runs[2].curves and runs[2].seconds is None
    assert [run.last.get("val/loss") for run in runs[:2]] == [0, 1]
    assert [(run.name, run.state) for run in read_project("us/tests")][2:] == [
        ("same id2", "finished"),
        ("id3", "waiting"),
        ("id4", "stopped"),
    ]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_run_that_was_begun_again_has_each_step_once(
    mode: str, online: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And values that JSON has no number for."""
    monkeypatch.setenv("WANDB_MODE", mode)
    log("run", [(0, {"a": 1.0}), (1, {"a": 2.0}), (2, {"a": math.nan})])
    log("run", [(1, {"a": 5.0, "epoch": 0}), (3, {"a": math.inf}), (4, {"b": 7.0})])
    if mode == "offline":
        sync(online)
    (run,) = read_project("us/tests")
    assert set(run.curves) == {"a", "b"}
    assert run.curves["a"].steps.tolist() == [1, 2, 3, 4]
    assert run.curves["a"].values.tolist() == pytest.approx([1, 5, math.nan, math.inf], nan_ok=True)
    assert (run.curves["b"].steps.tolist(), run.curves["b"].values.tolist()) == ([5], [7])


def test_history_longer_than_a_page_is_read_to_its_end(online: Service) -> None:
    log("run", [(step, {"a": float(step)}) for step in range(1203)])
    (run,) = read_project("us/tests")
    assert run.curves["a"].values.tolist() == list(range(1203))


def test_what_is_not_there_is_named(online: Service) -> None:
    assert "no project us/missing" in error_of("us/missing")
    online.runs["one"] = {"project": "tests", "sweep": "other"}
    assert "sweep missing has no runs" in error_of("us/tests/missing")
    for path in ("tests", "us/", "us/tests/sweep/run", ""):
        assert "ENTITY/PROJECT" in error_of(path)


def test_training_offline_does_not_keep_from_reading(
    online: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    online.runs["one"] = {"project": "tests"}
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert [run.name for run in read_project("us/tests")] == ["one"]


def test_without_a_key_nobody_is_asked_for_one(wandb_service: Service) -> None:  # noqa: F811
    wandb.teardown()
    assert "wandb login" in error_of("us/tests") and "WANDB_API_KEY" in error_of("us/tests")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nowhere"])  # where nobody listens, no address
def test_a_server_that_is_not_there_is_named(
    url: str, online: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_project, "SECONDS", 2)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert "WANDB_BASE_URL" in error_of("us/tests")


@pytest.mark.timeout(60)
def test_a_server_that_falls_silent_is_not_waited_for(
    online: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    log("run", [(0, {"a": 1.0})])
    monkeypatch.setattr(wandb_project, "SECONDS", 2)
    monkeypatch.setattr(wandb_project, "RETRIES", 1)
    silence = Event()
    monkeypatch.setattr(online, "_HistoryPage", lambda asked: silence.wait(50) and {}, raising=False)
    try:
        assert "us/tests of W&B cannot be read" in error_of("us/tests")
    finally:
        silence.set()
