"""Diffusers pipelines as generators, against diffusers' own: what it draws, feeds, writes and loads."""

from __future__ import annotations

import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, FluxPipeline
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from emu_lightning import cli
from emu_lightning.data.batch import Batch
from emu_lightning.models import PipelineVAE
from emu_lightning.models.pipeline_folder import copy_component, load_network
from emu_lightning.modules import PipelineModule, QualityTuningModule, load_generator, weights_sha256
from emu_lightning.processes import Diffusion, RectifiedFlow
from emu_lightning.processes.seeding import generators_for
from tests.pipelines import PIPELINES, PROMPT, SEED, SIDE, draw, make_pipeline, stock, vae
from tests.tiny import TinyData, make_batch, make_trainer

LORA = {"rank": 2, "alpha": 8, "targets": ["to_q", "to_v"]}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of all tiny pipelines, made when they are asked for."""

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = make_pipeline(name, tmp_path_factory.mktemp("pipelines") / name)
            return self[name]

    return Folders()


def load(folder: Path, **overrides: Any) -> PipelineModule:
    generator = load_generator(folder, {"image_size": SIDE, "num_steps": 2, **overrides})
    assert isinstance(generator, PipelineModule)
    return generator


def record_calls(network: torch.nn.Module) -> list[dict[str, Any]]:
    """Grows by the arguments, by name, and the output of every call of a network."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(type(network).forward)

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        bound = signature.bind(module, *args, **kwargs).arguments
        calls.append({**bound.pop("kwargs", {}), **bound, "output": output[0]})

    network.register_forward_hook(hook, with_kwargs=True)
    return calls


def assert_fed_alike(ours: Any, theirs: Any, name: str = "") -> None:
    if isinstance(theirs, dict):
        for key in theirs:
            assert_fed_alike(ours.get(key), theirs[key], key)
    elif isinstance(theirs, Tensor):
        assert ours is not None, f"{name} is not fed"
        torch.testing.assert_close(
            ours.float(), theirs.float().expand_as(ours), rtol=1e-6, atol=1e-6, msg=name
        )


def step_of(generator: PipelineModule) -> Tensor:
    """The weights that are trained, after a step of a large rate; the average follows."""
    batch = make_batch(0, size=2, side=SIDE)
    generator.loss(batch, generators_for(0, batch.positions)).backward()
    torch.optim.SGD(generator.trainable_parameters(), lr=0.5).step()
    generator.update_average()
    with torch.inference_mode():  # validation draws on the average, in between
        assert torch.isfinite(generator.eval().loss(batch, generators_for(0, batch.positions)))
    generator.train()
    return torch.cat([weight.detach().flatten() for weight in generator.trainable_parameters()])


# --- drawing and training, family by family -----------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_it_draws_what_diffusers_draws_and_is_trained_on_what_diffusers_feeds(name: str, pipelines) -> None:
    generator, pipeline = load(pipelines[name]), stock(pipelines[name])
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    expected = draw(pipeline)
    assert expected.std() > 0.05
    torch.testing.assert_close(generator.generate([PROMPT], [SEED]), expected, rtol=0, atol=1e-6)

    calls = record_calls(network)
    is_flux = isinstance(pipeline, FluxPipeline)
    draw(pipeline, **({"guidance_scale": 1.0} if is_flux else {}))
    ours = record_calls(generator.denoiser)
    texts = [PROMPT] if is_flux else ["", PROMPT]  # guided: no prompt first; we say so by ""
    text = generator.text_encoder(texts)
    size = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]]).repeat(len(texts), 1)
    for call in calls:
        x_t, output = call.get("sample", call.get("hidden_states")), call["output"]
        t = call["timestep"].float().expand(len(texts))
        if is_flux:
            x_t, output = (FluxPipeline._unpack_latents(each, SIDE, SIDE, 2) for each in (x_t, output))
        else:
            t = t / 1000
        with torch.no_grad():
            prediction = generator.predict(generator.denoiser, x_t, t, text, size)
        assert_fed_alike(ours[-1], call)
        torch.testing.assert_close(prediction, output[:, : x_t.shape[1]], rtol=1e-5, atol=1e-5)
    assert len(calls) == len(ours) == 2


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "flux"])
def test_a_negative_prompt_is_the_pipelines_own(name: str, pipelines) -> None:
    generator = load(pipelines[name])
    (without,) = generator.generate([PROMPT], [SEED])
    drawn = generator.generate(["a box", PROMPT], [0, SEED], negative_prompt="blurred")[1]
    torch.testing.assert_close(
        drawn, draw(stock(pipelines[name]), negative_prompt="blurred")[0], rtol=0, atol=1e-5
    )
    assert (drawn - without).abs().max() > 1e-4
    unguided = {"guidance_scale": 1.0, "negative_prompt": "blurred"}
    plain = generator.generate([PROMPT], [SEED], guidance_scale=1.0)
    assert torch.equal(generator.generate([PROMPT], [SEED], **unguided), plain)


