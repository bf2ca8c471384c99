"""The annotation application under load, under attack, and against a known truth, through its real server.

    python -m benchmarks.annotation --out results/evaluation

load      200 people at a time, 20,000 votes on pairs, on SQLite and on PostgreSQL; the server is killed five
          times on the way (SIGKILL) and started again, and people send again what was not acknowledged. Then
          each acknowledged vote is looked up in the database. `p99_ms` is of a vote's round trip, with the
          people's own processor time in it: they run on the same machine.
attacks   benchmarks/annotation_attacks.py
coverage  300 times, five people of known accuracy and left/right bias judge pairs, and tell the better
          picture by its pixels; the 95 % interval of the win rate is held against the exact probability that
          a prompt's majority is for the model, and that of win minus lose against its own. `expected` and
          `win_minus_lose_expected` are how often these intervals cover their truth over all outcomes of so
          many prompts, each with its exact probability.

`--parts` measures some and keeps the others' figures.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import lru_cache, partial
from itertools import product
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sqlalchemy import create_engine, text

from benchmarks.annotation_attacks import attack_all
from benchmarks.annotation_client import (
    Acknowledged,
    Answer,
    Decide,
    NotHere,
    Served,
    Worker,
    invite_all,
    join,
    postgresql,
)
from benchmarks.parts import run_parts
from emu_lightning.annotation.store import Batch, NewItem, Store
from emu_lightning.evaluation.votes import (
    majority_labels,
    read_judgements,
    tango_ci95,
    wilson_ci95,
    win_rate,
)
from emu_lightning.files import write_whole

NUM_RATERS = 5
THINK_SECONDS = 5.0  # mean, of an exponential distribution, for a pair


# --- load ---------------------------------------------------------------------------------------------------


def load(folder: Path, annotators: int, votes: int, kills: int) -> dict[str, Any]:
    """On SQLite, and on PostgreSQL where there is one."""
    found = {"sqlite": load_on(folder / "sqlite", None, annotators, votes, kills)}
    try:
        with postgresql() as url:
            found["postgresql"] = load_on(folder / "postgresql", url, annotators, votes, kills)
    except NotHere as reason:
        found["postgresql"] = {"not_run": str(reason)}
    return {"load": found}


def load_on(folder: Path, database: str | None, annotators: int, votes: int, kills: int) -> dict[str, Any]:
    """Votes by people at a time, and what became of each.

    Args:
        folder: for the store, made.
        database: URL; SQLite in the folder when None.
        votes: rounded down to whole items.
    """
    folder.mkdir(parents=True)
    url = database or f"sqlite:///{folder / 'annotation.db'}"
    num_items = votes // NUM_RATERS
    votes = num_items * NUM_RATERS
    store = Store(url)
    batch = store.add_batch("appeal", "load", NUM_RATERS)
    store.add_items(batch, pairs(folder, ["B"] * num_items))
    served = Served(folder, database)
    with served.running():
        sessions = invite_all(store, served.url, [f"person {number}" for number in range(annotators)])
        begun = time.monotonic()
        workers = vote_under_kills(served, batch, sessions, votes, kills)
        seconds = time.monotonic() - begun
    store.close()
    acknowledged = [vote for worker in workers for vote in worker.votes]
    milliseconds = 1000 * np.array([vote.seconds for vote in acknowledged])
    return {
        "annotators": annotators,
        "votes": len(acknowledged),
        "kills": kills,
        **compare(url, acknowledged),
        "p50_ms": round(float(np.percentile(milliseconds, 50)), 1),
        "p99_ms": round(float(np.percentile(milliseconds, 99)), 1),
        "longest_wait_s": round(max(vote.waited for vote in acknowledged), 1),
        "votes_per_second": round(len(acknowledged) / seconds, 1),
        "think_seconds": THINK_SECONDS,
        "refused": dict(Counter(reason for worker in workers for reason in worker.refused)),
        "errors": dict(Counter(reason for worker in workers for reason in worker.errors)),
    }


def vote_under_kills(
    served: Served, batch: Batch, sessions: Sequence[str], votes: int, kills: int
) -> list[Worker]:
    """All people at a time; the kills come when equal parts of the votes are acknowledged."""
    rng = random.Random(0)

    def think() -> None:
        time.sleep(rng.expovariate(1 / THINK_SECONDS))

    def decide(pictures: Mapping[str, bytes]) -> Answer:
        return {"choice": rng.choice(("left", "tie", "right"))}

    gone = threading.Event()
    workers = [Worker(served.url, session, decide, think, gone) for session in sessions]

    def num_votes() -> int:
        return sum(len(worker.votes) for worker in workers)

    with ThreadPoolExecutor(len(workers)) as threads:
        working = [threads.submit(worker.work, batch, lambda: num_votes() >= votes) for worker in workers]
        for number in range(1, kills + 1):
            while num_votes() < number * votes / (kills + 1) and not all(each.done() for each in working):
                time.sleep(0.01)
            served.kill()
            try:
                served.start()
            except RuntimeError:
                gone.set()
                raise
        for each in working:
            each.result()
    return workers


def compare(url: str, acknowledged: Sequence[Acknowledged]) -> dict[str, int]:
    """What the database holds against what was acknowledged, by plain SQL.

    Returns:
        `lost`: acknowledged votes that are not there, or not as sent. `duplicated`: further answers with a
        nonce, or of a person to an item. `over_assigned`: items held by more people than they want.
        `unknown`: answers that nobody was told of.
    """
    engine = create_engine(url)
    with engine.connect() as connection:

        def rows(query: str) -> list[Any]:
            return list(connection.execute(text(query)))

        events = rows(
            "SELECT nonce, assignment_id, item_id, person_id, body FROM events WHERE kind = 'answer'"
        )
        assigned = {row.token: row for row in rows("SELECT id, token, left_slot FROM assignments")}
        over = rows(
            "SELECT items.id FROM items JOIN assignments ON items.id = assignments.item_id JOIN batches "
            "ON batches.id = items.batch_id WHERE state IN ('lent', 'done') "
            "GROUP BY items.id, batches.num_people HAVING count(*) > batches.num_people"
        )
    engine.dispose()
    kept: dict[str, tuple[int, str]] = {}
    for event in events:
        body = json.loads(event.body) if isinstance(event.body, str) else event.body
        kept[event.nonce] = event.assignment_id, body["answer"]["choice"]
    lost = 0
    for vote in acknowledged:
        held = assigned[vote.token]
        right = {"A": "B", "B": "A"}[held.left_slot]
        sent = {"left": held.left_slot, "right": right, "tie": "Tie"}[vote.choice]
        lost += kept.get(vote.nonce) != (held.id, sent)
    of_people = Counter((event.item_id, event.person_id) for event in events)
    return {
        "lost": lost,
        "duplicated": len(events) - min(len(kept), len(of_people)),
        "over_assigned": len(over),
        "unknown": len(kept.keys() - {vote.nonce for vote in acknowledged}),
    }


# --- against a known truth ----------------------------------------------------------------------------------

# How often the better picture is B's, A's, or neither: what each prompt is drawn from.
TRUTH = {"A": 0.30, "B": 0.55, "Tie": 0.15}
# Of each rater: how often they see right, and how often they press a side without looking (left is positive).
RATERS = ((0.90, 0.05), (0.85, 0.20), (0.80, -0.10), (0.75, 0.30), (0.65, 0.0))


def pairs(folder: Path, truth: Sequence[str], prefix: str = "") -> list[NewItem]:
    """An item a prompt. The better picture is the brighter one, and A and B name no brightness."""
    grey = {"worse": 80, "better": 160}
    for name, value in grey.items():
        if not (path := folder / f"{name}.png").is_file():
            Image.new("L", (16, 16), value).save(path)
    shown = {"A": ("better", "worse"), "B": ("worse", "better"), "Tie": ("worse", "worse")}
    return [
        NewItem(
            f"{prefix}{row:05d}",
            {
                slot: (folder / f"{name}.png", f"model {slot}")
                for slot, name in zip("AB", shown[better], strict=True)
            },
            prompt=f"prompt {prefix}{row}",
        )
        for row, better in enumerate(truth)
    ]


def rater(accuracy: float, bias: float, rng: random.Random) -> Decide:
    """Someone who tells the brighter picture with this accuracy, else says one of the two other things."""

    def decide(pictures: Mapping[str, bytes]) -> Answer:
        if rng.random() < abs(bias):
            return {"choice": "left" if bias > 0 else "right"}
        left, right = (brightness(pictures[side]) for side in ("left", "right"))
        seen = "tie" if left == right else "left" if left > right else "right"
        others = [choice for choice in ("left", "tie", "right") if choice != seen]
        return {"choice": seen if rng.random() < accuracy else rng.choice(others)}

    return decide


@lru_cache
def brightness(content: bytes) -> float:
    with Image.open(io.BytesIO(content)) as image:
        return float(np.asarray(image).mean())


def vote_probabilities(accuracy: float, bias: float, better: str) -> dict[str, float]:
    """Of a rater's votes, where sides are even: half of the blind ones go to each model."""
    blind = {"A": abs(bias) / 2, "B": abs(bias) / 2, "Tie": 0.0}
    return {
        vote: blind[vote] + (1 - abs(bias)) * (accuracy if vote == better else (1 - accuracy) / 2)
        for vote in blind
    }


