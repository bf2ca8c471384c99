"""Pools, scorers and work with known behaviour, importable by the processes that tests start."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from emu_lightning.curation.engine import Engine, Mark, Report, Task, Work
from emu_lightning.curation.ingest import MISSING, Pool, Shard, as_rows, row_version, write_pool
from emu_lightning.curation.scorer import Columns, Derived, Picture, Scorer
from emu_lightning.curation.scorers import Head
from emu_lightning.curation.scoring import plan, score


def pixels(seed: int, width: int = 12, height: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, format: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_pictures(folder: Path, num: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(num):
        (folder / f"{seed:03d}.png").write_bytes(encoded(pixels(seed)))
    return folder


class Files(Pool):
    """All files of a folder, without the imports that captions and suffixes bring."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def table(self) -> pa.Table:
        rows = []
        for path in self.path.iterdir():
            stat = path.stat() if path.exists() else None
            version = f"{stat.st_size} {stat.st_mtime_ns}" if stat else MISSING
            row = {"uid": path.name, "uri": str(path), "file_version": row_version(version, None)}
            rows.append(row | {"source": "here"})
        return as_rows(rows, {"source": "source"}, None)


class Here(Engine):
    """No other process."""

    def map(self, work: Work, tasks: Sequence[Task], num_workers: int | None = None) -> Iterator[Report]:
        for task in tasks:
            yield work(task, lambda first, last: None)


def ingest(pool: Path, run: Path, rows_per_shard: int = 4) -> list[Shard]:
    shards = Files(pool).shards(rows_per_shard)
    write_pool(run, shards)
    return shards


def run_pass(
    pool: Path, run: Path, scorers: Sequence[Scorer], engine: Engine, **options: Any
) -> list[Report]:
    shards = ingest(pool, run)
    return list(score(run, plan(run, shards, scorers, **options), scorers, engine))


class Mean(Scorer):
    """Mean of all pixels; every picture that it is given is a line in `log`."""

    columns = {"mean": pa.float64(), "means": pa.list_(pa.float16(), 3)}
    batch_size = 3

    def __init__(
        self, log: Path, version: int = 1, seconds: float = 0.0, fails_at: str = "", factor: int | None = None
    ) -> None:
        self.log, self.version, self.seconds, self.fails_at = log, version, seconds, fails_at
        self.derived = [] if factor is None else [Times(factor)]

    def fingerprint(self) -> str:
        return f"mean {self.version}"

    def score(self, pictures: Sequence[Picture]) -> Columns:
        if any(picture.row["uid"] == self.fails_at for picture in pictures):
            raise OSError("not readable")
        with self.log.open("a") as log:
            log.writelines(f"{picture.row['uid']}\n" for picture in pictures)
        time.sleep(self.seconds)
        arrays = [np.asarray(picture.image) for picture in pictures]
        means = [array.mean((0, 1)).astype(np.float16) for array in arrays]
        return {"mean": [float(array.mean()) for array in arrays], "means": means}


class Times(Derived):
    """The mean of :class:`Mean`, times a number."""

    columns = {"times": pa.float64()}

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def fingerprint(self) -> str:
        return f"times {self.factor}"

    def derive(self, own: pa.Table) -> Columns:
        return {"times": [self.factor * mean for mean in own["mean"].to_pylist()]}


class Embedding(Scorer):
    """Mean colours in place of a CLIP's embedding; heads are started and derived as Clip's are."""

    name = "clip"
    columns = {"clip_embedding": pa.list_(pa.float16(), 3)}

    def __init__(self, log: str, heads: list[Head] | None = None) -> None:
        self.log, self.derived = log, heads or []

    def fingerprint(self) -> str:
        return "colours 1"

    def start(self) -> None:
        for head in self.derived:
            head.start(lambda texts: np.empty((0, 3), np.float32), 3, self.fingerprint())

    def score(self, pictures: Sequence[Picture]) -> Columns:
        with open(self.log, "a") as log:
            log.writelines(f"{picture.row['uid']}\n" for picture in pictures)
        means = [np.asarray(picture.image).mean((0, 1)) - 120 for picture in pictures]
        return {"clip_embedding": [(mean / np.linalg.norm(mean)).astype(np.float16) for mean in means]}


class Size(Scorer):
    columns = {"num_pixels": pa.int64()}

    def fingerprint(self) -> str:
        return "size 1"

    def score(self, pictures: Sequence[Picture]) -> Columns:
        return {"num_pixels": [picture.image.width * picture.image.height for picture in pictures]}


class Deadly(Size):
    """Kills its process at one picture."""

    batch_size = 3

    def __init__(self, uid: str) -> None:
        self.uid = uid

    def score(self, pictures: Sequence[Picture]) -> Columns:
        if any(picture.row["uid"] == self.uid for picture in pictures):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(pictures)


class CountRows:
    """Work that goes wrong at one row of one shard."""

    def __init__(self, shard: str = "", row: int = -1, wrong: str = "killed") -> None:
        self.shard, self.row, self.wrong = shard, row, wrong

    def __call__(self, task: Task, mark: Mark) -> Report:
        for row in range(task.num_rows):
            if row in task.refused:
                continue
            if self.wrong != "killed at once":
                mark(row, row)
            if (task.shard, row) == (self.shard, self.row):
                self.go_wrong()
        return Report(task.shard, task.num_rows, len(task.refused), 0.0)

    def go_wrong(self) -> None:
        if self.wrong == "hangs":
            time.sleep(600)
        elif self.wrong == "raises":
            raise FileNotFoundError("weights clip.safetensors are missing")
        os.kill(os.getpid(), signal.SIGKILL)
