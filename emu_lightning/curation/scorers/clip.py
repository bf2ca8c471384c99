"""One pass of a CLIP over each picture, and all that is read from its embedding: taste, offence, concept."""

from __future__ import annotations

import importlib.util
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from emu_lightning.curation.scorer import Columns, Derived, Picture, Scorer, fingerprint
from emu_lightning.weights import (
    OPEN_CLIP_CHECKPOINTS,
    OPEN_CLIP_CONFIG,
    find_checkpoint,
    find_weights,
    offline,
    sha256,
)

if TYPE_CHECKING:
    from torch import Tensor

Embeddings = NDArray[np.float32]  # (B, D), rows of length 1
EmbedTexts = Callable[[Sequence[str]], Embeddings]

AESTHETIC_RANGE = (-10.0, 20.0)  # LAION's answer is 1 to 10, rarely a little more


class Head(Derived):
    """Columns that are a function of a picture's embedding."""

    @abstractmethod
    def start(self, embed_texts: EmbedTexts, dim: int, made_by: str) -> None:
        """Loads what it needs.

        Args:
            embed_texts: gives T texts' embeddings (T, D).
            dim: D.
            made_by: fingerprint of the CLIP.

        Raises:
            FileNotFoundError, ValueError: weights are missing, or made for other embeddings.
        """

    @abstractmethod
    def score(self, embeddings: Embeddings) -> Columns:
        """`columns` of B pictures."""

    def derive(self, own: pa.Table) -> Columns:
        return self.score(stored_embeddings(own))


def stored_embeddings(own: pa.Table) -> Embeddings:
    """Embeddings (B, D) of length 1 from what is stored of :class:`Clip`, in half precision."""
    stored = own["clip_embedding"].combine_chunks()
    return _normalised(stored.flatten().to_numpy().reshape(len(stored), -1).astype(np.float32))


class AestheticHead(Head):
    """LAION's aesthetic predictors on CLIP ViT-L/14 of OpenAI: v1 (one linear layer) and v2 ("MLP").

    v2's layers have no activation between them, so both are affine maps one after another; dropout is none
    where nothing is trained. Column `aesthetic`: about 1 to 10.

    Args:
        weights: file of the state dict; `*.weight` (out, in) and `*.bias`, in the order of their names.
    """

    columns = {"aesthetic": pa.float32()}

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def fingerprint(self) -> str:
        return fingerprint("aesthetic 1", *self.weights_sha256().values())

    def weights_sha256(self) -> dict[str, str]:
        return {self.weights: sha256(find_weights(self.weights))}

    def start(self, embed_texts: EmbedTexts, dim: int, made_by: str) -> None:
        state = _read_state(self.weights)
        names = sorted((name for name in state if name.endswith("weight")), key=_natural)
        matrix, bias = np.eye(dim), np.zeros(dim)
        try:
            for name in names:  # composed in double precision: one map in the end
                weight = state[name]
                matrix, bias = weight @ matrix, weight @ bias + state[name.removesuffix("weight") + "bias"]
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{self.weights} is no aesthetic predictor for embeddings of {dim} numbers: {error}"
            ) from None
        if matrix.shape != (1, dim):
            raise ValueError(f"{self.weights} predicts {len(matrix)} numbers, not one")
        self._matrix, self._bias = matrix[0], bias[0]

    def score(self, embeddings: Embeddings) -> Columns:
        scores = (embeddings * self._matrix).sum(axis=1) + self._bias
        low, high = AESTHETIC_RANGE
        wrong = scores[~((scores >= low) & (scores <= high))]
        if len(wrong):
            raise ValueError(
                f"{self.weights} gives an aesthetic score of {wrong[0]:.1f}, where 1 to 10 is meant: "
                "it belongs to another CLIP"
            )
        return {"aesthetic": scores.tolist()}


