"""The command line: quick help, one-line errors, configs that merge and round-trip, runs that resume."""

from __future__ import annotations

import csv
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

from emu_lightning import cli
from emu_lightning.verbs import train
from emu_lightning.verbs.arguments import call

ROOT = Path(__file__).parent.parent
TOY = ["--model=tests.toy.ToyModule", "--model.denoiser=tests.toy.Denoiser", "--data=tests.toy.ToyData"]
QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
]


def fit(*options: str) -> None:
    cli.main(["fit", *TOY, *QUIET, *options])


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line a user sees."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if line.startswith("emu: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("emu: error: ")


def checkpoint(run: str, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(Path(run) / "checkpoints" / name, weights_only=True)


def assert_same_weights(run: str, other: str) -> None:
    """Bit for bit."""
    expected = checkpoint(other)["state_dict"]
    assert expected
    for name, weight in checkpoint(run)["state_dict"].items():
        assert torch.equal(weight, expected[name])


# --- the dispatcher -----------------------------------------------------------------------------------------


def test_help_is_quick_and_lists_every_verb() -> None:
    seconds = []
    for _ in range(3):  # the best of three: other work on the machine is not the program's time
        start = time.monotonic()
        argv = [sys.executable, "main.py", "--help"]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - start)
    assert all(f"\n  {verb} " in done.stdout for verb in cli.VERBS)
    assert min(seconds) < 1.5


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from emu_lightning.cli import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"torch", "lightning", "numpy", "yaml", "jsonargparse"}


def test_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, ["evalute"]) == "'evalute' is not a verb: did you mean 'evaluate'?"
    assert "--help" in error_of(capsys, ["xyzzy"])


@pytest.mark.parametrize("error", [ValueError("two\n  lines"), FileNotFoundError("two lines")])
def test_user_errors_end_in_one_line(error, capsys, monkeypatch) -> None:
    def broken(argv: list[str]) -> None:
        raise error

    monkeypatch.setattr("emu_lightning.verbs.train.main", broken)
    assert error_of(capsys, ["fit"]) == "two lines"
    monkeypatch.setenv("EMU_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["fit"])


def test_an_error_from_a_data_worker_ends_in_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    message = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in y\n    z()\nValueError: a.jpg: truncated\n'
    )
    with pytest.raises(SystemExit):
        cli.fail(message)
    assert capsys.readouterr().err == "emu: error: a.jpg: truncated\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def buggy(argv: list[str]) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("emu_lightning.verbs.train.main", buggy)
    with pytest.raises(KeyError):
        cli.main(["fit"])


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("emu_lightning.verbs.train.main", interrupted)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fit"])
    assert exit_.value.code == 130


# --- configurations -----------------------------------------------------------------------------------------