def majority_probability(label: str) -> float:
    """How probable it is that a prompt's majority is ``label``; without a majority it is Tie. Exact."""
    total = 0.0
    for better, share in TRUTH.items():
        of_raters = [vote_probabilities(accuracy, bias, better) for accuracy, bias in RATERS]
        for votes in product(TRUTH, repeat=len(RATERS)):
            (most, count), *_ = Counter(votes).most_common(1)
            majority = most if 2 * count > len(votes) else "Tie"
            if majority == label:
                chance = 1.0
                for probabilities, vote in zip(of_raters, votes, strict=True):
                    chance *= probabilities[vote]
                total += share * chance
    return total


def wilson_coverage(num: int, share: float) -> float:
    """How often Wilson's 95 % interval covers ``share``, over the binomial distribution."""
    total = 0.0
    for hits in range(num + 1):
        low, high = wilson_ci95(hits / num, num)
        if low <= share <= high:
            total += comb(num, hits) * share**hits * (1 - share) ** (num - hits)
    return total


def tango_coverage(num: int, win: float, lose: float) -> float:
    """How often Tango's 95 % interval covers ``win - lose``, over the multinomial distribution."""
    total = 0.0
    for wins in range(num + 1):
        for losses in range(num + 1 - wins):
            low, high = tango_ci95(wins / num, losses / num, num)
            if low <= win - lose <= high:
                ties = num - wins - losses
                ways = comb(num, wins) * comb(num - wins, losses)
                total += ways * win**wins * lose**losses * (1 - win - lose) ** ties
    return total


