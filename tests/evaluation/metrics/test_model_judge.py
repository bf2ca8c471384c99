"""Scorers as a judge, from the command line to marked judgements; and what remains without a network."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from emu_lightning.evaluation.comparison import compare
from emu_lightning.evaluation.generation import to_uint8
from emu_lightning.evaluation.metrics import (
    DSG,
    HPS,
    TIFA,
    AestheticScore,
    ClipScore,
    FileAnswers,
    FrechetDistance,
    ImageReward,
    ModelAnswers,
    ModelJudge,
    Network,
    OpenClipEmbedder,
    PickScore,
    PictureScorer,
    TimmEmbedder,
    TransformersClip,
    TransformersVision,
    Vendi,
    VisionLanguageModel,
    VQAScore,
    measure_pictures,
    measure_sets,
)
from emu_lightning.evaluation.metrics.picture_scorers import Scores
from emu_lightning.evaluation.scorers import Scorer
from emu_lightning.evaluation.votes import votes_by_prompt
from emu_lightning.verbs.arguments import call
from tests.evaluation.metrics.tiny_networks import make_images

MINIATURE = "emu_lightning/miniature/clip"


class Channel(PictureScorer):
    """The mean level of a colour, -1 to 1, as a score in any range."""

    def __init__(self, channel: int, reads_prompts: bool, scale: float = 1.0, low: float = -1.0) -> None:
        self.name, self.reads_prompts = f"channel {channel}", reads_prompts
        self.channel, self.scale, self.range = channel, scale, (low * scale, scale)

    @property
    def networks(self) -> tuple[Network, ...]:
        return (Network(self.name, "c0ffee" * 10, ""),)

    def _score(self, images, prompts: list[str]) -> Scores:
        return self.scale * images[:, self.channel].mean((1, 2)).double().numpy()


def plain_images(*colours: tuple[float, float]) -> torch.Tensor:
    """Red and green levels to images of 4 pixels a side."""
    levels = torch.tensor([[red, green, 0.0] for red, green in colours])
    return levels[:, :, None, None].expand(-1, -1, 4, 4)


BASE = plain_images((0.0, 0.5), (0.5, 0.0), (0.2, 0.2))
TUNED = plain_images((0.4, 0.5), (0.1, 0.6), (0.21, 0.1))
PROMPTS = ["a", "b", "a"]


def test_judgements_are_a_models_and_keep_every_pair():
    judge = ModelJudge(Channel(0, False), Channel(1, True))
    judgements = judge.judgements(BASE, TUNED, PROMPTS, appeal_margin=0.05, faithfulness_margin=0.01)
    assert {one.rater_kind for one in judgements} == {"model"}
    by = {(one.question, one.prompt, one.rater): one.answer for one in judgements}
    sha = "c0ffeec0ffee"
    assert by == {
        ("appeal", "a", f"channel 0 {sha}"): "B",
        ("appeal", "b", f"channel 0 {sha}"): "A",
        ("appeal", "a", f"channel 0 {sha}, picture 2"): "Tie",
        ("faithfulness", "a", f"channel 1 {sha}"): "Tie",
        ("faithfulness", "b", f"channel 1 {sha}"): "B",
        ("faithfulness", "a", f"channel 1 {sha}, picture 2"): "A",
    }
    assert votes_by_prompt(judgements, "appeal") == {"a": ["B", "Tie"], "b": ["A"]}


def test_faithfulness_becomes_a_share():
    scores = np.array([0.5, 0.0, 0.2])
    bounded = ModelJudge(Channel(0, False), Channel(1, True, scale=100))
    assert bounded.faithfulness(BASE, PROMPTS) == pytest.approx((scores + 1) / 2)
    unbounded = ModelJudge(Channel(0, False), Channel(1, True))
    unbounded.faithfulness_scorer.range = (-np.inf, np.inf)
    assert unbounded.faithfulness(BASE, PROMPTS) == pytest.approx(1 / (1 + np.exp(-scores)))


def test_a_scorer_judges_only_what_it_can():
    with pytest.raises(ValueError, match="channel 0 reads the prompt, which is hidden"):
        ModelJudge(Channel(0, True), Channel(1, True))
    with pytest.raises(ValueError, match="channel 1 does not read the prompt"):
        ModelJudge(Channel(0, False), Channel(1, False))


def test_the_command_line_takes_it(tmp_path: Path):
    """As `emu evaluate --scorer` does, on the CLIP that travels with the project."""
    save_file({"weight": torch.ones(1, 64), "bias": torch.ones(1)}, tmp_path / "head.safetensors")
    here = "emu_lightning.evaluation.metrics"
    clip = {"class_path": f"{here}.OpenClipEmbedder", "init_args": {"weights": MINIATURE}}
    judge = {
        "appeal": {
            "class_path": f"{here}.AestheticScore",
            "init_args": {"embedder": clip, "head": str(tmp_path / "head.safetensors")},
        },
        "faithfulness": {"class_path": f"{here}.ClipScore", "init_args": {"embedder": clip}},
    }
    config = {"scorer": {"class_path": f"{here}.ModelJudge", "init_args": judge}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def verb(scorer: Scorer) -> Scorer:
        return scorer

    scorer = call(verb, ["--config", str(tmp_path / "config.yaml")], "emu evaluate")
    images, prompts = make_images(3, side=64), ["a red ball", "a blue star", "a box"]
    direct = ClipScore(OpenClipEmbedder(MINIATURE)).score(images, prompts)
    assert scorer.faithfulness(images, prompts) == pytest.approx(direct / 2.5)
    pictures = to_uint8(images)
    result = compare(scorer, pictures, pictures, prompts)
    assert set(result.appeal_labels) == set(result.faithfulness_labels) == {"Tie"}


# --- without a network --------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Any attempt to reach a host fails, and is written down."""
    tried: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        tried.append(arguments)
        raise OSError("the network is blocked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


def _dsg(folder: Path) -> PictureScorer:
    (folder / "dsg.csv").write_text(
        "item_id,text,proposition_id,dependency,question_natural_language\n1,a ball,1,0,Is there a ball?\n"
    )
    return DSG(str(folder / "dsg.csv"), FileAnswers(str(folder / "none.jsonl"), "nobody"))


def _tifa(folder: Path) -> PictureScorer:
    question = {"caption": "a ball", "question": "is it?", "choices": ["yes", "no"], "answer": "yes"}
    (folder / "tifa.json").write_text(json.dumps([question]))
    return TIFA(str(folder / "tifa.json"), ModelAnswers(VisionLanguageModel("nobody/nothing")))


SCORERS: list[Callable[[Path], PictureScorer]] = [
    lambda _: ClipScore(OpenClipEmbedder("nobody/nothing")),
    lambda _: HPS(OpenClipEmbedder("nobody/HPS.pt", model="ViT-H-14"), "v2.1"),
    lambda _: PickScore(TransformersClip("nobody/nothing")),
    lambda _: AestheticScore(OpenClipEmbedder(MINIATURE), "nobody/head"),
    lambda _: ImageReward(),
    lambda _: VQAScore(VisionLanguageModel("nobody/nothing")),
    _tifa,
    _dsg,
]


def test_without_a_network_every_metric_says_what_to_do(no_network, tmp_path):
    images, prompts = make_images(2), ["a ball"] * 2
    scorers = [make(tmp_path) for make in SCORERS]
    works = ClipScore(OpenClipEmbedder(MINIATURE))
    *missing, there = measure_pictures([*scorers, works], images, prompts)
    assert [one.name for one in missing] == [scorer.name for scorer in scorers]
    assert there.value is not None and there.ci95 is None  # one prompt has no interval
    for embedder in (OpenClipEmbedder, TransformersClip, TransformersVision, TimmEmbedder):
        metrics = [FrechetDistance(), Vendi()]
        measured = measure_sets(metrics, embedder("nobody/nothing"), images, images)
        assert len(measured) == len(metrics)
        missing += measured
    for one in missing:
        assert one.value is None and "value" not in one.to_dict(), one
        assert "hf download" in one.reason or "write the questions" in one.reason, one
        assert "\n" not in one.reason and one.num == 2
    assert not no_network


def test_an_interval_is_over_prompts():
    """Four pictures of each of two prompts that disagree: the interval is that of two numbers."""
    images = plain_images(*[(0.8, 0.0)] * 4, *[(0.0, 0.0)] * 4)
    (measured,) = measure_pictures([Channel(0, False)], images, ["a"] * 4 + ["b"] * 4)
    half = 1.959964 * np.std([0.8, 0.0], ddof=1) / np.sqrt(2)
    assert measured.value == pytest.approx(0.4) and measured.ci95 == pytest.approx((0.4 - half, 0.4 + half))
