"""GenEval (Ghosh et al. 2023) by its own container: writes what it reads, reads what it writes.

Its detector needs Mask2Former and an mmdetection 2.x that no current Python has, so that it is not run here:
write the folder, run `evaluation/evaluate_images.py FOLDER --outfile results.jsonl` of the published
repository where it can be built, and read the results.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emu_lightning.evaluation.generation import write_png
from emu_lightning.evaluation.metrics.embedders import Network, Pictures, to_pil
from emu_lightning.evaluation.metrics.measured import Measured
from emu_lightning.files import write_whole
from emu_lightning.weights import sha256

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def write_geneval_folder(
    folder: str | Path, metadata: str | Path, images: Pictures, prompts: Sequence[str]
) -> Path:
    """Writes `00000/metadata.jsonl`, `00000/samples/0000.png`, ... as GenEval's evaluation reads them.

    Args:
        folder: made where it is missing.
        metadata: GenEval's `evaluation_metadata.jsonl`, or a part of it.
        images: (N, 3, H, W) in [-1, 1], or N pictures. Published figures have four of each prompt.
        prompts: N texts, one for each picture.

    Raises:
        FileNotFoundError, ValueError: the metadata are missing or not GenEval's, or a prompt of theirs has
            no picture.
    """
    of_prompt = defaultdict(list)
    for image, prompt in zip(to_pil(images), prompts, strict=True):
        of_prompt[prompt].append(image)
    rows = _read_lines(metadata, "prompt", "name the file of GenEval's prompts")
    for row in rows:
        if row["prompt"] not in of_prompt:
            raise ValueError(
                f"there is no picture of GenEval's prompt {row['prompt']!r}: generate all of them"
            )
    for number, row in enumerate(rows):
        place = Path(folder) / f"{number:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(of_prompt[row["prompt"]]):
            write_png(place / "samples" / f"{index:04d}.png", np.asarray(image))
        write_whole(place / "metadata.jsonl", json.dumps(row) + "\n")
    return Path(folder)


def read_geneval(results: str | Path) -> list[Measured]:
    """GenEval's score, the mean of its six tasks' accuracies, and each of these, from its results file.

    The score is missing where a task is: a mean of five of them passes for one of six.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is none of GenEval's.
    """
    remedy = "write the pictures by write_geneval_folder, and run GenEval's evaluation on them"
    rows = _read_lines(results, "correct", remedy)
    by_task = defaultdict(list)
    for row in rows:
        by_task[row["tag"]].append(bool(row["correct"]))
    networks = (Network("GenEval's detector", "not known", f"results file {sha256(Path(results))}"),)
    details = {"prompts": len({row["prompt"] for row in rows})}
    accuracies = {task: float(np.mean(by_task[task])) for task in TASKS if task in by_task}
    missing = [task for task in TASKS if task not in by_task]
    score = Measured(
        "GenEval",
        None if missing else float(np.mean(list(accuracies.values()))),
        reason=f"there are no results of {', '.join(missing)}" if missing else "",
        num=len(rows),
        networks=networks,
        details=details,
    )
    return [
        score,
        *(
            Measured(f"GenEval {task}", accuracy, num=len(by_task[task]), networks=networks)
            for task, accuracy in accuracies.items()
        ),
    ]


def _read_lines(path: str | Path, key: str, remedy: str) -> list[dict[str, Any]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"GenEval: there is no {path}: {remedy}")
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
        if not rows or not all({"tag", "prompt", key} <= set(row) for row in rows):
            raise ValueError(f"lines need tag, prompt, {key}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no file of GenEval's: {error}; {remedy}") from None
    return rows
