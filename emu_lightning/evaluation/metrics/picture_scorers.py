"""Scores of one picture and its prompt, behind one interface; those that are read from embeddings.

Whoever tunes on a score, or chooses training pictures by it, must not report on it: such a number rises
whatever people think of the pictures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from torch import Tensor

from emu_lightning.evaluation.metrics.distances import normalised
from emu_lightning.evaluation.metrics.embedders import (
    Embedder,
    Network,
    Pictures,
    TransformersClip,
    network_of,
)
from emu_lightning.weights import (
    find_weights,
    joint_sha256,
    label,
    read_state,
    sha256,
)

Scores = NDArray[np.float64]

ROUNDING = 1e-5  # of single precision: a cosine may come out as 1.0000001


class PictureScorer(ABC):
    """Scores pictures one by one, higher is better.

    Weights are read at first use, from disk only.

    Attributes:
        name: of the score.
        range: lowest and highest score there is.
        reads_prompts: the score depends on the prompt; else on the picture alone.

    Raises:
        FileNotFoundError: any use of it but its name, where weights are not on this machine.
        ValueError: weights are not what is expected.
    """

    name: str
    range: tuple[float, float]
    reads_prompts: bool = True

    @property
    @abstractmethod
    def networks(self) -> tuple[Network, ...]:
        """What the scores depend on."""

    @property
    def weights_sha256(self) -> str:
        """Of the file of weights; of several, the hash of their hashes."""
        return joint_sha256([network.weights_sha256 for network in self.networks])

    def score(self, images: Pictures, prompts: Sequence[str]) -> Scores:
        """Scores (N,) of N pictures.

        Args:
            images: (N, 3, H, W) in [-1, 1], or N pictures.
            prompts: N texts, one for each picture; ignored where the scorer does not read them.

        Raises:
            ValueError: a score is out of `range`: the weights do not belong together.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts: give one prompt for each")
        scores = np.asarray(self._score(images, list(prompts)), np.float64)
        low, high = self.range
        wrong = scores[~((scores >= low - ROUNDING) & (scores <= high + ROUNDING))]  # also what is no number
        if len(wrong):
            raise ValueError(
                f"{self.name} is {wrong[0]:.3g}, where {low:g} to {high:g} is meant: these weights do not "
                f"belong together: {', '.join(network.name for network in self.networks)}"
            )
        return scores.clip(low, high)

    @abstractmethod
    def _score(self, images: Pictures, prompts: list[str]) -> Scores: ...

    def cut(self, prompts: Sequence[str]) -> NDArray[np.bool_]:
        """Which of N prompts are longer than what the scorer reads, (N,)."""
        return np.zeros(len(prompts), np.bool_)


