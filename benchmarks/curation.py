"""Curation against its bounds and against the truth: one command, one file of figures.

    python -m benchmarks.curation --out results/curation

filters      a pool with planted defects through configs/curation/miniature.yaml: precision and recall of each
             filter, and how many of the photogenic pictures are selected
throughput   one core against bare decoding (cheap scorers; the figure is that of photographs of 3 megapixels)
             and against a bare loop of the model (Clip), which take turns in one process; and `emu curate`
             against a plain multiprocessing script, both from start to end. All in processor seconds, so
             that other work on the machine hardly matters
million_rows benchmarks/curation_selection.py
runners      the same pool by plain processes, Daft's native runner and its Ray runner: equal bytes?
kill         `emu curate` and all its processes killed at random moments, then run to the end: equal bytes?
fuzz         benchmarks/curation_fuzz.py

`--parts` measures some and keeps the others' figures. About half an hour on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.curation_fuzz import fuzz
from benchmarks.parts import run_parts
from emu_lightning.curation.engine import Task
from emu_lightning.curation.filters import READABLE
from emu_lightning.curation.ingest import Folder, write_pool
from emu_lightning.curation.scorer import Scorer
from emu_lightning.curation.scorers import Clip, Hashes, Photometry
from emu_lightning.curation.scoring import ScoreShard
from emu_lightning.evaluation.votes import wilson_ci95
from emu_lightning.files import write_whole
from examples.planted_pool import write_pool as write_planted

ROOT = Path(__file__).parents[1]
EMU = [sys.executable, str(ROOT / "main.py")]
CONFIG = str(ROOT / "configs/curation/miniature.yaml")
PLANTED = {  # filter -> what it is there for
    READABLE: "corrupt",
    "offensive": "offensive",
    "size": "low_resolution",
    "aspect": "extreme_aspect",
    "unique": "duplicate",
    "aligned": "wrong_caption",
    "sharp": "blur",
    "text": "text",
}


def curate_command(pool: Path, out: Path, *more: str) -> list[str]:
    return [*EMU, "curate", "--config", CONFIG, "--pool.path", str(pool), "--out", str(out), *more]


def curate(pool: Path, out: Path, *more: str) -> None:
    """Runs `emu curate` to its end."""
    done = subprocess.run(curate_command(pool, out, *more), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(done.args)}: {done.stderr[-2000:]}")


# --- against the truth --------------------------------------------------------------------------------------


def share(num: int, of: int) -> dict[str, Any]:
    return {
        "num": num,
        "of": of,
        "ci95": [round(end, 4) for end in wilson_ci95(num / of, of)] if of else None,
    }


def filters(folder: Path, num: int, page: Path) -> dict[str, Any]:
    """Of each filter precision and recall on what reached it; and the photogenic pictures' way through.

    Args:
        page: where the run's report is kept.
    """
    write_planted(folder / "planted", num, seed=0)
    curate(folder / "planted" / "pool", folder / "run")
    manifest = pq.read_table(folder / "run" / "manifest.parquet", columns=["uid", "selected", "rejected_by"])
    verdicts = {row["uid"]: row for row in manifest.to_pylist()}
    truth = pq.read_table(folder / "planted" / "truth.parquet").to_pylist()
    rows = [row | verdicts[row["uid"]] for row in truth]
    write_whole(page, (folder / "run" / "report.html").read_bytes())
    photographs = [row for row in rows if row["is_photograph"]]
    photogenic = [row for row in rows if row["planted"] == "photogenic"]
    passing = [row for row in photogenic if row["rejected_by"] is None]
    selected = [row for row in photogenic if row["selected"]]
    whole = [row for row in photographs if row["planted"] == "nothing"]
    return {
        "filters": per_filter(rows),
        "photogenic_recall": round(len(selected) / len(photogenic), 4),
        "photogenic": {
            "passing": share(len(passing), len(photogenic)),
            "selected": share(len(selected), len(photogenic)),
            "of_selection": share(len(selected), sum(row["selected"] for row in rows)),
        },
        "photographs": {
            "filters": per_filter(photographs),
            "without_fault": len(whole),
            "of_them_rejected_by": {
                name: count for name in PLANTED if (count := sum(row["rejected_by"] == name for row in whole))
            },
        },
        "pictures": {"world": len(rows) - len(photographs), "photographs": len(photographs)},
    }


def per_filter(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Filters in their order; each is measured on what the ones before left."""
    found = {}
    for name, kind in PLANTED.items():
        planted = [row for row in rows if row["planted"] == kind]
        rejected = [row for row in rows if row["rejected_by"] == name]
        hits = sum(row["planted"] == kind for row in rejected)
        found[name] = {
            "planted": kind,
            "precision": round(hits / len(rejected), 4) if rejected else None,
            "precision_of": share(hits, len(rejected)),
            "recall": round(hits / len(planted), 4) if planted else None,
            "recall_of": share(hits, len(planted)),
        }
        rows = [row for row in rows if row["rejected_by"] != name]
    return found


