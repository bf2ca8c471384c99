"""`emu generators`: the main job on every carried base, whatever kind it is, and one page about all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from emu_lightning.resources import miniature_path
from emu_lightning.verbs.arguments import call
from emu_lightning.verbs.recipes import Recipe, read_recipe, recipe_names
from emu_lightning.verbs.tuning import (
    Clock,
    Judged,
    curves,
    examples,
    facts_table,
    iterations,
    judge,
    remember,
    select,
    sizes,
    tune,
)


def generators(
    names: list[str] | None = None,
    run_dir: str = "runs/generators",
    scale: float = 1.0,
    device: str = "auto",
) -> None:
    """Tunes each carried base on the same selected pictures, judges it against itself, writes report.html.

    Every stage leaves its result in the run folder; what is there is not made again, so a killed run goes on.

    Args:
        names: which bases; each has a file in configs/recipes. All that are carried when left out.
        run_dir: folder for everything, each generator in a folder of its name.
        scale: the one dial: pool, tuning steps and judged prompts grow with it. 1 is about five minutes on
            two cores for each; 0.2 is a look.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    run = Path(run_dir)
    carried = [name for name in recipe_names() if miniature_path(name).is_dir()]
    recipes = {name: read_recipe(name) for name in names or carried or recipe_names()}
    for name in recipes:
        if not miniature_path(name).is_dir():
            raise ValueError(f"no base is carried for {name!r}: make it by `emu miniature --recipe {name}`")
    settings = sizes(scale)
    remember(run / "settings.json", settings)
    print(f"generators in {run}: {', '.join(recipes)}, {json.dumps(settings)}", flush=True)

    clock = Clock(run / "clock.json")
    with clock.part("select"):
        selection = select(run / "selection.json", settings)
    judged, results = {}, {}
    for name, recipe in recipes.items():
        judged[name], own = _tune_and_judge(name, recipe, run / name, selection, settings, device)
        results[name] = {
            **_figures(judged[name]),
            # One generator alone would need the selection too.
            "seconds": round(clock.total + own.total, 1),
            "seconds_of": {**clock.seconds, **own.seconds},
        }
    _report(run, recipes, judged, results, settings)


def _tune_and_judge(
    name: str, recipe: Recipe, run: Path, selection: Path, settings: dict[str, Any], device: str
) -> tuple[Judged, Clock]:
    from emu_lightning.modules import weights_sha256
    from emu_lightning.verbs.world_checks import held_out_prompts

    base = miniature_path(name)
    own = {
        **settings,
        "base": weights_sha256(base),
        "tuning": recipe.tuning.config,
        "max_steps": iterations(recipe.tuning, settings["scale"]),
    }
    remember(run / "settings.json", own)
    print(f"{name}: {json.dumps(own)}", flush=True)
    clock = Clock(run / "clock.json")
    with clock.part("tune"):
        seconds = tune(run, recipe, base, selection, own, device)
    clock.at_least("tune", seconds)
    with clock.part("judge"):
        judged = judge(run, base, held_out_prompts(settings["prompts"]), device)
    return judged, clock


def _figures(judged: Judged) -> dict[str, Any]:
    return {
        "appeal": judged.result.appeal.to_dict("win_rate"),
        "faithfulness": judged.result.faithfulness.to_dict("win_minus_lose"),
        "pretrained": judged.figures["base"],
        "tuned": judged.figures["tuned"],
        "stop": judged.stop,
        "parameters": judged.num_parameters,
    }


def _report(
    run: Path,
    recipes: dict[str, Recipe],
    judged: dict[str, Judged],
    results: dict[str, dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    import numpy as np

    from emu_lightning.callbacks.samples import picture_grid
    from emu_lightning.evaluation import report
    from emu_lightning.evaluation.comparison_page import environment
    from emu_lightning.evaluation.generation import write_png
    from emu_lightning.evaluation.generators_page import Tuned, generators_page
    from emu_lightning.verbs.stages import peak_memory_gb
    from emu_lightning.verbs.world_checks import held_out_prompts

    command = f"emu generators --names '[{', '.join(recipes)}]' --run_dir {run} --scale {settings['scale']}"
    memory = round(peak_memory_gb(), 2)
    page = generators_page(
        "Quality-tuning of every generator, in miniature",
        {
            name: Tuned(
                title=recipes[name].title,
                result=each.result,
                pictures=each.pictures,
                faithfulness={model: figures["faithfulness"] for model, figures in each.figures.items()},
                seconds=results[name]["seconds"],
                num_parameters=each.num_parameters,
                stop=each.stop["step"],
                details=[curves(run / name, each.stop["step"]), facts_table(each.figures)],
            )
            for name, each in judged.items()
        },
        held_out_prompts(settings["prompts"]),
        {
            "generators": settings,
            **{name: yaml.safe_load((run / name / "tuning" / "config.yaml").read_text()) for name in judged},
        },
        command=command,
        facts={"peak memory": f"{memory} GB"},
        sections=[
            report.Section(
                "What they were tuned on",
                [examples(run / "selection.json", settings)],
                f"{settings['selected']} of {settings['pool']} pictures, the same for all: those the judge "
                "finds most appealing. The same judge decides the result, as in the paper people did both.",
            ),
        ],
        judge="the exact judge of the synthetic world, from pixels alone",
    )
    rows = [each.pictures[model][:12] for each in judged.values() for model in ("base", "tuned")]
    write_png(run / "grid.png", picture_grid(np.concatenate(rows), columns=12))
    everything = {
        **results,
        "settings": settings,
        "command": command,
        "peak_memory_gb": memory,
        **environment(),
    }
    path = report.write_report(run, everything, page)
    for name, each in judged.items():
        appeal, faithfulness = each.result.appeal, each.result.faithfulness
        print(
            f"{name}: tuned wins {report.percent(appeal.win)} ({report.percent_interval(appeal.ci95)}) on "
            f"appeal; faithfulness, win minus lose, {report.points(faithfulness.win_minus_lose)} points "
            f"({report.points_interval(faithfulness.win_minus_lose_ci95)}); {results[name]['seconds']:.0f} s"
        )
    print(f"report: {path}")


def main(argv: list[str]) -> None:
    call(generators, argv, "emu generators")
