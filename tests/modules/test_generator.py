"""Generators on disk: folders and checkpoints, overrides, and what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from emu_lightning import cli, modules
from emu_lightning.models import Autoencoder
from emu_lightning.modules import (
    AutoencoderModule,
    CascadeModule,
    DiffusionModule,
    QualityTuningModule,
    SuperResolutionModule,
    load_generator,
    load_learner,
    load_upsampler,
)
from emu_lightning.modules.generator import build_learner, class_path
from emu_lightning.processes import Diffusion, RectifiedFlow
from tests.tiny import (
    TinyData,
    make_trainer,
    tiny_autoencoder,
    tiny_generator,
    tiny_unet,
    tiny_upsampler,
)

PROMPTS, SEEDS = ["a red ball in the snow", "a star"], [3, 4]


class Sharper(SuperResolutionModule):
    """A stage of a user's own."""


def pictures(generator: Any) -> torch.Tensor:
    return generator.generate(PROMPTS, SEEDS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionModule, Path]:
    """A latent generator after three steps, and the folder with its checkpoint.

    The checkpoint comes from training, so that optimizer and callbacks are in it.
    """
    folder = tmp_path_factory.mktemp("trained")
    module = tiny_generator(in_pixels=False, process=Diffusion(zero_terminal_snr=True, noise_offset=0.02))
    trainer = make_trainer(folder, max_steps=3)
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(folder / "last.ckpt")
    return module.eval(), folder


@pytest.fixture(scope="module")
def saved(trained: tuple[DiffusionModule, Path]) -> Path:
    module, folder = trained
    return module.save_pretrained(folder / "saved")


# --- there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_pixels": False},
        {"process": RectifiedFlow(time_shift=2.0, time_sampling="logit_normal")},
        {"process": Diffusion("linear", 500, "x_0", min_snr_gamma=None), "ema_decay": None},
        {"denoiser": tiny_unet(use_size_condition=True, size_dim=8)},
        {"num_steps": 2, "guidance_scale": 1.0, "train_text_encoder": False},
    ],
)
def test_a_folder_gives_the_same_generator(arguments: dict[str, Any], tmp_path: Path) -> None:
    module = tiny_generator(**arguments)
    assert module.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "generator.yaml", "model.safetensors",
    ]  # fmt: skip
    loaded = load_generator(tmp_path / "new" / "folder")
    assert loaded.describe() == module.describe()
    assert torch.equal(pictures(loaded), pictures(module))
    assert loaded.sampling_state().keys() == module.sampling_state().keys()
    for name, value in module.sampling_state().items():
        assert torch.equal(loaded.sampling_state()[name], value)


