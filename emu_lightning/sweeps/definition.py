"""A sweep file in W&B's format: which runs there are, and the command of each.

What it means is what the `wandb agent` does with it (wandb 0.30). What only a server can do is refused.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

Parameters = dict[str, Any]

KEYS = (
    "program", "command", "method", "metric", "parameters", "run_cap", "name", "description", "project",
    "entity", "early_terminate",
)  # fmt: skip
METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
LONGEST_NAME = 100  # of a run: W&B takes 128 characters, file systems 255

_ENVIRONMENT = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")


@dataclass(frozen=True)
class Choice:
    """One of some values, which may be of any type that a command line can spell."""

    values: tuple[Any, ...]

    @property
    def examples(self) -> tuple[Any, ...]:
        return self.values

    def label(self, value: Any) -> str:
        """Of configuration files the names alone, as far as they differ."""
        files = [Path(str(each)) for each in self.values]
        if any(file.suffix != ".yaml" for file in files):
            return str(value)
        return (
            Path(value)
            .with_suffix("")
            .relative_to(os.path.commonpath([file.parent for file in files]))
            .as_posix()
        )


@dataclass(frozen=True)
class Interval:
    """A number from ``low`` to ``high``, both included; where asked for whole, or a multiple of ``step``."""

    low: float
    high: float
    is_integer: bool = False
    is_log: bool = False
    step: float | None = None

    @property
    def examples(self) -> tuple[float, ...]:
        return (self.low, self.high)

    def label(self, value: float) -> str:
        return str(value)

    def written(self, value: float) -> float:
        """``value`` as a command line has it: of six digits, on the step, inside."""
        if self.is_integer:
            return int(value)
        value = float(f"{value:.6g}") if self.step is None else round(value / self.step) * self.step
        return min(max(value, self.low), self.high)


Space = Choice | Interval

# W&B's name -> how its bounds are read; of the others none has a counterpart in all three methods.
_DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "int_uniform": {"is_integer": True},
    "uniform": {},
    "q_uniform": {"step": 1},
    "log_uniform": {"is_log": True},  # bounds are exponents of e
    "log_uniform_values": {"is_log": True},
    "q_log_uniform_values": {"is_log": True, "step": 1},
}


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Args:
        path: the file.
        settings: what is in it.
        method: `grid`, `random` or `bayes`.
        parameters: dotted name of an option -> where its values come from.
        program: what `${program}` of the command stands for.
        command: with W&B's macros.
        metric: name of what is optimised, as in `metrics.csv`; None where nothing is.
        maximize: whether more of it is better.
        run_cap: how many runs at most; None is no limit.
    """

    path: Path
    settings: Mapping[str, Any]
    method: str
    parameters: Mapping[str, Space]
    program: str
    command: Sequence[str]
    metric: str | None
    maximize: bool
    run_cap: int | None

    def grid(self) -> Iterator[Parameters]:
        """Every combination of values, the last parameter varying fastest."""
        values = [
            space.values if isinstance(space, Choice) else range(int(space.low), int(space.high) + 1)
            for space in self.parameters.values()
        ]
        for combination in product(*values):
            yield dict(zip(self.parameters, combination, strict=True))

    def named_grid(self) -> dict[str, Parameters]:
        """The grid by the names of its runs.

        Raises:
            ValueError: two runs have one name.
        """
        named: dict[str, Parameters] = {}
        for parameters in self.grid():
            name = self.run_name(parameters)
            if name in named:
                raise ValueError(
                    f"{self.path}: two runs would be named {name}: {named[name]} and {parameters}"
                )
            named[name] = parameters
        return named

    def examples(self) -> list[Parameters]:
        """The fewest parameter sets in which every value, or bound, of every parameter occurs."""
        every = {name: space.examples for name, space in self.parameters.items()}
        num = max(map(len, every.values()))
        return [{name: some[min(i, len(some) - 1)] for name, some in every.items()} for i in range(num)]

    def run_name(self, parameters: Parameters) -> str:
        """Names a run by what varies: the last part of each option, and its value.

        Such as `subset_size_100-subset_seed_0`. Fit for a folder and for W&B's run id.
        """
        varied = [name for name, space in self.parameters.items() if len(set(map(repr, space.examples))) > 1]
        short = {name: name.rpartition(".")[2] for name in varied}
        if len(set(short.values())) < len(short):
            short = {name: name for name in varied}
        labels = {name: self.parameters[name].label(parameters[name]) for name in varied}
        words = "-".join(f"{short[name]}_{label}" for name, label in labels.items()) or "run"
        words = re.sub(r"[^A-Za-z0-9.+-]+", "_", words).strip("._")
        if len(words) > LONGEST_NAME:
            raise ValueError(
                f"{self.path}: the name of a run, {words}, is too long: vary fewer or shorter values"
            )
        return words

    def command_line(self, parameters: Parameters) -> list[str]:
        """The run's arguments, program first, as the agent spells them.

        Raises:
            ValueError: the command has a macro that is not known here.
        """
        flags = [f"{name}={value}" for name, value in parameters.items()]
        macros: dict[str, list[str]] = {
            "env": ["/usr/bin/env"],
            "interpreter": [sys.executable],  # the agent takes the `python` of the PATH
            "program": [self.program],
            "args": [f"--{flag}" for flag in flags],
            "args_no_equals": [
                part for name, value in parameters.items() for part in (f"--{name}", str(value))
            ],
            "args_no_hyphens": flags,
            "args_no_boolean_flags": [
                f"--{name}" if value is True else f"--{name}={value}"
                for name, value in parameters.items()
                if value is not False
            ],
            "args_json": [json.dumps(parameters)],
        }
        line: list[str] = []
        for part in map(str, self.command):
            part = _ENVIRONMENT.sub(lambda found: os.environ.get(found[1], found[1]), part)
            if not (part.startswith("${") and part.endswith("}")):
                line.append(part)
            elif part[2:-1] in macros:
                line += macros[part[2:-1]]
            else:
                raise ValueError(f"{self.path}: command has {part}; known are {', '.join(macros)}")
        return line


