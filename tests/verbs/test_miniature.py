"""A base from a recipe: stages in order, each once, and what is assembled, carried and said of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from emu_lightning import cli
from emu_lightning.models import Autoencoder
from emu_lightning.modules import load_generator
from emu_lightning.resources import miniature_path
from emu_lightning.verbs import miniature, recipes, world_checks
from emu_lightning.verbs.recipes import Recipe, fill, read_recipe, recipe_names
from tests.shipped import SIDE, tiny_options

pytestmark = pytest.mark.smoke
SHIPPED = recipe_names()


def write_recipe(folder: Path, name: str, recipe: Recipe) -> None:
    """Where recipes are looked for first: below the working directory."""
    path = folder / recipes.FOLDER / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dataclasses.asdict(recipe)))


def tiny(recipe: Recipe) -> Recipe:
    """With networks and training as small as can be; what the recipe itself says comes last."""

    def stage(each: recipes.Stage) -> recipes.Stage:
        options = dict(option.removeprefix("--").split("=", 1) for option in tiny_options(each.config))
        return recipes.Stage(each.config, options | each.options)

    stages = {name: stage(each) for name, each in recipe.stages.items()}
    autoencoders = dict.fromkeys(recipe.autoencoders, SIDE)
    return dataclasses.replace(recipe, stages=stages, autoencoders=autoencoders)


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.ckpt")}


def test_a_base_is_made_once_carried_in_half_precision_and_described(
    in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miniature, "NUM_PROMPTS", 4)
    monkeypatch.setattr(world_checks.autoencoder_psnr, "__defaults__", (64, 8, 902))
    write_recipe(in_tmp_path, "toy", tiny(read_recipe("latent")))
    job = ["miniature", "--recipe", "toy", "--run-dir", "runs", "--out", "carried", "--device", "cpu"]
    cli.main(job)

    run, carried = Path("runs/toy"), Path("carried")
    stored = load_file(carried / "model.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float16}
    trained = load_generator(run / "diffusion" / "pretrained").sampling_state()
    assert all(torch.equal(stored[name], value.to(stored[name].dtype)) for name, value in trained.items())
    made = Autoencoder.from_pretrained(run / "autoencoder" / "pretrained").state_dict()
    assert all(torch.equal(trained[f"autoencoder.{name}"], value) for name, value in made.items())

    figures = json.loads((carried / "figures.json").read_text())
    finished = {name: json.loads((run / name / "finished.json").read_text()) for name in figures["seconds"]}
    assert list(figures["seconds"]) == ["autoencoder", "diffusion"]
    assert figures["seconds"] == {name: each["seconds"] for name, each in finished.items()}
    assert figures["parameters"] == sum(value.numel() for value in stored.values())
    card = (carried / "README.md").read_text()
    assert "configs/autoencoder/miniature.yaml" in card and "configs/diffusion/miniature.yaml" in card
    assert f"`{figures['sha256']}`" in card and "`emu miniature --recipe toy`" in card

    # A stage that has ended is not trained again; one that was killed goes on from its checkpoint.
    before, weights = times(run), (carried / "model.safetensors").read_bytes()
    (run / "diffusion" / "finished.json").unlink()
    cli.main(job)
    kept = [path for path, time in before.items() if path.stat().st_mtime_ns == time]
    assert kept == [path for path in before if "autoencoder" in path.parts]
    assert json.loads((run / "diffusion" / "finished.json").read_text())["step"] == 2
    assert (carried / "model.safetensors").read_bytes() == weights


def test_an_unknown_recipe_is_one_line_naming_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["miniature", "--recipe", "lattent"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"emu: error: there is no recipe 'lattent'; there are {', '.join(SHIPPED)}"


def test_a_recipe_with_another_field_is_refused_by_its_name(in_tmp_path: Path) -> None:
    path = in_tmp_path / recipes.FOLDER / "toy.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("title: Toy\nstages: {}\ntuning: {config: a.yaml}\nspeed: 3\n")
    with pytest.raises(ValueError, match="toy.yaml is not a recipe: .*'speed'"):
        read_recipe("toy")


def test_the_run_folder_is_filled_in_wherever_it_stands() -> None:
    value = {"a": ["{run}/b", {"c": "x {run}"}], "n": 3, "none": None}
    assert fill(value, Path('runs/"odd"\\')) == {
        "a": ['runs/"odd"\\/b', {"c": 'x runs/"odd"\\'}],
        "n": 3,
        "none": None,
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_takes_up_only_what_earlier_stages_made(name: str) -> None:
    recipe, made = read_recipe(name), {"cache"}
    for stage, each in recipe.stages.items():
        taken = {value.split("/")[1] for value in map(str, each.options.values()) if "{run}/" in value}
        assert taken <= made, f"stage {stage} takes up {taken - made}"
        made.add(stage)
    assembled = {part.split("/")[0] for part in yaml.safe_dump(recipe.generator).split("{run}/")[1:]}
    assert assembled <= made - {"cache"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_s_options_are_its_configurations_own(name: str, capsys, in_tmp_path: Path) -> None:
    """An option that a configuration does not have would end training only when its stage begins."""
    recipe = read_recipe(name)
    for stage in [*recipe.stages.values(), recipe.tuning]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(
                ["fit", "--config", f"configs/{stage.config}", *stage.arguments(Path("r")), "--print_config"]
            )
        printed = capsys.readouterr()
        assert not exit_.value.code, printed.err
        resolved = printed.out
        assert all(str(fill(value, Path("r"))) in resolved for value in stage.options.values())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_base_took_at_most_ninety_minutes(name: str) -> None:
    figures = json.loads((miniature_path(name) / "figures.json").read_text())
    assert sum(figures["seconds"].values()) <= 90 * 60


@pytest.mark.parametrize("name", [name for name in SHIPPED if miniature_path(name).is_dir()])
def test_a_shipped_base_is_what_its_recipe_says(name: str) -> None:
    folder, recipe = miniature_path(name), read_recipe(name)
    figures = json.loads((folder / "figures.json").read_text())
    assert list(figures["seconds"]) == list(recipe.stages)
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 16e6
    assert (folder / "README.md").read_text() == miniature.model_card(recipe, figures)
    generator = load_generator(folder)
    assert all(generator.get_submodule(network) for network in recipe.autoencoders)
