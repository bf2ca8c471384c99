"""Seconds and memory to filter, balance and select a million pictures whose scores are there.

    python benchmarks/curation_selection.py --out results/curation_selection

The scores are drawn at random, and lie as `emu curate` writes them: a Parquet file a shard and scorer.
What is timed is all that a changed threshold costs before the report: reading the columns, joining them by
uid, six filters, percentiles within nine concepts, quotas, and writing manifest and selection. The peak of
memory is that of the whole process, Python and its packages with it. Embeddings, which a selection never
reads, are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from emu_lightning.curation.filters import Filter, Filters, Where
from emu_lightning.curation.selection import Balance, ScoredPool, ScoreTable
from emu_lightning.files import write_whole

TARGET = {"seconds": 5.0, "gb": 2.0}
CONCEPTS = ("portrait", "food", "animal", "landscape", "car", "building", "flower", "interior", "other")
QUOTAS = dict(zip(CONCEPTS, (4, 3, 3, 3, 1, 2, 1, 1, 1), strict=True))
FILTERS: Filters = {
    "size": Where("least(width, height) >= 512"),
    "aspect": Where("greatest(width, height) <= 2 * least(width, height)"),
    "offensive": Filter("offensive", maximum=0.8),
    "aligned": Filter("clip_score", minimum=0.1),
    "aesthetic": Filter("aesthetic", minimum=4.0),
    "text": Filter("num_words", maximum=6),
}


def write_scores(folder: Path, num: int, rows_per_shard: int) -> None:
    """A pool of `num` rows and its scores, as files of `rows_per_shard` rows."""
    rng = np.random.default_rng(0)
    for shard, first in enumerate(range(0, num, rows_per_shard)):
        numbers = range(first, min(first + rows_per_shard, num))
        count = len(numbers)
        uids = [f"{number // 10_000:05d}/{number:09d}.jpg" for number in numbers]
        is_missing = rng.random(count) < 0.3
        rows = {
            "pool": {
                "uri": [f"/data/photographs/originals/{uid}" for uid in uids],
                "caption": [
                    f"picture {number} of a pool, with a caption of ordinary length" for number in numbers
                ],
                "source": rng.choice(["here", "there"], count),
                "licence": rng.choice(["cc-by", "cc0"], count),
                "likes": pa.array(rng.integers(0, 10_000, count), mask=is_missing),
            },
            "read": {
                "sha256": [rng.bytes(32).hex() for _ in numbers],
                "num_bytes": rng.integers(10_000, 5_000_000, count),
                "format": ["JPEG"] * count,
                "width": rng.integers(256, 4096, count).astype(np.int32),
                "height": rng.integers(256, 4096, count).astype(np.int32),
                "error": pa.array(np.where(rng.random(count) < 0.01, "truncated", None), pa.string()),
            },
            "hashes": {"phash": rng.integers(0, 2**63, count)},
            "photometry": {
                name: rng.random(count, np.float32)
                for name in ("blur", "exposure", "contrast", "colourfulness", "border", "watermark")
            },
            "clip": {
                "clip_score": rng.normal(0.25, 0.08, count).astype(np.float32),
                "aesthetic": rng.normal(5, 1, count).astype(np.float32),
                "offensive": rng.beta(0.5, 5, count).astype(np.float32),
                "concept": rng.choice(CONCEPTS, count),
                "concept_probability": rng.random(count, np.float32),
            },
            "popularity": {"popularity": pa.array(rng.random(count), mask=is_missing)},
            "ocr": {"num_words": rng.poisson(2, count).astype(np.int32), "text_area": rng.random(count)},
        }
        for name, columns in rows.items():
            (folder / name).mkdir(exist_ok=True)
            pq.write_table(pa.table({"uid": uids, **columns}), folder / name / f"{shard:08d}.parquet")


def read_scores(folder: Path) -> ScoredPool:
    scores = []
    for name in ("read", "hashes", "photometry", "clip", "popularity", "ocr"):
        schema = pq.read_schema(folder / name / "00000000.parquet")
        columns = {column.name: column.type for column in schema if column.name != "uid"}
        scores.append(ScoreTable(name, folder / name, columns, "random", is_late=name == "ocr"))
    return ScoredPool(sorted((folder / "pool").iterdir()), scores)


def peak_memory_gb() -> float:
    """Of this process since its program began; `ru_maxrss` would count who started it, too. Linux only."""
    (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024 / 1e9


def main(argv: list[str]) -> dict[str, Any]:
    """Measures, prints, writes `<out>/results.json`, and returns what is in it."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("results/curation_selection"), help="folder")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the pool")
    parser.add_argument("--rows_per_shard", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=50_000, help="of the selection")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder, "scores")
        scores.mkdir()
        # In a process of its own: its memory is not the selection's.
        maker = multiprocessing.get_context("spawn").Process(
            target=write_scores, args=(scores, arguments.rows, arguments.rows_per_shard)
        )
        maker.start()
        maker.join()
        wall, cpu = time.perf_counter(), time.process_time()
        balance = Balance(arguments.size, "concept", QUOTAS, {"aesthetic": 0.7, "popularity": 0.3})
        selection = read_scores(scores).select(FILTERS, balance, folder)
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        manifest_mb = Path(folder, "manifest.parquet").stat().st_size / 1e6
    gb = peak_memory_gb()
    results = {
        "command": shlex.join(["python", "benchmarks/curation_selection.py", *argv]),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}",
        "versions": {name: version(name) for name in ("duckdb", "pyarrow")},
        "rows": arguments.rows,
        "rows_per_shard": arguments.rows_per_shard,
        "selected": len(selection.uids),
        "funnel": {step.name: [step.num_in, step.num_out] for step in selection.funnel},
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "gb": round(gb, 2),
        "manifest_mb": round(manifest_mb, 1),
        "target": TARGET,
    }
    write_whole(arguments.out / "results.json", json.dumps(results, indent=2) + "\n")
    print(
        f"{arguments.rows:,} rows: {len(selection.uids):,} selected in {seconds:.2f} s "
        f"({cpu_seconds:.2f} s of processor time), {gb:.2f} GB; manifest {manifest_mb:.0f} MB"
    )
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
