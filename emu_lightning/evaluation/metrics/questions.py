"""Faithfulness by questions: TIFA and DSG. Questions come from files, answers from a model or a file."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from abc import ABC
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from emu_lightning.evaluation.generation import write_png
from emu_lightning.evaluation.metrics.embedders import Network, Pictures, to_pil
from emu_lightning.evaluation.metrics.picture_scorers import PictureScorer, Scores
from emu_lightning.evaluation.metrics.vlm import VisionLanguageModel
from emu_lightning.files import write_whole
from emu_lightning.weights import sha256

QUESTIONS = "questions.jsonl"


@dataclass(frozen=True)
class Question:
    """One question about the pictures of one prompt.

    Attributes:
        prompt: the prompt's text.
        id: of the question, unique within its prompt.
        text: of the question.
        choices: answers to choose from.
        answer: the right one.
        parents: ids of questions without whose right answers this one makes no sense; those that are no
            questions do not count, the published file has some.
    """

    prompt: str
    id: str
    text: str
    choices: tuple[str, ...] = ("yes", "no")
    answer: str = "yes"
    parents: tuple[str, ...] = ()


class Answerer(Protocol):
    """Answers questions about a picture."""

    @property
    def network(self) -> Network:
        """What the answers depend on."""
        ...

    def answers(self, image: Image.Image, questions: Sequence[Question]) -> list[str]:
        """One of the choices for each question, or "" where there is none among them.

        Raises:
            FileNotFoundError: weights or file are missing.
            ValueError: the answer to a question is missing.
        """
        ...


class ModelAnswers(Answerer):
    """Answers of a model, in its own words, matched to the choices.

    TIFA matches by a network of sentences; here a choice has to occur in the answer, and no other one.

    Args:
        model: is asked.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model

    @property
    def network(self) -> Network:
        return self.model.network

    def answers(self, image: Image.Image, questions: Sequence[Question]) -> list[str]:
        asked = [f"{one.text} Answer by one of: {', '.join(one.choices)}." for one in questions]
        said = [self.model.answer(image, text) for text in asked]
        return [match(answer, one.choices) for answer, one in zip(said, questions, strict=True)]


class FileAnswers(Answerer):
    """Answers that another program gave to what :meth:`QuestionScorer.write` wrote.

    Args:
        path: file of JSON lines with "picture", "id" and "answer"; what else is in them is not read.
        name: of who answered, for reports.
    """

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name

    @property
    def network(self) -> Network:
        _ = self._answers
        return Network(self.name, sha256(Path(self.path)), "answers in a file")

    def answers(self, image: Image.Image, questions: Sequence[Question]) -> list[str]:
        picture = picture_id(image)
        for one in questions:
            if (picture, one.id) not in self._answers:
                raise ValueError(
                    f"{self.path} has no answer to question {one.id} of {one.prompt!r} about picture "
                    f"{picture}: answer all that was written"
                )
        return [match(self._answers[picture, one.id], one.choices) for one in questions]

    @cached_property
    def _answers(self) -> dict[tuple[str, str], str]:
        path, answers = Path(self.path), {}
        if not path.is_file():
            raise FileNotFoundError(
                f"no answers at {path}: write the questions, and let a model answer them outside"
            )
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                answers[row["picture"], str(row["id"])] = str(row["answer"])
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number} is no answer (picture, id, answer): {error}") from None
        return answers


