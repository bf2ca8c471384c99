"""`emu evaluate`: two models' pictures of the same prompts, judged; and every step of it as its own command.

emu evaluate --base MODEL --tuned MODEL --scorer ...   draw and judge by a scorer, all at once
emu evaluate prompts --log FILE                        a prompt set from what users typed
emu evaluate plan                                      how many prompts and votes a result needs
emu evaluate generate --model MODEL --prompts_file F   pictures of a prompt set
emu evaluate metrics --folders '["DIR", "DIR"]' ...    automatic metrics of folders of pictures
emu evaluate votes --votes FILE --a DIR --b DIR        from votes to a report
"""

from __future__ import annotations

import difflib
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from emu_lightning.evaluation.metrics import Embedder, PictureScorer, SetMetric
from emu_lightning.evaluation.paraphrase import Rewriter
from emu_lightning.evaluation.prompt_builder import Concepts, UnsafeScore
from emu_lightning.evaluation.scorers import Scorer
from emu_lightning.evaluation.votes import NoMajority, Question
from emu_lightning.verbs.arguments import call
from emu_lightning.weights import sha256

if TYPE_CHECKING:
    from emu_lightning.evaluation.outcomes import Judged
    from emu_lightning.evaluation.prompts import PromptSet
    from emu_lightning.evaluation.report import Html


@dataclass(frozen=True)
class Report:
    """A page that is made when the whole command is known, since it names the command."""

    out: str
    results: Mapping[str, Any]
    page: Callable[[str], Html]