class OffensiveHead(Head):
    """LAION's detector of offensive pictures on CLIP ViT-L/14 of OpenAI, as ported from AutoKeras to torch.

    Standardised embedding, three layers with ReLU, one with a sigmoid. Column `offensive`: in [0, 1], 1 is
    not safe for work.

    Args:
        weights: file of the state dict: `norm.mean`, `norm.variance`, `linear_1.weight`, ...
    """

    columns = {"offensive": pa.float32()}

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def fingerprint(self) -> str:
        return fingerprint("offensive 1", *self.weights_sha256().values())

    def weights_sha256(self) -> dict[str, str]:
        return {self.weights: sha256(find_weights(self.weights))}

    def start(self, embed_texts: EmbedTexts, dim: int, made_by: str) -> None:
        state = _read_state(self.weights)
        try:
            self._mean = state["norm.mean"].reshape(dim)
            self._deviation = np.sqrt(state["norm.variance"]).reshape(dim)
            self._layers = [(state[f"linear_{n}.weight"], state[f"linear_{n}.bias"]) for n in range(1, 5)]
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{self.weights} detects no offensive pictures by embeddings of {dim} numbers: {error}"
            ) from None

    def score(self, embeddings: Embeddings) -> Columns:
        x = (embeddings - self._mean) / self._deviation
        for number, (weight, bias) in enumerate(self._layers):
            x = x if number == 0 else np.maximum(x, 0)
            x = np.einsum("bi,oi->bo", x, weight) + bias
        return {"offensive": (1 / (1 + np.exp(-x[:, 0]))).tolist()}


class ZeroShot(Head):
    """Which of some concepts a picture shows: that with the nearest prompts (Radford et al. 2021).

    Columns `NAME`: the most probable concept, and `NAME_probability`: its probability among them.

    Args:
        concepts: name -> prompts; their embeddings are averaged. Name what you do not look for as well.
        name: of the columns, so that several can be asked: "concept", "overlay", ...
        scale: of the cosines before the softmax; CLIP learns 100.
    """

    def __init__(self, concepts: dict[str, list[str]], name: str = "concept", scale: float = 100.0) -> None:
        if len(concepts) < 2 or not all(concepts.values()):
            raise ValueError(f"zero-shot {name} needs two concepts or more, each with a prompt or more")
        self.concepts, self.scale = concepts, scale
        self.columns = {name: pa.string(), f"{name}_probability": pa.float32()}

    def fingerprint(self) -> str:
        return fingerprint("zero-shot 1", [*self.concepts.items()], self.name, self.scale)

    def start(self, embed_texts: EmbedTexts, dim: int, made_by: str) -> None:
        means = [_normalised(embed_texts(prompts).mean(axis=0)) for prompts in self.concepts.values()]
        self._names, self._concepts = list(self.concepts), np.stack(means)

    def score(self, embeddings: Embeddings) -> Columns:
        logits = self.scale * np.einsum("bd,cd->bc", embeddings, self._concepts, dtype=np.float64)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        best = shares.argmax(axis=1)
        return {
            self.name: [self._names[index] for index in best],
            f"{self.name}_probability": shares.max(axis=1).tolist(),
        }


class Probe(Head):
    """The probability that a picture shows one thing rather than another, by prompts for both.

    Where there is no detector for your CLIP: offensive pictures, watermarks, drawings, ... Column `NAME`.

    Args:
        name: of the column.
        prompts: for what is looked for.
        others: for what is not.
        scale: see `ZeroShot`.
    """

    def __init__(self, name: str, prompts: list[str], others: list[str], scale: float = 100.0) -> None:
        self._either = ZeroShot({"yes": prompts, "no": others}, name, scale)
        self.columns = {name: pa.float32()}

    def fingerprint(self) -> str:
        return fingerprint("probe 1", self._either.fingerprint())

    def start(self, embed_texts: EmbedTexts, dim: int, made_by: str) -> None:
        self._either.start(embed_texts, dim, made_by)

    def score(self, embeddings: Embeddings) -> Columns:
        answers = self._either.score(embeddings)
        pairs = zip(answers[self.name], answers[f"{self.name}_probability"], strict=True)
        return {self.name: [share if answer == "yes" else 1 - share for answer, share in pairs]}


