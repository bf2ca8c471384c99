"""TIFA and DSG from their files, and GenEval by its folder and results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu_lightning.evaluation.metrics import (
    DSG,
    TIFA,
    FileAnswers,
    ModelAnswers,
    Network,
    VisionLanguageModel,
    measure_geneval,
    read_geneval,
    write_geneval_folder,
)
from emu_lightning.evaluation.metrics.questions import (
    Answerer,
    Question,
    match,
    picture_id,
    read_dsg,
    read_tifa,
)
from tests.evaluation.metrics.tiny_networks import make_pictures

SCENE = "a red ball in the snow"
# As dsg-1k-anns.csv is written; like it, with a parent that is no question, and one text of two items.
DSG_FILE = """\
item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language
one_1,a red ball in the snow,ball,1,0,entity,whole,entity - whole (ball),Is there a ball?
one_1,a red ball in the snow,"ball, red",2,1,attribute,color,"attribute - color (ball, red)",Is the ball red?
one_1,a red ball in the snow,snow,3,0,entity,whole,entity - whole (snow),Is there snow?
one_1,a red ball in the snow,"ball, in",4,"1, 3, right",relation,spatial,"relation (ball, snow, in)",Is it in?
one_2,a cat,cat,1,0,entity,whole,entity - whole (cat),Is there a cat?
one_3,a cat,cat,1,0,entity,whole,entity - whole (cat),"Is there, again, a cat?"
"""
TIFA_FILE = [
    {
        "id": "coco_1", "caption": SCENE, "question": "is this a ball?", "choices": ["yes", "no"],
        "answer": "yes", "element_type": "object", "element": "ball",
    },
    {
        "id": "coco_1", "caption": SCENE, "question": "what colour is the ball?",
        "choices": ["green", "red", "dark red"], "answer": "red", "element_type": "color", "element": "red",
    },
]  # fmt: skip


class Says(Answerer):
    """Answers by the question's id."""

    network = Network("someone", "", "")

    def __init__(self, **by_id: str) -> None:
        self.by_id = by_id

    def answers(self, image: Image.Image, questions: Sequence[Question]) -> list[str]:
        return [self.by_id[f"q{one.id}"] for one in questions]


@pytest.fixture
def dsg_file(tmp_path: Path) -> str:
    (tmp_path / "dsg.csv").write_text(DSG_FILE)
    return str(tmp_path / "dsg.csv")


@pytest.fixture
def tifa_file(tmp_path: Path) -> str:
    (tmp_path / "tifa.json").write_text(json.dumps(TIFA_FILE))
    return str(tmp_path / "tifa.json")


def test_questions_are_read_as_published(dsg_file, tifa_file):
    questions = read_dsg(dsg_file)
    assert [(one.id, one.parents) for one in questions] == [
        ("1", ()), ("2", ("1",)), ("3", ()), ("4", ("1", "3", "right")), ("1", ()),
    ]  # fmt: skip
    assert questions[-1].text == "Is there a cat?"
    colour = read_tifa(tifa_file)[1]
    assert (colour.prompt, colour.choices, colour.answer) == (SCENE, ("green", "red", "dark red"), "red")


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        ({"q1": "yes", "q2": "yes", "q3": "yes", "q4": "yes"}, 1.0),
        ({"q1": "yes", "q2": "no", "q3": "yes", "q4": "yes"}, 0.75),
        ({"q1": "no", "q2": "yes", "q3": "yes", "q4": "yes"}, 0.25),  # no ball: neither red nor in the snow
        ({"q1": "yes", "q2": "yes", "q3": "no", "q4": "yes"}, 0.5),
        ({"q1": "", "q2": "yes", "q3": "no", "q4": "no"}, 0.0),
    ],
)
def test_dsg_counts_no_question_without_its_parents(answers, share, dsg_file):
    assert DSG(dsg_file, Says(**answers)).score(make_pictures(1), [SCENE]).tolist() == [share]


def test_tifa_is_the_share_of_right_answers(tifa_file):
    assert TIFA(tifa_file, Says(q0="yes", q1="red")).score(make_pictures(1), [SCENE]).tolist() == [1]
    assert TIFA(tifa_file, Says(q0="yes", q1="green")).score(make_pictures(1), [SCENE]).tolist() == [0.5]
    with pytest.raises(ValueError, match="no question is about the prompt 'a dog'"):
        TIFA(tifa_file, Says()).score(make_pictures(1), ["a dog"])


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("Yes.", "yes"), ("yes, there is", "yes"), ("No", "no"), ("it is not", ""), ("yes and no", ""),
        ("Dark red!", "dark red"), ("snow", ""), ("", ""),
    ],
)  # fmt: skip
def test_an_answer_is_matched_to_one_choice(answer, choice):
    assert match(answer, ["yes", "no", "dark red"]) == choice


def test_a_model_is_asked_with_the_choices(tifa_file):
    class Parrot(VisionLanguageModel):
        asked: list[str] = []

        def answer(self, image, question, max_tokens=16):
            self.asked.append(question)
            return "Red, I think"

    answers = ModelAnswers(Parrot("nothing")).answers(make_pictures(1)[0], read_tifa(tifa_file))
    assert answers == ["", "red"]
    assert Parrot.asked[1] == "what colour is the ball? Answer by one of: green, red, dark red."