def evaluate(
    base: str,
    tuned: str,
    scorer: Scorer,
    prompts_file: str | None = None,
    out: str = "runs/evaluation",
    seed: int = 0,
    batch_size: PositiveInt = 64,
    device: str = "auto",
) -> Report:
    """Generates where needed, judges appeal and faithfulness, writes report.html and results.json.

    Its steps are commands, too: emu evaluate prompts, plan, generate, metrics and votes, each with --help.

    Args:
        base: generator folder, checkpoint, or folder of pictures.
        tuned: the same, of the model whose wins are counted.
        scorer: the judge, as {class_path: ...}.
        prompts_file: prompt set; not needed where both are folders of pictures generated here.
        out: folder for pictures, report.html and results.json.
        seed: of the first picture of each model; the next has seed + 1.
        batch_size: pictures made, and judged, at once.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    from emu_lightning.evaluation.comparison import compare_folders
    from emu_lightning.evaluation.comparison_page import comparison_page
    from emu_lightning.evaluation.generation import fill_folder, holds_pictures, open_folder
    from emu_lightning.evaluation.prompts import read_prompts
    from emu_lightning.modules import load_generator, weights_sha256
    from emu_lightning.verbs.stages import torch_device

    prompts = read_prompts(prompts_file) if prompts_file else None
    folders = {}
    for name, path in {"base": base, "tuned": tuned}.items():
        folder = Path(path)
        if not holds_pictures(folder):
            if prompts is None:
                raise ValueError(f"{path} is a model: say what it should draw by --prompts_file FILE")
            folder = Path(out) / name
            fill_folder(
                load_generator(path).to(torch_device(device)).eval(),
                prompts.prompts,
                range(seed, seed + len(prompts)),
                folder,
                settings={"weights": weights_sha256(path)},
                batch_size=batch_size,
                description=f"pictures of {name}",
            )
        folders[name] = open_folder(folder, prompts)
    result = compare_folders(scorer, folders["base"], folders["tuned"], batch_size=batch_size)
    results = {
        "appeal": result.appeal.to_dict("win_rate"),
        "faithfulness": result.faithfulness.to_dict("win_minus_lose"),
        "settings": {"base": base, "tuned": tuned, "scorer": type(scorer).__name__, "seed": seed},
    }

    def page(command: str) -> Html:
        texts = folders["base"].prompts
        title = "Two models on the same prompts"
        return comparison_page(title, result, folders, texts, results, command=command)

    return Report(out, results, page)


# --- prompts ------------------------------------------------------------------------------------------------


def prompts(
    log: str,
    out: str = "runs/prompts",
    column: str = "prompt",
    count_column: str | None = None,
    name: str = "users' prompts (ours)",
    num_prompts: PositiveInt | None = None,
    quotas: dict[str, int] | None = None,
    concepts: Concepts | None = None,
    blocked: str | None = None,
    unsafe_score: UnsafeScore | None = None,
    max_unsafe: float = 0.5,
    min_count: PositiveInt = 1,
    similarity: float = 0.7,
    rewriter: Rewriter | None = None,
) -> None:
    """Builds a prompt set from what users typed: merged, filtered, balanced, paraphrased.

    What it is made of is in the manifest. It is not the paper's Open User Input, which was not released.

    Args:
        log: .jsonl, .csv or .txt of users' prompts.
        out: folder for prompts.jsonl and manifest.json; it is a --prompts_file.
        column: what the prompt is called in the log.
        count_column: how often a row was typed, where rows are counted already.
        name: what reports call the set.
        num_prompts: how many, the most frequent; all when left out.
        quotas: how many of each concept, the most frequent, instead of num_prompts; "other" is the rest.
        concepts: what tells them, as {class_path: ...}: Keywords or Nearest of
            emu_lightning.evaluation.prompt_builder.
        blocked: file of words and phrases, one a line, that no prompt may hold.
        unsafe_score: class or function that gives texts scores, higher is worse.
        max_unsafe: the highest score that passes.
        min_count: prompts of users, alike ones together, that make one worth having.
        similarity: from which Jaccard similarity on two prompts are one, from 0.5 to 1.
        rewriter: who says prompts in other words, as {class_path: ...}: ChatEndpoint or LocalModel of
            emu_lightning.evaluation.paraphrase; as typed when left out.
    """
    from emu_lightning.evaluation.prompt_builder import Choices, build_prompts, read_log

    words = Path(blocked).read_text(encoding="utf-8").split("\n") if blocked else []
    choices = Choices(
        name=name,
        num_prompts=num_prompts,
        quotas=quotas,
        min_count=min_count,
        similarity=similarity,
        blocked=tuple(word.strip() for word in words if word.strip()),
        max_unsafe=max_unsafe,
    )
    manifest = build_prompts(
        read_log(log, column, count_column),
        out,
        choices,
        concepts=concepts,
        unsafe_score=unsafe_score,
        rewriter=rewriter,
        source=f"{log} (sha256 {sha256(Path(log))})",
    )
    for step in manifest["funnel"]:
        print(f"{step['step']:<22}{step['num_prompts']:>12,} prompts, typed {step['num_typed']:,} times")
    for concept, counts in manifest["concepts"].items():
        wanted = "" if counts["wanted"] is None else f" of {counts['wanted']:,} wanted"
        print(f"  {concept}: {counts['taken']:,}{wanted}, of {counts['candidates']:,} there are")
    for reason, num in manifest["rewrites_left_out"].items():
        print(f"  {num:,} paraphrases left out: {reason}")
    print(f"{out}: {manifest['name']}, settings {manifest['settings_sha256'][:12]}")


def plan(
    half_width: float = 0.03,
    win_rate: float = 0.5,
    ties: float = 0.2,
    wins: float = 0.53,
    comparisons: PositiveInt = 1,
    power: float = 0.8,
    raters: PositiveInt = 5,
) -> None:
    """Prints how many prompts and votes a result needs.

    Args:
        half_width: of the 95 % interval, as a share: 0.03 is 3 points to either side.
        win_rate: that is expected, as a share of all prompts; 0.5 needs the most.
        ties: share of prompts expected to end in one; what is left is lost.
        wins: the better model's share of the decided prompts that should be told from a half.
        comparisons: planned together (questions, prompt sets, pairs of models): each is tested more strictly.
        power: probability to find that difference if it is there.
        raters: votes on a prompt.
    """
    from emu_lightning.evaluation import planning

    lose = 1 - win_rate - ties
    if lose < 0:
        raise ValueError(f"win_rate {win_rate:g} and ties {ties:g} are more than all prompts")
    level = 0.05 / comparisons
    lines = {
        f"win rate of {100 * win_rate:g} % to ±{100 * half_width:g} points": planning.prompts_for_win_rate(
            half_width, win_rate
        ),
        f"win minus lose, {100 * ties:g} % ties, to ±{100 * half_width:g} points": (
            planning.prompts_for_win_minus_lose(half_width, ties)
        ),
        f"{100 * wins:g} : {100 - 100 * wins:g} of decided prompts, {100 * ties:g} % ties, found with "
        f"probability {power:g} at level {level:.3g}": planning.prompts_for_sign_test(
            wins, ties, power, level
        ),
    }
    width = max(map(len, lines))
    for what, num in lines.items():
        print(f"{what:<{width}}  {num:>7,} prompts, {num * raters:>8,} votes")
    majority = planning.majority_shares(win_rate, lose, raters)
    print(
        f"Votes of {_three(win_rate, ties, lose)} % (win / tie / lose), alike on all prompts, make majorities"
    )
    print(f"of {_three(*majority[:3])} % with {raters} raters, and {100 * majority[3]:.0f} % have none.")
    print("More raters for each prompt do not replace prompts: the prompt is the unit of every interval.")


def _three(*shares: float) -> str:
    return " / ".join(f"{100 * share:.0f}" for share in shares)


# --- pictures -----------------------------------------------------------------------------------------------


def generate(
    model: str,
    prompts_file: str,
    out: str,
    seed: int = 0,
    num_steps: PositiveInt | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    batch_size: PositiveInt = 64,
    device: str = "auto",
    num_processes: PositiveInt | None = None,
    shard: str = "1/1",
) -> None:
    """Pictures of a prompt set, one a prompt; what is there is not made again, and a kill loses one batch.

    For a fair comparison give all models the same prompt set and seed.

    Args:
        model: generator folder, checkpoint, pipeline folder or hub id.
        prompts_file: .txt, .tsv (PartiPrompts), .csv (DrawBench), .json or a folder of them (HPSv2), .jsonl,
            or a folder that `emu evaluate prompts` wrote.
        out: folder for the pictures and their manifest.
        seed: of the first picture; the next has seed + 1.
        num_steps: sampling steps; the model's own default when left out.
        guidance_scale: 1.0 is off; the model's own default when left out.
        negative_prompt: what guidance moves away from, in place of no text.
        batch_size: pictures made at once, by each process.
        device: auto, cpu, cuda, cuda:1, mps.
        num_processes: that share the work; one for each GPU when left out.
        shard: this command's part of the work, 1/4 to 4/4 on four machines with a common folder.
    """
    from emu_lightning.evaluation.prompts import read_prompts

    index, num_shards = _shard(shard)
    found = read_prompts(prompts_file)
    processes = num_processes or _num_gpus(device)
    arguments = {
        "model": model,
        "prompts": found,
        "out": out,
        "seeds": range(seed, seed + len(found)),
        "options": {"num_steps": num_steps, "guidance_scale": guidance_scale}
        # Folders of `emu sample`, and of before there were negative prompts, stay valid.
        | ({"negative_prompt": negative_prompt} if negative_prompt else {}),
        "batch_size": batch_size,
        "device": device,
    }
    shares = [(index * processes + rank, num_shards * processes) for rank in range(processes)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:  # none is started until needed
        helpers = [
            pool.submit(_generate, rank=rank, shares=shares, **arguments) for rank in range(1, processes)
        ]
        _generate(rank=0, shares=shares, **arguments)
        try:
            for helper in helpers:
                helper.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process was killed, perhaps for want of memory: run this again, it goes on, with fewer "
                "--num_processes or a smaller --batch_size"
            ) from None
    num = sum(len(range(first, len(found), step)) for first, step in shares)
    print(f"{num:,} of {len(found):,} pictures of {found.name} are in {out}")


def _generate(
    model: str,
    prompts: PromptSet,
    out: str,
    seeds: Sequence[int],
    options: Mapping[str, Any],
    batch_size: int,
    device: str,
    rank: int,
    shares: Sequence[tuple[int, int]],
) -> None:
    """One process's share."""
    import torch

    from emu_lightning.evaluation.generation import fill_folder
    from emu_lightning.modules import load_generator, weights_sha256
    from emu_lightning.verbs.stages import torch_device

    if len(shares) > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // len(shares)))
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{rank % torch.cuda.device_count()}"
    fill_folder(
        load_generator(model).to(torch_device(device)).eval(),
        prompts.prompts,
        seeds,
        out,
        settings={"weights": weights_sha256(model), **options},
        batch_size=batch_size,
        description=f"process {rank + 1} of {len(shares)}" if len(shares) > 1 else "generating",
        share=shares[rank],
        notes={"model": model, "prompt_set": {"name": prompts.name, "sha256": prompts.sha256}},
    )


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise ValueError(f"shard {text!r} is none: give 1/4, 2/4, 3/4 and 4/4 to share the work between four")
    return int(number) - 1, int(of)