def read_sweep(path: str | Path) -> Sweep:
    """Reads a sweep file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one, or asks for what only a server can do; one line naming the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"sweep file {path} does not exist")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    try:
        return _understood(path, settings)
    except _Wrong as error:
        raise ValueError(f"{path}: {error}") from None


class _Wrong(Exception):
    """What is wrong with the file, without its name."""


def _understood(path: Path, settings: Any) -> Sweep:
    _known(settings, "a sweep file", KEYS)
    method = _one_of(settings.get("method"), "method", METHODS)
    if not isinstance(settings.get("parameters"), dict) or not settings["parameters"]:
        raise _Wrong(
            "parameters must name what varies, such as model.optimizer.lr: {values: [1.0e-4, 1.0e-3]}"
        )
    parameters = {str(name): _space(str(name), spec) for name, spec in settings["parameters"].items()}
    if method == "grid":
        for name, space in parameters.items():
            if isinstance(space, Interval) and not space.is_integer:
                raise _Wrong(f"parameters.{name}: a grid needs value, values, or whole numbers min and max")
    metric = settings.get("metric")
    if metric is not None:
        _known(metric, "metric", ("name", "goal", "target"))
        _one_of(metric.get("goal", "minimize"), "metric.goal", GOALS)
        if not isinstance(metric.get("name"), str):
            raise _Wrong("metric has no name, such as val/loss")
    elif method == "bayes":
        raise _Wrong("method bayes needs a metric: {name: val/loss, goal: minimize}")
    command = settings.get("command", DEFAULT_COMMAND)
    if not isinstance(command, list | tuple) or not command:
        raise _Wrong("command must be a list of words")
    run_cap = settings.get("run_cap")
    if run_cap is not None and (not isinstance(run_cap, int) or run_cap < 1):
        raise _Wrong(f"run_cap must be a positive whole number, not {run_cap}")
    return Sweep(
        path=path,
        settings=settings,
        method=method,
        parameters=parameters,
        program=str(settings.get("program", "")),
        command=tuple(map(str, command)),
        metric=metric["name"] if metric else None,
        maximize=bool(metric) and metric.get("goal") == "maximize",
        run_cap=run_cap,
    )


def _known(settings: Any, what: str, keys: Sequence[str]) -> None:
    if not isinstance(settings, dict):
        raise _Wrong(f"{what} must be a mapping with the keys {', '.join(keys)}")
    for key in settings:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(keys)}"
            raise _Wrong(f"{key!r} is not a key of {what}; {hint}")


def _one_of(value: Any, what: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise _Wrong(f"{what} must be one of {', '.join(choices)}, not {value}")
    return str(value)


def _space(name: str, spec: Any) -> Space:
    where = f"parameters.{name}"
    _known(spec, where, ("value", "values", "distribution", "min", "max", "q"))
    if "value" in spec or "values" in spec:
        values = spec["values"] if "values" in spec else [spec["value"]]
        if not isinstance(values, list) or not values:
            raise _Wrong(f"{where}: values must be a list that is not empty")
        if any(isinstance(value, dict) for value in values):
            raise _Wrong(
                f"{where}: a value cannot be a mapping, no command line can spell it: use dotted names"
            )
        if len(set(map(repr, values))) < len(values):
            raise _Wrong(f"{where}: values has a value twice")
        return Choice(tuple(values))
    bounds = [spec.get("min"), spec.get("max")]
    for key, bound in zip(("min", "max"), bounds, strict=True):
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            remedy = ", written like 1.0e-4" if isinstance(bound, str) else ", or value or values"
            raise _Wrong(f"{where}: {key} must be a number{remedy}")
    are_whole = all(isinstance(bound, int) for bound in bounds)
    kind = _one_of(
        spec.get("distribution", "int_uniform" if are_whole else "uniform"),
        f"{where}.distribution",
        [*_DISTRIBUTIONS],
    )
    settings = dict(_DISTRIBUTIONS[kind])
    if "step" in settings:
        settings["step"] = spec.get("q", settings["step"])
    low, high = map(math.exp, bounds) if kind == "log_uniform" else bounds
    if low >= high or (settings.get("is_log") and low <= 0):
        raise _Wrong(f"{where}: min must be below max{', and positive' if settings.get('is_log') else ''}")
    return Interval(low, high, **settings)
