"""What a sweep file means, against W&B's own agent; what is wrong with one, in one line; the shipped ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from emu_lightning import cli
from emu_lightning.sweeps.definition import Sweep, read_sweep
from emu_lightning.sweeps.runner import LocalSweep
from emu_lightning.verbs.sweep import refuse_wrong_options

ROOT = Path(__file__).parent.parent.parent
SHIPPED = sorted((ROOT / "sweeps").glob("*.yaml"))
MACROS = ["args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags", "args_json"]


def sweep_of(tmp_path: Path, **settings: Any) -> Sweep:
    defaults = {"program": "main.py", "method": "grid", "parameters": {"lr": {"values": [1, 2]}}}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(defaults | settings, sort_keys=False))
    return read_sweep(path)


@pytest.mark.parametrize("macro", MACROS)
def test_a_command_is_spelt_as_the_agent_spells_it(
    macro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.sdk.launch.sweeps import utils

    monkeypatch.setenv("NODES", "3")
    parameters = {
        "model.lr": 1e-4,
        "use_it": True,
        "not_it": False,
        "list": [0, 1],
        "none": None,
        "text": "a b",
    }
    command = ["${env}", "${program}", "fit", "${" + macro + "}", "--nodes=${envvar:NODES}", "--dir=$NODES"]
    sweep = sweep_of(tmp_path, command=command)
    values = utils.create_sweep_command_args({"args": {name: {"value": v} for name, v in parameters.items()}})
    expected: list[str] = []
    for part in utils.create_sweep_command(list(command)):  # as Agent._command_run puts it together
        known = values | {"env": ["/usr/bin/env"], "program": ["main.py"]}
        expected += known[part[2:-1]] if part.startswith("${") else [part]
    assert sweep.command_line(parameters) == expected
    assert "--nodes=3" in expected and "--dir=$NODES" in expected


def test_a_grid_is_every_combination_once(tmp_path: Path) -> None:
    parameters = {
        "a.size": {"values": [100, 500]},
        "a.seed": {"min": 0, "max": 2},
        "b.file": {"values": ["configs/x/one.yaml", "configs/y/one.yaml"]},
        "b.kept": {"value": "same"},
    }
    sweep = sweep_of(tmp_path, parameters=parameters)
    runs = list(sweep.grid())
    assert len(runs) == 2 * 3 * 2 == len({tuple(run.values()) for run in runs})
    assert runs[0] == {"a.size": 100, "a.seed": 0, "b.file": "configs/x/one.yaml", "b.kept": "same"}
    named = sweep.named_grid()
    assert list(named.values()) == runs
    assert next(iter(named)) == "size_100-seed_0-file_x_one"  # what varies, files without what they share
    shown = [
        set(map(str, column)) for column in zip(*(run.values() for run in sweep.examples()), strict=True)
    ]
    every = [set(map(str, column)) for column in zip(*(run.values() for run in runs), strict=True)]
    every[1] -= {"1"}  # of a range the bounds
    assert shown == every and len(sweep.examples()) == 2


def test_two_options_of_one_name_keep_their_whole_names(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, parameters={"data.seed": {"values": [0, 1]}, "model.seed": {"values": [0, 1]}})
    assert sweep.run_name({"data.seed": 1, "model.seed": 0}) == "data.seed_1-model.seed_0"


def test_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, parameters={"word": {"values": ["a b", "a/b"]}})
    with pytest.raises(
        ValueError, match="two runs would be named word_a_b: {'word': 'a b'} and {'word': 'a/b'}"
    ):
        sweep.named_grid()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"metod": "grid"}, "'metod' is not a key of a sweep file; did you mean 'method'?"),
        ({"method": "grids"}, "method must be one of grid, random, bayes, not grids"),
        ({"method": "bayes"}, "method bayes needs a metric"),
        ({"parameters": {}}, "parameters must name what varies"),
        (
            {"parameters": {"lr": {"vlaues": [1]}}},
            "'vlaues' is not a key of parameters.lr; did you mean 'values'?",
        ),
        ({"parameters": {"lr": {"values": []}}}, "parameters.lr: values must be a list that is not empty"),
        ({"parameters": {"lr": {"values": [1, 1]}}}, "parameters.lr: values has a value twice"),
        ({"parameters": {"lr": {"values": [{"a": 1}]}}}, "parameters.lr: a value cannot be a mapping"),
        (
            {"parameters": {"lr": {"min": 0.1, "max": 1.0}}},
            "parameters.lr: a grid needs value, values, or whole",
        ),
        (
            {"parameters": {"lr": {"min": "1e-4", "max": 1}}},
            "parameters.lr: min must be a number, written like 1.0e-4",
        ),
        ({"parameters": {"lr": {"parameters": {}}}}, "'parameters' is not a key of parameters.lr"),
        (
            {"method": "random", "parameters": {"lr": {"distribution": "normal", "min": 0, "max": 1}}},
            "parameters.lr.distribution must be one of int_uniform",
        ),
        (
            {
                "method": "random",
                "parameters": {"lr": {"distribution": "log_uniform_values", "min": 0, "max": 1}},
            },
            "parameters.lr: min must be below max, and positive",
        ),
        (
            {"metric": {"name": "x", "goal": "more"}},
            "metric.goal must be one of minimize, maximize, not more",
        ),
        ({"metric": {"goal": "minimize"}}, "metric has no name"),
        ({"run_cap": 0}, "run_cap must be a positive whole number"),
        ({"command": "python main.py"}, "command must be a list of words"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(settings, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        sweep_of(tmp_path, **settings)
    assert f"sweep.yaml: {expected}" in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_macro_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"command has \$\{arguments\}; known are env, interpreter"):
        sweep_of(tmp_path, command=["${arguments}"]).command_line({})


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.yaml does not exist"):
        read_sweep(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="broken.yaml is not valid YAML"):
        read_sweep(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ValueError, match="list.yaml: a sweep file must be a mapping"):
        read_sweep(tmp_path / "list.yaml")


# --- the shipped ones ---------------------------------------------------------------------------------------


@pytest.fixture
def in_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SLURM_NNODES", "2")


def test_every_ablation_is_there_at_both_scales() -> None:
    names = {"channels", "channels_generation", "set_size", "stopping", "generators", "learning_rate"}
    assert {path.stem for path in SHIPPED} == {
        f"{scale}_{name}" for scale in ("miniature", "emu") for name in names
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_sweep_has_runs_of_their_own_that_go_on(path: Path, in_an_allocation: None) -> None:
    sweep = read_sweep(path)
    runs = list(sweep.grid()) if sweep.method == "grid" else sweep.examples()
    assert len({sweep.run_name(run) for run in runs}) == len(runs)
    command = sweep.command_line(runs[0])
    assert "--run_dir=runs/sweeps/$WANDB_SWEEP_ID/$WANDB_RUN_ID" in command and "--ckpt_path=last" in command
    assert "--config=configs/loggers/wandb.yaml" in command
    assert {f"--{name}={value}" for name, value in runs[0].items()} <= set(command)
    assert ("srun" in command) == path.stem.startswith("emu")
    head = path.read_text().split("program:")[0]
    assert f"sweeps/{path.name}" in head and "paper" in head


@pytest.mark.smoke
@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_options_of_a_shipped_sweep_exist(in_an_allocation: None, tmp_path: Path, path: Path) -> None:
    """By the real parser, with every value that varies."""
    refuse_wrong_options(LocalSweep(read_sweep(path), tmp_path / path.stem))


@pytest.mark.smoke
def test_a_misspelt_key_fails_before_the_first_run(
    in_an_allocation: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "sweeps" / "miniature_set_size.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text.replace("data.subset_size", "data.subset_sise"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["sweep", str(tmp_path / "wrong.yaml"), "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    wrong = "'data.subset_sise' is not an option of emu_lightning.data.WorldData"
    assert capsys.readouterr().err.strip() == f"emu: error: {tmp_path}/wrong.yaml: {wrong}"
    assert not (tmp_path / "out").exists()
