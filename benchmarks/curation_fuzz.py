"""Mutated pictures through reading and scoring: each must end as a row, and no process may die.

    python benchmarks/curation_fuzz.py --images 1000 --out fuzz.json

JPEG, PNG, WebP, GIF, BMP and TIFF files with bytes changed, cut out, put in, or taken from another file, all
from one seed. Prints how many of them are still pictures, what the others are taken for, and `crashes`: those
that killed or held a process, or have no row.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from emu_lightning.curation.engine import Processes
from emu_lightning.curation.ingest import Pool, as_rows, row_version, write_pool
from emu_lightning.curation.scorer import Columns, Picture, Scorer
from emu_lightning.curation.scoring import READ, plan, score

KINDS = {
    "jpeg": [{"quality": 85}, {"quality": 85, "progressive": True}],
    "png": [{}],
    "webp": [{}, {"lossless": True}],
    "gif": [{}],
    "bmp": [{}],
    "tiff": [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}],
}


class Mutated(Pool):
    """Files of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def table(self) -> pa.Table:
        rows = [
            {"uid": path.name, "uri": str(path), "file_version": row_version(path.name, None)}
            for path in self.path.iterdir()
        ]
        return as_rows(rows, {"source": "source"}, None)


class MeanColour(Scorer):
    """Touches every pixel."""

    columns = {"mean": pa.float64()}

    def fingerprint(self) -> str:
        return "mean 1"

    def score(self, pictures: Sequence[Picture]) -> Columns:
        return {"mean": [float(np.asarray(picture.image).mean()) for picture in pictures]}


def whole_pictures(rng: random.Random) -> list[bytes]:
    """A file of each kind: smooth shades with some noise, as photographs have."""
    contents = []
    for kind, ways in KINDS.items():
        for options in ways:
            height, width = rng.randrange(40, 200), rng.randrange(40, 200)
            noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 8, (height, width, 3))
            shade = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 120, width))[..., None]
            image = Image.fromarray((shade + noise).clip(0, 255).astype(np.uint8))
            frames = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)] if kind in ("gif", "webp") else []
            more = {"save_all": True, "append_images": frames} if frames else {}
            buffer = io.BytesIO()
            image.save(buffer, kind, **options, **more)
            contents.append(buffer.getvalue())
    return contents


def mutate(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes overwritten, parts cut out, put in twice, or from another file: one to twenty."""
    mutated = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        if not mutated:
            break
        reach = min(len(mutated), rng.choice([64, len(mutated)]))  # headers are where decoders trust
        at = rng.randrange(reach)
        until = min(len(mutated), at + rng.choice([1, 2, 4, 100, len(mutated)]))
        start = rng.randrange(len(other))
        mutated[at:until] = rng.choice(
            [
                bytes([mutated[at] ^ 1 << rng.randrange(8)]) + mutated[at + 1 : until],
                rng.randbytes(until - at),
                rng.choice([b"\0", b"\xff"]) * (until - at),
                b"",
                mutated[at:until] * 2,
                other[start : start + until - at],
            ]
        )
    return bytes(mutated)


def fuzz(num_images: int, seed: int, num_workers: int) -> dict[str, object]:
    """What became of `num_images` mutated pictures."""
    rng = random.Random(seed)
    wholes = whole_pictures(rng)
    with tempfile.TemporaryDirectory() as folder:
        files, run = Path(folder) / "files", Path(folder) / "run"
        files.mkdir()
        for number in range(num_images):
            content = mutate(wholes[number % len(wholes)], rng.choice(wholes), rng)
            (files / f"{number:06d}").write_bytes(content)
        shards = Mutated(files).shards(rows_per_shard=100)
        write_pool(run, shards)
        tasks = plan(run, shards, [MeanColour()])
        for _ in score(run, tasks, [MeanColour()], Processes(num_workers, timeout=60)):
            pass
        facts = [row for path in READ.files(run) for row in pq.read_table(path).to_pylist()]
    dead = sum("its process" in (row["error_detail"] or "") for row in facts)
    kinds = Counter(row["error"] or "picture" for row in facts)
    crashes = dead + num_images - len(facts)
    return {"images": len(facts), "crashes": crashes, "seed": seed, "kinds": dict(sorted(kinds.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures = json.dumps({"fuzz": fuzz(args.images, args.seed, args.num_workers)}, indent=2)
    print(figures)
    if args.out is not None:
        args.out.write_text(figures + "\n")


if __name__ == "__main__":
    main()
