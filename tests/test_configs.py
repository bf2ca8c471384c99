"""Every shipped configuration parses against the real classes, trains two tiny steps, and reloads.

Configurations are found, not listed: a new one is tested as soon as it lies under `configs/`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from PIL import Image

from emu_lightning import cli
from emu_lightning.models import Autoencoder, VQAutoencoder
from emu_lightning.modules import Generator, load_generator, load_learner
from emu_lightning.modules.generator import Learner
from emu_lightning.resources import shipped
from tests.shipped import CONFIGS, RUN_CONFIGS, SIDE, TINY_MODEL, make_workplace, read, stage_of, tiny_options
from tests.tiny import make_batch

pytestmark = pytest.mark.smoke
CARRIED_BASE = "init_from: emu_lightning/miniature/latent"


def draw(learner: Learner) -> torch.Tensor:
    """A picture, by an upsampler of a small one."""
    if isinstance(learner, Generator):
        return learner.generate(["a red ball in the snow"], [0])
    small = make_batch(0, size=1, side=learner.low_size or SIDE // learner.factor).images
    return learner.upsample(small, ["a red ball in the snow"], [0])


def reloads_as_a_learner(state: dict[str, torch.Tensor]) -> None:
    drawn = [draw(load_learner(path)) for path in ("run/pretrained", "run/checkpoints/last.ckpt")]
    assert drawn[0].shape == (1, 3, SIDE, SIDE)
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-5)  # merged adapters round differently


def reloads_as_an_autoencoder(
    state: dict[str, torch.Tensor], network: type[Autoencoder | VQAutoencoder]
) -> None:
    loaded = network.from_pretrained("run/pretrained")
    again = network.from_config(dict(loaded.config))
    own = "autoencoder."
    again.load_state_dict({key.removeprefix(own): state[key] for key in state if key.startswith(own)})
    images = make_batch(0, side=SIDE).images
    assert torch.equal(again.eval().reconstruct(images), loaded.reconstruct(images))
    measured = loaded.latent_std != 1 if isinstance(loaded, Autoencoder) else loaded.usage.sum() > 0
    assert measured.all()


def reloads_in_open_clip(state: dict[str, torch.Tensor]) -> None:
    name = "local-dir:run/pretrained"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[f"clip.{key}"].half().to(value.dtype))
    black = preprocess(Image.new("RGB", (2 * SIDE, SIDE)))
    assert torch.equal(black, torch.full((3, SIDE, SIDE), -1.0))  # as images in training
    tokens = open_clip.get_tokenizer(name)(["a red ball"])
    assert model.eval()(black[None], tokens)[0].shape == (1, 8)


RELOADS: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "AutoencoderModule": partial(reloads_as_an_autoencoder, network=Autoencoder),
    "VQAutoencoderModule": partial(reloads_as_an_autoencoder, network=VQAutoencoder),
    "ContrastiveModule": reloads_in_open_clip,
}


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fit", *argv, "--print_config"])
    output = capsys.readouterr()
    assert not exit_.value.code, output.err
    return yaml.safe_load(output.out)


def test_there_is_a_configuration_for_every_stage() -> None:
    assert {stage_of(read(name)) for name in RUN_CONFIGS} == set(TINY_MODEL)


@pytest.mark.parametrize("name", RUN_CONFIGS)
def test_it_parses_as_shipped_and_prints_itself(name: str, capsys, in_tmp_path) -> None:
    config = read(name)
    needs = ["--data.path=photographs"] if config["data"]["class_path"].endswith("FolderData") else []
    resolved = printed(capsys, "--config", str(CONFIGS / name), *needs)
    Path("printed.yaml").write_text(yaml.safe_dump(resolved))
    assert printed(capsys, "--config", "printed.yaml") == resolved
    kept = {"seed_everything", "run_dir", "trainer", "model", "data"}
    assert kept <= set(config), f"{name} leaves out {kept - set(config)}"
    assert resolved["run_dir"] == config["run_dir"]
    assert resolved["trainer"]["max_steps"] == config["trainer"]["max_steps"] > 0


@pytest.mark.parametrize("name", RUN_CONFIGS)
def test_it_names_itself_and_what_the_paper_gives(name: str) -> None:
    """Each opens with the command that runs it, and says what is a choice."""
    comments = [line for line in (CONFIGS / name).read_text().splitlines() if line.startswith("#")]
    head = " ".join(comments)
    assert f"configs/{name}" in head or "emu quickstart" in head
    assert "choice" in head.lower() and "paper" in head


@pytest.mark.parametrize("name", RUN_CONFIGS)
def test_it_trains_two_tiny_steps_and_reloads(name: str, in_tmp_path: Path) -> None:
    make_workplace(in_tmp_path, name)
    cli.main(["fit", "--config", str(CONFIGS / name), "--run_dir=run", *tiny_options(name)])
    assert json.loads(Path("run/finished.json").read_text())["step"] == 2
    assert "train/loss" in Path("run/metrics.csv").read_text()
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    RELOADS.get(stage_of(read(name)), reloads_as_a_learner)(checkpoint["state_dict"])
    if read(name)["trainer"].get("callbacks"):
        assert Path("run/samples/step-000002.png").is_file()
    cli.main(
        ["fit", "--config=run/config.yaml", "--run_dir=run", "--ckpt_path=last", "--trainer.max_steps=3"]
    )
    assert json.loads(Path("run/finished.json").read_text())["step"] == 3


@pytest.mark.parametrize(
    "name", [name for name in RUN_CONFIGS if CARRIED_BASE in (CONFIGS / name).read_text()]
)
def test_quality_tuning_starts_from_a_base_that_travels_along(name: str, in_tmp_path: Path) -> None:
    """From any folder, at most 16 MB, of the resolution that is trained on."""
    config = read(name)
    module, data = config["model"]["init_args"], config["data"]["init_args"]
    generator = load_generator(module["init_from"], module["overrides"])
    assert generator.process.noise_offset == 0.1  # the paper's
    images = generator.generate(["a red ball in the snow"], [0], num_steps=2)
    assert images.shape == (1, 3, data["resolution"], data["resolution"])
    assert sum(file.stat().st_size for file in shipped(module["init_from"]).glob("*.safetensors")) <= 16e6
