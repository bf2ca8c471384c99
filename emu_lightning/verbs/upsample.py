"""`emu upsample`: pictures of a manifest that are too small go up through super-resolution stages.

    emu upsample --manifest chosen.parquet --model CASCADE --size 1024 --out DIR

The originals stay as they are. What is made lies in DIR/pictures, and DIR/manifest.parquet names it in their
place. The name of a picture is a hash of all that it depends on, so that a killed job goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jsonargparse.typing import PositiveInt
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from emu_lightning.data.manifest import COLUMNS, Manifest, read_table, write_table
from emu_lightning.data.pictures import to_tensor
from emu_lightning.data.source import BrokenImage
from emu_lightning.data.storage import find_files
from emu_lightning.evaluation.generation import to_uint8, write_png
from emu_lightning.modules import CascadeModule, Upsampler, load_learner, weights_sha256
from emu_lightning.processes.seeding import next_seed
from emu_lightning.verbs.arguments import call
from emu_lightning.verbs.stages import torch_device

Size = tuple[int, int]  # height and width in pixels
NUM_SHOWN = 10  # of the pictures that could not be raised
REPLACED = ("uri", "sha256", "height", "width")
PROVENANCE = {  # columns of the result, null in the rows of pictures that are as they were
    **{f"original_{name}": COLUMNS[name] for name in REPLACED},
    "upsampler_sha256": pa.large_string(),  # of the weights of each --model
    "upsampler_settings": pa.large_string(),  # JSON: size, sampling, the stages' descriptions
    "upsampler_seed": pa.int64(),  # of this picture
    "upsampler_error": pa.large_string(),  # why a picture is still too small
}


def upsample(
    manifest: str,
    model: list[str] | str,
    out: str,
    size: PositiveInt = 1024,
    caption: str = "caption",
    keep: str | None = None,
    seed: int = 0,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    overrides: dict[str, Any] | None = None,
    batch_size: PositiveInt = 4,
    device: str = "auto",
    cache_dir: str = "runs/cache",
) -> None:
    """Raises pictures whose shorter side is under `size`; what has been made is not made again.

    Args:
        manifest: Parquet file, path or URL.
        model: upsampler, several in the order in which pictures grow, or a cascade, of which those are taken.
        out: folder for the raised pictures and the manifest that names them.
        size: of the shorter side, pixels; the other follows.
        caption: name of the column of captions, which the stages read.
        keep: name of a boolean column; only pictures where it is true are raised. All when left out.
        seed: of the whole job; a picture's own follows from it and from the picture.
        num_steps: sampling steps of each stage; its own default when left out.
        guidance_scale: 1.0 is off; each stage's own default when left out.
        negative_prompt: what guidance moves away from, in place of no text.
        overrides: arguments of the model to change, such as '{augmentation_level: 0.2}'.
        batch_size: pictures of size x size pixels raised at once; fewer where they are longer.
        device: auto, cpu, cuda, cuda:1, mps.
        cache_dir: for indices of shards and for copies of remote ones.
    """
    folder, models = Path(out), [model] if isinstance(model, str) else model
    result = folder / "manifest.parquet"
    table, source = _read(manifest, keep, caption, cache_dir, result)
    target = torch_device(device)
    stages = [stage.to(target).eval() for path in models for stage in load_stages(path, overrides)]
    sampling = {"num_steps": num_steps, "guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
    settings = {"size": size, **sampling, "stages": [stage.describe() for stage in stages]}
    upsampler = {
        "upsampler_sha256": " ".join(map(weights_sha256, models)),
        "upsampler_settings": json.dumps(settings, sort_keys=True),
    }
    tasks, errors = _plan(source, size, [stage.factor for stage in stages], seed)
    paths = {
        task: folder / "pictures" / f"{_digest(*upsampler.values(), task.seed, task.sha256, task.text)}.png"
        for task in tasks
    }
    errors |= _make(source, paths, stages, sampling, batch_size * size**2)
    changes: dict[int, dict[str, Any]] = {index: {"upsampler_error": why} for index, why in errors.items()}
    for task, path in paths.items():
        if task.index not in errors:
            changes[task.index] = {
                "uri": path.relative_to(folder).as_posix(),
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "height": task.way[-1][0],
                "width": task.way[-1][1],
                "upsampler_seed": task.seed,
                **upsampler,
            }
    rows = np.arange(len(table)) if keep is None else np.flatnonzero(table[keep].fill_null(False))
    write_table(_changed(table, {int(rows[index]): change for index, change in changes.items()}), result)
    for index, why in list(errors.items())[:NUM_SHOWN]:
        print(f"not raised: {source.uid(index)}: {why}")
    print(f"{len(changes) - len(errors)} pictures raised, {len(errors)} could not be: {result}")


def _read(
    manifest: str, keep: str | None, caption: str, cache_dir: str, result: Path
) -> tuple[pa.Table, Manifest]:
    """The whole table, and those of its pictures that may be raised."""
    files = find_files(manifest)
    if len(files) > 1:
        raise ValueError(f"--manifest {manifest} names {len(files)} files: give one")
    source = Manifest(manifest, keep, caption, verify=True, cache_dir=cache_dir)
    table = read_table(files[0])
    if "original_uri" in table.column_names:
        raise ValueError(f"{manifest} was made by `emu upsample`: give the manifest of the originals")
    if result.is_file() and "original_uri" not in pq.read_schema(result).names:
        raise ValueError(f"{result} is another manifest, which would be lost: name another --out")
    return table, source


def load_stages(path: str, overrides: Mapping[str, Any] | None = None) -> list[Upsampler]:
    """The super-resolution stages of an upsampler or of a cascade, in the order in which pictures grow.

    Raises:
        FileNotFoundError, ValueError: as :func:`~emu_lightning.modules.load_learner`; it has no stages, or
            one that takes pictures of one size only.
    """
    learner = load_learner(path, overrides)
    if isinstance(learner, CascadeModule):
        stages = list(learner.upsamplers)
    elif isinstance(learner, Upsampler):
        stages = [learner]
    else:
        raise ValueError(f"{path} draws from text alone: name an upsampler, or a cascade that has some")
    for stage in stages:
        if stage.low_size is not None:
            raise ValueError(
                f"{path} takes pictures of {stage.low_size}x{stage.low_size} pixels and no others: "
                "name an upsampler that takes any, as those of pixel diffusion do"
            )
    return stages


def way_up(size: Size, target: int, factors: Sequence[int]) -> tuple[Size, ...]:
    """What a picture becomes on its way to `target`: a size for each of the last stages, as few as reach it.

    The last stage ends at the target, and each one before it where the next one's factor begins.

    Args:
        size: of the picture; its shorter side is under `target`.
        target: shorter side of the result.
        factors: of the stages, in the order in which pictures grow.

    Returns:
        One size for each stage that is needed; none where all of them together do not reach the target.
    """
    sides, shorter = [target], min(size)
    for factor in reversed(factors):
        if shorter * factor >= sides[0]:
            return tuple((round(size[0] * side / shorter), round(size[1] * side / shorter)) for side in sides)
        sides.insert(0, -(-sides[0] // factor))
    return ()


def raise_images(
    stage: Upsampler,
    images: Tensor,
    size: Size,
    prompts: Sequence[str],
    seeds: Sequence[int],
    **sampling: Any,
) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] of smaller ones (B, 3, h, w), by one stage.

    A network takes sides that are multiples of some number. So the small images are continued by reflection
    at their lower and right edge, and the result is cut back. Where the ratio of the sizes is not whole, the
    cut may fall within a small pixel, so that a part of one is lost at the edge.

    Args:
        size: H and W.
        sampling: of :meth:`~emu_lightning.modules.Upsampler.upsample`.

    Raises:
        ValueError: H or W is smaller than the number.
    """
    height, width = (-(-side // stage.side_multiple) * stage.side_multiple for side in size)
    below = height * images.shape[2] // size[0] - images.shape[2]
    beside = width * images.shape[3] // size[1] - images.shape[3]
    if below >= images.shape[2] or beside >= images.shape[3]:
        raise ValueError(
            f"a stage that makes sides of {stage.side_multiple} pixels and more cannot make pictures of "
            f"{size[0]}x{size[1]}: raise --size, or leave the stage out"
        )
    continued = pad(images, (0, beside, 0, below), mode="reflect")
    made = stage.upsample(continued, prompts, seeds, size=(height, width), **sampling)
    return made[:, :, : size[0], : size[1]]


@dataclass(frozen=True)
class Task:
    """A picture to raise.

    Attributes:
        index: in the source.
        sha256: of its bytes.
        text: its caption.
        size: of it.
        way: see :func:`way_up`.
        seed: of the first stage's noise; each further stage has the :func:`next_seed`.
    """

    index: int
    sha256: str
    text: str
    size: Size
    way: tuple[Size, ...]
    seed: int


def _plan(
    source: Manifest, target: int, factors: Sequence[int], seed: int
) -> tuple[list[Task], dict[int, str]]:
    """What is too small, in order; and by index why some of it cannot be raised."""
    tasks: list[Task] = []
    errors: dict[int, str] = {}
    sizes = source.sizes()
    for index in np.flatnonzero(sizes.min(1) < target).tolist():
        height, width = sizes[index].tolist()
        way = way_up((height, width), target, factors)
        if way:
            sha256 = source.sha256(index)
            own_seed = int(_digest(seed, sha256)[:15], 16)  # torch takes 63 bits
            tasks.append(Task(index, sha256, source.text(index), (height, width), way, own_seed))
        else:
            most = math.prod(factors)
            errors[index] = f"{height}x{width} pixels are too few: the stages raise {most} times"
    return tasks, errors


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _make(
    source: Manifest,
    paths: Mapping[Task, Path],
    stages: Sequence[Upsampler],
    sampling: Mapping[str, Any],
    num_pixels: int,
) -> dict[int, str]:
    """Makes the pictures that are not there; returns why some cannot be, by index.

    Args:
        paths: where they go.
        num_pixels: to make at once.
    """
    errors: dict[int, str] = {}
    todo = [task for task, path in paths.items() if not _is_whole(path)]
    bar = tqdm(total=len(paths), initial=len(paths) - len(todo), desc="raising", unit="picture")
    with bar:
        for batch in _of_equal_size(todo, num_pixels):
            images: dict[Task, Tensor] = {}
            for task in batch:
                try:
                    images[task] = _image(source, task)
                except BrokenImage as error:
                    errors[task.index] = error.reason
            if images:
                made = _raise(stages, torch.cat(list(images.values())), list(images), sampling)
                for task, picture in zip(images, to_uint8(made), strict=True):
                    write_png(paths[task], picture)
            bar.update(len(batch))
    return errors


def _is_whole(path: Path) -> bool:
    """Whether a PNG is there with all that its checksums say."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):  # Pillow's word for a wrong checksum
        return False
    return True


def _of_equal_size(tasks: Iterable[Task], num_pixels: int) -> Iterator[list[Task]]:
    """Batches of pictures of one size each, that make at most `num_pixels`, or are single."""
    for _, group in groupby(sorted(tasks, key=lambda task: (task.size, task.index)), lambda task: task.size):
        alike = list(group)
        step = max(1, num_pixels // math.prod(alike[0].way[-1]))
        for start in range(0, len(alike), step):
            yield alike[start : start + step]


def _image(source: Manifest, task: Task) -> Tensor:
    sample = source[task.index]
    if sample.original_size != task.size:
        (height, width), (told_height, told_width) = sample.original_size, task.size
        reason = f"it is {height}x{width} pixels, the manifest says {told_height}x{told_width}"
        raise BrokenImage(sample.uid, reason)
    assert isinstance(sample.image, Image.Image)  # as a manifest's source gives it
    return to_tensor(sample.image)


def _raise(
    stages: Sequence[Upsampler], images: Tensor, tasks: Sequence[Task], sampling: Mapping[str, Any]
) -> Tensor:
    """Images (B, 3, H, W) of tasks of one size, through the last stages."""
    way, texts, seeds = tasks[0].way, [task.text for task in tasks], [task.seed for task in tasks]
    for stage, size in zip(stages[-len(way) :], way, strict=True):
        images = raise_images(stage, images, size, texts, seeds, **sampling)
        seeds = [next_seed(seed) for seed in seeds]
    return images


def _changed(table: pa.Table, changes: Mapping[int, Mapping[str, Any]]) -> pa.Table:
    """The table with new values in the `changes` of rows, and what was there before in `original_...`."""
    columns = {name: table[name].to_pylist() for name in REPLACED}
    columns |= {name: [None] * len(table) for name in PROVENANCE}
    for row, change in changes.items():
        for name, value in change.items():
            if name in REPLACED:
                columns[f"original_{name}"][row] = columns[name][row]
            columns[name][row] = value
    for name in REPLACED:
        values = pa.array(columns[name], COLUMNS[name])
        table = table.set_column(table.column_names.index(name), name, values)
    for name, type_ in PROVENANCE.items():
        table = table.append_column(name, pa.array(columns[name], type_))
    return table


def main(argv: list[str]) -> None:
    call(upsample, argv, "emu upsample")