# --- against bounds -----------------------------------------------------------------------------------------


def write_jpegs(folder: Path, num: int, width: int, height: int) -> Path:
    """Files with the detail of photographs, about 2.5 bits a pixel, and a caption beside each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(num):
        small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
        noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:06d}.jpg", quality=90)
        (folder / f"{number:06d}.txt").write_text(f"a photograph of {number} coloured clouds in the evening")
    return folder


def cpu_seconds(do: Callable[[], object]) -> float:
    begun = time.process_time()
    do()
    return time.process_time() - begun


def one_pass(pool: Path, run: Path, scorers: list[Scorer]) -> Callable[[], None]:
    """A pass over all pictures in this process, as a worker does it; into an empty run each time."""
    (shard,) = Folder(str(pool)).shards(rows_per_shard=10**6)
    work = ScoreShard(run, scorers)

    def score() -> None:
        shutil.rmtree(run, ignore_errors=True)
        write_pool(run, [shard])
        work(Task(shard.id, len(shard.rows)), lambda first, last: None)

    return score


def compare(bare: Callable[[], None], ours: Callable[[], None], num: int, rounds: int) -> dict[str, Any]:
    """Pictures a second of one core on both sides, which take turns; and the median of their ratios."""
    ours()  # loads what is loaded once
    before, ratios, seconds = cpu_seconds(bare), [], []
    for _ in range(rounds):
        seconds.append(cpu_seconds(ours))
        after = cpu_seconds(bare)
        ratios.append((before + after) / 2 / seconds[-1])
        before = after
    return {
        "ratio": round(float(np.median(ratios)), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "images_per_second": round(num / float(np.median(seconds)), 1),
        "bare_images_per_second": round(num / before, 1),
    }


def cheap_scorers(folder: Path, num: int, rounds: int, width: int, height: int) -> dict[str, Any]:
    pool = write_jpegs(folder / f"jpegs_{width}", num, width, height)
    paths = sorted(pool.glob("*.jpg"))

    def decode() -> None:
        for path in paths:
            with Image.open(io.BytesIO(path.read_bytes())) as image:
                image.load()

    return compare(decode, one_pass(pool, folder / "cheap", [Photometry(), Hashes()]), num, rounds)


def clip_pass(folder: Path, num: int, rounds: int) -> dict[str, Any]:
    """A CLIP ViT-B-32 with weights at random: what it says is nonsense, what it costs is not."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    pool = write_jpegs(folder / "captioned", num, 512, 384)
    network, _, transform = open_clip.create_model_and_transforms("ViT-B-32", load_weights=False)
    network, tokenizer = network.eval(), open_clip.get_tokenizer("ViT-B-32")
    save_file(network.state_dict(), folder / "clip.safetensors")
    clip = Clip(str(folder / "clip.safetensors"), model="ViT-B-32", batch_size=16)
    paths = sorted(pool.glob("*.jpg"))

    @torch.inference_mode()
    def loop() -> None:
        for first in range(0, num, clip.batch_size):
            some = paths[first : first + clip.batch_size]
            network.encode_image(torch.stack([transform(Image.open(path)) for path in some]))
            network.encode_text(tokenizer([path.with_suffix(".txt").read_text() for path in some]))

    return compare(loop, one_pass(pool, folder / "clip", [clip]), num, rounds)


PLAIN_SCRIPT = """
import json, multiprocessing, sys
from pathlib import Path
from PIL import Image
from emu_lightning.curation.scorer import Picture
from emu_lightning.curation.scorers import Hashes, Photometry
SCORERS = [Photometry(), Hashes()]
def score(path):
    content = path.read_bytes()
    with Image.open(path) as image:
        picture = Picture(content, image.convert("RGB"), {"uid": path.name, "caption": None})
    row = {"uid": path.name, "width": picture.image.width, "height": picture.image.height}
    for scorer in SCORERS:
        row |= {name: values[0] for name, values in scorer.score([picture]).items()}
    return row
if __name__ == "__main__":
    paths = sorted(Path(sys.argv[1]).glob("*.jpg"))
    with multiprocessing.Pool(2) as workers:
        rows = workers.map(score, paths)
    kept = [row for row in rows if row["width"] >= 512 and row["sharpness"] >= 30]
    Path(sys.argv[2]).write_text("".join(json.dumps(row) + "\\n" for row in rows))
    print(len(kept))
"""
WHOLE = """
pool: {class_path: emu_lightning.curation.ingest.Folder, init_args: {path: PATH}}
out: OUT
rows_per_shard: 100
passes:
  - scorers: [emu_lightning.curation.scorers.Photometry, emu_lightning.curation.scorers.Hashes]
filters: {size: {column: width, minimum: 512}, sharp: {column: sharpness, minimum: 30}}
engine: {class_path: emu_lightning.curation.engine.Daft, init_args: {num_workers: 2}}
"""