def coverage(folder: Path, runs: int, prompts: int, teams: int = 4) -> dict[str, Any]:
    """Each run is a batch of its own on one server; teams of five people work side by side."""
    rng = random.Random(0)
    store = Store(f"sqlite:///{folder / 'annotation.db'}")
    batches = []
    for run in range(runs):
        truth = rng.choices(list(TRUTH), list(TRUTH.values()), k=prompts)
        batches.append(store.add_batch("appeal", f"run {run}", len(RATERS)))
        store.add_items(batches[-1], pairs(folder, truth))
    served = Served(folder)
    truths = {label: majority_probability(label) for label in ("A", "B")}
    hits = Counter[str]()
    estimates, differences = [], []
    difference = truths["B"] - truths["A"]
    with served.running():
        names = [f"team {team}, person {number}" for team in range(teams) for number in range(len(RATERS))]
        sessions = invite_all(store, served.url, names)
        begun = time.monotonic()
        _judge(served, batches, sessions, teams, rng)
        seconds = time.monotonic() - begun
        with closing(join(served.url, store.invite("lead", "lead"))) as lead:
            for batch in batches:
                export = lead.get(f"/lead/{batch.public_id}/export?format=votes").raise_for_status()
                votes = write_whole(folder / "votes.jsonl", export.content)
                labels = majority_labels(read_judgements(votes), "appeal").labels
                rate = win_rate(list(labels.values()), of="B")
                estimates.append(rate.win)
                differences.append(rate.win_minus_lose)
                hits["win"] += rate.ci95[0] <= truths["B"] <= rate.ci95[1]
                low, high = rate.win_minus_lose_ci95
                hits["win_minus_lose"] += low <= difference <= high
    store.close()
    return {
        "coverage": {
            "nominal": 0.95,
            "empirical": round(hits["win"] / runs, 4),
            "runs": runs,
            "expected": round(wilson_coverage(prompts, truths["B"]), 4),
            "ci95": [round(end, 4) for end in wilson_ci95(hits["win"] / runs, runs)],
            "win_minus_lose_empirical": round(hits["win_minus_lose"] / runs, 4),
            "win_minus_lose_expected": round(tango_coverage(prompts, truths["B"], truths["A"]), 4),
            "win_minus_lose_ci95": [
                round(end, 4) for end in wilson_ci95(hits["win_minus_lose"] / runs, runs)
            ],
            "win_minus_lose_truth": round(difference, 4),
            "win_minus_lose_mean_estimate": round(float(np.mean(differences)), 4),
            "truth": round(truths["B"], 4),
            "mean_estimate": round(float(np.mean(estimates)), 4),
            "prompts": prompts,
            "raters": [{"accuracy": accuracy, "left_bias": bias} for accuracy, bias in RATERS],
            "votes": runs * prompts * len(RATERS),
            "votes_per_second": round(runs * prompts * len(RATERS) / seconds, 1),
        }
    }