UNKNOWN = [  # option, the class that it is not an option of, what was meant
    ("--model.latent_chanels=8", " of tests.toy.ToyModule", "latent_channels"),
    ("--model.denoiser.widht=3", " of tests.toy.Denoiser", "width"),
    ("--model.optimizer.lrr=2", " of torch.optim.AdamW", "lr"),
    ("--data.batchsize=3", " of tests.toy.ToyData", "batch_size"),
    ("--trainer.max_step=3", "", "trainer.max_steps"),
    ("--checkpoint.every_n_step=3", "", "checkpoint.every_n_train_steps"),
    ("--run_dri=runs/a", "", "run_dir"),
]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        *(
            (option, f"{option[2:].partition('=')[0]!r} is not an option{owner}; did you mean {meant!r}?")
            for option, owner, meant in UNKNOWN
        ),
        (
            "--model.latent_channels=5",
            "model.latent_channels: Expected a typing.Literal[4, 8, 16]. Got value: 5",
        ),
        ("--model.optimizer.lr=fast", "model.optimizer.lr: Expected a <class 'float'>"),
        (
            "--model.optimizer=not_installed.Adam",
            "not_installed.Adam cannot be imported: No module named 'not_installed'",
        ),
        ("--model=tests.toy.NoModule", "model: module 'tests.toy' has no attribute 'NoModule'"),
        ("--trainer.default_root_dir=here", "'trainer.default_root_dir' is set by 'run_dir': give that one"),
        ("--config=missing.yaml", "config: File does not exist: 'missing.yaml'"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(option, expected, capsys, in_tmp_path) -> None:
    message = error_of(capsys, ["fit", *TOY, "--trainer.max_steps=1", option])
    assert message.replace(f"{in_tmp_path}/", "") == expected
    assert not list(in_tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: {class_path: tests.toy.ToyModule, init_args: {latent_chanels: 8}}",
            "'model.latent_chanels' is not an option",
        ),
        ("trainer: {max_step: 3}", "'trainer.max_step' is not an option; did you mean 'trainer.max_steps'?"),
        ("modell: {class_path: x}", "'modell.class_path' is not an option; did you mean 'model'?"),
        (
            "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitr: a}}]}",
            "'trainer.callbacks.monitr' is not an option",
        ),
        ("model:\n  a: 1\n b: [", "wrong.yaml is not valid YAML"),
    ],
)
def test_a_wrong_key_in_a_file_is_named_in_one_line(text, expected, capsys, in_tmp_path) -> None:
    Path("wrong.yaml").write_text(text)
    assert error_of(capsys, ["fit", *TOY, "--trainer.max_steps=1", "--config=wrong.yaml"]).startswith(
        expected
    )


def test_a_missing_argument_is_named(capsys, in_tmp_path) -> None:
    assert error_of(capsys, ["fit"]) == "missing: --data, --model; or give a --config that has it"
    message = error_of(capsys, ["fit", TOY[0], TOY[2], "--trainer.max_steps=1"])
    assert message == "missing: --model.denoiser; or give a --config that has it"


def test_training_without_an_end_is_refused(capsys, in_tmp_path) -> None:
    assert "--trainer.max_steps" in error_of(capsys, ["fit", *TOY])


def bake(flour: int, style: Literal["flat", "tall"] = "flat", salt: float = 0.5) -> tuple[int, str, float]:
    """A verb."""
    return flour, style, salt


def test_a_verb_takes_its_arguments_from_its_signature(in_tmp_path) -> None:
    Path("a.yaml").write_text("flour: 3\nstyle: tall")
    Path("b.yaml").write_text("flour: 4")
    assert call(bake, ["--config=a.yaml", "--config=b.yaml", "--salt=1"], "emu bake") == (4, "tall", 1.0)
    for argv, expected in {
        ("--flour=1", "--slat=2"): "'slat' is not an option; did you mean 'salt'?",
        ("--flour=1", "--style=round"): "style: Expected a typing.Literal['flat', 'tall']. Got value: round",
        ("--config=a.yaml", "--flour=x"): "flour: Expected a <class 'int'>. Got value: x",
        (): "missing: --flour; or give a --config that has it",
    }.items():
        with pytest.raises(ValueError) as error:
            call(bake, list(argv), "emu bake")
        assert str(error.value) == expected


def test_shipped_configs_are_found_from_anywhere(in_tmp_path, monkeypatch) -> None:
    """What the README says must work where a wheel is installed and there is no checkout."""
    monkeypatch.setattr("emu_lightning.resources.PACKAGE", in_tmp_path / "site-packages" / "emu_lightning")
    shipped = in_tmp_path / "site-packages/emu_lightning/configs/stage/a.yaml"
    shipped.parent.mkdir(parents=True)
    shipped.write_text("flour: 7")
    assert call(bake, ["--config", "configs/stage/a.yaml"], "emu bake")[0] == 7
    assert call(bake, ["--config=configs/stage/a.yaml"], "emu bake")[0] == 7
    with pytest.raises(ValueError, match="File does not exist.*configs/stage/b.yaml"):
        call(bake, ["--config=configs/stage/b.yaml"], "emu bake")
    Path("configs/stage").mkdir(parents=True)
    Path("configs/stage/a.yaml").write_text("flour: 8")  # a file of the user's comes first
    assert call(bake, ["--config=configs/stage/a.yaml"], "emu bake")[0] == 8