def against_multiprocessing(folder: Path, num: int) -> dict[str, Any]:
    """Both from the start of the interpreter to the end: scores, filters, and what each writes."""
    pool = write_jpegs(folder / "whole", num, 1024, 768)
    (folder / "plain.py").write_text(PLAIN_SCRIPT)
    (folder / "whole.yaml").write_text(
        WHOLE.replace("PATH", str(pool)).replace("OUT", str(folder / "whole_run"))
    )
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    plain = [sys.executable, str(folder / "plain.py"), str(pool), str(folder / "plain.jsonl")]
    seconds = {
        "multiprocessing": children_seconds(plain, path),
        "curate": children_seconds([*EMU, "curate", "--config", str(folder / "whole.yaml")], path),
    }
    ratio = seconds["multiprocessing"]["cpu"] / seconds["curate"]["cpu"]
    return {"ratio": round(ratio, 4), "seconds": seconds, "pictures": num}


def children_seconds(command: list[str], environment: Mapping[str, str]) -> dict[str, float]:
    """Processor time of a command and all its processes; and how long it took."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, begun = spent(), time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return {"cpu": round(spent() - before, 2), "wall": round(time.perf_counter() - begun, 2)}


def throughput(folder: Path, scale: float) -> dict[str, Any]:
    cheap = cheap_scorers(folder, round(40 * scale), 5, 2048, 1536)
    small = cheap_scorers(folder, round(120 * scale), 5, 1024, 768)
    clip = clip_pass(folder, round(48 * scale), 3)
    plain = against_multiprocessing(folder, round(1500 * scale))
    return {
        "throughput": {
            "decode_ratio": cheap["ratio"],
            "clip_ratio": clip["ratio"],
            "vs_multiprocessing": plain["ratio"],
            "decode": {"2048x1536": cheap, "1024x768": small},
            "clip": clip,
            "multiprocessing": plain,
        }
    }


def million_rows(folder: Path) -> dict[str, Any]:
    """In a process of its own, whose memory is measured."""
    script = ROOT / "benchmarks" / "curation_selection.py"
    out = folder / "million"
    subprocess.run([sys.executable, script, "--out", out], check=True, capture_output=True, cwd=ROOT)
    found = json.loads((out / "results.json").read_text())
    return {"million_rows": found | {"command": "python benchmarks/curation_selection.py"}}


# --- against one another ------------------------------------------------------------------------------------


def digest(run: Path) -> str:
    return hashlib.sha256((run / "manifest.parquet").read_bytes()).hexdigest()


def runners(folder: Path, num: int) -> dict[str, Any]:
    write_planted(folder / "runners", num, seed=2, tens=0)
    pool = folder / "runners" / "pool"
    engine = "--engine emu_lightning.curation.engine."
    engines = {
        "processes": f"{engine}Processes",
        "native": f"{engine}Daft",
        "ray": f"{engine}Daft --engine.runner ray --engine.num_workers 2",
    }
    digests = {}
    for name, arguments in engines.items():
        curate(pool, folder / name, *arguments.split())
        digests[name] = digest(folder / name)
    return {"runners_digest_equal": len(set(digests.values())) == 1, "runners": digests}


def kill(folder: Path, num: int, runs: int) -> dict[str, Any]:
    """Each run is started three times to be killed at a random moment, and then goes on to its end."""
    write_planted(folder / "kill", num, seed=3, tens=0)
    pool, rng = folder / "kill" / "pool", random.Random(0)
    begun = time.monotonic()
    curate(pool, folder / "whole_run", "--rows_per_shard", "10")
    seconds, identical, kills = time.monotonic() - begun, 0, 0
    for number in range(runs):
        out = folder / f"killed_{number}"
        for _ in range(3):
            process = subprocess.Popen(
                curate_command(pool, out, "--rows_per_shard", "10"),
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                process.wait(rng.uniform(0.05, 0.5) * seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
        curate(pool, out, "--rows_per_shard", "10")
        identical += digest(out) == digest(folder / "whole_run")
    return {"kill": {"runs": runs, "kills": kills, "identical": identical}}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints, and writes `<out>/results.json`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("results/curation"), help="folder")
    parser.add_argument("--scale", type=float, default=1.0, help="of numbers of pictures and runs")
    parts: dict[str, Callable[[Path, float], dict[str, Any]]] = {
        "filters": lambda folder, scale: filters(folder, round(900 * scale), arguments.out / "report.html"),
        "throughput": throughput,
        "million_rows": lambda folder, scale: million_rows(folder),
        "runners": lambda folder, scale: runners(folder, round(100 * scale)),
        "kill": lambda folder, scale: kill(folder, round(60 * scale), max(1, round(5 * scale))),
        "fuzz": lambda folder, scale: {"fuzz": fuzz(round(1000 * scale), 0, 2)},
    }
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="all when left out")
    arguments = parser.parse_args(argv)
    options = [] if arguments.scale == 1 else ["--scale", f"{arguments.scale:g}"]
    chosen = {name: partial(parts[name], scale=arguments.scale) for name in arguments.parts}
    return run_parts(arguments.out, chosen, "benchmarks.curation", options)


if __name__ == "__main__":
    main()