def test_what_has_no_use_for_a_negative_prompt_says_so(pipelines) -> None:
    with pytest.raises(ValueError, match="^FluxPipeline .* leave negative_prompt out$"):
        load(pipelines["flux"]).generate([PROMPT], [SEED], negative_prompt="blurred")


@pytest.mark.parametrize(
    "name", ["stable_diffusion", "stable_diffusion_xl", "pixart_alpha", "stable_diffusion_3", "flux"]
)
def test_cached_text_and_latents_train_alike(name: str, pipelines) -> None:
    generator = load(pipelines[name], text_dropout=0.5, ema_decay=None)
    batch = make_batch(5, size=4, side=SIDE)
    rng = generators_for(0, batch.positions)
    loss = generator.loss(batch, rng)
    encoder = generator.frozen_text()
    cached = Batch(**{**vars(batch), "embeddings": encoder.embed(batch.texts)})
    cached.empty_embeddings = encoder.embed([""])
    torch.testing.assert_close(generator.loss(cached, generators_for(0, batch.positions)), loss)
    assert {value.shape[1:] for value in encoder.embed(["a"]).values()} == {
        value.shape[1:] for value in encoder.embed(["word " * 300]).values()
    }
    images = batch.images
    cached.latents, cached.images = generator.vae.network.encode(images), None
    assert torch.isfinite(generator.loss(cached, generators_for(0, batch.positions)))


def test_a_process_is_what_the_scheduler_reverses(pipelines) -> None:
    """Noised by diffusers' scheduler and by ours, at the same times, data is the same."""
    x_0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for name in ("stable_diffusion", "stable_diffusion_xl", "pixart_alpha"):
        generator = load(pipelines[name])
        steps = torch.tensor([0, 500, 999])
        assert isinstance(generator.process, Diffusion) and generator.process.prediction == "noise"
        theirs = DDPMScheduler.from_config(generator.scheduler.config).add_noise(x_0, noise, steps)
        torch.testing.assert_close(
            generator.process.corrupt(x_0, noise, steps / 1000), theirs, rtol=1e-5, atol=1e-5
        )
    for name, arguments in {"stable_diffusion_3": {}, "flux": {"mu": _flux_mu(SIDE)}}.items():
        generator = load(pipelines[name], **{"process": None})
        assert isinstance(generator.process, RectifiedFlow)
        generator.scheduler.set_timesteps(sigmas=[0.75, 0.5], **arguments)
        shift, t = generator.process.time_shift, torch.tensor([0.75, 0.5])
        torch.testing.assert_close(shift * t / (1 + (shift - 1) * t), generator.scheduler.sigmas[:2])


