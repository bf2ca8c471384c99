"""Quality-tuning: what it starts from, what it changes, where it ends, and that any generator will do."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from emu_lightning import modules
from emu_lightning.data.batch import Batch
from emu_lightning.modules import CascadeModule, QualityTuningModule, load_generator, quality_tuning
from emu_lightning.modules.generator import Description, Generator
from emu_lightning.processes.seeding import generator_for, generators_for
from tests.tiny import TinyData, make_batch, make_trainer, tiny_generator, tiny_upsampler

PROMPTS, SEEDS = ["a red ball in the snow", "a star"], [3, 4]
KINDS = set(modules.__all__) - {"Generator", "QualityTuningModule", "load_generator"}


class Colour(Generator):
    """The least generator there is: one learnt colour and its average, no diffusion, no text."""

    def __init__(self, side: int = 4, warmth: float = 0.0) -> None:
        super().__init__(torch.optim.SGD, None, 0)
        self.side, self.warmth = side, warmth
        self.colour = nn.Parameter(torch.zeros(3))
        self.average: Tensor
        self.register_buffer("average", torch.zeros(3))

    def loss(self, batch: Batch, rng: list[torch.Generator]) -> Tensor:
        target = batch.images.mean((0, 2, 3)) + 0.01 * torch.randn(3, generator=rng[0])
        return (self.colour - target).square().sum()

    def generate(
        self, prompts: Sequence[str], seeds: Iterable[int], *, num_steps=None, guidance_scale=None
    ) -> Tensor:
        colour = self.average + self.warmth
        return colour.view(1, 3, 1, 1).expand(len(prompts), 3, self.side, self.side).clamp(-1, 1)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        yield self.colour

    def update_average(self) -> None:
        self.average.lerp_(self.colour.detach(), 0.5)

    def describe(self) -> Description:
        arguments = {"side": self.side, "warmth": self.warmth}
        return {"class_path": f"{__name__}.Colour", "init_args": arguments}

    def sampling_state(self) -> dict[str, Tensor]:
        return {"colour": self.average}

    def load_sampling_state(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        colour = state.get("average", state.get("colour"))
        if colour is None:
            return ["colour"], []
        self.colour.data.copy_(colour)
        self.average.copy_(colour)
        return [], []


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A generator folder, in pixels."""
    return tiny_generator(seed=1).save_pretrained(tmp_path / "start")


def tuning(start: Path, **arguments: object) -> QualityTuningModule:
    optimizer = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)}
    return QualityTuningModule(str(start), **{**optimizer, **arguments})  # type: ignore[arg-type]


def test_it_starts_from_the_weights_it_is_given_and_changes_what_it_is_told(start: Path) -> None:
    module = tuning(start, overrides={"process.noise_offset": 0.1, "text_dropout": 0.3})
    assert (module.generator.process.noise_offset, module.generator.text_dropout) == (0.1, 0.3)
    expected = load_generator(start).generate(PROMPTS, SEEDS)
    assert torch.equal(module.generate(PROMPTS, SEEDS), expected)
    assert module.load_start().process.noise_offset == 0.0  # the start is as it was


def test_it_draws_as_its_generator_is_asked_to(start: Path) -> None:
    asked = {"num_steps": 2, "guidance_scale": 4.0, "negative_prompt": "a box"}
    drawn = tuning(start).generate(PROMPTS, SEEDS, **asked)
    assert torch.equal(drawn, load_generator(start).generate(PROMPTS, SEEDS, **asked))
    for name in asked:  # all of them counted
        fewer = {key: value for key, value in asked.items() if key != name}
        assert not torch.equal(drawn, tuning(start).generate(PROMPTS, SEEDS, **fewer))


def test_the_stages_of_a_start_keep_their_own_process(tmp_path: Path) -> None:
    CascadeModule(tiny_generator(), [tiny_upsampler()]).save_pretrained(tmp_path)
    overrides = {
        "base.process.noise_offset": 0.1,
        "upsamplers.0.process.noise_offset": 0.2,
        "upsamplers.0.num_steps": 1,
    }
    module = tuning(tmp_path, overrides=overrides)
    offsets = [
        [stage.process.noise_offset for stage in (cascade.base, *cascade.upsamplers)]
        for cascade in (module.generator, module.load_start())
    ]
    assert offsets == [[0.1, 0.2], [0.0, 0.0]]
    assert module.generator.upsamplers[0].num_steps == module.load_start().upsamplers[0].num_steps == 1