def _num_gpus(device: str) -> int:
    import torch

    return max(1, torch.cuda.device_count()) if device == "auto" else 1


# --- judged -------------------------------------------------------------------------------------------------


def votes(
    votes: list[str] | str,
    a: list[str] | str,
    b: list[str] | str,
    prompts_file: list[str] | str | None = None,
    question: Question | None = None,
    no_majority: NoMajority = "tie",
    a_name: list[str] | str | None = None,
    b_name: list[str] | str | None = None,
    title: str = "Pictures compared",
    out: str = "runs/votes",
) -> Report:
    """From votes to report.html and results.json: win, tie and lose with intervals, pictures, agreement.

    Several files of votes, prompt sets or pairs of models are given as lists; what is given once is the same
    for all. Three models or more are also set in one order.

    Args:
        votes: file of judgements as JSON lines, as `emu annotate` exports them.
        a: folder of the pictures of model A, made here or elsewhere.
        b: the same of model B, whose wins are counted.
        prompts_file: the prompt set, with its categories; needed for pictures made elsewhere.
        question: appeal or faithfulness; both when left out.
        no_majority: what prompts become on which no answer has a majority: tie, exclude, or extra_rater.
        a_name: what model A is called; its folder's name when left out.
        b_name: what model B is called.
        title: of the page.
        out: folder for report.html and results.json.
    """
    from emu_lightning.evaluation.comparison_page import environment
    from emu_lightning.evaluation.generation import open_folder, prompts_of
    from emu_lightning.evaluation.outcomes import Judged, outcome, results_of
    from emu_lightning.evaluation.prompts import read_prompts
    from emu_lightning.evaluation.votes import BOOTSTRAP_SEED, NUM_DRAWS, read_judgements
    from emu_lightning.evaluation.votes_page import votes_page

    files = votes if isinstance(votes, list) else [votes]
    judged: dict[tuple[str, ...], Judged] = {}
    facts: dict[str, str] = {}
    for file, folder_a, folder_b, prompt_file, name_a, name_b in zip(
        files,
        *(_for_each(files, one) for one in (a, b, prompts_file, a_name, b_name)),
        strict=True,
    ):
        found = None if prompt_file is None else read_prompts(prompt_file)
        pictures = open_folder(folder_a, found), open_folder(folder_b, found)
        names = (name_a or Path(folder_a).resolve().name, name_b or Path(folder_b).resolve().name)
        prompts = found or prompts_of(pictures[0])
        key = (folder_a, folder_b, prompts.sha256)  # of several files the votes are put together
        before = judged[key].judgements if key in judged else []
        judged[key] = Judged(*names, prompts, [*before, *read_judgements(file)], pictures)
        facts |= {
            file: f"sha256 {sha256(Path(file))}",
            prompts.name: f"{len(prompts):,} prompts, sha256 {prompts.sha256}",
            folder_a: pictures[0].origin,
            folder_b: pictures[1].origin,
        }
    outcomes = [
        outcome(one, each, kind, no_majority)
        for one in judged.values()
        for each, kind in one.kinds
        if question in (None, each)
    ]
    if not outcomes:
        raise ValueError(f"{', '.join(files)}: no vote{f' on {question}' if question else ''}")
    _check_names(list(judged.values()))
    settings = {
        "no_majority": no_majority,
        "question": question or "all",
        "bootstrap": {"draws": NUM_DRAWS, "seed": BOOTSTRAP_SEED},
    }
    results = {**results_of(outcomes), "settings": settings, "inputs": facts}

    def page(command: str) -> Html:
        return votes_page(title, outcomes, settings, command=command, facts={**facts, **environment()})

    return Report(out, results, page)


