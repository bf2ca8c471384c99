"""The ablations: what is varied, what is measured, what the paper reports, which trend it saw.

Every figure of the paper (Emu, arXiv 2309.15807) says whether it is in its text or recalled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from emu_lightning.dashboard.runs import RunRecord

Unit = Literal["", "%", "points"]
Verdict = Literal["holds", "does not hold", "not settled"]
SEED_KEYS = ("seed_everything", "data.subset_seed", "data.seed")
PAPER, RECALLED = "the paper", "recalled"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval by Student's t; the interval is None for a single seed."""

    mean: float
    ci95: tuple[float, float] | None
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        x = np.array(list(values), np.float64)
        mean = float(x.mean())
        if len(x) < 2:
            return cls(mean, None, len(x))
        half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
        return cls(mean, (mean - half, mean + half), len(x))

    @property
    def verdict(self) -> Verdict:
        """Whether a difference is above 0: only an interval that leaves 0 out settles it."""
        low, high = self.ci95 or (-np.inf, np.inf)
        if self.ci95 is not None and low == high == 0:
            return "does not hold"
        return "holds" if low > 0 else "does not hold" if high < 0 else "not settled"


@dataclass(frozen=True)
class Reported:
    """A figure of the paper: ``source`` says whether it is in its text, or recalled."""

    value: float
    source: str


@dataclass(frozen=True)
class Metric:
    """What is measured of a run.

    Args:
        name: of the curve, as it is logged.
        label: for people.
        better: which way is better; "" for what is only looked at.
        unit: "%" for shares in [0, 1], "points" for their differences.
        paper: the paper's figures by the varied value.
        paper_is: what those figures are of, where they cannot be compared one to one.
    """

    name: str
    label: str
    better: Literal["higher", "lower", ""] = "higher"
    unit: Unit = ""
    paper: Mapping[str, Reported] | None = None
    paper_is: str = ""


@dataclass(frozen=True)
class Claim:
    """What the paper saw: a weighted sum of a metric over values, above 0 where the claim holds.

    Where lower is better the weights are of the metric's negative.
    """

    statement: str
    metric: str
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Ablation:
    """A question that runs of one sweep answer together.

    Args:
        key: short name.
        title: the question.
        x_label: what is varied.
        keys: settings in which the runs differ, besides seeds.
        value: what a run has of it, as the paper's figures name it.
        wandb_key: what tells the runs apart in W&B's config: below ``cli`` is what `emu fit` resolved, beside
            it what a sweep sets.
        metrics: from the most to the least important.
        claims: the paper's.
        caveat: what the reader has to know about the figures.
    """

    key: str
    title: str
    x_label: str
    keys: frozenset[str]
    value: Callable[[Mapping[str, Any]], str]
    wandb_key: str
    metrics: Sequence[Metric]
    claims: Sequence[Claim]
    caveat: str


def _channels(config: Mapping[str, Any]) -> str:
    fourier = " + Fourier" if config["model.autoencoder.fourier_frequencies"] else ""
    return f"{config['model.autoencoder.latent_channels']}{fourier}"


def _autoencoders_channels(config: Mapping[str, Any]) -> str:
    """Of a generator: what its autoencoder's input was only that one's folder says."""
    fourier = " + Fourier" if "fourier" in config["model.autoencoder.folder"] else ""
    return f"{config['model.denoiser.in_channels']}{fourier}"


def _recalled(values: Mapping[str, float]) -> dict[str, Reported]:
    return {value: Reported(figure, RECALLED) for value, figure in values.items()}


_TABLE_1 = "Table 1, a full-size autoencoder on photographs"
PSNR = Metric(
    "val/psnr",
    "PSNR, dB",
    paper=_recalled({"4": 28.64, "8": 30.95, "16": 34.00, "16 + Fourier": 34.19}),
    paper_is=_TABLE_1,
)
SSIM = Metric(
    "val/ssim",
    "SSIM",
    paper=_recalled({"4": 0.80, "8": 0.86, "16": 0.92, "16 + Fourier": 0.93}),
    paper_is=_TABLE_1,
)
RFD = Metric("val/rfd_random", "Fréchet distance of random features", "lower")
RFID = Metric(
    "val/rfd_inception_v3",
    "rFID",
    "lower",
    paper=_recalled({"4": 0.35, "8": 0.19, "16": 0.06, "16 + Fourier": 0.03}),
    paper_is=_TABLE_1,
)
PERCEPTUAL = Metric("val/perceptual_random", "distance of random features", "lower")
APPEAL = Metric("held_out/appeal_win_minus_lose", "appeal, win minus lose", unit="points")
FAITHFULNESS = Metric("held_out/faithfulness_win_minus_lose", "faithfulness, win minus lose", unit="points")
WINS = Metric(
    "held_out/appeal_win_rate",
    "appeal, wins",
    unit="%",
    paper={
        "0": Reported(0.248, PAPER),
        "100": Reported(0.60, PAPER),
        "1000": Reported(0.632, RECALLED),
        "2000": Reported(0.67, RECALLED),
    },
    paper_is="against SDXL, by people; ours are against the base itself",
)

_STEPS = (("16", "4"), ("8", "4"), ("16", "8"), ("16 + Fourier", "16"))

CHANNELS = Ablation(
    "channels",
    "Do more latent channels, and Fourier features, reconstruct better?",
    "latent channels",
    frozenset({"model.autoencoder.latent_channels", "model.autoencoder.fourier_frequencies"}),
    _channels,
    "config",  # a file for each number of channels, and one with Fourier features
    [PSNR, SSIM, RFID, RFD, PERCEPTUAL],
    [
        Claim(f"{more} channels over {fewer}: {metric.label} {way}", metric.name, {more: 1.0, fewer: -1.0})
        for more, fewer in _STEPS
        for metric, way in ((PSNR, "rises"), (SSIM, "rises"), (RFID, "falls"), (RFD, "falls"))
    ],
    "One autoencoder for each number of channels and seed, at equal steps; held-out pictures.",
)

