"""Where a diffusers pipeline lies, and how its networks are read: safetensors only, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

INDEX_FILE = "model_index.json"  # the pipeline's class and components
SUFFIXES = (".safetensors", ".json", ".txt", ".model")  # what a component is read from
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_VARIANT = re.compile(r"\.([a-z]\w*?)(?:-\d+-of-\d+)?\.safetensors$")  # model.fp16.safetensors
N = TypeVar("N", bound=nn.Module)


def is_pipeline(path: str | Path) -> bool:
    """Whether a path is a pipeline folder, or can only be a hub id: two words, the first no folder here."""
    if Path(path).exists():
        return (Path(path) / INDEX_FILE).is_file()
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))) and not Path(path).parent.exists()


def pipeline_folder(path: str | Path) -> Path:
    """The folder of a pipeline, fetched from the hub where `path` is a hub id and it is not in its cache yet.

    Only what the pipeline consists of is fetched, and of its weights only safetensors.

    Raises:
        FileNotFoundError: no pipeline is there.
        OSError: the hub cannot be reached, or has no such pipeline.
    """
    if not is_pipeline(path):
        raise FileNotFoundError(
            f"no pipeline at {path}: give a diffusers folder with {INDEX_FILE}, or a hub id such as "
            "stabilityai/stable-diffusion-xl-base-1.0"
        )
    if Path(path).exists():
        return Path(path)
    try:
        return Path(DiffusionPipeline.download(str(path), use_safetensors=True))
    except Exception as error:  # the hub's client raises its own kinds, the network others
        cause = " ".join((str(error) or type(error).__name__).split())[:200]
        raise OSError(
            f"nothing is at {path}, and it cannot be fetched from the hub as a pipeline ({cause}): check the "
            "spelling and the network, or give a local folder"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this pipeline folder is not complete")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def load_network(network: type[N], folder: Path, dtype: torch.dtype = torch.float32) -> N:
    """A network of diffusers or transformers from its folder.

    Args:
        network: its class.
        folder: holds config.json and safetensors, whole or in shards; a variant, such as fp16, where there is
            nothing else.
        dtype: of the weights in memory.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights are pickles, truncated, or do not fit config.json.
    """
    read_json(folder / "config.json")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        found = f" but {pickles[0]}, a pickle, which may hold code and is not loaded" if pickles else ""
        raise ValueError(f"{folder} holds no .safetensors{found}: convert its weights to safetensors")
    options = {"variant": variant} if (variant := only_variant(files)) else {}
    try:
        loaded, report = network.from_pretrained(  # type: ignore[attr-defined]  # both libraries have it
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        cause = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{folder} cannot be loaded: truncated, or not what its config.json says ({cause})"
        ) from None
    unfit = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if unfit:
        raise ValueError(f"the weights in {folder} do not fit its config.json, first at {unfit[0]}")
    return loaded


def only_variant(weights: Iterable[str]) -> str | None:
    """The variant, such as fp16, that weights exist in; None where they exist without any."""
    variants = {match[1] if (match := _VARIANT.search(name)) else None for name in weights}
    return None if None in variants or not variants else sorted(filter(None, variants))[0]


def content_hash(folder: Path, components: Iterable[str]) -> str:
    """sha256 over the names and contents of all files of the components that anything is loaded from."""
    digest = hashlib.sha256()
    for name in sorted(components):
        for path in sorted((folder / name).glob("*")):
            if path.suffix in SUFFIXES:
                digest.update(f"{name}/{path.name}".encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def copy_component(source: Path, target: Path) -> bool:
    """Puts a component's files elsewhere, weights as links where the disk allows it; pickles stay behind.

    Where weights exist as a variant only, such as fp16, they lose that name and are found without it.

    Returns:
        False where nothing can be made of the component: it is not there, or its weights are pickles only.
    """
    if not source.is_dir():
        return False
    files = [path for path in source.iterdir() if path.suffix in SUFFIXES]
    weights = [path.name for path in files if path.suffix == ".safetensors"]
    if not weights and any(path.suffix in PICKLES for path in source.iterdir()):
        return False
    variant = only_variant(weights)
    target.mkdir(parents=True, exist_ok=True)
    for path in files:
        plain = target / (path.name.replace(f".{variant}", "") if variant else path.name)
        if variant and path.name.endswith(f".index.{variant}.json"):  # names the files of sharded weights
            plain.write_text(path.read_text(encoding="utf-8").replace(f".{variant}", ""), encoding="utf-8")
        elif path.suffix == ".safetensors":
            link_or_copy(path, plain)
        else:  # may be edited, which must not change the source
            shutil.copyfile(path, plain)
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """One more name for a file's content, or a copy of it where the disk has no such thing."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
