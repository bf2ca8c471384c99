"""Frozen text networks, and how generators read them: one alone, or Emu's CLIP and T5."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from emu_lightning.models.frozen import Frozen
from emu_lightning.models.text import FrozenTextEncoder, Text, token_ids

Precision = Literal["bfloat16", "float32"]  # not float16: T5 overflows in it
SNAPSHOT_FILES = ["*.safetensors", "*.json", "*.txt", "*.model"]  # of a hub repository: no pickles
VOCABULARY_FILES = ["tokenizer.json", "spiece.model", "vocab.json"]


class TextNetwork(nn.Module, ConfigMixin, ABC):
    """A frozen network from texts to one embedding a token, loaded at first use.

    Its files are not needed to build it, nor to build a generator that holds it.

    Args:
        dim: D, the width of its embeddings.
        length: L, tokens a text, start and end included; shorter ones are padded, longer ones are cut but
            keep their end.
        precision: of its weights and of what it computes, whatever the training around it has.
        offload: keep it in host memory, where it also computes.
    """

    config_name = "config.json"

    def __init__(self, dim: int, length: int, precision: Precision, offload: bool) -> None:
        super().__init__()
        self.dim, self.length, self.precision = dim, length, precision
        self.frozen = Frozen(self._load_precisely, offload)

    @abstractmethod
    def load(self) -> nn.Module:
        """The network from its files.

        Raises:
            FileNotFoundError, ValueError: they are missing, or not what is expected.
        """

    @abstractmethod
    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts to ids (B, L) int64 and mask (B, L) bool, False at the padding, on the CPU."""

    @abstractmethod
    def run(self, network: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The network on ids (B, L): "sequence" (B, L, D) and, where it has one, "pooled" (B, D)."""

    @abstractmethod
    def files(self) -> list[Path]:
        """All files that the embeddings depend on."""

    @torch.no_grad()
    def embed(self, texts: list[str]) -> dict[str, Tensor]:
        """What :meth:`run` gives for B texts, and their "mask".

        Raises:
            ValueError: the network is not `dim` wide.
        """
        network = self.frozen.network
        device = next(network.parameters()).device
        ids, mask = (tensor.to(device) for tensor in self.tokenize(texts))
        with torch.autocast(device.type, enabled=False):  # else a cache would hold other embeddings
            embeddings = {**self.run(network, ids, mask), "mask": mask}
        width = embeddings["sequence"].shape[-1]
        if width != self.dim:
            raise ValueError(f"{type(self).__name__} has dim={self.dim}, but its network is {width} wide")
        return embeddings

    def fingerprint(self) -> str:
        """Hash of the files' contents, wherever they lie, and of the settings that change embeddings."""
        settings = [type(self).__name__, self.dim, self.length, self.precision]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for path in sorted(self.files(), key=lambda path: path.name):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _load_precisely(self) -> nn.Module:
        return self.load().to(getattr(torch, self.precision))


class HubText(TextNetwork, ABC):
    """A text network of transformers: its folder, or its id on the Hugging Face hub.

    Args:
        path: folder or hub id; weights as safetensors.
        tokenizer: folder or hub id of the tokenizer, where it is not with the weights.
    """

    def __init__(
        self, path: str, tokenizer: str | None, dim: int, length: int, precision: Precision, offload: bool
    ) -> None:
        super().__init__(dim, length, precision, offload)
        self.path, self.tokenizer_path = path, tokenizer or path
        self._tokenizer: Any = None

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        if self._tokenizer is None:
            from transformers import AutoTokenizer  # imported late: seconds

            folder = snapshot(self.tokenizer_path)
            if not any((folder / name).is_file() for name in VOCABULARY_FILES):
                # transformers would make a tokenizer to which every word is unknown
                raise ValueError(
                    f"{folder} holds no tokenizer ({' or '.join(VOCABULARY_FILES)}): set tokenizer"
                )
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokens = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return tokens.input_ids, tokens.attention_mask.bool()

    def files(self) -> list[Path]:
        folders = dict.fromkeys([snapshot(self.path), snapshot(self.tokenizer_path)])  # once, in this order
        return [file for folder in folders for pattern in SNAPSHOT_FILES for file in folder.glob(pattern)]

    def _from_pretrained(self, network_class: Any) -> nn.Module:
        folder = snapshot(self.path)
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"{folder} holds no *.safetensors: convert its weights, as docs/emu_at_full_size.md shows"
            )
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would list the vision tower or the decoder that is left out
        try:
            network, report = network_class.from_pretrained(
                folder,
                dtype=getattr(torch, self.precision),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # transformers, safetensors and json each raise their own kinds
            raise ValueError(
                f"{folder} does not hold a {network_class.__name__}: {_first_line(error)}"
            ) from None
        finally:
            logging.set_verbosity(verbosity)
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ValueError(
                f"{folder} does not hold a {network_class.__name__}: {len(missing)} weights are missing, "
                f"such as {missing[0]}"
            )
        return network


class ClipText(HubText):
    """CLIP's text tower; pooled is the end token's embedding, not projected, as FLUX takes it.

    Args:
        path, tokenizer, dim, precision, offload: see `HubText` and `TextNetwork`; the defaults are ViT-L/14.
    """

    @register_to_config
    def __init__(
        self,
        path: str = "openai/clip-vit-large-patch14",
        tokenizer: str | None = None,
        dim: int = 768,
        precision: Precision = "bfloat16",
        offload: bool = False,
    ) -> None:
        super().__init__(path, tokenizer, dim, 77, precision, offload)  # CLIP's positions end there

    def load(self) -> nn.Module:
        from transformers import CLIPTextModel

        return self._from_pretrained(CLIPTextModel)

    def run(self, network: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        output = network(input_ids=ids)  # causal: no token sees the padding behind it
        return {"sequence": output.last_hidden_state, "pooled": output.pooler_output}


class OpenClipText(TextNetwork):
    """CLIP's text tower from an open_clip checkpoint, read as `ClipText` reads it.

    Args:
        name: open_clip's name of the architecture. OpenAI's own weights need "ViT-L-14-quickgelu".
        checkpoint: file of its weights (safetensors, or a pickle of tensors only).
        dim, precision, offload: see `TextNetwork`.
    """

    @register_to_config
    def __init__(
        self,
        name: str,
        checkpoint: str,
        dim: int = 768,
        precision: Precision = "bfloat16",
        offload: bool = False,
    ) -> None:
        super().__init__(dim, 77, precision, offload)
        self.name, self.checkpoint = name, checkpoint

    def load(self) -> nn.Module:
        import open_clip  # imported late: seconds

        (checkpoint,) = self.files()
        try:
            network = open_clip.create_model(self.name, pretrained=str(checkpoint), weights_only=True)
        except Exception as error:  # torch, safetensors and open_clip each raise their own kinds
            raise ValueError(f"{checkpoint} does not hold a {self.name}: {_first_line(error)}") from None
        del network.visual
        return network

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [token_ids(text, self.length) for text in texts]
        ids = torch.tensor([[*row, *[0] * (self.length - len(row))] for row in rows])
        return ids, torch.tensor([[n < len(row) for n in range(self.length)] for row in rows])

    def run(self, network: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = network.token_embedding(ids) + network.positional_embedding
        sequence = network.ln_final(network.transformer(x, attn_mask=network.attn_mask))
        return {"sequence": sequence, "pooled": sequence[torch.arange(len(ids)), mask.sum(1) - 1]}

    def files(self) -> list[Path]:
        path = Path(self.checkpoint).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint of {self.name} at {path}: name the file of its weights")
        return [path]


class T5Text(HubText):
    """T5's encoder.

    Args:
        path, tokenizer, dim, length, precision, offload: see `HubText` and `TextNetwork`; the defaults are
            T5-XXL of version 1.1, its encoder alone. The paper gives no length.
    """

    @register_to_config
    def __init__(
        self,
        path: str = "mcmonkey/google_t5-v1_1-xxl_encoderonly",  # google's own repository has pickles only
        tokenizer: str | None = None,
        dim: int = 4096,
        length: int = 128,
        precision: Precision = "bfloat16",
        offload: bool = False,
    ) -> None:
        super().__init__(path, tokenizer, dim, length, precision, offload)

    def load(self) -> nn.Module:
        from transformers import T5EncoderModel

        return self._from_pretrained(T5EncoderModel)

    def run(self, network: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"sequence": network(input_ids=ids, attention_mask=mask).last_hidden_state}


class SingleTextEncoder(FrozenTextEncoder, ConfigMixin):
    """One frozen network, projected to the width that the generator reads: T5 for Imagen and for Muse.

    Only the projection is trained, saved and averaged over. Pooled is the mean over the text's tokens.

    Args:
        network: the frozen one.
        dim: D, the width of the sequence and of the pooled text.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, network: TextNetwork, dim: int = 1024) -> None:
        super().__init__()
        self.network = network
        self.sequence_dim = self.pooled_dim = dim
        self.projection = nn.Linear(network.dim, dim)

    def embed(self, texts: list[str]) -> dict[str, Tensor]:
        """What the network makes of B texts: "sequence" (B, L, D) with its own D, "mask" (B, L) bool."""
        embeddings = self.network.embed(texts)
        return {"sequence": embeddings["sequence"], "mask": embeddings["mask"]}

    def read(self, embeddings: dict[str, Tensor]) -> Text:
        weight = self.projection.weight
        mask = embeddings["mask"].to(weight.device)
        sequence = self.projection(embeddings["sequence"].to(weight)) * mask[..., None]
        pooled = sequence.sum(1) / mask.sum(1, keepdim=True)  # "" has its end token
        return Text(sequence, mask, pooled)

    def fingerprint(self) -> str:
        return self.network.fingerprint()


class JointTextEncoder(FrozenTextEncoder, ConfigMixin):
    """CLIP and T5, each projected to one width and joined along the sequence; pooled is CLIP's.

    Emu (section 3.1) conditions on both and does not say how they are combined: this is a choice. Only the
    two projections are trained, saved and averaged over; a generator's folder holds no T5.

    Args:
        clip: the first part of the sequence, and the pooled text.
        t5: the second part.
        dim: D, the width of the joint sequence; the denoiser's `sequence_dim`.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, clip: TextNetwork, t5: TextNetwork, dim: int = 2048) -> None:
        super().__init__()
        self.clip, self.t5 = clip, t5
        self.sequence_dim, self.pooled_dim = dim, clip.dim
        self.clip_projection = nn.Linear(clip.dim, dim)
        self.t5_projection = nn.Linear(t5.dim, dim)

    def embed(self, texts: list[str]) -> dict[str, Tensor]:
        """What each of the two makes of B texts.

        Returns:
            "clip" and "t5" (B, L, D) with L and D of each, "clip_mask" and "t5_mask" (B, L) bool,
            "clip_pooled" (B, D).
        """
        clip, t5 = self.clip.embed(texts), self.t5.embed(texts)
        return {
            "clip": clip["sequence"],
            "clip_mask": clip["mask"],
            "clip_pooled": clip["pooled"],
            "t5": t5["sequence"],
            "t5_mask": t5["mask"],
        }

    def read(self, embeddings: dict[str, Tensor]) -> Text:
        weight = self.clip_projection.weight
        mask = torch.cat([embeddings["clip_mask"], embeddings["t5_mask"]], 1).to(weight.device)
        clip, t5, pooled = (embeddings[name].to(weight) for name in ("clip", "t5", "clip_pooled"))
        sequence = torch.cat([self.clip_projection(clip), self.t5_projection(t5)], 1)
        return Text(sequence * mask[..., None], mask, pooled)

    def fingerprint(self) -> str:
        return hashlib.sha256((self.clip.fingerprint() + self.t5.fingerprint()).encode()).hexdigest()


def share_networks(module: nn.Module) -> None:
    """Text networks of equal settings in `module` hold one frozen network between them."""
    first: dict[str, Frozen[nn.Module]] = {}
    for each in module.modules():
        if isinstance(each, TextNetwork):
            each.frozen = first.setdefault(f"{type(each)} {each.config}", each.frozen)


def snapshot(path: str) -> Path:
    """A local folder, or the local copy of a hub repository, fetched where it is not there yet.

    Raises:
        FileNotFoundError: it is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(path, allow_patterns=SNAPSHOT_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{path} is no folder, and no repository of the Hugging Face hub that can be fetched "
            f"({_first_line(error)}): give the folder that holds it"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