def printed_config(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fit", *options, "--print_config"])
    assert not exit_.value.code
    return capsys.readouterr().out


def test_print_config_round_trips(capsys, in_tmp_path) -> None:
    options = [
        "--trainer.max_steps=7",
        "--model.optimizer=Adam",
        "--model.optimizer.lr=0.5",
        "--run_dir=runs/a",
    ]
    first = printed_config(capsys, *TOY, *options)
    Path("printed.yaml").write_text(first)
    assert printed_config(capsys, "--config=printed.yaml") == first
    config = yaml.safe_load(first)
    assert config["run_dir"] == "runs/a"
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5


def test_overlays_merge_and_the_later_wins(capsys, in_tmp_path) -> None:
    Path("a.yaml").write_text(
        "trainer: {max_steps: 3, log_every_n_steps: 1}\n"
        "data: {class_path: tests.toy.ToyData, init_args: {width: 5}}"
    )
    Path("b.yaml").write_text("trainer: {max_steps: 4}\ndata: {init_args: {batch_size: 9}}")
    files = ["--config=a.yaml", "--config=b.yaml"]
    config = yaml.safe_load(printed_config(capsys, *TOY[:2], *files, "--data.batch_size=8"))
    assert (config["trainer"]["max_steps"], config["trainer"]["log_every_n_steps"]) == (4, 1)
    assert config["data"]["init_args"] == {"width": 5, "batch_size": 8}


# --- runs ---------------------------------------------------------------------------------------------------


def test_a_run_folder_holds_everything_and_repeats_the_run(in_tmp_path) -> None:
    every = [
        "--checkpoint.every_n_train_steps=2",
        "--checkpoint.keep_steps=[3]",
        "--trainer.log_every_n_steps=1",
    ]
    fit("--trainer.max_steps=5", "--run_dir=runs/a", "--trainer.val_check_interval=4", *every)
    assert sorted(path.name for path in Path("runs/a").iterdir()) == [
        "checkpoints", "config.yaml", "finished.json", "metrics.csv", "speed.csv",
    ]  # fmt: skip
    assert sorted(path.name for path in Path("runs/a/checkpoints").iterdir()) == ["last.ckpt", "step-3.ckpt"]
    assert checkpoint("runs/a")["global_step"] == 5  # not a multiple of 2, but the end
    assert checkpoint("runs/a")["state_dict"]["ended"]  # what the module did when training had ended
    assert checkpoint("runs/a", "step-3.ckpt")["global_step"] == 3
    assert json.loads(Path("runs/a/finished.json").read_text())["step"] == 5
    rows = list(csv.DictReader(Path("runs/a/metrics.csv").open()))
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2", "3", "4"]
    assert [row["step"] for row in rows if row["val/loss"]] == ["3"]
    assert list(in_tmp_path.iterdir()) == [in_tmp_path / "runs"]

    cli.main(["fit", "--config=runs/a/config.yaml", "--run_dir=runs/b"])
    assert_same_weights("runs/b", "runs/a")


@pytest.mark.parametrize("val_check_interval", [4, 5])  # where the first part ends, and not there
def test_a_resumed_run_ends_as_if_it_had_not_been_interrupted(val_check_interval, in_tmp_path) -> None:
    common = ["--checkpoint.every_n_train_steps=2", "--trainer.log_every_n_steps=1"]
    common.append(f"--trainer.val_check_interval={val_check_interval}")
    fit("--trainer.max_steps=6", "--run_dir=runs/whole", *common)
    fit("--trainer.max_steps=4", "--run_dir=runs/parts", *common)
    with Path("runs/parts/metrics.csv").open(
        "a"
    ) as file:  # a step after the checkpoint, a row torn by a kill
        file.write("4,0.5\n1" if val_check_interval == 5 else "4,0.5,\n1")
    fit("--trainer.max_steps=6", "--run_dir=runs/parts", "--ckpt_path=last", *common)
    assert_same_weights("runs/parts", "runs/whole")
    assert Path("runs/parts/metrics.csv").read_text() == Path("runs/whole/metrics.csv").read_text()


def test_resuming_where_nothing_is_starts_from_the_beginning(in_tmp_path) -> None:
    fit("--trainer.max_steps=1", "--ckpt_path=last")
    assert json.loads(Path("runs/unnamed/finished.json").read_text())["step"] == 1


def test_a_second_run_does_not_overwrite_the_first(capsys, in_tmp_path) -> None:
    fit("--trainer.max_steps=1")
    message = error_of(capsys, ["fit", *TOY, *QUIET, "--trainer.max_steps=2"])
    assert "--ckpt_path last" in message and "--run_dir" in message


def test_a_checkpoint_never_rules_the_configuration(capsys, in_tmp_path) -> None:
    """Lightning 2.6 would silently take latent_channels, and even the class, from the checkpoint."""
    fit("--trainer.max_steps=1", "--run_dir=runs/a", "--model.latent_channels=8")
    resume = ["--run_dir=runs/a", "--ckpt_path=last", "--trainer.max_steps=2"]
    message = error_of(capsys, ["fit", *TOY, *QUIET, *resume, "--model.latent_channels=16"])
    assert "model.latent_channels=8" in message and "16" in message and "init_from" in message
    message = error_of(capsys, ["fit", *TOY, *QUIET, *resume, "--model=tests.toy.OtherModule"])
    assert "model.class_path=tests.toy.ToyModule" in message

    # A checkpoint that was moved out of its run folder has nothing to compare with: the configuration stands.
    Path("runs/a/checkpoints/last.ckpt").rename("moved.ckpt")
    fit("--run_dir=runs/b", "--ckpt_path=moved.ckpt", "--trainer.max_steps=2", "--model.latent_channels=16")
    assert checkpoint("runs/b")["hyper_parameters"]["latent_channels"] == 16
    written = yaml.safe_load(Path("runs/b/config.yaml").read_text())
    assert written["model"]["init_args"]["latent_channels"] == 16


def test_a_checkpoint_that_does_not_fit_the_model_ends_in_one_line(capsys, in_tmp_path) -> None:
    fit("--trainer.max_steps=1", "--run_dir=runs/a")
    Path("runs/a/checkpoints/last.ckpt").rename("moved.ckpt")
    wider = ["--model.denoiser.width=4", "--data.width=4", "--ckpt_path=moved.ckpt", "--trainer.max_steps=2"]
    assert "does not fit the configured model" in error_of(capsys, ["fit", *TOY, *QUIET, *wider])


def test_a_checkpoint_that_cannot_be_read_ends_in_one_line(capsys, in_tmp_path) -> None:
    fit("--trainer.max_steps=1", "--run_dir=runs/a")
    content = Path("runs/a/checkpoints/last.ckpt").read_bytes()
    Path("torn.ckpt").write_bytes(content[: len(content) // 2])
    Path("code.ckpt").write_bytes(pickle.dumps(Path.touch))
    torch.save({"state_dict": Path.touch}, "zipped_code.ckpt")
    torch.save([1], "list.ckpt")
    for name in ("torn.ckpt", "code.ckpt", "zipped_code.ckpt", "list.ckpt"):
        message = error_of(capsys, ["fit", *TOY, *QUIET, "--trainer.max_steps=2", f"--ckpt_path={name}"])
        assert f"{name} cannot be read as a checkpoint" in message and "weights_only" not in message
    message = error_of(capsys, ["fit", *TOY, *QUIET, "--trainer.max_steps=2", "--ckpt_path=runs/a"])
    assert "runs/a is not a complete sharded checkpoint" in message


def test_validating_a_run_leaves_its_history_alone(capsys, in_tmp_path) -> None:
    fit("--trainer.max_steps=2", "--run_dir=runs/a", "--trainer.log_every_n_steps=1")
    before = {path: path.read_bytes() for path in Path("runs/a").rglob("*") if path.is_file()}
    cli.main(["validate", *TOY, *QUIET, "--run_dir=runs/a", "--ckpt_path=last"])
    assert {path: path.read_bytes() for path in before} == before
    assert "val/loss" in Path("runs/a/validate.csv").read_text()
    missing = error_of(capsys, ["validate", *TOY, *QUIET, "--run_dir=runs/none", "--ckpt_path=last"])
    assert "runs/none" in missing and "does not exist" in missing


def test_a_trial_run_leaves_nothing(in_tmp_path) -> None:
    fit("--trainer.fast_dev_run=2")
    assert not list(in_tmp_path.iterdir())


@pytest.mark.parametrize(("computes", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_mixed_precision_gives_way_on_a_cpu_that_has_none(
    computes, precision, monkeypatch, caplog, in_tmp_path
) -> None:
    monkeypatch.setattr(train, "computes_bfloat16", lambda: computes)
    with caplog.at_level(logging.INFO):
        fit("--trainer.max_steps=1", "--trainer.precision=bf16-mixed")
    assert yaml.safe_load(Path("runs/unnamed/config.yaml").read_text())["trainer"]["precision"] == precision
    assert ("trainer.precision is 32-true" in caplog.text) == (not computes)


def test_loggers_and_callbacks_of_the_config_stand_beside_ours(in_tmp_path) -> None:
    added = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.log_every_n_steps=1"]
    fit("--trainer.max_steps=1", "--run_dir=runs/a", *added, "--trainer.callbacks=LearningRateMonitor")
    theirs = list(Path("logs").rglob("metrics.csv"))
    assert len(theirs) == 1
    for file in [Path("runs/a/metrics.csv"), *theirs]:
        assert "train/loss" in file.read_text()
    assert Path("runs/a/checkpoints/last.ckpt").exists()


def test_the_progress_bar_counts_steps_to_the_end(capsys, in_tmp_path) -> None:
    bar = [option for option in QUIET if "progress" not in option]
    cli.main(["fit", *TOY, *bar, "--trainer.max_steps=3", "--run_dir=runs/a"])
    assert "3/3 [" in capsys.readouterr().err


def start_slow_fit(folder: Path, *options: str) -> subprocess.Popen[str]:
    """A process that trains 40 slow steps and saves every 5, once it has saved something."""
    slow = ["--trainer.max_steps=40", "--checkpoint.every_n_train_steps=5", "--model.seconds_per_step=0.1"]
    argv = [sys.executable, str(ROOT / "main.py"), "fit", *TOY, *QUIET, "--run_dir=runs/a", *slow, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        argv,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Whoever started the tests in a shell's background has given them a deaf ear to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 120
    while not (folder / "runs/a/checkpoints/last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    return process


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_killed_run_goes_on_to_the_same_weights(number, exit_code, in_tmp_path) -> None:
    process = start_slow_fit(in_tmp_path)
    time.sleep(0.25)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == exit_code, output
    assert not Path("runs/a/finished.json").exists()
    step = checkpoint("runs/a")["global_step"]
    assert 5 <= step < 40
    if number == signal.SIGTERM:
        assert step > 5  # saved where it stopped

    fit("--trainer.max_steps=40", "--model.seconds_per_step=0.1", "--run_dir=runs/a", "--ckpt_path=last")
    fit("--trainer.max_steps=40", "--run_dir=runs/whole")
    assert_same_weights("runs/a", "runs/whole")
    assert Path("runs/a/finished.json").exists()