def _flux_mu(side: int) -> float:
    """Black Forest Labs' line through 0.5 at 256 patches and 1.15 at 4096, for latents of half the side."""
    patches = (side // 2 // 2) ** 2
    return 0.5 + (1.15 - 0.5) * (patches - 256) / (4096 - 256)


def test_another_process_brings_its_own_scheduler(pipelines) -> None:
    folder = pipelines["stable_diffusion"]
    kept = load(folder, **{"process.noise_offset": 0.1, "process.min_snr_gamma": 5.0})
    assert kept.process.noise_offset == 0.1 and kept.scheduler.config.steps_offset == 1
    velocity = load(folder, **{"process.prediction": "velocity", "process.zero_terminal_snr": True})
    assert velocity.scheduler.config.prediction_type == "v_prediction"
    assert velocity.scheduler.config.rescale_betas_zero_snr
    with pytest.raises(ValueError, match="RectifiedFlow does not suit"):
        PipelineModule(str(folder), process=RectifiedFlow())


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_long_captions_keep_the_end_of_text(name: str, pipelines) -> None:
    encoder = load(pipelines[name]).text_encoder
    side = encoder.side.network
    calls = {key: record_calls(network) for key, network in side.encoders.items()}
    encoder.embed(["word " * 300])
    for key, each in calls.items():
        network = side.encoders[key]
        ids = each[0]["input_ids"][0]
        assert ids[-1] == network.config.eos_token_id, key
        assert (ids == network.config.eos_token_id).sum() == 1, key


# --- what is trained and kept -------------------------------------------------------------------------------


def test_only_the_denoiser_is_trained_and_kept(pipelines) -> None:
    generator = load(pipelines["stable_diffusion_xl"], ema_decay=0.5)
    names = set(generator.state_dict())
    assert names == (
        {
            f"{place}.{name}"
            for name in generator.denoiser.state_dict()
            for place in ("denoiser", "average.model")
        }
        | {"average.num_updates"}
    )
    assert sum(p.numel() for p in generator.trainable_parameters()) == sum(
        p.numel() for p in generator.denoiser.parameters()
    )
    before = generator.generate([PROMPT], [SEED])
    step_of(generator)
    after = generator.generate([PROMPT], [SEED])
    assert not torch.equal(before, after)
    averaged = load(pipelines["stable_diffusion_xl"], ema_decay=None)
    averaged.denoiser.load_state_dict(generator.average.model.state_dict())
    assert torch.equal(averaged.generate([PROMPT], [SEED]), after), "pictures are the average's"


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "flux"])
def test_with_lora_only_the_adapters_are_trained_and_kept(name: str, pipelines) -> None:
    plain, generator = load(pipelines[name]), load(pipelines[name], lora=LORA, ema_decay=0.5)
    start = plain.generate([PROMPT], [SEED])
    torch.testing.assert_close(generator.generate([PROMPT], [SEED]), start, rtol=0, atol=1e-4)
    state = generator.state_dict()
    adapters = [key for key in state if "lora_" in key]
    assert adapters and set(state) - set(adapters) == {
        *(f"average.model.{index}" for index in range(len(adapters))),
        "average.num_updates",
    }
    assert generator.load_state_dict(state).missing_keys == []
    trained = step_of(generator)
    drawn = generator.generate([PROMPT], [SEED])
    again = torch.cat([weight.detach().flatten() for weight in generator.trainable_parameters()])
    assert torch.equal(again, trained), "after drawing with the average, what is trained is in its place"
    average = torch.cat([weight.flatten() for weight in generator.average.model.parameters()])
    assert not torch.equal(average, trained)
    base = dict(plain.denoiser.named_parameters())
    for key, weight in generator.denoiser.named_parameters():
        if "lora_" not in key:
            assert torch.equal(weight, base[key.replace(".base_layer", "")])
    assert (drawn - start).abs().max() > 1e-3


def test_a_frozen_base_may_be_in_bfloat16(pipelines) -> None:
    generator = load(pipelines["flux"], lora=LORA, frozen_dtype="bfloat16")
    assert {weight.dtype for weight in generator.trainable_parameters()} == {torch.float32}
    assert generator.denoiser.dtype == torch.bfloat16
    step_of(generator)
    full = load(pipelines["flux"]).generate([PROMPT], [SEED])
    assert (generator.generate([PROMPT], [SEED]) - full).abs().mean() < 0.2


def test_one_setting_of_the_adapters_can_be_changed(pipelines) -> None:
    lora = dict(LORA)
    generator = load(pipelines["stable_diffusion"], **{"lora": lora, "lora.rank": 3})
    assert generator.describe()["init_args"]["lora"] == {**LORA, "rank": 3}
    assert lora == LORA, "what was given is as it was"


