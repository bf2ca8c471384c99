"""The main job on a miniature base: select, tune, draw and judge. Every part keeps what it made on disk."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from emu_lightning.files import write_whole
from emu_lightning.verbs.recipes import Recipe, Stage

if TYPE_CHECKING:  # heavy
    from emu_lightning.evaluation.comparison import Comparison
    from emu_lightning.evaluation.report import Html, Pictures

POOL_SEED = 100  # the pool is of another world than the base's


# --- what a run folder remembers --------------------------------------------------------------------------


def remember(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuses to go on in a folder where another job was begun."""
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise ValueError(
            f"{path.parent} was begun with other settings ({path}): name another --run_dir, or remove it"
        )
    write_whole(path, json.dumps(settings, indent=1))


class Clock:
    """Seconds that the parts of a job took over all its starts, kept in a file.

    A part that has come to its end is not counted again when a later start finds its result there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ended: dict[str, bool] = {}
        self.seconds: dict[str, float] = {}
        if path.is_file():
            kept = json.loads(path.read_text())
            self._ended, self.seconds = kept["ended"], kept["seconds"]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what is done inside; also where that is interrupted."""
        if self._ended.get(name):
            yield
            return
        begun = time.monotonic() - self.seconds.get(name, 0.0)
        try:
            yield
            self._ended[name] = True
        finally:
            self.at_least(name, time.monotonic() - begun)

    def at_least(self, name: str, seconds: float) -> None:
        """For a part that keeps its own time, even of starts that were killed."""
        self.seconds[name] = max(seconds, self.seconds.get(name, 0.0))
        write_whole(self._path, json.dumps({"seconds": self.seconds, "ended": self._ended}))

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


# --- the parts --------------------------------------------------------------------------------------------


