"""Recipes: how a carried base is made from nothing, and how it is tuned, as data in `configs/recipes`.

A recipe names shipped configurations and what is assembled of their results. Its name is that of the carried
base. `{run}` in it stands for the folder of the run that follows it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from emu_lightning.resources import config_path, shipped

FOLDER = "configs/recipes"


@dataclass(frozen=True)
class Stage:
    """One `emu fit`: a shipped configuration, and options on top of it by their dotted names."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, run: Path) -> list[str]:
        """The options as a command line, for the run in folder ``run``."""
        options = fill(self.options, run)
        return [part for name, value in options.items() for part in (f"--{name}", str(value))]

    def settings(self) -> dict[str, Any]:
        """What the configuration says, without the options."""
        settings: dict[str, Any] = yaml.safe_load(config_path(self.config).read_text())
        return settings


@dataclass(frozen=True)
class Recipe:
    """A base of the synthetic world.

    Args:
        title: what kind of generator it is, for pages.
        about: what it is, for its model card.
        limits: what it is known not to do, for its model card.
        stages: name -> stage, in the order of training; each trains in the folder of its name.
        generator: class path and arguments of what the stages' results make together.
        tuning: the quality-tuning of the base.
        autoencoders: network inside the generator, by dotted name -> side of its pictures in pixels.
        latents_of: the one of them whose latents tuning encodes once; left out where it trains on images.
    """

    title: str
    about: str
    limits: str
    stages: dict[str, Stage]
    generator: dict[str, Any]
    tuning: Stage
    autoencoders: dict[str, int] = field(default_factory=dict)
    latents_of: str | None = None


def recipe_names() -> list[str]:
    """The shipped recipes' names."""
    return sorted(path.stem for path in shipped(FOLDER).glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """Reads the recipe of a base.

    Raises:
        ValueError: there is none of this name, or it does not have the fields of :class:`Recipe`.
    """
    if name not in recipe_names():
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(recipe_names())}")
    path = shipped(FOLDER) / f"{name}.yaml"
    fields = yaml.safe_load(path.read_text())
    try:
        stages = {stage: Stage(**each) for stage, each in fields.pop("stages").items()}
        return Recipe(stages=stages, tuning=Stage(**fields.pop("tuning")), **fields)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a recipe: {error}") from None


def fill(value: Any, run: Path) -> Any:
    """``value``, nested lists and mappings of plain values, with the folder ``run`` for every `{run}`."""
    written = json.dumps(str(run))[1:-1]
    return json.loads(json.dumps(value).replace("{run}", written))