class _Cosine(PictureScorer, ABC):
    """A function of the cosine of a picture's and its prompt's embedding."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    @property
    def networks(self) -> tuple[Network, ...]:
        return (network_of(self.embedder),)

    def cut(self, prompts: Sequence[str]) -> NDArray[np.bool_]:
        return self.embedder.cut([self._text(prompt) for prompt in prompts])

    def _text(self, prompt: str) -> str:
        return prompt

    def _cosines(self, images: Pictures, prompts: list[str]) -> Scores:
        distinct = list(dict.fromkeys(prompts))
        texts = normalised(self.embedder.embed_texts([self._text(prompt) for prompt in distinct]))
        place = {prompt: index for index, prompt in enumerate(distinct)}
        pictures = normalised(self.embedder.embed_images(images))
        cosines: Scores = (pictures * texts[[place[prompt] for prompt in prompts]]).sum(axis=1)
        return cosines


class ClipScore(_Cosine):
    """CLIPScore: 2.5 max(cos, 0), of each picture (Hessel et al. 2021, section 3). In [0, 2.5].

    torchmetrics' number of that name is the mean of 100 cos, set to 0 only behind the mean: not this one. Of
    a prompt that is too long the beginning is read, with the end token; `cut` counts them.

    Args:
        embedder: a CLIP; published is ViT-B/32 of OpenAI. Another one gives another score.
        prefix: in front of each prompt. Published is "A photo depicts " for captions of photographs.
    """

    name = "CLIPScore"
    range = (0.0, 2.5)

    def __init__(self, embedder: Embedder, prefix: str = "") -> None:
        super().__init__(embedder)
        self.prefix = prefix

    def _text(self, prompt: str) -> str:
        return self.prefix + prompt

    def _score(self, images: Pictures, prompts: list[str]) -> Scores:
        return 2.5 * np.maximum(self._cosines(images, prompts), 0)


class HPS(_Cosine):
    """Human preference score v2 or v2.1: the cosine of a CLIP tuned on people's choices (Wu et al. 2023).

    In [-1, 1], about 0.2 to 0.35; published tables print it times 100. Scores of the two versions, or of
    different prompts, do not compare. The weights are a file for open_clip's "ViT-H-14" (`hf download
    xswu/HPSv2 HPS_v2.1_compressed.pt`), and pictures are framed, not cropped:

        OpenClipEmbedder("HPS_v2.1_compressed.pt", model="ViT-H-14", resize_mode="longest")

    Args:
        embedder: that one.
        version: which of the two the weights are; published code takes v2.0 where nothing is said.
    """

    range = (-1.0, 1.0)

    def __init__(self, embedder: Embedder, version: Literal["v2.0", "v2.1"]) -> None:
        super().__init__(embedder)
        self.name = f"HPS{version}"

    def _score(self, images: Pictures, prompts: list[str]) -> Scores:
        return self._cosines(images, prompts)


class PickScore(_Cosine):
    """PickScore: the scaled cosine of a CLIP tuned on users' choices (Kirstain et al. 2023). About 15 to 25.

    The weights are those of a CLIP of transformers ("yuvalkirstain/PickScore_v1"), whose tokenizer and
    processor are in "laion/CLIP-ViT-H-14-laion2B-s32B-b79K".

    Args:
        embedder: that one.
    """

    name = "PickScore"
    embedder: TransformersClip

    def __init__(self, embedder: TransformersClip) -> None:
        super().__init__(embedder)

    @property
    def range(self) -> tuple[float, float]:  # type: ignore[override]  # the scale is in the weights
        return -self.embedder.logit_scale, self.embedder.logit_scale

    def _score(self, images: Pictures, prompts: list[str]) -> Scores:
        return self.embedder.logit_scale * self._cosines(images, prompts)

    @staticmethod
    def preference(scores: ArrayLike, other: ArrayLike) -> Scores:
        """Probability (N,) that a user picks the first of two pictures of one prompt, by their scores."""
        return expit(np.subtract(scores, other))


class AestheticScore(PictureScorer):
    """LAION's aesthetic predictors on CLIP ViT-L/14 of OpenAI: v1 (one linear layer) and v2 ("MLP").

    About 1 to 10, and an error below -10 or above 20, where the head belongs to another CLIP. v2's layers
    have no activation between them, so both are affine maps one after another, of embeddings of length 1.

    Args:
        embedder: the CLIP.
        head: file of the state dict; `*.weight` (out, in) and `*.bias`, in the order of their names.
    """

    name = "aesthetic score"
    range = (-10.0, 20.0)
    reads_prompts = False

    def __init__(self, embedder: Embedder, head: str) -> None:
        self.embedder, self.head = embedder, head

    @property
    def networks(self) -> tuple[Network, ...]:
        head = Network(f"head {label(self.head)}", sha256(find_weights(self.head)), "embeddings of length 1")
        return network_of(self.embedder), head

    def _score(self, images: Pictures, prompts: list[str]) -> Scores:
        weight, bias = affine_map(read_state(find_weights(self.head)))
        embeddings = normalised(self.embedder.embed_images(images))
        if weight.shape != (1, embeddings.shape[1]):
            raise ValueError(
                f"{self.head} makes {weight.shape[0]} numbers of embeddings of {weight.shape[1]}, but one of "
                f"{embeddings.shape[1]} is needed: it belongs to another CLIP"
            )
        scores: Scores = embeddings @ weight[0] + bias[0]
        return scores


def affine_map(state: Mapping[str, Tensor]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight (out, in) and bias (out,) of linear layers, composed in the order of their names.

    Raises:
        ValueError: they do not follow one another.
    """
    arrays = {name: tensor.double().numpy() for name, tensor in state.items()}
    names = sorted((name for name in arrays if name.endswith("weight")), key=_natural)
    layers = [(arrays[name], arrays.get(name.removesuffix("weight") + "bias", np.zeros(1))) for name in names]
    try:
        matrix, bias = layers[0]
        for weight, offset in layers[1:]:
            matrix, bias = weight @ matrix, weight @ bias + offset
    except (IndexError, ValueError) as error:
        raise ValueError(f"there are no linear layers that follow one another: {error}") from None
    return matrix, bias


def _natural(name: str) -> list[tuple[int, str]]:
    """Orders `layers.2.weight` before `layers.10.weight`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