def test_what_it_minimises_is_the_generators_own_loss(start: Path, tmp_path: Path) -> None:
    losses = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            losses.append(outputs["loss"].item())

    module = tuning(start, seed=5, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    make_trainer(tmp_path, max_steps=2, callbacks=[Keep()]).fit(module, TinyData())
    generator = load_generator(start).train()
    expected = [generator.loss(make_batch(p), generators_for(5, range(p, p + 4))).item() for p in (0, 4)]
    assert losses == expected


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tuning_moves_the_generator_and_not_its_start(start: Path, tmp_path: Path, accumulate: int) -> None:
    module = tuning(start)
    expected = module.generate(PROMPTS, SEEDS)
    before = (start / "model.safetensors").read_bytes()
    trainer = make_trainer(tmp_path, max_steps=4, accumulate_grad_batches=accumulate)
    trainer.fit(module, TinyData())
    assert trainer.global_step == 4
    assert int(module.generator.average.num_updates) == 4
    assert (module.generate(PROMPTS, SEEDS) - expected).abs().max() > 1e-3
    assert torch.equal(module.load_start().generate(PROMPTS, SEEDS), expected)
    assert (start / "model.safetensors").read_bytes() == before
    assert not module.load_start().training
    module.save_pretrained(tmp_path / "tuned")
    loaded = load_generator(tmp_path / "tuned")
    assert torch.equal(loaded.generate(PROMPTS, SEEDS), module.generate(PROMPTS, SEEDS))


def test_tuning_can_go_on_from_a_tuned_checkpoint(start: Path, tmp_path: Path) -> None:
    first = tuning(start)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(first, TinyData())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = tuning(tmp_path / "first.ckpt")
    assert torch.equal(second.generate(PROMPTS, SEEDS), first.generate(PROMPTS, SEEDS))


# --- the cap ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_steps", [15_001, 100_000, -1])
def test_more_than_the_papers_cap_is_refused(start: Path, tmp_path: Path, max_steps: int) -> None:
    module = tuning(start)
    with pytest.raises(ValueError, match="at most 15000 iterations") as error:
        make_trainer(tmp_path, max_steps=max_steps, max_epochs=1).fit(module, TinyData())
    message = str(error.value)
    assert str(max_steps) in message and "--trainer.max_steps" in message and "\n" not in message
    assert int(module.generator.average.num_updates) == 0


def test_the_cap_is_an_argument(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 3 iterations"):
        make_trainer(tmp_path, max_steps=4).fit(tuning(start, max_iterations=3), TinyData())
    make_trainer(tmp_path, max_steps=3).fit(tuning(start, max_iterations=3), TinyData())


# --- any generator ------------------------------------------------------------------------------------------


def test_it_names_no_kind_of_generator() -> None:
    """The seam: a new generator costs nothing here."""
    tree = ast.parse(inspect.getsource(quality_tuning))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = {name.name for node in imports for name in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not (imported | used) & KINDS
    assert "DiffusionModule" in KINDS and "isinstance" not in used


def test_a_generator_of_another_kind_is_tuned_saved_and_loaded_alike(tmp_path: Path) -> None:
    Colour().save_pretrained(tmp_path / "start")
    module = tuning(tmp_path / "start", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.25),
                    overrides={"warmth": 0.125})  # fmt: skip
    assert isinstance(module.generator, Colour)
    colours, colour, average = [], torch.zeros(3), torch.zeros(3)
    for position in range(0, 20, 4):  # by hand: gradient descent on a square halves the distance
        noise = 0.01 * torch.randn(3, generator=generator_for(0, position))
        colour = colour + 0.5 * (make_batch(position).images.mean((0, 2, 3)) + noise - colour)
        average = (average + colour) / 2
        colours.append(average)
    trainer = make_trainer(tmp_path, max_steps=5)
    trainer.fit(module, TinyData())
    assert torch.allclose(module.generator.average, colours[-1], atol=1e-6)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    module.save_pretrained(tmp_path / "tuned")
    for path in (tmp_path / "last.ckpt", tmp_path / "tuned"):
        loaded = load_generator(path)
        assert type(loaded) is Colour and loaded.warmth == 0.125
        assert torch.equal(loaded.generate(PROMPTS, SEEDS), module.generate(PROMPTS, SEEDS))
        assert torch.allclose(loaded.generate(["x"], [0])[0, :, 0, 0], colours[-1] + 0.125, atol=1e-6)
    with pytest.raises(ValueError, match="warmht"):
        load_generator(tmp_path / "tuned", {"warmht": 1.0})