def test_the_folder_is_plain_text_and_the_averaged_weights(trained, saved) -> None:
    module, _ = trained
    description = yaml.safe_load((saved / "generator.yaml").read_text())
    assert description["class_path"] == "emu_lightning.modules.DiffusionModule"
    assert description["init_args"]["process"]["init_args"]["noise_offset"] == 0.02
    state = load_file(saved / "model.safetensors")
    assert not any("average" in name for name in state)
    for name, value in module.average.model.state_dict().items():
        assert torch.equal(state[f"denoiser.{name}"], value)
    assert not torch.equal(state["denoiser.net.conv_in.weight"], module.denoiser.net.conv_in.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_nearly_the_same(trained, tmp_path: Path, dtype: torch.dtype) -> None:
    module, _ = trained
    module.save_pretrained(tmp_path / "full")
    module.save_pretrained(tmp_path / "half", dtype)
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert {kind for kind in kinds if kind.is_floating_point} == {dtype}
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    loaded = load_generator(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    difference = (pictures(loaded) - pictures(module)).abs()
    assert 0 < difference.mean() < {torch.float16: 0.005, torch.bfloat16: 0.04}[dtype]
    assert {p.dtype for p in module.parameters()} == {torch.float32}  # saving changed nothing here


def test_saving_again_replaces_and_leaves_no_parts(trained, tmp_path: Path) -> None:
    module, _ = trained
    tiny_generator().save_pretrained(tmp_path)
    module.save_pretrained(tmp_path)
    assert torch.equal(pictures(load_generator(tmp_path)), pictures(module))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_of_pre_training_gives_the_averaged_weights(trained) -> None:
    module, folder = trained
    loaded = load_generator(folder / "last.ckpt")
    assert torch.equal(pictures(loaded), pictures(module))
    state = module.average.model.state_dict()
    for name, value in loaded.denoiser.state_dict().items():
        assert torch.equal(value, state[name])
    for name, value in loaded.average.model.state_dict().items():  # it starts anew from there
        assert torch.equal(value, state[name])
    assert int(loaded.average.num_updates) == 0 < int(module.average.num_updates)


def test_a_checkpoint_of_quality_tuning_gives_the_averaged_weights(saved, tmp_path: Path) -> None:
    module = QualityTuningModule(str(saved), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    module.save_pretrained(tmp_path / "tuned")
    expected = module.generate(PROMPTS, SEEDS)
    assert not torch.equal(expected, pictures(load_generator(saved)))
    for path in (tmp_path / "tuned.ckpt", tmp_path / "tuned"):
        loaded = load_generator(path)
        assert isinstance(loaded, DiffusionModule)
        assert torch.equal(pictures(loaded), expected)
        state = module.generator.average.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in loaded.denoiser.state_dict().items())


def test_a_class_goes_by_the_package_that_exports_it() -> None:
    for name in modules.__all__:
        if isinstance(cls := getattr(modules, name), type):
            assert class_path(cls) == f"emu_lightning.modules.{name}"
    assert class_path(Sharper) == f"{__name__}.Sharper"


# --- generators and upsamplers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A super-resolution stage, on disk."""
    return tiny_upsampler().save_pretrained(tmp_path_factory.mktemp("stage") / "stage")


def test_each_is_loaded_as_what_it_is(saved, stage) -> None:
    assert type(load_learner(saved)) is type(load_generator(saved)) is DiffusionModule
    assert type(load_learner(stage)) is type(load_upsampler(stage)) is SuperResolutionModule
    with pytest.raises(ValueError, match=f"^{stage} is a super-resolution stage, .* of a cascade$"):
        load_generator(stage)
    with pytest.raises(ValueError, match=f"^{saved} is a generator .*, not a super-resolution stage$"):
        load_upsampler(saved)


def test_a_stage_of_a_users_own_class_is_loaded_as_such(stage, tmp_path: Path) -> None:
    sharper = tiny_upsampler()
    sharper.__class__ = Sharper
    loaded = load_upsampler(sharper.save_pretrained(tmp_path))
    assert type(loaded) is Sharper
    images = torch.zeros(2, 3, 8, 8)
    assert torch.equal(
        loaded.upsample(images, PROMPTS, SEEDS), load_upsampler(stage).upsample(images, PROMPTS, SEEDS)
    )


def test_a_stage_is_exported_but_draws_nothing_alone(stage, in_tmp_path: Path, capsys) -> None:
    cli.main(["export", f"--model={stage}", "--out=exported"])
    assert "`emu upsample --model exported`" in capsys.readouterr().out
    for name in ("generator.yaml", "model.safetensors"):
        assert (in_tmp_path / "exported" / name).read_bytes() == (stage / name).read_bytes()
    Path("prompts.txt").write_text("a box")
    judged = ["--scorer.class_path=emu_lightning.evaluation.judge.WorldJudge", "--prompts_file=prompts.txt"]
    for command in (
        ["sample", f"--model={stage}", '--prompts=["a box"]'],
        ["evaluate", f"--base={stage}", f"--tuned={stage}", *judged],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
        message = capsys.readouterr().err
        assert ended.value.code == 2 and "is a super-resolution stage" in message, message


def test_a_folder_of_pictures_has_one_negative_prompt(saved, in_tmp_path: Path, capsys) -> None:
    def sample(out: str, *more: str) -> bytes:
        cli.main(["sample", f"--model={saved}", '--prompts=["a box"]', f"--out={out}", *more])
        return Path(out, "00000.png").read_bytes()

    plain = sample("plain")
    manifest = yaml.safe_load(Path("plain/manifest.json").read_text())
    known_before = {"weights", "num_steps", "guidance_scale"}  # else older folders would be refused
    assert manifest["settings"].keys() == known_before
    assert sample("negative", "--negative_prompt=a star") != plain
    with pytest.raises(SystemExit):
        sample("plain", "--negative_prompt=a star")
    assert "other prompts, seeds or settings" in capsys.readouterr().err


# --- overrides ----------------------------------------------------------------------------------------------


def flat(description: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(description, list):
        description = {str(index): each for index, each in enumerate(description)}
    if not isinstance(description, dict):
        return {prefix: description}
    return {
        name: leaf
        for key, value in description.items()
        for name, leaf in flat(value, prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")).items()
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [("process.noise_offset", 0.1), ("text_dropout", 0.5), ("ema_decay", 0.9), ("num_steps", 2)],
)
def test_an_override_changes_just_that(saved, name: str, value: float) -> None:
    before = flat(load_generator(saved).describe())
    after = flat(load_generator(saved, {name: value}).describe())
    assert {key for key in after if before[key] != after[key]} == {name}
    assert after[name] == value
    assert flat(yaml.safe_load((saved / "generator.yaml").read_text())) == before  # the folder is as it was


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base.process.noise_offset", 0.1),
        ("upsamplers.0.process.noise_offset", 0.1),
        ("upsamplers.1.num_steps", 7),
        ("upsamplers.0.denoiser.attention.0", "text"),
    ],
)
def test_an_override_reaches_into_lists(name: str, value: Any) -> None:
    stages = [tiny_upsampler(), tiny_upsampler(image_size=32)]
    description = CascadeModule(tiny_generator(), stages).describe()
    before, after = flat(description), flat(build_learner(description, {name: value}).describe())
    assert {key for key in after if before[key] != after[key]} == {name}
    assert after[name] == value
    for wrong in ("upsamplers.2.num_steps", "upsamplers.first.num_steps", "upsamplers.num_steps"):
        with pytest.raises(ValueError, match=rf"^override '{wrong}': there is no .*; there is \['0', '1'\]$"):
            build_learner(description, {wrong: 1})


def test_null_on_a_command_line_is_none(saved) -> None:
    assert load_generator(saved, {"ema_decay": "None"}).describe()["init_args"]["ema_decay"] is None


def test_overrides_leave_the_weights_alone(saved) -> None:
    plain, changed = load_generator(saved), load_generator(saved, {"process.noise_offset": 0.1})
    assert torch.equal(pictures(plain), pictures(changed))  # offset noise is for training only
    assert changed.process.noise_offset == 0.1 and plain.process.noise_offset == 0.02


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"process.noise_ofset": 0.1}, ["process.noise_ofset", "noise_offset"]),
        ({"text_dropuot": 0.1}, ["text_dropuot", "text_dropout"]),
        ({"proces.noise_offset": 0.1}, ["proces.noise_offset", "process"]),
        ({"image_size.noise_offset": 1}, ["image_size.noise_offset"]),
        ({"process.noise_offset": "much"}, ["noise_offset", "much"]),
        ({"process.prediction": "score"}, ["prediction", "score"]),
        ({"process.noise_offset": -1.0}, ["noise_offset=-1.0"]),
    ],
)
def test_a_wrong_override_is_named_in_one_line(saved, overrides: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_generator(saved, overrides)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in expected), message