def sizes(scale: float) -> dict[str, Any]:
    """Pictures of the pool, those selected of it, and judged prompts, by the one dial.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    if scale <= 0:
        raise ValueError(f"--scale {scale}: give a positive number, 1 is the default job")
    return {
        "scale": scale,
        "pool": round(3000 * scale),
        "selected": round(300 * scale),
        "prompts": max(64, min(375, round(360 * scale))),
    }


def iterations(tuning: Stage, scale: float) -> int:
    """At most so many steps of tuning; what its configuration says at scale 1."""
    return max(50, round(tuning.settings()["trainer"]["max_steps"] * scale))


def select(path: Path, settings: Mapping[str, Any]) -> Path:
    """The pictures of the pool that the judge finds most appealing, as a selection file."""
    if path.is_file():
        return path
    from emu_lightning.data import World
    from emu_lightning.data.world_data import WorldData
    from emu_lightning.verbs.world_checks import read_all, world_pictures

    pool = WorldData(pool_size=settings["pool"], world_seed=POOL_SEED).train_source()
    assert isinstance(pool, World)
    appeal = [reading.marks.appeal for reading in read_all(world_pictures(pool)[0], "judging the pool")]
    ranked = sorted(range(len(pool)), key=lambda i: appeal[i], reverse=True)
    chosen = ranked[: settings["selected"]]
    selection = {
        "configuration": {"pool": pool.fingerprint(), "rank_by": "WorldJudge appeal", "take": len(chosen)},
        "appeal": {
            "pool_mean": sum(appeal) / len(appeal),
            "selected_mean": sum(appeal[i] for i in chosen) / len(chosen),
            "selected_lowest": appeal[chosen[-1]],
        },
        "uids": sorted(pool.uid(i) for i in chosen),
    }
    write_whole(path, json.dumps(selection, indent=1))
    return path


def tune(
    run: Path,
    recipe: Recipe,
    base: Path,
    selection: Path,
    settings: Mapping[str, Any],
    device: str,
) -> float:
    """Tunes ``base`` into ``run/tuning``, on latents made once where the recipe has them.

    Returns:
        The seconds of training over all its starts.
    """
    from emu_lightning.modules import load_generator
    from emu_lightning.verbs.stages import device_options, run_stage

    options = {
        "--model.init_from": base,
        "--data.pool_size": settings["pool"],
        "--data.world_seed": POOL_SEED,
        "--data.selection": selection,
        "--trainer.max_steps": settings["max_steps"],
    }
    if recipe.latents_of:
        encoder = run / "autoencoder"
        load_generator(base).get_submodule(recipe.latents_of).save(encoder)  # type: ignore[operator]
        options |= {"--data.latents_from": encoder, "--data.cache_dir": run / "cache"}
    flat = [str(part) for option in options.items() for part in option]
    stage = recipe.tuning
    return run_stage(stage.config, run / "tuning", [*stage.arguments(run), *flat, *device_options(device)])


@dataclass(frozen=True)
class Judged:
    """Base and tuned on the same prompts at equal seeds.

    ``pictures`` and ``figures`` (what `world_checks.share_all_three` gives) are of `base` and of `tuned`;
    ``stop`` is the chosen evaluation of tuning; ``num_parameters`` counts what a picture needs.
    """

    result: Comparison
    pictures: dict[str, Pictures]
    figures: dict[str, dict[str, Any]]
    stop: dict[str, Any]
    num_parameters: int


def judge(run: Path, base: Path, prompts: Sequence[str], device: str) -> Judged:
    """Draws what is missing of ``run/base`` and ``run/tuned``, and judges both.

    Raises:
        ValueError: tuning chose no iteration.
    """
    import torch

    from emu_lightning.evaluation.comparison import compare
    from emu_lightning.evaluation.generation import generate_folder
    from emu_lightning.modules import load_generator, weights_sha256
    from emu_lightning.verbs.stages import torch_device
    from emu_lightning.verbs.world_checks import JudgeOnce, read_all, share_all_three

    if not (run / "tuning" / "chosen.json").is_file():
        raise ValueError(
            f"no iteration was faithful enough to be chosen: see {run / 'tuning' / 'preference.jsonl'}"
        )
    scorer = JudgeOnce()
    pictures, figures = {}, {}
    where = torch_device(device)
    # As tuning drew when it chose where to stop.
    precision = yaml.safe_load((run / "tuning" / "config.yaml").read_text())["trainer"]["precision"]
    for name, path in {"base": base, "tuned": run / "tuning" / "chosen"}.items():
        generator = load_generator(path).to(where).eval()
        with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            pictures[name] = generate_folder(
                generator,
                prompts,
                range(len(prompts)),
                run / name,
                settings={"weights": weights_sha256(path), "precision": precision},
                description=f"pictures of {name}",
            )
        figures[name] = share_all_three(read_all(pictures[name], f"reading {name}", scorer), list(prompts))
    result = compare(scorer, pictures["base"], pictures["tuned"], prompts)
    stop = json.loads((run / "tuning" / "chosen.json").read_text())
    num_parameters = sum(weight.numel() for weight in generator.sampling_state().values())
    return Judged(result, pictures, figures, stop, num_parameters)


# --- what a page shows of them ----------------------------------------------------------------------------


def examples(selection: Path, settings: Mapping[str, Any]) -> Html:
    """Pictures of the pool beside selected ones."""
    import numpy as np

    from emu_lightning.data import World
    from emu_lightning.evaluation import report
    from emu_lightning.verbs.world_checks import world_pictures

    selected = set(json.loads(selection.read_text())["uids"])
    num_shown = min(12, len(selected))
    pool = World(num_images=settings["pool"], seed=POOL_SEED)
    indices = [i for i in range(len(pool)) if pool.uid(i) in selected][:num_shown]
    shown = {
        "pool": world_pictures(World(num_images=num_shown, seed=POOL_SEED))[0],
        "selected": np.stack([np.asarray(pool[i].image) for i in indices]),
    }
    return report.figure_grid(shown, [f"example {i + 1}" for i in range(num_shown)])


def curves(run: Path, stop: int) -> Html:
    """Preference over the start and loss, against the iterations of ``run/tuning``."""
    from emu_lightning.evaluation import report

    history = [json.loads(line) for line in (run / "tuning" / "preference.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in history]
    share = [
        report.Series("appeal, win", steps, [entry["appeal_win_rate"] for entry in history]),
        report.Series("faithfulness, win − lose", steps, [e["faithfulness_win_minus_lose"] for e in history]),
    ]
    losses = []
    with (run / "tuning" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("train/loss", "val/loss"):
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        if points:
            losses.append(report.Series(name, [p[0] for p in points], [p[1] for p in points]))
    return report.columns(
        report.line_chart("Against the frozen start", share, x_label="iteration", unit="%", stop=stop),
        report.line_chart("Loss", losses, x_label="iteration", stop=stop),
    )


def facts_table(figures: Mapping[str, Mapping[str, Any]]) -> Html:
    """Share of the prompts naming a fact whose picture shows it, base and tuned."""
    from emu_lightning.evaluation import report

    names = ("base", "tuned")
    return report.table(
        ["fact", *names],
        [
            [fact, *(report.percent(figures[name]["facts"][fact]) for name in names)]
            for fact in figures["base"]["facts"]
        ],
        caption="Share of the prompts naming a fact whose picture shows it.",
    )