class LearntHead(Head):
    """What people's labels taught about embeddings: see :mod:`emu_lightning.curation.head`, and `emu head`.

    Column `NAME`: the probability, in [0, 1], of what was labelled true; or the number that was labelled.

    Args:
        name: of the column.
        weights: the file that `emu head` wrote.
    """

    def __init__(self, name: str, weights: str) -> None:
        self.weights, self.columns = weights, {name: pa.float32()}

    def fingerprint(self) -> str:
        return fingerprint("learnt 1", self.name, *self.weights_sha256().values())

    def weights_sha256(self) -> dict[str, str]:
        return {self.weights: sha256(find_weights(self.weights))}

    def start(self, embed_texts: EmbedTexts, dim: int, made_by: str) -> None:
        from safetensors import SafetensorError

        from emu_lightning.curation.head import read_head

        path = find_weights(self.weights)
        try:
            self._head, clip = read_head(path)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path} is no head that `emu head` wrote: {error}") from None
        if clip != made_by:
            raise ValueError(f"{path} was learnt from another CLIP's embeddings: learn it anew by `emu head`")

    def score(self, embeddings: Embeddings) -> Columns:
        return {self.name: self._head(embeddings).tolist()}


class Clip(Scorer):
    """A CLIP of open_clip, once for each picture; heads read its embedding.

    Columns:
        clip_embedding: of the picture, length 1, in half precision. `clip_score` and all heads' columns are
            computed from it as it is stored here, lengthened to 1 again.
        clip_score: cosine with the caption's embedding; missing where there is no caption. Of a caption that
            the network does not read whole, the mean over parts that it does, weighted by their lengths.

    Heads' columns lie in files of their own: a head that is added or changed later passes no picture again.

    Args:
        weights: folder or hub id with `open_clip_config.json`, or a file of weights alone: safetensors, or a
            pickle of tensors only.
        model: open_clip's name of the architecture, where weights are a file. OpenAI's own weights need
            "ViT-L-14-quickgelu".
        heads: what else is read from the embedding.
        batch_size: pictures that pass at once.
        precision: of the network.
        device: where it runs; None is the GPU where there is one.

    Raises:
        ValueError: a file without a model, or a folder with one.
    """

    def __init__(
        self,
        weights: str,
        model: str | None = None,
        heads: Sequence[Head] = (),
        batch_size: int = 32,
        precision: Literal["fp32", "fp16", "bf16"] = "fp32",
        device: str | None = None,
    ) -> None:
        self.weights, self.model, self.heads = weights, model, tuple(heads)
        self.batch_size, self.precision, self.device = batch_size, precision, device
        self._network: Any = None

    @property
    def derived(self) -> Sequence[Derived]:  # type: ignore[override]
        return self.heads

    @property
    def columns(self) -> Mapping[str, pa.DataType]:  # type: ignore[override]  # its width is in the weights
        return {"clip_embedding": pa.list_(pa.float16(), self._dim()), "clip_score": pa.float32()}

    def fingerprint(self) -> str:
        _, checkpoint = self._source()
        files = [checkpoint]
        if self.model is None:  # the configuration and, where it is not open_clip's own, the tokenizer
            suffixes = (".json", ".txt", ".model")
            files += sorted(path for path in checkpoint.parent.iterdir() if path.suffix in suffixes)
        digests = {path.name: sha256(path) for path in files}
        return fingerprint("clip 2", self.model, digests, self.precision)

    def weights_sha256(self) -> dict[str, str]:
        return {self.weights: sha256(self._source()[1])}

    def start(self) -> None:
        import open_clip
        import torch
        from open_clip.transform import PreprocessCfg, image_transform_v2

        architecture, checkpoint = self._source()
        config = self._config()["text_cfg"]
        if self.model is not None and (config.get("hf_tokenizer_name") or "siglip" in architecture.lower()):
            raise ValueError(
                f"{architecture} has a tokenizer of its own, which {self.weights} does not bring: give the "
                f"folder or hub id that holds both, with {OPEN_CLIP_CONFIG}, and no model"
            )
        self._device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            with offline():
                network = open_clip.create_model(
                    architecture,
                    None if self.model is None else str(checkpoint),  # a folder brings its own
                    precision=self.precision,
                    device=self._device,
                    require_pretrained=True,
                    weights_only=True,
                )
                self._tokenizer = open_clip.get_tokenizer(architecture)
        except Exception as error:  # torch, safetensors, json and open_clip each raise their own kinds
            first = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise ValueError(f"{checkpoint} does not hold a {architecture}: {first}") from None
        self._network = network.requires_grad_(False).eval()
        self._dtype = open_clip.get_input_dtype(self.precision)
        self._transform = image_transform_v2(PreprocessCfg(**network.visual.preprocess_cfg), is_train=False)
        for head in self.heads:
            head.start(self._embed_texts, self._dim(), self.fingerprint())

    def score(self, pictures: Sequence[Picture]) -> Columns:
        import torch

        pixels = torch.stack([self._transform(picture.image) for picture in pictures])
        stored = self._embed(self._network.encode_image, pixels.to(self._dtype)).astype(np.float16)
        embeddings = _normalised(stored.astype(np.float32))
        captions = [picture.row.get("caption") for picture in pictures]
        return {"clip_embedding": list(stored), "clip_score": self._clip_scores(embeddings, captions)}

    def _clip_scores(self, embeddings: Embeddings, captions: Sequence[str | None]) -> list[float | None]:
        parts = [self._parts(caption) for caption in captions]
        texts = self._embed_texts([text for texts in parts for text in texts])
        scores: list[float | None] = []
        first = 0
        for embedding, mine in zip(embeddings, parts, strict=True):
            cosines = (texts[first : first + len(mine)] * embedding).sum(axis=1)
            first += len(mine)
            scores.append(float(np.average(cosines, weights=[len(text) for text in mine])) if mine else None)
        return scores

    def _parts(self, caption: str | None) -> list[str]:
        """The caption in parts that the network reads whole; none of nothing."""
        words = (caption or "").split()
        if not words:
            return []
        text = " ".join(words)
        if len(words) == 1 or self._fits(text):
            return [text]
        middle = len(words) // 2
        return [part for half in (words[:middle], words[middle:]) for part in self._parts(" ".join(half))]

    def _fits(self, text: str) -> bool:
        """Whether all of a text's tokens are read: then one more place changes none of them."""
        length = self._network.context_length
        ids = self._tokenizer([text], context_length=length)[0]
        return bool((self._tokenizer([text], context_length=length + 1)[0][:length] == ids).all())

    def _embed_texts(self, texts: Sequence[str]) -> Embeddings:
        import torch

        if not texts:
            return np.empty((0, self._dim()), np.float32)
        ids = torch.as_tensor(self._tokenizer(list(texts), context_length=self._network.context_length))
        return self._embed(self._network.encode_text, ids)

    def _embed(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Embeddings:
        """Embeddings (B, D) of length 1.

        Batches are filled up to one size: sums are then taken in one order, so that a picture's embedding is
        the same whichever others are computed with it.
        """
        import torch

        rows = []
        for batch in inputs.split(self.batch_size):
            missing = self.batch_size - len(batch)
            full = torch.cat([batch, batch[:1].expand(missing, *batch.shape[1:])])
            with torch.inference_mode():
                rows.append(encode(full.to(self._device))[: len(batch)].float().cpu())
        return _normalised(torch.cat(rows).numpy())

    def _source(self) -> tuple[str, Path]:
        """open_clip's name of the architecture, and the file of weights."""
        path = find_checkpoint(self.weights, self.model, OPEN_CLIP_CONFIG, OPEN_CLIP_CHECKPOINTS)
        return self.model or f"local-dir:{path.parent}", path

    def _dim(self) -> int:
        dim: int = self._config()["embed_dim"]
        return dim

    def _config(self) -> Any:
        """open_clip's description of the network, without importing it: that takes seconds."""
        _, checkpoint = self._source()
        if self.model is None:
            return json.loads((checkpoint.parent / OPEN_CLIP_CONFIG).read_text())["model_cfg"]
        spec = importlib.util.find_spec("open_clip")
        assert spec is not None and spec.origin is not None
        path = Path(spec.origin).parent / "model_configs" / f"{self.model}.json"
        if not path.is_file():
            raise ValueError(f"open_clip knows no model {self.model}: open_clip.list_models() names them")
        return json.loads(path.read_text())


def _normalised(embeddings: NDArray[np.float32]) -> Embeddings:
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=-1, keepdims=True)
    return (embeddings / lengths).astype(np.float32)


def _read_state(weights: str) -> dict[str, NDArray[np.float64]]:
    """A state dict from safetensors, or from a pickle of tensors only."""
    import torch

    path = find_weights(weights)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.double().numpy() for name, tensor in state.items()}
    except Exception as error:  # torch and safetensors each raise their own kinds
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(f"{path} holds no tensors that can be read: {first}") from None


def _natural(name: str) -> list[tuple[int, str]]:
    """Orders `layers.2.weight` before `layers.10.weight`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