class QuestionScorer(PictureScorer, ABC):
    """The share of a prompt's questions that are answered right about its picture, in [0, 1].

    A question counts as wrong where one of its parents is answered wrong.

    Args:
        questions: of all prompts.
        answerer: answers them.
    """

    range = (0.0, 1.0)

    def __init__(self, questions: Sequence[Question], answerer: Answerer) -> None:
        self.answerer = answerer
        self._questions: dict[str, list[Question]] = defaultdict(list)
        for one in questions:
            self._questions[one.prompt].append(one)

    @property
    def networks(self) -> tuple[Network, ...]:
        return (self.answerer.network,)

    def write(self, folder: str | Path, images: Pictures, prompts: Sequence[str]) -> Path:
        """Writes what a model outside has to answer: pictures, and `questions.jsonl` about them.

        Each line has "picture" (the PNG's name without ending), "id", "question", "choices". Add "answer" to
        each, and read the file by :class:`FileAnswers`.

        Returns:
            Path of `questions.jsonl`.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        lines = {}
        for image, prompt in zip(to_pil(images), prompts, strict=True):
            picture = picture_id(image)
            write_png(Path(folder) / f"{picture}.png", np.asarray(image))
            for one in self._asked(prompt):
                row = {"picture": picture, "id": one.id, "question": one.text, "choices": one.choices}
                lines[picture, one.id] = json.dumps(row, ensure_ascii=False) + "\n"
        return write_whole(Path(folder) / QUESTIONS, "".join(lines.values()))

    def _score(self, images: Pictures, prompts: list[str]) -> Scores:
        shares = []
        for image, prompt in zip(to_pil(images), prompts, strict=True):
            questions = self._asked(prompt)
            answers = self.answerer.answers(image, questions)
            is_right = {one.id: said == one.answer for one, said in zip(questions, answers, strict=True)}
            counts = [
                is_right[one.id] and all(is_right.get(parent, True) for parent in one.parents)
                for one in questions
            ]
            shares.append(sum(counts) / len(counts))
        return np.array(shares)

    def _asked(self, prompt: str) -> list[Question]:
        if prompt not in self._questions:
            raise ValueError(f"no question is about the prompt {prompt!r}: make the file's questions for it")
        return self._questions[prompt]


class TIFA(QuestionScorer):
    """TIFA (Hu et al. 2023): questions with several choices.

    Args:
        questions: its file, such as `tifa_v1.0_question_answers.json`: "caption", "question", "choices",
            "answer" of each.
        answerer: answers them.
    """

    name = "TIFA"

    def __init__(self, questions: str, answerer: Answerer) -> None:
        super().__init__(read_tifa(questions), answerer)


class DSG(QuestionScorer):
    """DSG (Cho et al. 2024): yes or no, where a question counts only if those that it depends on are right.

    As in the released code a question's own parents count, not theirs in turn.

    Args:
        questions: its file, such as `dsg-1k-anns.csv`: item_id, text, proposition_id, dependency,
            question_natural_language of each.
        answerer: answers them.
    """

    name = "DSG"

    def __init__(self, questions: str, answerer: Answerer) -> None:
        super().__init__(read_dsg(questions), answerer)


def read_tifa(path: str | Path) -> list[Question]:
    """Questions of TIFA's JSON; the id is the question's place in the file.

    Raises:
        FileNotFoundError, ValueError: the file is missing, or is none of TIFA's.
    """
    try:
        return [
            Question(row["caption"], str(number), row["question"], tuple(row["choices"]), row["answer"])
            for number, row in enumerate(json.loads(_read(path)))
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no file of TIFA's questions: {error}") from None


def read_dsg(path: str | Path) -> list[Question]:
    """Questions of DSG's CSV.

    Raises:
        FileNotFoundError, ValueError: the file is missing, or is none of DSG's.
    """
    questions, item_of = [], dict[str, str]()
    try:
        for row in csv.DictReader(_read(path).splitlines()):
            if item_of.setdefault(row["text"], row["item_id"]) != row["item_id"]:
                continue  # the published file has one text twice, with questions for each
            parents = [parent.strip() for parent in row["dependency"].split(",")]
            questions.append(
                Question(
                    row["text"],
                    row["proposition_id"],
                    row["question_natural_language"],
                    parents=tuple(parent for parent in parents if parent not in ("0", "")),
                )
            )
    except (KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no file of DSG's questions: {error}") from None
    return questions


def _read(path: str | Path) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no questions at {path}: name the file that TIFA or DSG have published")
    return Path(path).read_text(encoding="utf-8")


def match(answer: str, choices: Sequence[str]) -> str:
    """The choice that an answer is, or the only one whose words are in it; "" where there is none."""
    said = _words(answer)
    for choice in choices:
        if _words(choice) == said:
            return choice
    found = [choice for choice in choices if f" {_words(choice)} " in f" {said} "]
    return found[0] if len(found) == 1 else ""


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def picture_id(image: Image.Image) -> str:
    """Hash of a picture's size and pixels, whatever file it is in."""
    picture = image.convert("RGB")
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:32]