# --- handing over -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lora"),
    [("stable_diffusion_xl", None), ("stable_diffusion_xl", LORA), ("pixart_sigma", LORA), ("flux", LORA)],
)
def test_what_is_tuned_goes_out_as_a_pipeline(name: str, lora: Any, pipelines, tmp_path: Path) -> None:
    """Quality-tuned by Lightning, exported, loaded by diffusers and by us: the same pictures."""
    overrides = {
        "image_size": SIDE,
        "num_steps": 2,
        "lora": lora,
        "process.noise_offset": 0.1,
        "ema_decay": 0.5,
    }
    module = QualityTuningModule(
        str(pipelines[name]), overrides, optimizer=lambda weights: torch.optim.AdamW(weights, lr=0.02)
    )
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, TinyPipelineData())
    drawn = module.generate([PROMPT], [SEED])
    assert (drawn - module.load_start().generate([PROMPT], [SEED])).abs().max() > 1e-3

    exported = module.save_pretrained(tmp_path / "exported")
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(draw(stock(exported)), drawn, **close)
    ours = load_generator(exported)
    torch.testing.assert_close(ours.generate([PROMPT], [SEED]), drawn, **close)
    assert ours.process.noise_offset == 0.1 and ours.lora is None
    assert weights_sha256(exported) != weights_sha256(pipelines[name])
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    torch.testing.assert_close(
        load_generator(tmp_path / "tuned.ckpt").generate([PROMPT], [SEED]), drawn, **close
    )

    card = (exported / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == str(pipelines[name]) and front["license"] == "unknown"
    assert ("LoRA of rank 2" if lora else "the whole") in card
    assert not [*exported.rglob("*.bin"), *exported.rglob("*.partial")]
    if lora:
        base = stock(pipelines[name])
        if hasattr(base, "load_lora_weights"):  # diffusers has none for PixArt
            base.load_lora_weights(exported)
            torch.testing.assert_close(draw(base), drawn, **close)


class TinyPipelineData(TinyData):
    def train_dataloader(self) -> Any:
        return DataLoader([make_batch(4 * step, size=4, side=SIDE) for step in range(2)], batch_size=None)


def test_an_exported_pipeline_states_the_licence_of_its_base_and_half_precision(
    pipelines, tmp_path: Path
) -> None:
    generator = load(pipelines["stable_diffusion"])
    (pipelines["stable_diffusion"] / "README.md").write_text("---\nlicense: mit\n---\nA base.\n")
    folder = generator.save_pretrained(tmp_path / "half", torch.bfloat16)
    assert "license: mit" in (folder / "README.md").read_text()
    unet = stock(folder).unet
    assert load_network(type(unet), folder / "unet", torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="is the base that is tuned"):
        generator.save_pretrained(pipelines["stable_diffusion"])


def test_weights_that_exist_as_a_variant_only_are_found_and_handed_on(pipelines, tmp_path: Path) -> None:
    copy = make_pipeline("stable_diffusion", tmp_path / "fp16")
    for path in [
        *copy.glob("unet/*.safetensors"),
        *copy.glob("vae/*.safetensors"),
        *copy.glob("text_*/*.safetensors"),
    ]:
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    generator = load(copy)
    expected = load(pipelines["stable_diffusion"]).generate([PROMPT], [SEED])
    assert torch.equal(generator.generate([PROMPT], [SEED]), expected)
    exported = generator.save_pretrained(tmp_path / "exported")
    torch.testing.assert_close(draw(stock(exported)), expected, rtol=0, atol=1e-5)


def test_sharded_weights_of_a_variant_keep_their_index(tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path / "vae", variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 1
    assert copy_component(tmp_path / "vae", tmp_path / "copy")
    kind = type(vae())
    loaded, copied = load_network(kind, tmp_path / "vae"), load_network(kind, tmp_path / "copy")
    assert all(
        torch.equal(one, other) for one, other in zip(loaded.parameters(), copied.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"scaling_factor": 0.13025},
        {"scaling_factor": 0.36, "shift_factor": 0.12},
        {"scaling_factor": 0.5, "latents_mean": [1.0, -1.0, 0.5, 0.0], "latents_std": [1.0, 2.0, 3.0, 4.0]},
    ],
)
def test_latents_are_scaled_as_the_autoencoder_says(settings: dict[str, Any], tmp_path: Path) -> None:
    network = vae(**settings)
    network.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    ours = PipelineVAE.from_pretrained(tmp_path)
    images = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        posterior = network.encode(images).latent_dist.mode()
        mean = torch.tensor(settings.get("latents_mean", [settings.get("shift_factor", 0.0)])).view(
            1, -1, 1, 1
        )
        std = torch.tensor(settings.get("latents_std", [1.0])).view(1, -1, 1, 1)
        latents = ours.encode(images)
        torch.testing.assert_close(latents, (posterior - mean) / std * settings["scaling_factor"])
        torch.testing.assert_close(
            ours.decode(latents), network.decode(posterior).sample, rtol=1e-4, atol=1e-5
        )
    assert (ours.latent_channels, ours.downsampling) == (4, 2)
    with pytest.raises(ValueError, match="do not fit an autoencoder of downsampling 2"):
        ours.encode(images[..., :15])


# --- bad input ----------------------------------------------------------------------------------------------


def error_of(path: Any, **overrides: Any) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load_generator(path, overrides).text_encoder.embed(["a"])
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    assert not any(scaffold in message for scaffold in ("Union", "NoneType", "Parser key")), message
    return message


def test_what_is_wrong_with_a_pipeline_is_said_in_one_line(tmp_path: Path) -> None:
    folder = make_pipeline("stable_diffusion_xl", tmp_path / "pipeline")
    index = folder / "model_index.json"
    whole = index.read_text()

    assert "rank=0" in error_of(folder, lora={"rank": 0})
    assert "nowhere" in error_of(folder, lora={"targets": ["nowhere"]})
    assert "lora: there is no 'rang'" in error_of(folder, lora={"rang": 4})
    assert "ema_decay: Expected a <class 'float'>" in error_of(folder, ema_decay="much")
    assert "there is no 'noise'" in error_of(folder, noise=1)

    index.write_text(whole.replace("StableDiffusionXLPipeline", "OtherPipeline"))
    message = error_of(folder)
    assert "OtherPipeline" in message and "FluxPipeline" in message and "StableDiffusionXLPipeline" in message
    index.write_text("{")
    assert "not valid JSON" in error_of(folder)
    index.unlink()
    assert "or, as a pipeline, model_index.json" in error_of(folder)
    index.write_text(whole)

    (folder / "generator.yaml").write_text("- nothing")
    assert "describes no generator" in error_of(folder)
    (folder / "generator.yaml").unlink()

    (folder / "text_encoder_2").rename(folder / "elsewhere")
    assert "has no text_encoder_2/" in error_of(folder)
    (folder / "elsewhere").rename(folder / "text_encoder_2")

    config = folder / "vae" / "config.json"
    fitting = config.read_text()
    config.write_text(json.dumps(json.loads(fitting) | {"latent_channels": 16}))
    message = error_of(folder)
    assert "takes 4 channels" in message and "have 16" in message
    config.write_text(fitting)

    scheduler = folder / "scheduler" / "scheduler_config.json"
    known = scheduler.read_text()
    scheduler.write_text(known.replace("EulerDiscreteScheduler", "os"))
    assert "diffusers has no scheduler 'os'" in error_of(folder)
    scheduler.write_text(known.replace('"epsilon"', '"unheard_of"'))
    assert "unheard_of" in error_of(folder)
    scheduler.write_text(known)

    for component in ("unet", "text_encoder"):  # one that is loaded at once, one at first use
        (weights,) = (folder / component).glob("*.safetensors")
        content = weights.read_bytes()
        weights.write_bytes(content[: len(content) // 2])
        assert f"{component} cannot be loaded" in error_of(folder)
        weights.unlink()
        assert "holds no .safetensors" in error_of(folder)
        (folder / component / "weights.bin").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
        assert "weights.bin, a pickle" in error_of(folder)
        (folder / component / "weights.bin").rename(weights)
        error_of(folder)
        assert not (tmp_path / "touched").exists(), "code in a pickle has run"
        weights.write_bytes(content)

    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 16', '"cross_attention_dim": 24'))
    assert "unet cannot be loaded" in error_of(folder)


class Touch:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", unreachable)
    monkeypatch.chdir(tmp_path)
    message = error_of("stabilityai/stable-diffusion-xl-base-1.0")
    assert (
        "stabilityai/stable-diffusion-xl-base-1.0" in message
        and "check the spelling and the network" in message
    )
    (tmp_path / "runs").mkdir()
    assert "no generator at runs/tuned" in error_of("runs/tuned")  # a folder here: not meant for the hub


def test_the_verbs_take_a_pipeline(pipelines, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pipelines["stable_diffusion_3"]
    cli.main(["sample", f"--model={folder}", f'--prompts=["{PROMPT}"]', f"--seed={SEED}", "--num_steps=2"])
    (picture,) = (path for path in Path("runs/sample").glob("*.png") if path.name != "grid.png")
    pixels = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1) / 127.5 - 1
    assert (pixels - draw(stock(folder))[0]).abs().max() < 1 / 127
    cli.main(["export", f"--model={folder}", "--out=exported", "--dtype=float16"])
    assert "exported" in capsys.readouterr().out
    assert load_generator("exported").image_size == SIDE
