"""From two models to a report, with people made of code: judge through the application, count, report.

    emu generators --names '[latent]'
    python -m benchmarks.annotation_miniature --results results/evaluation/results.json

Each person sees what the exact judge of the synthetic world sees in the pictures' pixels, and says it with a
known accuracy, else one of the other answers. They vote at the real server, `emu annotate` exports the votes,
`emu evaluate votes` writes the report.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.annotation_client import Answer, Decide, Served, Worker, invite_all
from emu_lightning.annotation.derive import judgements
from emu_lightning.annotation.exchange import folder_items
from emu_lightning.annotation.store import Batch, Store
from emu_lightning.evaluation.generation import read_folder, to_images
from emu_lightning.evaluation.votes import append_judgements
from emu_lightning.files import write_whole
from emu_lightning.verbs.evaluate import main as evaluate
from emu_lightning.verbs.world_checks import JudgeOnce

ACCURACIES = (0.95, 0.9, 0.9, 0.85, 0.8, 0.75)
KEPT = (
    "num_votes",
    "win_rate",
    "win_rate_ci95",
    "win_minus_lose",
    "win_minus_lose_ci95",
    "no_majority",
    "agreement",
    "position",
)
APPEAL_MARGIN = 0.02  # nearer than this the judge has no preference, as in `emu evaluate`
OPTIONS = {"appeal": ("left", "tie", "right"), "faithfulness": ("left", "both", "neither", "right")}


def read(folders: list[Path]) -> dict[bytes, dict[str, float]]:
    """What the judge finds, by a file's bytes: appeal, and the share of the prompt's facts that are shown."""
    judge, found = JudgeOnce(), {}
    for folder in folders:
        pictures, prompts = read_folder(folder)
        images = to_images(pictures)
        scores = zip(judge.appeal(images), judge.faithfulness(images, prompts), strict=True)
        for row, (appeal, faithfulness) in enumerate(scores):
            content = (folder / f"{row:05d}.png").read_bytes()
            found[content] = {"appeal": float(appeal), "faithfulness": float(faithfulness)}
    return found


def person(question: str, accuracy: float, scores: Mapping[bytes, Mapping[str, float]], seed: int) -> Decide:
    rng = random.Random(seed)

    def decide(pictures: Mapping[str, bytes]) -> Answer:
        left, right = (scores[pictures[side]][question] for side in ("left", "right"))
        if abs(left - right) > (APPEAL_MARGIN if question == "appeal" else 0):
            seen = "left" if left > right else "right"
        elif question == "appeal":
            seen = "tie"
        else:
            seen = "both" if left == 1 else "neither"
        others = [option for option in OPTIONS[question] if option != seen]
        return {"choice": seen if rng.random() < accuracy else rng.choice(others)}

    return decide


def vote(
    served: Served, batch: Batch, sessions: list[str], scores: Mapping[bytes, Mapping[str, float]]
) -> None:
    """All people at a time, until the batch has nothing more for any of them."""
    workers = [
        Worker(served.url, session, person(batch.question, accuracy, scores, seed))
        for seed, (session, accuracy) in enumerate(zip(sessions, ACCURACIES, strict=True))
    ]
    with ThreadPoolExecutor(len(workers)) as threads:
        list(threads.map(lambda worker: worker.work(batch), workers))
    refused = [line for worker in workers for line in (*worker.refused, *worker.errors)]
    if refused:
        raise RuntimeError(f"a vote was not taken: {refused[0]}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Judges, writes votes and report into ``--out``; what came out by question."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/generators/latent"), help="folder with base and tuned"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/people"), help="folder, made")
    parser.add_argument("--results", type=Path, help="JSON file; what came out is kept in it as `miniature`")
    given = parser.parse_args(sys.argv[1:] if argv is None else argv)
    base, tuned = given.run / "base", given.run / "tuned"
    scores = read([base, tuned])
    given.out.mkdir(parents=True)
    store = Store(f"sqlite:///{given.out / 'annotation.db'}")
    batches = []
    for question in OPTIONS:
        batches.append(store.add_batch(question, question))
        store.add_items(batches[-1], folder_items({"A": base, "B": tuned}))
    served = Served(given.out)
    with served.running():
        names = [f"person {number}" for number in range(len(ACCURACIES))]
        sessions = invite_all(store, served.url, names)
        for batch in batches:
            vote(served, batch, sessions, scores)
    votes = given.out / "votes.jsonl"
    for batch in batches:
        append_judgements(votes, judgements(store, batch))
    store.close()
    report = given.out / "report"
    title = "Pre-trained and tuned, judged by simulated people"
    folders = ["--a", str(base), "--b", str(tuned), "--out", str(report)]
    evaluate(["votes", "--votes", str(votes), *folders, "--title", title])
    comparisons = json.loads((report / "results.json").read_text())["comparisons"]
    found = {one["question"]: {name: one[name] for name in KEPT} for one in comparisons}
    found |= {"accuracies": ACCURACIES, "command": "python -m benchmarks.annotation_miniature"}
    if given.results is not None:
        known = json.loads(given.results.read_text()) if given.results.is_file() else {}
        write_whole(given.results, json.dumps(known | {"miniature": found}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