def metrics(
    folders: list[str],
    prompts_file: str | None = None,
    scorers: list[PictureScorer] | None = None,
    set_metrics: list[SetMetric] | None = None,
    embedder: Embedder | None = None,
    reference: str | None = None,
    axes: dict[str, str] | None = None,
    out: str = "runs/metrics",
) -> Report:
    """Automatic metrics of folders of pictures, side by side; what cannot be computed says why.

    Args:
        folders: of pictures of the same prompts, made here or elsewhere.
        prompts_file: the prompt set; needed for pictures made elsewhere.
        scorers: of single pictures, each as {class_path: ...}, such as ClipScore of
            emu_lightning.evaluation.metrics.
        set_metrics: of whole folders, such as Vendi, Manifold or KernelDistance.
        embedder: the network whose features set metrics are computed on.
        reference: folder of real pictures, for those that compare with some.
        axes: metrics for the plot of what tuning gives and takes, such as {consistency: CLIPScore, diversity:
            recall, realism: precision}.
        out: folder for report.html and results.json.
    """
    from emu_lightning.evaluation.comparison_page import environment
    from emu_lightning.evaluation.generation import open_folder, read_images
    from emu_lightning.evaluation.metrics import measure_pictures, measure_sets
    from emu_lightning.evaluation.metrics_page import metrics_page, points_of
    from emu_lightning.evaluation.prompts import read_prompts

    if not (scorers or set_metrics):
        raise ValueError("nothing is to be measured: give --scorers, or --set_metrics and their --embedder")
    if set_metrics and embedder is None:
        raise ValueError("set metrics are computed on features: say of which network by --embedder")
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = folders
    found = None if prompts_file is None else read_prompts(prompts_file)
    photographs = None if reference is None else read_images(reference)
    measured, facts = {}, {}
    for name, folder in zip(names, folders, strict=True):
        pictures = open_folder(folder, found)
        facts[folder] = pictures.origin
        measured[name] = measure_pictures(scorers or [], pictures.images, pictures.prompts)
        if embedder is not None and set_metrics:
            measured[name] += measure_sets(set_metrics, embedder, pictures.images, photographs)
    if axes:
        points_of(measured, axes)  # a misspelt name is told before the page is made
    settings = {"reference": reference, "axes": axes}
    results = {
        "metrics": {name: [one.to_dict() for one in ones] for name, ones in measured.items()},
        "settings": settings,
        "inputs": facts,
    }

    def page(command: str) -> Html:
        title, made_by = "Automatic metrics", {**facts, **environment()}
        return metrics_page(title, measured, axes or {}, settings, command=command, facts=made_by)

    return Report(out, results, page)


