"""Whether what is built for real models at real scale is right: one command, one file of figures.

    OMP_NUM_THREADS=1 python -m benchmarks.scale --out results/scale

Counts parameters on the meta device, compares the mathematics with diffusers' own, exports a pipeline of
every family and draws with it again, resumes on one and two processes, trains sharded against unsharded, and
measures the data path and the caches, each against its bound in the same run. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import caching, decoding
from benchmarks.conformance import conformance
from benchmarks.cost import parameter_counts
from emu_lightning.evaluation.comparison_page import environment
from emu_lightning.files import write_whole
from emu_lightning.modules import load_generator
from tests.parallel_cases import fsdp2_loss_diff
from tests.pipelines import PIPELINES, PROMPT, SEED, SIDE, draw, make_pipeline, stock
from tests.resume_matrix import resume_matrix


def export_differences(folder: Path) -> dict[str, float]:
    """Largest difference between our picture and that of the exported pipeline, float32, for each family."""
    differences = {}
    for name in PIPELINES:
        base = make_pipeline(name, folder / name)
        generator = load_generator(base, {"image_size": SIDE, "num_steps": 2})
        ours = generator.generate([PROMPT], [SEED])
        exported = generator.save_pretrained(folder / f"{name}-exported")
        differences[name] = (draw(stock(exported)) - ours).abs().max().item()
    return differences


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures everything and writes `results.json`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/scale"))
    out: Path = parser.parse_args(argv).out
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        decode, cache = (bench.main(["--out", folder]) for bench in (decoding, caching))
        cases = resume_matrix(place / "resume")
        exported = export_differences(place / "export")
        results: dict[str, Any] = {
            "parameters": parameter_counts(),
            "conformance": {"max_abs_diff": {**conformance(), "export": max(exported.values())}},
            "export": exported,
            "resume": {
                "cases": len(cases),
                "cases_exact": sum(case.exact for case in cases),
                "not_exact": [case.name for case in cases if not case.exact],
            },
            "fsdp2": {"loss_diff": fsdp2_loss_diff(place / "fsdp2")},
            "data": {name: decode[name] for name in ("decode_ratio", "folder", "shards", "settings")},
            "cache": {
                "speedup": cache["cache_speedup"],  # of an epoch of training
                "latents_speedup": cache["latents_speedup"],  # of an epoch that ends with the latents
                "all_epoch_seconds": cache["all_epoch_seconds"],
                "settings": cache["settings"],
            },
            "gpu": "not measured: no GPU at hand",
        }
    command = shlex.join(
        [f"OMP_NUM_THREADS={torch.get_num_threads()}", "python", "-m", "benchmarks.scale", *argv]
    )
    results |= {"command": command, **environment()}
    results["seconds"] = round(time.monotonic() - started, 1)
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
