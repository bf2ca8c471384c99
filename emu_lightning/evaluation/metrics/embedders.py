"""Networks that turn pictures, and some also texts, into vectors: what most metrics are computed from."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from emu_lightning.evaluation.generation import to_uint8
from emu_lightning.weights import (
    CHECKPOINTS,
    OPEN_CLIP_CHECKPOINTS,
    OPEN_CLIP_CONFIG,
    VOCABULARY_FILES,
    checkpoint_files,
    find_checkpoint,
    find_in,
    find_weights,
    first_line,
    label,
    offline,
    sha256,
)

Pictures = Tensor | Sequence[Image.Image]  # images (N, 3, H, W) in [-1, 1], or N pictures of any sizes
Embeddings = NDArray[np.float32]  # (N, D)


@dataclass(frozen=True)
class Network:
    """What a number depends on besides the pictures, to be printed beside it.

    Attributes:
        name: library and weights.
        weights_sha256: of the file of weights; of several files, the hash of their hashes.
        preprocess_id: how pictures become the network's input. Resizing alone moves every distance.
    """

    name: str
    weights_sha256: str
    preprocess_id: str


class Embedder(Protocol):
    """Turns pictures and texts into vectors. The attributes of :class:`Network` say which one it is.

    Weights are read at first use, from disk only.

    Raises:
        FileNotFoundError: any use of it, where the weights are not on this machine.
        ValueError: the weights are not what is expected.
    """

    @property
    def name(self) -> str: ...

    @property
    def weights_sha256(self) -> str: ...

    @property
    def preprocess_id(self) -> str: ...

    def embed_images(self, images: Pictures) -> Embeddings:
        """Embeddings (N, D) of N pictures, as the network gives them: not of length 1."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Embeddings:
        """Embeddings (N, D) of N texts in the pictures' space; long ones are cut but keep their end token.

        Raises:
            ValueError: the network reads no texts.
        """
        ...

    def cut(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which of N texts are longer than what the network reads, (N,)."""
        ...


def network_of(embedder: Embedder) -> Network:
    return Network(embedder.name, embedder.weights_sha256, embedder.preprocess_id)


def to_pil(images: Pictures) -> list[Image.Image]:
    """RGB pictures; images are rounded to 8 bits, as they would be in a file."""
    if isinstance(images, Tensor):
        return [Image.fromarray(picture) for picture in to_uint8(images)]
    return [image.convert("RGB") for image in images]


def batches(images: Pictures, size: int) -> Iterator[list[Image.Image]]:
    """RGB pictures, `size` at a time; of a sequence that reads them from disk no more are held."""
    for start in range(0, len(images), size):
        if isinstance(images, Tensor):
            yield to_pil(images[start : start + size])
        else:
            yield to_pil([images[i] for i in range(start, min(start + size, len(images)))])


def default_device(device: str | None) -> str:
    """The GPU where there is one, unless another is named."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


class _Batches(Embedder, ABC):
    """Embeds a batch at a time. Reads no texts, unless a subclass does.

    Args:
        batch_size: pictures or texts that pass at once.
        device: where it runs; None is the GPU where there is one.
    """

    def __init__(self, batch_size: int, device: str | None) -> None:
        self.batch_size, self.device = batch_size, device

    @cached_property
    def _network(self) -> Any:
        return self._load().eval().to(default_device(self.device))

    @abstractmethod
    def _load(self) -> nn.Module:
        """The network, on any device."""

    @abstractmethod
    def _transform(self, picture: Image.Image) -> Tensor:
        """What the network reads of an RGB picture."""

    @abstractmethod
    def _encode_images(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D) of what `_transform` made, stacked."""

    def embed_images(self, images: Pictures) -> Embeddings:
        device, rows = _device_of(self._network), []
        for pictures in batches(images, self.batch_size):
            pixels = torch.stack([self._transform(picture) for picture in pictures])
            with torch.inference_mode():
                rows.append(self._encode_images(pixels.to(device)).float().cpu())
        return _stack(rows)

    def embed_texts(self, texts: Sequence[str]) -> Embeddings:
        raise self._reads_no_texts()

    def cut(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        raise self._reads_no_texts()

    def _reads_no_texts(self) -> ValueError:
        return ValueError(f"{self.name} reads no texts: give a network of pictures and texts, such as a CLIP")


class _Pretrained(_Batches, ABC):
    """An embedder whose weights are files, path or hub id."""

    def __init__(self, weights: str, batch_size: int, device: str | None) -> None:
        super().__init__(batch_size, device)
        self.weights = weights

    @abstractmethod
    def _files(self) -> list[Path]:
        """The files of weights."""

    @abstractmethod
    def _read(self) -> nn.Module:
        """The network of these files, and whatever its inputs are made with."""

    @abstractmethod
    def _preprocess(self) -> dict[str, Any]:
        """What `_transform` does; the network has been read."""

    @property
    def weights_sha256(self) -> str:
        return sha256(*self._files())

    @property
    def preprocess_id(self) -> str:
        _ = self._network
        return json.dumps(self._preprocess(), sort_keys=True, default=str)

    def _load(self) -> nn.Module:
        files = self._files()
        try:
            with offline():
                return self._read()
        except FileNotFoundError:
            raise
        except Exception as error:  # torch, safetensors, json and each library raise their own kinds
            raise ValueError(
                f"{files[0]} does not hold a network for {self.name}: {first_line(error)}"
            ) from None


class _PretrainedReader(_Pretrained, ABC):
    """An embedder that reads texts, too."""

    @abstractmethod
    def _length(self) -> int:
        """Tokens that the network reads, start and end included."""

    @abstractmethod
    def _tokenize(self, texts: list[str], length: int) -> Tensor:
        """Ids (B, length), cut or padded; a cut text keeps its end token."""

    @abstractmethod
    def _encode_texts(self, ids: Tensor) -> Tensor:
        """Embeddings (B, D) of ids (B, L)."""

    def embed_texts(self, texts: Sequence[str]) -> Embeddings:
        device, rows = _device_of(self._network), []
        for ids in self._tokenize(list(texts), self._length()).split(self.batch_size):
            with torch.inference_mode():
                rows.append(self._encode_texts(ids.to(device)).float().cpu())
        return _stack(rows)

    def cut(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        _ = self._network
        length = self._length()  # one more place changes none of the ids of a text that is read whole
        ids, longer = (self._tokenize(list(texts), n) for n in (length, length + 1))
        return (ids != longer[:, :length]).any(dim=1).numpy()


class OpenClipEmbedder(_PretrainedReader):
    """A CLIP or SigLIP of open_clip.

    Args:
        weights: folder or hub id with `open_clip_config.json`, or a file of weights alone: safetensors, or a
            pickle of tensors only.
        model: open_clip's name of the architecture, where weights are a file. OpenAI's own weights need
            "ViT-L-14-quickgelu".
        resize_mode: how pictures that are not square become so: cut to the middle square (shortest), framed
            in black (longest), or distorted (squash). None is what the weights say, mostly shortest.
        batch_size: pictures or texts that pass at once.
        device: where it runs; None is the GPU where there is one.
    """

    def __init__(
        self,
        weights: str,
        model: str | None = None,
        resize_mode: Literal["shortest", "longest", "squash"] | None = None,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        super().__init__(weights, batch_size, device)
        self.model, self.resize_mode = model, resize_mode

    @property
    def name(self) -> str:
        return f"open_clip {self.model or label(self.weights)}"

    def _files(self) -> list[Path]:
        return [find_checkpoint(self.weights, self.model, OPEN_CLIP_CONFIG, OPEN_CLIP_CHECKPOINTS)]

    def _read(self) -> nn.Module:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        (checkpoint,) = self._files()
        architecture = self.model or f"local-dir:{checkpoint.parent}"
        network = open_clip.create_model(
            architecture,
            None if self.model is None else str(checkpoint),  # a folder brings its own
            require_pretrained=True,
            weights_only=True,
        )
        self._tokenizer = open_clip.get_tokenizer(architecture)
        self._settings = dict(network.visual.preprocess_cfg)
        if self.resize_mode is not None:
            self._settings["resize_mode"] = self.resize_mode
        self._to_pixels = image_transform_v2(PreprocessCfg(**self._settings), is_train=False)
        return network

    def _transform(self, picture: Image.Image) -> Tensor:
        return self._to_pixels(picture)

    def _preprocess(self) -> dict[str, Any]:
        return {"by": "open_clip", **self._settings}

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return self._network.encode_image(pixels)

    def _length(self) -> int:
        return int(self._network.context_length)

    def _tokenize(self, texts: list[str], length: int) -> Tensor:
        return torch.as_tensor(self._tokenizer(texts, context_length=length))

    def _encode_texts(self, ids: Tensor) -> Tensor:
        return self._network.encode_text(ids)


class TransformersVision(_Pretrained):
    """A network of pictures of transformers, such as DINOv2; embeddings are its pooled output.

    DINOv2's is the class token behind the last norm, as the Fréchet distance of Stein et al. 2023 takes it.

    Args:
        weights: folder or hub id, such as "facebook/dinov2-large".
        processor: folder or hub id of the processor, where it is not with the weights.
        batch_size: pictures or texts that pass at once.
        device: where it runs; None is the GPU where there is one.
    """

    def __init__(
        self, weights: str, processor: str | None = None, batch_size: int = 32, device: str | None = None
    ) -> None:
        super().__init__(weights, batch_size, device)
        self.processor = processor or weights

    @property
    def name(self) -> str:
        return f"transformers {label(self.weights)}"

    def _files(self) -> list[Path]:
        return checkpoint_files(find_weights(self.weights))

    def _read(self) -> nn.Module:
        from transformers import AutoImageProcessor, AutoModel

        folder = find_weights(self.processor)
        self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        return load_transformers(AutoModel, find_weights(self.weights))

    def _transform(self, picture: Image.Image) -> Tensor:
        return self._processor(images=picture, return_tensors="pt").pixel_values[0]

    def _preprocess(self) -> dict[str, Any]:
        import transformers

        settings = self._processor.to_dict()
        return {"by": f"transformers {transformers.__version__}", **settings}

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return self._network(pixel_values=pixels).pooler_output


class TransformersClip(TransformersVision, _PretrainedReader):
    """A CLIP or SigLIP of transformers; embeddings are the projected ones.

    Args:
        weights: folder or hub id, such as "openai/clip-vit-large-patch14".
        processor: folder or hub id of tokenizer and processor, where they are not with the weights.
        batch_size: pictures or texts that pass at once.
        device: where it runs; None is the GPU where there is one.
    """

    @property
    def logit_scale(self) -> float:
        """What the network multiplies cosines with; CLIP's is at most 100."""
        return float(self._network.logit_scale.detach().exp())

    def _read(self) -> nn.Module:
        from transformers import AutoTokenizer

        folder = find_weights(self.processor)
        find_in(folder, VOCABULARY_FILES, "tokenizer")  # else to a made-up one every word is unknown
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return super()._read()

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return self._network.get_image_features(pixel_values=pixels).pooler_output

    def _length(self) -> int:
        return int(self._network.config.text_config.max_position_embeddings)

    def _tokenize(self, texts: list[str], length: int) -> Tensor:
        return self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids

    def _encode_texts(self, ids: Tensor) -> Tensor:
        # No mask: CLIP is causal, no token sees the padding behind it; SigLIP learnt with its padding.
        return self._network.get_text_features(input_ids=ids).pooler_output


class TimmEmbedder(_Pretrained):
    """A network of pictures of timm, without its classifier; embeddings are what the classifier reads.

    Args:
        weights: folder or hub id with `config.json` as timm writes it, such as
            "timm/vit_large_patch14_dinov2.lvd142m"; or a file of weights alone: safetensors, or a pickle of
            tensors only.
        model: timm's name of the architecture, where weights are a file.
        batch_size: pictures or texts that pass at once.
        device: where it runs; None is the GPU where there is one.
    """

    def __init__(
        self, weights: str, model: str | None = None, batch_size: int = 32, device: str | None = None
    ) -> None:
        super().__init__(weights, batch_size, device)
        self.model = model

    @property
    def name(self) -> str:
        return f"timm {self.model or label(self.weights)}"

    def _files(self) -> list[Path]:
        return [find_checkpoint(self.weights, self.model, "config.json", CHECKPOINTS)]

    def _read(self) -> nn.Module:
        import timm

        (checkpoint,) = self._files()
        network = timm.create_model(
            self.model or f"local-dir:{checkpoint.parent}",
            pretrained=True,
            pretrained_cfg_overlay=None if self.model is None else {"file": str(checkpoint)},
        )
        network.reset_classifier(0)
        self._settings = timm.data.resolve_data_config(model=network)
        self._to_pixels = timm.data.create_transform(**self._settings)
        return network

    def _transform(self, picture: Image.Image) -> Tensor:
        return self._to_pixels(picture)

    def _preprocess(self) -> dict[str, Any]:
        return {"by": "timm", **self._settings}

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return self._network(pixels)


class ModuleEmbedder(_Batches):
    """Any module that makes one vector of a picture, as torchmetrics' Fréchet distance takes it.

    Args:
        module: uint8 images (B, 3, H, W) to features (B, D); it resizes them itself where it has to. It is
            put into evaluation mode.
        name: what reports call it.
        batch_size: pictures that pass at once; those of one batch are of one size.
        device: where it runs; None is the GPU where there is one.
    """

    def __init__(self, module: nn.Module, name: str, batch_size: int = 32, device: str | None = None) -> None:
        super().__init__(batch_size, device)
        self.module, self._name = module, name

    @property
    def name(self) -> str:
        return self._name

    @property
    def weights_sha256(self) -> str:
        """Of all parameters and buffers by their names, those that no state dict holds as well."""
        digest = hashlib.sha256()
        for name, tensor in _tensors(self.module):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def preprocess_id(self) -> str:
        return "the module's own"

    def _load(self) -> nn.Module:
        return self.module

    def _transform(self, picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return self._network(pixels)


def load_transformers(auto_class: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A network of transformers from a folder, all of whose weights have to be there.

    Raises:
        ValueError: some are missing; transformers would make them up.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list weights of a head that is left out
    try:
        network, report = auto_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
    return network


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _device_of(network: nn.Module) -> torch.device:
    """Of its first tensor; a module that holds none computes anywhere."""
    return next((tensor.device for _, tensor in _tensors(network)), torch.device("cpu"))


def _stack(rows: list[Tensor]) -> Embeddings:
    if not rows:
        raise ValueError("there is nothing to embed: give a picture or text at least")
    embeddings: Embeddings = torch.cat(rows).numpy()
    return embeddings
