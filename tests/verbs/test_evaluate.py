"""`emu evaluate` and its steps, by the command line: what they write, share, resume and refuse."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from emu_lightning import cli
from emu_lightning.evaluation.generation import open_folder
from emu_lightning.evaluation.metrics import Network, PictureScorer
from emu_lightning.evaluation.metrics.embedders import Pictures, to_pil
from emu_lightning.evaluation.prompts import read_prompts
from emu_lightning.evaluation.votes import Judgement, append_judgements
from tests.evaluation.test_paraphrase import Service, service  # noqa: F401
from tests.tiny import tiny_generator

pytestmark = pytest.mark.smoke


class Redness(PictureScorer):
    """The mean of the red channel, from 0 to 1."""

    name = "redness"
    range = (0.0, 1.0)
    reads_prompts = False
    networks = (Network("redness", "0" * 64, "none"),)

    def _score(self, images: Pictures, prompts: list[str]) -> np.ndarray:
        return np.array([np.asarray(image)[..., 0].mean() / 255 for image in to_pil(images)])


class RedJudge:
    """Prefers red pictures; a prompt is followed by green ones."""

    def appeal(self, images: torch.Tensor) -> NDArray[np.float64]:
        return ((images[:, 0].mean((1, 2)) + 1) / 2).double().numpy()

    def faithfulness(self, images: torch.Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        return ((images[:, 1].mean((1, 2)) + 1) / 2).double().numpy()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generator().save_pretrained(tmp_path_factory.mktemp("model"))


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["evaluate", *argv])
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emu: error: ")]
    return line


def paint(folder: str, names: Sequence[str], colours: Sequence[tuple[int, int, int]], size: int = 8) -> None:
    Path(folder).mkdir(parents=True)
    for name, colour in zip(names, colours, strict=True):
        Image.new("RGB", (size, size), colour).save(Path(folder) / f"{name}.png")


# --- prompts and plan ---------------------------------------------------------------------------------------


def test_a_prompt_set_is_built_and_paraphrased_by_the_command_line(
    service: Service,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    in_tmp_path: Path,
) -> None:
    Path("log.csv").write_text("text,times\na red cat,5\nA red cat!,2\na man,4\na gun,9\nsome box,1\n")
    Path("blocked.txt").write_text("gun\n\n")
    concepts = {"animal": ["cat"], "person": ["man"]}
    cli.main(
        ["evaluate", "prompts", "--log", "log.csv", "--column", "text", "--count_column", "times"]
        + ["--blocked", "blocked.txt", "--quotas", '{"animal": 3, "person": 1}', "--out", "built"]
        + ["--concepts.class_path", "emu_lightning.evaluation.prompt_builder.Keywords"]
        + ["--concepts.init_args.concepts", json.dumps(concepts)]
        + ["--rewriter.class_path", "emu_lightning.evaluation.paraphrase.ChatEndpoint"]
        + ["--rewriter.init_args.url", service.url, "--rewriter.init_args.model", "m"]
    )
    built = read_prompts("built")
    assert built.prompts == ("tac der a", "nam a") and built.categories == ("animal", "person")
    assert sorted(service.texts) == ["a man", "a red cat"]
    shown = capsys.readouterr().out
    assert "animal: 1 of 3 wanted, of 1 there are" in shown and "safe" in shown
    manifest = json.loads(Path("built/manifest.json").read_text())
    assert (
        manifest["settings"]["rewriter"]["url"] == service.url and "log.csv" in manifest["settings"]["source"]
    )


def test_the_plan_prints_the_known_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """1,068 and 3,415 are the textbook's z^2 p q / h^2 and z^2 (1 - ties) / h^2."""
    cli.main(["evaluate", "plan"])
    shown = capsys.readouterr().out
    assert "1,068 prompts,    5,340 votes" in shown and "3,415 prompts" in shown
    cli.main(["evaluate", "plan", "--half_width", "0.06", "--ties", "0"])
    assert "267 prompts" in capsys.readouterr().out  # a quarter
    assert "more than all prompts" in error_of(capsys, "plan", "--win_rate", "0.9")


# --- generate -----------------------------------------------------------------------------------------------