def test_an_override_that_needs_other_weights_is_refused(saved) -> None:
    with pytest.raises(ValueError) as error:
        load_generator(saved, {"denoiser.layers_per_block": 2})
    assert "do not fit their description" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="size mismatch for denoiser") as error:
        load_generator(saved, {"denoiser.block_channels": [16, 16]})
    assert "do not fit their description" in str(error.value) and "\n" not in str(error.value)


# --- what is refused ----------------------------------------------------------------------------------------


def error_of(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_generator(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


def copied(saved: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_what_is_not_there_is_named(saved, tmp_path: Path) -> None:
    assert "no generator at" in error_of(tmp_path / "nothing")
    assert "needs generator.yaml and model.safetensors" in error_of(tmp_path)
    for name in ("generator.yaml", "model.safetensors"):
        folder = copied(saved, tmp_path / name.partition(".")[0])
        (folder / name).unlink()
        assert "needs generator.yaml and model.safetensors" in error_of(folder)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.9])
def test_truncated_weights_are_named(saved, tmp_path: Path, keep: float) -> None:
    folder = copied(saved, tmp_path / "torn")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(keep * len(content))])
    message = error_of(folder)
    assert "model.safetensors" in message and "truncated" in message


@pytest.mark.parametrize(
    "content", ["", "class_path: [", "a: b", "just text", "class_path: os.system\ninit_args: {}"]
)
def test_a_description_that_is_none_is_refused(saved, tmp_path: Path, content: str) -> None:
    folder = copied(saved, tmp_path / "torn")
    (folder / "generator.yaml").write_text(content)
    error_of(folder)


