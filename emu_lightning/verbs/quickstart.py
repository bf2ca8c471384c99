"""`emu quickstart`: the main job in minutes, on the carried miniature base: select, tune, judge, report."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

from emu_lightning.files import write_whole
from emu_lightning.resources import config_path, miniature_path
from emu_lightning.verbs.arguments import call

POOL_SEED = 100  # the pool is of another world than the base's


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
        scale: the one dial: pool, tuning steps and judged prompts grow with it. 1 is about four minutes on
            two cores; 0.2 is a look.
        from_scratch: first make a base of one's own (about an hour on two cores) instead of the carried one.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    if scale <= 0:
        raise ValueError(f"--scale {scale}: give a positive number, 1 is the default job")
    run = Path(run_dir)
    settings = {
        "scale": scale,
        "from_scratch": from_scratch,
        "pool": round(3000 * scale),
        "selected": round(300 * scale),
        "max_steps": max(50, round(200 * scale)),
        "prompts": max(64, min(375, round(360 * scale))),
    }
    _remember(run / "settings.json", settings)
    started = time.monotonic() - _seconds_before(run)
    print(f"quickstart in {run}: {json.dumps(settings)}", flush=True)

    from emu_lightning.verbs.miniature import make_base  # heavy imports from here on

    base = make_base(run / "base", device) if from_scratch else miniature_path()
    selection = _select(run / "selection.json", settings)
    _tune(run, base, selection, settings, device)
    _keep_seconds(run, started)
    _judge(run, base, settings, device, started)


def _select(path: Path, settings: dict[str, Any]) -> Path:
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


def _tune(run: Path, base: Path, selection: Path, settings: dict[str, Any], device: str) -> None:
    from emu_lightning.modules import load_generator
    from emu_lightning.verbs.stages import device_options, run_stage

    autoencoder = run / "autoencoder"
    load_generator(base).autoencoder.save(autoencoder)  # type: ignore[union-attr,operator]
    prompts = config_path("prompts/world_stop.txt")
    options = {
        "--model.init_from": base,
        "--data.pool_size": settings["pool"],
        "--data.world_seed": POOL_SEED,
        "--data.selection": selection,
        "--data.latents_from": autoencoder,  # the selected few are encoded once
        "--data.cache_dir": run / "cache",
        "--trainer.max_steps": settings["max_steps"],
        "--trainer.callbacks.prompts": prompts,
    }
    flat = [str(part) for option in options.items() for part in option]
    run_stage("quality_tuning/miniature.yaml", run / "tuning", [*flat, *device_options(device)])


def _judge(run: Path, base: Path, settings: dict[str, Any], device: str, started: float) -> None:
    import numpy as np

    from emu_lightning.callbacks.samples import picture_grid
    from emu_lightning.data import World
    from emu_lightning.evaluation import report
    from emu_lightning.evaluation.comparison import compare
    from emu_lightning.evaluation.comparison_page import comparison_page, environment
    from emu_lightning.evaluation.generation import generate_folder, write_png
    from emu_lightning.evaluation.judge import WorldJudge, facts_of
    from emu_lightning.modules import load_generator, weights_sha256
    from emu_lightning.verbs.stages import peak_memory_gb, torch_device
    from emu_lightning.verbs.world_checks import (
        autoencoder_psnr,
        held_out_prompts,
        judge_figures,
        read_all,
        share_all_three,
        world_pictures,
    )

    if not (run / "tuning" / "chosen.json").is_file():
        raise ValueError(
            f"no iteration was faithful enough to be chosen: see {run / 'tuning' / 'preference.jsonl'}"
        )
    prompts = held_out_prompts(settings["prompts"])
    seeds = range(len(prompts))
    pictures, figures = {}, {}
    for name, path in {"base": base, "tuned": run / "tuning" / "chosen"}.items():
        generator = load_generator(path).to(torch_device(device)).eval()
        pictures[name] = generate_folder(
            generator,
            prompts,
            seeds,
            run / name,
            settings={"weights": weights_sha256(path)},
            description=f"pictures of {name}",
        )
        figures[name] = share_all_three(read_all(pictures[name], f"reading {name}"), prompts)
    result = compare(WorldJudge(), pictures["base"], pictures["tuned"], prompts)
    chosen = json.loads((run / "tuning" / "chosen.json").read_text())
    results: dict[str, Any] = {
        "autoencoder": autoencoder_psnr(generator.autoencoder),
        "pretrained": figures["base"],
        "tuned": figures["tuned"],
        "appeal": result.appeal.to_dict("win_rate"),
        "faithfulness": result.faithfulness.to_dict("win_minus_lose"),
        "judge": judge_figures(),
        "stop": chosen,
        "settings": settings,
        "command": f"emu quickstart --run_dir {run} --scale {settings['scale']}",
        **environment(),
    }
    results["seconds"] = round(time.monotonic() - started, 1)
    results["peak_memory_gb"] = round(peak_memory_gb(), 2)

    selected = set(json.loads((run / "selection.json").read_text())["uids"])
    pool = World(num_images=settings["pool"], seed=POOL_SEED)
    facts = [facts_of(prompt) for prompt in prompts]
    num_shown = min(12, len(selected))
    examples = {
        "pool": world_pictures(World(num_images=num_shown, seed=POOL_SEED))[0],
        "selected": _pictures_of(pool, selected, num_shown),
    }
    page = comparison_page(
        "Quality-tuning in miniature",
        result,
        pictures,
        prompts,
        {"quickstart": settings, "tuning": _yaml(run / "tuning" / "config.yaml")},
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
                [
                    report.table(
                        ["fact", "base", "tuned"],
                        [
                            [
                                fact,
                                *(report.percent(figures[name]["facts"][fact]) for name in ("base", "tuned")),
                            ]
                            for fact in figures["base"]["facts"]
                        ],
                        caption="Share of the prompts naming a fact whose picture shows it.",
                    )
                ],
                "Half of the places right is what guessing between left and right gives.",
            ),
            report.Section(
                "The stop", _curves(run, chosen["step"]), "Chosen by evaluation, never by the loss."
            ),
            report.Section(
                "What it was tuned on",
                [report.figure_grid(examples, [f"example {i + 1}" for i in range(num_shown)])],
                f"{len(selected)} of {len(pool)} pictures, those the judge finds most appealing. "
                "The same judge decides the result, as in the paper people did both.",
            ),
        ],
        slices={group: [fact[group] for fact in facts] for group in ("subject", "colour", "background")},
        judge="the exact judge of the synthetic world, from pixels alone",
    )
    grid = picture_grid(np.concatenate([pictures[name][:12] for name in ("base", "tuned")]), columns=12)
    write_png(run / "grid.png", grid)
    path = report.write_report(run, results, page)
    appeal, faithfulness = result.appeal, result.faithfulness
    print(f"appeal: tuned wins {report.percent(appeal.win)} ({report.percent_interval(appeal.ci95)})")
    print(f"faithfulness: win minus lose {report.points(faithfulness.win_minus_lose)} points")
    print(f"report: {path}")


def _curves(run: Path, stop: int) -> list[Any]:
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
    return [
        report.columns(
            report.line_chart("Against the frozen start", share, x_label="iteration", unit="%", stop=stop),
            report.line_chart("Loss", losses, x_label="iteration", stop=stop),
        )
    ]


def _pictures_of(pool: Any, uids: set[str], num: int) -> Any:
    import numpy as np

    indices = [i for i in range(len(pool)) if pool.uid(i) in uids][:num]
    return np.stack([np.asarray(pool[i].image) for i in indices])


def _remember(path: Path, settings: dict[str, Any]) -> None:
    """Refuses to go on in a folder where another job was begun."""
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise ValueError(
            f"{path.parent} was begun with other settings ({path}): name another --run_dir, or remove it"
        )
    write_whole(path, json.dumps(settings, indent=1))


def _seconds_before(run: Path) -> float:
    """Seconds that earlier starts of this run took up to the end of tuning."""
    path = run / "seconds.json"
    return float(json.loads(path.read_text())) if path.is_file() else 0.0


def _keep_seconds(run: Path, started: float) -> None:
    if not (run / "seconds.json").is_file():
        write_whole(run / "seconds.json", json.dumps(time.monotonic() - started))


def _yaml(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text())


def main(argv: list[str]) -> None:
    call(quickstart, argv, "emu quickstart")