def test_pictures_do_not_depend_on_who_made_them(
    model: Path, capsys: pytest.CaptureFixture[str], in_tmp_path: Path
) -> None:
    Path("set.csv").write_text("Prompts,Category\n" + "".join(f"a ball {n},Balls\n" for n in range(7)))
    job = ["evaluate", "generate", "--model", str(model), "--prompts_file", "set.csv", "--seed", "5"]
    cli.main([*job, "--out", "alone", "--num_steps", "2"])
    cli.main([*job, "--out", "two", "--num_steps", "2", "--num_processes", "2", "--batch_size", "2"])
    for shard in ("2/3", "3/3", "1/3"):
        cli.main([*job, "--out", "shards", "--num_steps", "2", "--shard", shard])
    assert "2 of 7 pictures of set are in shards" in capsys.readouterr().out
    folders = [open_folder(name, read_prompts("set.csv")) for name in ("alone", "two", "shards")]
    for row in range(7):
        first, *others = (folder[row].astype(int) for folder in folders)
        assert all(np.abs(first - other).max() <= 1 for other in others)
    assert folders[0].manifest["seeds"] == list(range(5, 12))
    assert folders[0].manifest["prompt_set"] == {"name": "set", "sha256": read_prompts("set.csv").sha256}
    assert folders[0].manifest["sha256"] == folders[1].manifest["sha256"] == folders[2].manifest["sha256"]

    times = {file: file.stat().st_mtime_ns for file in Path("alone").glob("*.png")}
    Path("alone/00003.png").unlink()
    cli.main([*job, "--out", "alone", "--num_steps", "2"])
    kept = [file for file in times if file.stat().st_mtime_ns == times[file]]
    assert len(kept) == 6
    # What `emu sample` made goes on, too: the same settings have the same hash.
    Path("set.txt").write_text("".join(f"a ball {n}\n" for n in range(7)))
    sampled = [
        "sample",
        "--model",
        str(model),
        "--prompts_file",
        "set.txt",
        "--seed",
        "5",
        "--num_steps",
        "2",
    ]
    cli.main([*sampled, "--out", "sampled"])
    cli.main([*job, "--out", "sampled", "--num_steps", "2"])
    assert "other prompts, seeds or settings" in error_of(
        capsys, *job[1:], "--out", "alone", "--num_steps", "3"
    )


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "a/b", "1/0"])
def test_a_shard_that_is_none_is_refused(
    shard: str, capsys: pytest.CaptureFixture[str], in_tmp_path: Path
) -> None:
    job = ("generate", "--model", "m", "--prompts_file", "p", "--out", "o", "--shard", shard)
    assert "give 1/4, 2/4, 3/4 and 4/4" in error_of(capsys, *job)


# --- judged -------------------------------------------------------------------------------------------------

NAMES = ["cat-1", "dog-2", "hen-3", "owl-4"]