def test_questions_are_answered_elsewhere_and_read_again(dsg_file, tmp_path):
    """Two pictures of one prompt, in any order; of what is in the file, nothing is asked twice."""
    pictures, prompts = make_pictures(3), [SCENE, "a cat", SCENE]
    answers = tmp_path / "answers.jsonl"
    scorer = DSG(dsg_file, FileAnswers(str(answers), "a model elsewhere"))
    with pytest.raises(FileNotFoundError, match="no answers at .*write the questions"):
        scorer.score(pictures, prompts)
    written = scorer.write(tmp_path / "asked", [*pictures, pictures[0]], [*prompts, SCENE])
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(rows) == 4 + 1 + 4
    red = np.asarray(pictures[0])
    for row in rows:  # the first picture has all that is asked, the other two have nothing
        shown = np.asarray(Image.open(written.parent / f"{row['picture']}.png"))
        row["answer"] = "Yes" if np.array_equal(shown, red) else "No."
    answers.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert scorer.score(pictures, prompts).tolist() == [1, 0, 0]
    assert scorer.networks[0].name == "a model elsewhere" and len(scorer.weights_sha256) == 64
    answers.write_text(json.dumps(rows[0]) + "\n")
    few = DSG(dsg_file, FileAnswers(str(answers), "a model elsewhere"))
    with pytest.raises(ValueError, match="no answer to question 2 .* answer all that was written"):
        few.score(pictures, prompts)
    answers.write_text('{"picture": "x"}\n')
    with pytest.raises(ValueError, match="answers.jsonl:1 is no answer"):
        DSG(dsg_file, FileAnswers(str(answers), "x")).score(pictures, prompts)


def test_a_picture_is_known_by_its_pixels(tmp_path):
    first, second = make_pictures(2)
    first.save(tmp_path / "again.png")
    assert picture_id(first) == picture_id(Image.open(tmp_path / "again.png")) != picture_id(second)


def test_files_of_something_else_are_named(tmp_path):
    (tmp_path / "x").write_text("[1]")
    for read in (read_tifa, read_dsg):
        with pytest.raises(FileNotFoundError, match="no questions at"):
            read(tmp_path / "missing")
    with pytest.raises(ValueError, match="no file of TIFA's questions"):
        read_tifa(tmp_path / "x")
    (tmp_path / "x").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no file of DSG's questions"):
        read_dsg(tmp_path / "x")


# --- GenEval ------------------------------------------------------------------------------------------------

TASK_RESULTS = {  # task -> pictures that are right, pictures
    "single_object": (4, 4), "two_object": (2, 4), "counting": (1, 4), "colors": (3, 4), "position": (0, 4),
    "color_attr": (3, 12),
}  # fmt: skip


def write_results(path: Path, tasks: dict[str, tuple[int, int]]) -> Path:
    rows = [
        {"filename": f"{task}/{n}.png", "tag": task, "prompt": f"{task} {n // 4}", "correct": n < right}
        for task, (right, num) in tasks.items()
        for n in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_geneval_is_the_mean_of_tasks_and_not_of_pictures(tmp_path):
    score, *tasks = read_geneval(write_results(tmp_path / "results.jsonl", TASK_RESULTS))
    assert score.value == pytest.approx((1 + 0.5 + 0.25 + 0.75 + 0 + 0.25) / 6)
    assert score.value != pytest.approx(13 / 32) and (score.num, score.details) == (32, {"prompts": 8})
    assert {one.name: (one.value, one.num) for one in tasks} == {
        f"GenEval {task}": (right / num, num) for task, (right, num) in TASK_RESULTS.items()
    }


def test_geneval_without_a_task_has_no_score(tmp_path):
    path = write_results(tmp_path / "results.jsonl", {**TASK_RESULTS, "position": (0, 0)})
    score, *tasks = read_geneval(path)
    assert score.value is None and score.reason == "there are no results of position" and len(tasks) == 5
    with pytest.raises(FileNotFoundError, match="there is no .*write_geneval_folder"):
        read_geneval(tmp_path / "missing.jsonl")
    (missing,) = measure_geneval(tmp_path / "missing.jsonl")
    assert missing.value is None and "write_geneval_folder" in missing.reason
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="no file of GenEval's"):
        read_geneval(path)


def test_geneval_is_given_its_folder(tmp_path):
    rows = [
        {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
        {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
    ]
    metadata = tmp_path / "evaluation_metadata.jsonl"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures = make_pictures(4)
    prompts = [rows[1]["prompt"], rows[0]["prompt"]] * 2
    folder = write_geneval_folder(tmp_path / "folder", metadata, pictures, prompts)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        f"0000{n}/{name}"
        for n in (0, 1)
        for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    assert [json.loads((folder / f"0000{n}/metadata.jsonl").read_text()) for n in (0, 1)] == rows
    shown = np.asarray(Image.open(folder / "00001/samples/0001.png"))
    np.testing.assert_array_equal(shown, np.asarray(pictures[2]))
    with pytest.raises(ValueError, match="no picture of GenEval's prompt 'a photo of two cows'"):
        write_geneval_folder(tmp_path / "less", metadata, pictures[1:2], prompts[1:2])
