"""W&B beside a training: one run whatever happens, all steps, and nothing that training waits for.

What is logged is looked at where it arrives: the real `wandb` writes it, and uploads it to a stand-in of the
service.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image

from emu_lightning import cli
from emu_lightning.callbacks import SampleGrid, WandbRun
from tests.callbacks.test_samples import Counter
from tests.sweeps.service import Service
from tests.sweeps.test_agent import ROOT, wandb, wandb_service  # noqa: F401  # a fixture
from tests.test_cli import QUIET, TOY
from tests.tiny import TinyData, make_trainer

pytestmark = [pytest.mark.smoke, pytest.mark.slow]
WANDB = f"--config={ROOT / 'configs/loggers/wandb.yaml'}"
EVERY_STEP = ["--trainer.log_every_n_steps=1", "--trainer.val_check_interval=2"]


def fit(run: str, max_steps: int, *options: str) -> None:
    cli.main(
        [
            "fit",
            WANDB,
            *TOY,
            *QUIET,
            *EVERY_STEP,
            f"--run_dir={run}",
            f"--trainer.max_steps={max_steps}",
            *options,
        ]
    )


def uploaded(told: Service, *runs: str) -> dict[str, list[dict[str, Any]]]:
    """Rows that the service has of each run after a sync of all offline files in run folders."""
    folders = [str(path) for run in runs for path in sorted(Path(run, "wandb").glob("offline-run-*"))]
    wandb(told, "sync", "--yes", *folders)
    return {name: [lines[number] for number in sorted(lines)] for name, lines in told.history.items()}


def steps(rows: list[dict[str, Any]], metric: str) -> list[int]:
    return [row["trainer/global_step"] for row in rows if metric in row]


def test_all_starts_of_a_training_are_one_run_with_every_step(wandb_service: Service) -> None:  # noqa: F811
    """Offline, because there is no key; another training of the same process is another run."""
    fit("one", 4)
    fit("two", 2)
    fit("one", 7, "--ckpt_path=last")
    assert len(list(Path("one/wandb").glob("offline-run-*"))) == 2
    rows = uploaded(wandb_service, "one", "two")
    one, two = (Path(run, "wandb", "run_id").read_text() for run in ("one", "two"))
    assert set(rows) == {one, two} and one != two
    assert steps(rows[one], "train/loss") == [0, 1, 2, 3, 4, 5, 6]
    assert steps(rows[one], "val/loss") == [1, 3, 5]
    assert steps(rows[two], "train/loss") == [0, 1]
    logged = {row["trainer/global_step"]: row["train/loss"] for row in rows[one] if "train/loss" in row}
    with Path("one/metrics.csv").open(newline="") as file:
        written = {
            int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]
        }
    assert logged == written

    config = json.loads(wandb_service.runs[one]["config"])
    resolved = yaml.safe_load(Path("one/config.yaml").read_text())
    assert config["cli"]["value"]["trainer"]["max_steps"] == resolved["trainer"]["max_steps"] == 7
    assert wandb_service.runs[one]["project"] == "emu_lightning"
    assert wandb_service.exit_codes == {one: 0, two: 0}


def test_a_server_that_is_not_there_keeps_nobody_waiting(
    wandb_service: Service,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr("emu_lightning.callbacks.wandb_run.SECONDS_TO_BEGIN", 3)
    with pytest.warns(UserWarning, match="no W&B server .* this run is logged offline"):
        fit("run", 2)
    assert json.loads(Path("run/finished.json").read_text())["step"] == 2
    monkeypatch.delenv("WANDB_BASE_URL")
    rows = uploaded(wandb_service, "run")
    assert steps(rows[Path("run/wandb/run_id").read_text()], "train/loss") == [0, 1]


def test_several_processes_are_one_run_that_a_sweep_names(
    wandb_service: Service,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Online, under torchrun; the folder is named by the environment, too."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "named")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, value in wandb_service.environment.items():
        monkeypatch.setenv(name, value)
    options = [
        *TOY,
        *QUIET,
        *EVERY_STEP,
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.max_steps=4",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [
            *torchrun,
            str(ROOT / "main.py"),
            "fit",
            WANDB,
            *options,
            "--run_dir=runs/$WANDB_SWEEP_ID/$WANDB_RUN_ID",
        ],
        check=True,
        timeout=250,
    )
    assert set(wandb_service.runs) == {"named"} and wandb_service.runs["named"]["sweep"] == "sweep"
    assert steps(list(wandb_service.history["named"].values()), "train/loss") == [0, 1, 2, 3]
    assert Path("runs/sweep/named/finished.json").is_file()


def test_pictures_are_a_table_with_prompts_and_seeds(wandb_service: Service) -> None:  # noqa: F811
    logger = WandbRun()
    logger.run_dir = "run"
    grid = SampleGrid(["a", "bb"], every_n_train_steps=2, first_seed=50)
    make_trainer(Path("run"), max_steps=4, callbacks=[grid], logger=logger).fit(Counter(), TinyData())
    assert not list(Path(".local").glob("**/staging/*"))  # all is in the run folder
    uploaded(wandb_service, "run")
    files = dict(wandb_service.files)
    drawn = []
    for table in [
        json.loads(content) for name, content in wandb_service.files if name == "samples.table.json"
    ]:
        assert table["columns"] == ["prompt", "seed", "picture"]
        assert [row[:2] for row in table["data"]] == [["a", 50], ["bb", 51]]
        pictures = [Image.open(io.BytesIO(files[row[2]["path"]])) for row in table["data"]]
        drawn.append([np.asarray(picture)[0, 0].tolist() for picture in pictures])
    assert sorted(drawn) == [
        [[2, 50, 1], [2, 51, 2]],
        [[4, 50, 1], [4, 51, 2]],
    ]  # step, seed, prompt's length


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, ["finish 0"]),
        (ValueError(), ["finish 1"]),
        (SIGTERMException(), ["mark_preempting", "finish 1"]),  # the agent begins it again
    ],
)
def test_how_a_training_ended_is_told(error: BaseException | None, expected: list[str]) -> None:
    told: list[str] = []

    class Experiment:
        def mark_preempting(self) -> None:
            told.append("mark_preempting")

        def finish(self, exit_code: int) -> None:
            told.append(f"finish {exit_code}")

    logger = WandbRun()
    logger._experiment, logger._sets_data_dir = Experiment(), False
    try:
        if error is not None:
            raise error
        logger.finalize("success")
    except BaseException:  # as Lightning does
        logger.finalize("failed")
    logger.finalize("success")  # there is no run any more
    assert told == expected


def test_a_name_that_the_environment_does_not_have_is_told(in_tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", *TOY, *QUIET, "--run_dir=runs/$NO_SUCH_NAME", "--trainer.max_steps=1"])
    assert (
        "--run_dir: runs/$NO_SUCH_NAME has a name that the environment does not have"
        in capsys.readouterr().err
    )


@pytest.fixture(autouse=True)
def wandb_forgets() -> Iterator[None]:
    """Credentials and settings that W&B keeps in this process."""
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()