@pytest.fixture
def elsewhere(in_tmp_path: Path) -> Path:
    """Two models' pictures made elsewhere, named by their prompts' ids, of unequal sizes."""
    rows = [{"id": name, "prompt": f"a {name[:3]}", "category": "animal"} for name in NAMES]
    Path("set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paint("runs/base", NAMES, [(100, 50, 0)] * 4)
    paint("runs/tuned", NAMES, [(200, 50, 0), (200, 90, 0), (100, 50, 0), (20, 50, 0)], size=12)
    return in_tmp_path


def test_pictures_made_elsewhere_are_judged_in_any_sizes(
    elsewhere: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = ["--scorer.class_path", "tests.verbs.test_evaluate.RedJudge"]
    both = ["--base", "runs/base", "--tuned", "runs/tuned", *judge]
    cli.main(["evaluate", *both, "--prompts_file", "set.jsonl", "--out", "judged", "--batch_size", "3"])
    results = json.loads(Path("judged/results.json").read_text())
    assert (results["appeal"]["win_rate"], results["appeal"]["lose_rate"]) == (0.5, 0.25)
    assert (results["faithfulness"]["win_rate"], results["faithfulness"]["tie_rate"]) == (0.25, 0.75)
    page = Path("judged/report.html").read_text()
    assert page.count("data:image") >= 8 and "--prompts_file set.jsonl" in page
    assert "give the file of their prompts" in error_of(capsys, *both)
    # One model draws, the other's pictures are there.
    mixed = ["--base", str(model), "--tuned", "runs/tuned", *judge, "--prompts_file", "set.jsonl"]
    cli.main(["evaluate", *mixed, "--out", "mixed"])
    assert len(list(Path("mixed/base").glob("*.png"))) == 4


def vote(prompt: str, answers: str, question: str = "appeal", people: str = "person") -> list[Judgement]:
    words = {"A": "A", "B": "B", "T": "Tie", "n": "Neither"}
    return [
        Judgement(prompt, question, words[one], f"{people} {n}", "person", "AB"[n % 2])  # type: ignore[arg-type]
        for n, one in enumerate(answers)
    ]


def test_votes_become_a_report(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cast = {"cat-1": "BBB", "a dog": "BBA", "hen-3": "AAT", "owl-4": "ABT"}  # by id or by text
    append_judgements("votes.jsonl", [one for prompt, each in cast.items() for one in vote(prompt, each)])
    append_judgements("votes.jsonl", vote("cat-1", "nn", "faithfulness"))
    job = ["--votes", "votes.jsonl", "--a", "runs/base", "--b", "runs/tuned", "--prompts_file", "set.jsonl"]
    cli.main(["evaluate", "votes", *job, "--out", "report"])
    appeal, faithfulness = json.loads(Path("report/results.json").read_text())["comparisons"]
    assert (appeal["a"], appeal["b"], appeal["question"]) == ("base", "tuned", "appeal")
    assert (appeal["win_rate"], appeal["tie_rate"], appeal["lose_rate"]) == (0.5, 0.25, 0.25)
    assert appeal["no_majority"]["num_prompts"] == 1 and faithfulness["answers"] == {"Neither": 2}
    page = Path("report/report.html").read_text()
    assert "emu evaluate votes --votes votes.jsonl" in page and "made elsewhere" in page
    assert page.count("data:image") == 2 * 3  # cat-1 is won clearly, a dog and owl-4 are split

    cli.main(["evaluate", "votes", *job, "--out", "one", "--question", "appeal", "--no_majority", "exclude"])
    (only,) = json.loads(Path("one/results.json").read_text())["comparisons"]
    assert only["num_prompts"] == 3 and only["no_majority"]["policy"] == "exclude"
    assert "not in 'set', such as 'a fox'" in _refused(capsys, [*job], vote("a fox", "B"))
    assert "no vote on faithfulness" in _refused(
        capsys, [*job, "--question", "faithfulness"], vote("cat-1", "B")
    )
    assert "both models are called 'base'" in error_of(capsys, "votes", *job[:5], "runs/base", *job[6:])


def _refused(capsys: pytest.CaptureFixture[str], job: list[str], votes: list[Judgement]) -> str:
    Path("bad.jsonl").unlink(missing_ok=True)
    append_judgements("bad.jsonl", votes)
    job[1] = "bad.jsonl"
    return error_of(capsys, "votes", *job)


def test_several_prompt_sets_or_pairs_of_models_are_given_as_lists(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paint("runs/other", NAMES, [(0, 0, 0)] * 4)
    for name, answers in (("x", "BBB"), ("y", "BBA"), ("z", "BAA")):
        append_judgements(f"{name}.jsonl", [one for prompt in NAMES for one in vote(prompt, answers)])
    pairs = ["--votes", '["x.jsonl", "y.jsonl", "z.jsonl"]', "--prompts_file", "set.jsonl"]
    pairs += [
        "--a",
        '["runs/base", "runs/base", "runs/other"]',
        "--b",
        '["runs/tuned", "runs/other", "runs/tuned"]',
    ]
    cli.main(["evaluate", "votes", *pairs, "--out", "three"])
    job = ["--a", "runs/base", "--b", "runs/tuned", "--prompts_file", "set.jsonl"]
    results = json.loads(Path("three/results.json").read_text())
    assert [(one["a"], one["b"], one["win_rate"]) for one in results["comparisons"]] == [
        ("base", "tuned", 1), ("base", "other", 1), ("other", "tuned", 0),
    ]  # fmt: skip
    assert list(results["strengths"]["person"]["appeal"]["log_strengths"])[-1] == "base"
    # Files of one comparison are put together; the last vote of a person on a prompt counts.
    both = ["--votes", '["x.jsonl", "z.jsonl"]', *job]
    cli.main(["evaluate", "votes", *both, "--out", "together"])
    (one,) = json.loads(Path("together/results.json").read_text())["comparisons"]
    assert (one["num_votes"], one["lose_rate"]) == (12, 1)
    Path("other/set.jsonl").parent.mkdir()
    Path("other/set.jsonl").write_text(Path("set.jsonl").read_text() + "\n")
    sets = ["--prompts_file", '["set.jsonl", "other/set.jsonl"]']
    assert "2 comparisons are of 'tuned' with 'base' on 'set'" in error_of(capsys, "votes", *both[:-2], *sets)
    assert "for 3 files of votes: give as many" in error_of(capsys, "votes", *pairs, "--a_name", '["p", "q"]')


def test_metrics_of_folders_stand_side_by_side(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scorer = '[{"class_path": "tests.verbs.test_evaluate.Redness"}]'
    job = ["metrics", "--folders", '["runs/base", "runs/tuned"]', "--prompts_file", "set.jsonl"]
    cli.main(["evaluate", *job, "--scorers", scorer, "--out", "measured"])
    measured = json.loads(Path("measured/results.json").read_text())["metrics"]
    assert measured["base"][0]["value"] == pytest.approx(100 / 255)
    assert measured["tuned"][0]["value"] == pytest.approx(130 / 255) and measured["tuned"][0]["num"] == 4
    assert "redness ↑" in Path("measured/report.html").read_text()
    assert "nothing is to be measured" in error_of(capsys, *job)
    axes = '{"consistency": "redness", "diversity": "redness", "realism": "blueness"}'
    assert "'blueness' is none of the metrics" in error_of(capsys, *job, "--scorers", scorer, "--axes", axes)


def test_an_unknown_step_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'votes'?" in error_of(capsys, "vote")
    assert "there are prompts, plan, generate, metrics, votes" in error_of(capsys, "xyz")