# --- the command line ---------------------------------------------------------------------------------------

STEPS: Mapping[str, Callable[..., Report | None]] = {
    "prompts": prompts,
    "plan": plan,
    "generate": generate,
    "metrics": metrics,
    "votes": votes,
}


def main(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-"):
        report = call(_step(argv[0]), argv[1:], f"emu evaluate {argv[0]}")
    else:
        report = call(evaluate, argv, "emu evaluate")
    if report is not None:
        from emu_lightning.evaluation.report import write_report

        page = report.page(shlex.join(["emu", "evaluate", *argv]))
        print(f"report: {write_report(report.out, report.results, page)}")


def _step(name: str) -> Callable[..., Report | None]:
    if name not in STEPS:
        close = difflib.get_close_matches(name, STEPS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(STEPS)}"
        raise ValueError(f"{name!r} is no step of `emu evaluate`: {hint}")
    return STEPS[name]


def _for_each(files: Sequence[str], value: list[str] | str | None) -> list[Any]:
    """One for each file of votes; what is given once is the same for all."""
    if not isinstance(value, list):
        return [value] * len(files)
    if len(value) != len(files):
        raise ValueError(f"{len(value)} values {value} for {len(files)} files of votes: give as many")
    return value


def _check_names(judged: Sequence[Judged]) -> None:
    """Rows of a table are told apart by their names."""
    names = Counter((one.a, one.b, one.prompts.name) for one in judged)
    (a, b, name), num = names.most_common(1)[0]
    if num > 1:
        raise ValueError(
            f"{num} comparisons are of {b!r} with {a!r} on {name!r}: tell them apart by --a_name and "
            "--b_name, or by the names of the prompt sets"
        )
