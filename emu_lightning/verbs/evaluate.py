"""`emu evaluate`: two models' pictures of the same prompts, judged."""

from __future__ import annotations

import shlex
from pathlib import Path

from emu_lightning.evaluation.scorers import Scorer
from emu_lightning.verbs.arguments import call


def evaluate(
    base: str,
    tuned: str,
    scorer: Scorer,
    prompts_file: str | None = None,
    out: str = "runs/evaluation",
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Generates where needed, judges appeal and faithfulness, writes report.html and results.json.

    Args:
        base: generator folder, checkpoint, or folder of generated pictures.
        tuned: the same, of the model whose wins are counted.
        scorer: the judge, as {class_path: ...}.
        prompts_file: file of prompts, one a line; not needed where both are folders of pictures.
        out: folder for pictures, report.html and results.json.
        seed: of the first picture of each model; the next has seed + 1.
        batch_size: pictures made at once.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    from emu_lightning.evaluation.comparison import compare
    from emu_lightning.evaluation.comparison_page import comparison_page
    from emu_lightning.evaluation.generation import generate_folder, read_folder
    from emu_lightning.evaluation.prompts import read_lines
    from emu_lightning.evaluation.report import write_report
    from emu_lightning.modules import load_generator, weights_sha256
    from emu_lightning.verbs.stages import torch_device

    pictures = {}
    texts: list[str] | None = list(read_lines(prompts_file).prompts) if prompts_file else None
    for name, path in {"base": base, "tuned": tuned}.items():
        if (Path(path) / "manifest.json").is_file():
            pictures[name], made_of = read_folder(path)
            if texts is not None and texts != made_of:
                raise ValueError(
                    f"{path} holds pictures of other prompts than the rest: judge equal prompts only"
                )
            texts = made_of
        elif texts is None:
            raise ValueError(f"{path} is a model: say what it should draw by --prompts_file FILE")
        else:
            seeds = range(seed, seed + len(texts))
            pictures[name] = generate_folder(
                load_generator(path).to(torch_device(device)).eval(),
                texts,
                seeds,
                Path(out) / name,
                settings={"weights": weights_sha256(path)},
                batch_size=batch_size,
                description=f"pictures of {name}",
            )
    assert texts is not None
    result = compare(scorer, pictures["base"], pictures["tuned"], texts)
    results = {
        "appeal": result.appeal.to_dict("win_rate"),
        "faithfulness": result.faithfulness.to_dict("win_minus_lose"),
        "settings": {"base": base, "tuned": tuned, "scorer": type(scorer).__name__, "seed": seed},
    }
    command = shlex.join(["emu", "evaluate", "--base", base, "--tuned", tuned])
    page = comparison_page(
        "Two models on the same prompts", result, pictures, texts, results, command=command
    )
    print(f"report: {write_report(out, results, page)}")


def main(argv: list[str]) -> None:
    call(evaluate, argv, "emu evaluate")
