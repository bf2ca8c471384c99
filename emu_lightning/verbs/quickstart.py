"""`emu quickstart`: the main job in minutes, on the carried miniature base: select, tune, judge, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from emu_lightning.resources import miniature_path
from emu_lightning.verbs.arguments import call
from emu_lightning.verbs.recipes import read_recipe
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


def quickstart(
    run_dir: str = "runs/quickstart",
    scale: float = 1.0,
    from_scratch: bool = False,
    device: str = "auto",
) -> None:
    """Selects the photogenic few from a pool, tunes the base on them, judges both, writes report.html.

    Every stage leaves its result in the run folder; what is there is not made again, so a killed run goes on.

    Args:
        run_dir: folder for everything.
        scale: the one dial: pool, tuning steps and judged prompts grow with it. 1 is four to seven minutes on
            two cores; 0.2 is a look.
        from_scratch: first make a base of one's own (about an hour on two cores) instead of the carried one.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    run, recipe = Path(run_dir), read_recipe("latent")
    settings = {
        **sizes(scale),
        "from_scratch": from_scratch,
        "max_steps": iterations(recipe.tuning, scale),
    }
    remember(run / "settings.json", settings)
    print(f"quickstart in {run}: {json.dumps(settings)}", flush=True)

    clock = Clock(run / "clock.json")
    base = miniature_path()
    if from_scratch:
        from emu_lightning.verbs.miniature import make_base

        with clock.part("base"):
            base, _ = make_base(recipe, run / "from_scratch", device)
    with clock.part("select"):
        selection = select(run / "selection.json", settings)
    with clock.part("tune"):
        seconds = tune(run, recipe, base, selection, settings, device)
    clock.at_least("tune", seconds)
    with clock.part("judge"):
        from emu_lightning.verbs.world_checks import held_out_prompts

        prompts = held_out_prompts(settings["prompts"])
        judged = judge(run, base, prompts, device)
        checks = _checks(base)
    _report(run, judged, prompts, checks, settings, clock)


def _checks(base: Path) -> dict[str, Any]:
    """How good the autoencoder and the judge are, without which the result would mean little."""
    from emu_lightning.modules import load_generator
    from emu_lightning.verbs.world_checks import autoencoder_psnr, judge_figures

    autoencoder = load_generator(base).get_submodule("autoencoder")
    return {"autoencoder": autoencoder_psnr(autoencoder), "judge": judge_figures()}


def _report(
    run: Path,
    judged: Judged,
    prompts: list[str],
    checks: dict[str, Any],
    settings: dict[str, Any],
    clock: Clock,
) -> None:
    import numpy as np

    from emu_lightning.callbacks.samples import picture_grid
    from emu_lightning.evaluation import report
    from emu_lightning.evaluation.comparison_page import comparison_page, environment
    from emu_lightning.evaluation.generation import write_png
    from emu_lightning.evaluation.judge import facts_of
    from emu_lightning.verbs.stages import peak_memory_gb

    result, figures = judged.result, judged.figures
    results: dict[str, Any] = {
        "autoencoder": checks["autoencoder"],
        "pretrained": figures["base"],
        "tuned": figures["tuned"],
        "appeal": result.appeal.to_dict("win_rate"),
        "faithfulness": result.faithfulness.to_dict("win_minus_lose"),
        "judge": checks["judge"],
        "stop": judged.stop,
        "settings": settings,
        "command": f"emu quickstart --run_dir {run} --scale {settings['scale']}",
        **environment(),
        "seconds": round(clock.total, 1),
        "peak_memory_gb": round(peak_memory_gb(), 2),
    }
    facts = [facts_of(prompt) for prompt in prompts]
    page = comparison_page(
        "Quality-tuning in miniature",
        result,
        judged.pictures,
        prompts,
        {
            "quickstart": settings,
            "tuning": yaml.safe_load((run / "tuning" / "config.yaml").read_text()),
        },
        command=results["command"],
        facts={"seconds": str(results["seconds"]), "peak memory": f"{results['peak_memory_gb']} GB"},
        cards=[
            report.Figure(
                "base shows all three facts",
                report.percent(figures["base"]["faithfulness"]),
                report.percent_interval(tuple(figures["base"]["ci95"])),
            ),
            report.Figure(
                "autoencoder", f"{results['autoencoder']['psnr_db']:.1f} dB", "PSNR, held-out pictures"
            ),
            report.Figure(
                "judge's accuracy", report.percent(results["judge"]["accuracy"]), "on fresh pictures"
            ),
            report.Figure("judge's AUC", f"{results['judge']['auc']:.3f}", "skilled against ordinary"),
        ],
        sections=[
            report.Section(
                "Fact by fact",
                [facts_table(figures)],
                "Half of the places right is what guessing between left and right gives.",
            ),
            report.Section(
                "The stop", [curves(run, judged.stop["step"])], "Chosen by evaluation, never by the loss."
            ),
            report.Section(
                "What it was tuned on",
                [examples(run / "selection.json", settings)],
                f"{settings['selected']} of {settings['pool']} pictures, those the judge finds most "
                "appealing. The same judge decides the result, as in the paper people did both.",
            ),
        ],
        slices={group: [fact[group] for fact in facts] for group in ("subject", "colour", "background")},
        judge="the exact judge of the synthetic world, from pixels alone",
    )
    rows = np.concatenate([judged.pictures[name][:12] for name in ("base", "tuned")])
    write_png(run / "grid.png", picture_grid(rows, columns=12))
    path = report.write_report(run, results, page)
    appeal, faithfulness = result.appeal, result.faithfulness
    print(f"appeal: tuned wins {report.percent(appeal.win)} ({report.percent_interval(appeal.ci95)})")
    print(f"faithfulness: win minus lose {report.points(faithfulness.win_minus_lose)} points")
    print(f"report: {path}")


def main(argv: list[str]) -> None:
    call(quickstart, argv, "emu quickstart")
