"""Which concept a picture shows, by a classifier of timm: the alternative to asking CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from emu_lightning.curation.scorer import Columns, Picture, Scorer, fingerprint
from emu_lightning.weights import find_in, find_weights, offline, sha256

CONFIG = "config.json"
CHECKPOINTS = ["model.safetensors", "pytorch_model.bin"]
OTHER = "other"


class TimmConcept(Scorer):
    """A classifier whose classes are gathered into concepts.

    Columns `concept`: that whose classes have most probability together, or "other" for classes of none; and
    `concept_probability`: their sum.

    Args:
        weights: folder or hub id with `config.json` as timm writes it, such as "timm/resnet50.a1_in1k"; or a
            file of weights alone: safetensors, or a pickle of tensors only.
        concepts: name -> the numbers of its classes, such as "0-397, 979". For ImageNet, animals are 0-397.
        model: timm's name of the architecture, where weights are a file.
        batch_size: pictures that pass at once.
        device: where it runs; None is the GPU where there is one.

    Raises:
        ValueError: a concept's classes are none, or another concept's.
    """

    columns = {"concept": pa.string(), "concept_probability": pa.float32()}

    def __init__(
        self,
        weights: str,
        concepts: dict[str, str],
        model: str | None = None,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        self.weights, self.concepts, self.model = weights, concepts, model
        self.batch_size, self.device = batch_size, device
        self._classes = {name: parse_classes(text, name) for name, text in concepts.items()}
        seen: dict[int, str] = {}
        for name, classes in self._classes.items():
            for number in classes:
                if seen.setdefault(number, name) != name:
                    raise ValueError(f"class {number} belongs to two concepts, {seen[number]} and {name}")

    def fingerprint(self) -> str:
        return fingerprint("timm concept 1", self.model, self._digests(), [*self._classes.items()])

    def weights_sha256(self) -> dict[str, str]:
        """Of each file of weights, by the name that the configuration gives it."""
        return {self.weights: self._digests()[-1]}

    def _digests(self) -> list[str]:
        return [sha256(path) for path in self._files() if path is not None]

    def start(self) -> None:
        import timm
        import torch

        config, checkpoint = self._files()
        try:
            with offline():
                if config is not None:
                    network = timm.create_model(f"local-dir:{config.parent}", pretrained=True)
                else:
                    overlay = {"file": str(checkpoint)}
                    network = timm.create_model(self.model, pretrained=True, pretrained_cfg_overlay=overlay)
        except Exception as error:  # torch, safetensors, json and timm each raise their own kinds
            first = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise ValueError(f"{checkpoint} does not hold a classifier of timm: {first}") from None
        for name, classes in self._classes.items():
            if max(classes) >= network.num_classes:
                raise ValueError(
                    f"concept {name} has class {max(classes)}, but {self.weights} knows 0 to "
                    f"{network.num_classes - 1}"
                )
        self._device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._network: Any = network.requires_grad_(False).eval().to(self._device)
        self._transform = timm.data.create_transform(**timm.data.resolve_data_config(model=network))

    def score(self, pictures: Sequence[Picture]) -> Columns:
        import torch

        pixels = torch.stack([self._transform(picture.image) for picture in pictures])
        # Filled up to one size: a picture's scores are then the same whichever others it is computed with.
        missing = max(0, self.batch_size - len(pixels))
        full = torch.cat([pixels, pixels[:1].expand(missing, *pixels.shape[1:])])
        with torch.inference_mode():
            logits = self._network(full.to(self._device))[: len(pictures)]
        classes = logits.double().softmax(dim=1).cpu().numpy()
        sums = {name: classes[:, numbers].sum(axis=1) for name, numbers in self._classes.items()}
        sums[OTHER] = 1 - sum(sums.values())
        names, shares = list(sums), np.stack(list(sums.values()), axis=1)
        best = shares.argmax(axis=1)
        return {
            "concept": [names[index] for index in best],
            "concept_probability": shares.max(axis=1).tolist(),
        }

    def _files(self) -> tuple[Any, Any]:
        """The configuration, None where weights are a file; and the file of weights."""
        path = find_weights(self.weights)
        if path.is_file():
            if self.model is None:
                raise ValueError(f"{self.weights} is a file of weights: name the architecture by model")
            return None, path
        if self.model is not None:
            raise ValueError(f"{self.weights} brings its architecture, in {CONFIG}: leave out model")
        return find_in(path, [CONFIG]), find_in(path, CHECKPOINTS)


def parse_classes(text: str, concept: str) -> list[int]:
    """The numbers of "0-2, 7".

    Raises:
        ValueError: there are none, or the text is no such list.
    """
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            numbers += range(int(first), int(last if dash else first) + 1)
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f'concept {concept}: "{text}" are no classes; write them as "0-397, 979"')
    return numbers