@pytest.mark.parametrize(
    ("place", "gone"),
    [
        ("", "emu_lightning.modules.OldModule"),
        ("denoiser", "emu_lightning.models.old.UNet"),
        ("text_encoder", "elsewhere.Encoder"),
    ],
)
def test_a_class_that_is_gone_is_named(saved, tmp_path: Path, place: str, gone: str) -> None:
    folder = copied(saved, tmp_path / "old")
    description = yaml.safe_load((folder / "generator.yaml").read_text())
    (description["init_args"][place] if place else description)["class_path"] = gone
    (folder / "generator.yaml").write_text(yaml.safe_dump(description))
    assert f"{place}: there is no class {gone}: was it renamed".lstrip(":") in error_of(folder)


def test_weights_that_do_not_fit_are_named(saved, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "other")
    tiny_generator(in_pixels=True).save_pretrained(tmp_path / "pixels")
    (folder / "model.safetensors").write_bytes((tmp_path / "pixels" / "model.safetensors").read_bytes())
    error_of(folder)


def test_what_is_no_generator_is_refused(tmp_path: Path) -> None:
    tiny_autoencoder().save(tmp_path / "autoencoder")
    assert "is not a generator folder" in error_of(tmp_path / "autoencoder")
    module = AutoencoderModule(Autoencoder(4, (8, 16), norm_groups=4), num_latent_batches=1)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(tmp_path / "autoencoder.ckpt")
    assert "it is a checkpoint of another stage" in error_of(tmp_path / "autoencoder.ckpt")


def test_a_truncated_checkpoint_is_named(trained, tmp_path: Path) -> None:
    content = (trained[1] / "last.ckpt").read_bytes()
    for keep in (0, len(content) // 2):
        (tmp_path / "torn.ckpt").write_bytes(content[:keep])
        assert "cannot be read as a checkpoint" in error_of(tmp_path / "torn.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint at all")
    assert "cannot be read as a checkpoint" in error_of(tmp_path / "text.ckpt")


class Exploit:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_is_never_executed(trained, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    checkpoint = torch.load(trained[1] / "last.ckpt", weights_only=True)
    torch.save({**checkpoint, "payload": Exploit(trap)}, tmp_path / "exploit.ckpt")
    assert "cannot be read as a checkpoint" in error_of(tmp_path / "exploit.ckpt")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Exploit(trap)))
    assert "cannot be read as a checkpoint" in error_of(tmp_path / "raw.ckpt")
    assert not trap.exists()
    with pytest.raises(FileExistsError):  # the trap itself works
        for _ in range(2):
            pickle.loads(pickle.dumps(Exploit(trap)))


def test_code_in_a_description_is_never_executed(trained, saved, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    folder = copied(saved, tmp_path / "copy")
    (folder / "generator.yaml").write_text(f"!!python/object/apply:os.mkdir ['{trap}']")
    error_of(folder)
    description = trained[0].describe()
    description["init_args"]["text_encoder"] = {"class_path": "os.mkdir", "init_args": {"path": str(trap)}}
    with pytest.raises(ValueError):
        build_learner(description)
    assert not trap.exists()