GENERATION = Ablation(
    "channels_generation",
    "What do latent channels do for the generator that learns on them?",
    "latent channels",
    frozenset({"model.autoencoder.folder", "data.latents_from", "model.denoiser.in_channels"}),
    _autoencoders_channels,
    "config",
    [
        Metric("held_out/faithfulness", "facts of a prompt that are shown", unit="%"),
        Metric("held_out/appeal", "appeal"),
    ],
    [],
    "Not measured in the paper. One U-Net for each autoencoder and seed, at equal steps; held-out prompts.",
)

SET_SIZE = Ablation(
    "set_size",
    "How many superb pictures does quality-tuning need?",
    "pictures tuned on",
    frozenset({"data.subset_size"}),
    lambda config: str(config["data.subset_size"]),
    "cli.data.init_args.subset_size",
    [APPEAL, FAITHFULNESS, WINS],
    [
        Claim("100 pictures already help", APPEAL.name, {"100": 1.0, "0": -1.0}),
        Claim(
            "the first 100 help more than all that follow", APPEAL.name, {"100": 2.0, "0": -1.0, "2000": -1.0}
        ),
        Claim("2000 help more than 100", APPEAL.name, {"2000": 1.0, "100": -1.0}),
        Claim("faithfulness rises with the pictures, too", FAITHFULNESS.name, {"2000": 1.0, "0": -1.0}),
    ],
    "Against the base itself, at equal prompts and seeds. The subsets of a seed are nested; another seed is "
    "another random set. Each run stopped where evaluation on other prompts chose.",
)

ABLATIONS = (CHANNELS, GENERATION, SET_SIZE)


@dataclass(frozen=True)
class Point:
    """One value of what was varied: estimates by metric, and the mean seconds of a run."""

    value: str
    estimates: Mapping[str, Estimate]
    seconds: float | None


@dataclass(frozen=True)
class Answered:
    """A claim and what came of it here: the weighted sum, paired by seed."""

    claim: Claim
    metric: Metric
    difference: Estimate


@dataclass(frozen=True)
class Answer:
    """What the runs say of an ablation: points in order, and the paper's claims."""

    ablation: Ablation
    points: Sequence[Point]
    claims: Sequence[Answered]
    runs: Sequence[RunRecord]

    @property
    def measured(self) -> list[Metric]:
        """Metrics that some run has."""
        return [
            metric for metric in self.ablation.metrics if any(metric.name in p.estimates for p in self.points)
        ]


def varied(runs: Sequence[RunRecord]) -> list[str]:
    """Settings in which runs differ, without seeds and places; in the order of the first run's settings."""
    begun = [run for run in runs if run.state != "waiting"]  # of the others only what the sweep sets is known
    keys = list(dict.fromkeys(key for run in begun for key in run.config))
    return [key for key in keys if not _is_aside(key) and _differs([run.config.get(key) for run in begun])]


def _is_aside(key: str) -> bool:
    return key in SEED_KEYS or "dir" in key.rpartition(".")[2].split("_")


def _differs(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def seed_of(run: RunRecord) -> tuple[Any, ...]:
    """What makes a run a replicate of another."""
    return tuple(run.config.get(key) for key in SEED_KEYS)


def answers(runs: Sequence[RunRecord]) -> list[Answer]:
    """What the finished runs, sweep by sweep, say of the paper's ablations."""
    found = []
    for sweep in dict.fromkeys(run.sweep for run in runs):
        members = [run for run in runs if run.sweep == sweep and run.state == "finished"]
        differing = set(varied(members))
        found += [_answer(each, members) for each in ABLATIONS if differing and differing <= each.keys]
    return [answer for answer in found if answer.points]


def _answer(ablation: Ablation, runs: Sequence[RunRecord]) -> Answer:
    by_value: dict[str, list[RunRecord]] = {}
    for run in sorted(runs, key=lambda run: _order(ablation.value(run.config))):
        by_value.setdefault(ablation.value(run.config), []).append(run)
    points = []
    for value, members in by_value.items():
        estimates = {
            metric.name: Estimate.of(values)
            for metric in ablation.metrics
            if (values := [run.last[metric.name] for run in members if metric.name in run.last])
        }
        if not estimates:  # killed before it was measured
            continue
        seconds = [run.seconds for run in members if run.seconds is not None]
        points.append(Point(value, estimates, float(np.mean(seconds)) if seconds else None))
    named = {metric.name: metric for metric in ablation.metrics}
    claims = [
        Answered(claim, named[claim.metric], Estimate.of(differences))
        for claim in ablation.claims
        if (differences := _differences(claim, named[claim.metric], by_value))
    ]
    return Answer(ablation, points, claims, runs)


def _order(value: str) -> tuple[float, str]:
    number, _, rest = value.partition(" ")
    return float(number), rest


def _differences(claim: Claim, metric: Metric, by_value: Mapping[str, Sequence[RunRecord]]) -> list[float]:
    """The claim's weighted sum for each seed that has all of its values."""
    sign = -1 if metric.better == "lower" else 1
    sums: list[float] = []
    at = [
        {seed_of(run): run.last[metric.name] for run in by_value.get(value, ()) if metric.name in run.last}
        for value in claim.weights
    ]
    for seed in at[0]:
        if all(seed in values for values in at):
            weighted = zip(claim.weights.values(), at, strict=True)
            sums.append(sign * sum(weight * values[seed] for weight, values in weighted))
    return sums