def _judge(
    served: Served, batches: Sequence[Batch], sessions: Sequence[str], teams: int, rng: random.Random
) -> None:
    def work(number: int) -> None:
        team, member = divmod(number, len(RATERS))
        worker = Worker(served.url, sessions[number], rater(*RATERS[member], random.Random(rng.random())))
        for batch in batches[team::teams]:
            worker.work(batch)
        if worker.refused or worker.errors:
            raise RuntimeError(f"a vote was not taken: {[*worker.refused, *worker.errors][0]}")

    with ThreadPoolExecutor(len(sessions)) as threads:
        list(threads.map(work, range(len(sessions))))


# --- all ----------------------------------------------------------------------------------------------------


def attacks(folder: Path) -> dict[str, Any]:
    return {"attacks": attack_all(folder)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints, and writes `<out>/results.json`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("results/evaluation"), help="folder")
    parser.add_argument("--annotators", type=int, default=200, help="of load, at a time")
    parser.add_argument("--votes", type=int, default=20_000, help="of load")
    parser.add_argument("--kills", type=int, default=5, help="of load")
    parser.add_argument("--runs", type=int, default=300, help="of coverage")
    parser.add_argument("--prompts", type=int, default=60, help="of a run of coverage")
    parts: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
        "load": lambda folder, given: load(folder, given.annotators, given.votes, given.kills),
        "attacks": lambda folder, given: attacks(folder),
        "coverage": lambda folder, given: coverage(folder, given.runs, given.prompts),
    }
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="all when left out")
    arguments = parser.parse_args(argv)
    options = [
        f"--{option}={value}"
        for option, value in vars(arguments).items()
        if option not in ("out", "parts") and value != parser.get_default(option)
    ]
    chosen = {name: partial(parts[name], given=arguments) for name in arguments.parts}
    return run_parts(arguments.out, chosen, "benchmarks.annotation", options)


if __name__ == "__main__":
    main()
