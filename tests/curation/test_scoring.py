import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from emu_lightning.curation import scoring
from emu_lightning.curation.engine import Daft, Processes
from emu_lightning.curation.scoring import READ, Scores, ScoreShard, all_scores, plan
from tests.curation.planted import Deadly, Here, Mean, Size, encoded, ingest, pixels, run_pass, write_pictures


def rows_of(scores, run):
    tables = [pq.read_table(path) for path in scores.files(run)]
    return {row["uid"]: row for table in tables for row in table.to_pylist()}


def calls(log):
    return Counter(log.read_text().splitlines()) if log.exists() else Counter()


def contents(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.parquet")}


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def test_bad_files_are_rows_and_their_neighbours_are_scored(tmp_path, log):
    pool = write_pictures(tmp_path / "pool", 5)
    whole, odd = encoded(pixels(7), "jpeg"), "a \"quoted\"\n'name'; DROP TABLE pool.jpg"
    bad = {"half.jpg": whole[: len(whole) // 2], "zero.png": b"", "text.jpg": b"not a picture, but a text"}
    for name, content in (bad | {odd: whole}).items():
        (pool / name).write_bytes(content)
    (pool / "gone.png").symlink_to("nowhere")
    reports = run_pass(pool, tmp_path / "run", [Mean(log), Size()], Processes(2))
    assert sum(report.num_bad for report in reports) == 4
    assert sum(report.num_rows for report in reports) == 10
    facts = rows_of(READ, tmp_path / "run")
    assert {uid: row["error"] for uid, row in facts.items() if row["error"]} == {
        "half.jpg": "truncated",
        "zero.png": "empty",
        "text.jpg": "not_an_image",
        "gone.png": "missing",
    }
    means = rows_of(Scores.of(Mean(log)), tmp_path / "run")
    assert set(means) == {f"{seed:03d}.png" for seed in range(5)} | {odd} == facts.keys() - bad - {"gone.png"}
    for seed in range(5):
        assert means[f"{seed:03d}.png"]["mean"] == pixels(seed).mean()
        assert np.allclose(means[f"{seed:03d}.png"]["means"], pixels(seed).mean((0, 1)), rtol=1e-3)
    assert set(calls(log).values()) == {1}


def test_nothing_is_scored_twice(tmp_path, log):
    pool, run = write_pictures(tmp_path / "pool", 10), tmp_path / "run"
    run_pass(pool, run, [Mean(log)], Here())
    once = contents(run)
    assert plan(run, ingest(pool, run), [Mean(log)]) == []
    assert contents(run) == once

    run_pass(pool, run, [Mean(log), Size()], Here())  # a new scorer scores alone
    assert set(calls(log).values()) == {1}
    assert len(rows_of(Scores.of(Size()), run)) == 10

    (pool / "004.png").write_bytes(encoded(pixels(77)))  # a changed picture alone is scored again
    run_pass(pool, run, [Mean(log)], Here())
    assert {uid for uid, num in calls(log).items() if num == 2} == {"004.png"}
    assert rows_of(Scores.of(Mean(log)), run)["004.png"]["mean"] == pixels(77).mean()

    (pool / "0000.png").write_bytes(encoded(pixels(78)))  # all rows move on by one, some into another shard
    (pool / "009.png").unlink()
    run_pass(pool, run, [Mean(log), Size()], Here())
    assert calls(log)["0000.png"] == 1 and calls(log).total() == 12
    assert set(rows_of(Scores.of(Mean(log)), run)) == set(os.listdir(pool))
    fresh = tmp_path / "fresh"
    run_pass(pool, fresh, [Mean(log), Size()], Here())
    assert contents(run) == contents(fresh)

    log.unlink()
    run_pass(pool, run, [Mean(log, version=2)], Here())  # another fingerprint, other scores
    assert calls(log) == dict.fromkeys(os.listdir(pool), 1)


def test_a_late_pass_scores_what_is_named_and_later_the_rest(tmp_path, log):
    pool, run = write_pictures(tmp_path / "pool", 10), tmp_path / "run"
    (pool / "003.png").write_bytes(b"")
    run_pass(pool, run, [Size()], Here())
    few = {"001.png", "003.png", "008.png"}
    assert [task.num_rows for task in plan(run, ingest(pool, run), [Mean(log)], uids=few)] == [1, 1]
    run_pass(pool, run, [Mean(log)], Here(), uids=few)
    assert set(calls(log)) == {"001.png", "008.png"} == set(rows_of(Scores.of(Mean(log)), run))
    run_pass(pool, run, [Mean(log)], Here(), uids=few | {"000.png"})
    run_pass(pool, run, [Mean(log)], Here())
    assert len(calls(log)) == 9 and set(calls(log).values()) == {1}
    fresh = tmp_path / "fresh"
    run_pass(pool, fresh, [Size(), Mean(log)], Here())
    assert contents(run) == contents(fresh)


def test_what_is_derived_of_scores_reads_no_picture(tmp_path, log):
    pool, run = write_pictures(tmp_path / "pool", 10), tmp_path / "run"
    (pool / "003.png").write_bytes(b"")
    run_pass(pool, run, [Mean(log)], Here(), uids={"001.png", "003.png", "008.png"})
    run_pass(pool, run, [Mean(log, factor=2)], Here(), uids={"001.png", "007.png"})
    ((own, derived),) = all_scores([Mean(log, factor=2)]).items()
    (times,) = derived
    means = rows_of(own, run)
    assert {uid: row["times"] for uid, row in rows_of(times, run).items()} == {
        uid: 2 * means[uid]["mean"] for uid in ("001.png", "007.png")
    }
    run_pass(pool, run, [Mean(log, factor=2)], Here())
    run_pass(pool, run, [Mean(log, factor=3)], Here())  # another: all that is known is enough
    assert len(calls(log)) == 9 and set(calls(log).values()) == {1}
    assert plan(run, ingest(pool, run), [Mean(log, factor=3)]) == []
    fresh = tmp_path / "fresh"
    run_pass(pool, fresh, [Mean(log, factor=2)], Processes(2))
    assert contents(fresh).items() <= contents(run).items()
    run_pass(pool, run, [Mean(log, version=2, factor=2)], Here())  # of other scores, other ones
    assert len(list((run / "scores").glob("mean-times-*"))) == 3


def test_a_missing_file_is_looked_for_again(tmp_path, log):
    pool, run = write_pictures(tmp_path / "pool", 3), tmp_path / "run"
    shards = ingest(pool, run)
    (pool / "001.png").rename(tmp_path / "away.png")
    tasks = plan(run, shards, [Mean(log)])
    for _ in Here().map(ScoreShard(run, [Mean(log)]), tasks):
        pass
    assert rows_of(READ, run)["001.png"]["error"] == "missing"
    (tmp_path / "away.png").rename(pool / "001.png")
    run_pass(pool, run, [Mean(log)], Here())
    assert rows_of(READ, run)["001.png"]["error"] is None
    assert calls(log) == {f"{seed:03d}.png": 1 for seed in range(3)}


def test_what_takes_long_is_saved_on_the_way(tmp_path, log, monkeypatch):
    pool, run = write_pictures(tmp_path / "pool", 8), tmp_path / "run"
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0.0)
    with pytest.raises(OSError, match="not readable"):
        run_pass(pool, run, [Mean(log, fails_at="003.png")], Here())
    assert set(rows_of(Scores.of(Mean(log)), run)) == {"000.png", "001.png", "002.png"}
    run_pass(pool, run, [Mean(log)], Here())
    assert calls(log) == {f"{seed:03d}.png": 1 for seed in range(8)}
    run_pass(pool, tmp_path / "fresh", [Mean(log)], Here())
    assert contents(run) == contents(tmp_path / "fresh")


def test_a_scorer_must_give_what_it_says(tmp_path):
    class Short(Size):
        def score(self, pictures):
            return {"num_pixels": []}

    with pytest.raises(ValueError, match=r"scorer short gave \{'num_pixels': 0\} values for 1 pictures"):
        run_pass(write_pictures(tmp_path / "pool", 1), tmp_path / "run", [Short()], Here())


def test_a_damaged_file_of_scores_is_made_again(tmp_path, log):
    pool, run = write_pictures(tmp_path / "pool", 6), tmp_path / "run"
    run_pass(pool, run, [Mean(log)], Here())
    whole = contents(run)
    first = Scores.of(Mean(log)).file(run, "00000000")
    first.write_bytes(first.read_bytes()[:100])
    run_pass(pool, run, [Mean(log)], Here())
    assert contents(run) == whole and calls(log).total() == 6 + 4


def test_a_picture_that_kills_is_one_row(tmp_path):
    pool, run = write_pictures(tmp_path / "pool", 10), tmp_path / "run"
    run_pass(pool, run, [Deadly("005.png")], Processes(2))
    facts = rows_of(READ, run)
    assert {uid for uid, row in facts.items() if row["error"]} == {"005.png"}
    assert facts["005.png"]["error"] == "damaged" and "SIGKILL" in facts["005.png"]["error_detail"]
    assert set(rows_of(Scores.of(Deadly("005.png")), run)) == facts.keys() - {"005.png"}
    assert plan(run, ingest(pool, run), [Deadly("005.png")]) == []


KILLED = """
from pathlib import Path
from emu_lightning.curation.engine import Processes
from tests.curation.planted import Mean, run_pass
if __name__ == "__main__":
    here = Path.cwd()
    run_pass(here / "pool", here / "run", [Mean(here / "log", seconds=0.05)], Processes(2))
"""


def test_killed_and_run_again_the_files_are_the_same(tmp_path, log):
    pool = write_pictures(tmp_path / "pool", 40)
    (pool / "020.png").write_bytes(b"")
    run_pass(pool, tmp_path / "whole", [Mean(log)], Here())
    log.unlink()
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    for num_lines in (8, 20):
        process = subprocess.Popen([sys.executable, script], cwd=tmp_path, env=environment)
        while len(calls(log)) < num_lines and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(0.5)  # its processes see that it is gone
    run_pass(pool, tmp_path / "run", [Mean(log)], Processes(2))
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert len(calls(log)) == 39
    assert calls(log).total() <= 39 + 2 * 2 * 4  # at most the shards at hand, of 2 processes, at each kill


def test_daft_writes_the_same_files(tmp_path, log):
    pytest.importorskip("daft")
    pool = write_pictures(tmp_path / "pool", 10)
    (pool / "003.png").write_bytes(b"GIF89a")
    for name, engine in {"here": Here(), "processes": Processes(2), "daft": Daft(num_workers=2)}.items():
        run_pass(pool, tmp_path / name, [Mean(log), Size()], engine)
    assert contents(tmp_path / "processes") == contents(tmp_path / "daft") == contents(tmp_path / "here")


@pytest.mark.slow
def test_ray_writes_the_same_files(tmp_path, log):
    pytest.importorskip("ray")
    pytest.importorskip("daft")
    pool = write_pictures(tmp_path / "pool", 30)
    run_pass(pool, tmp_path / "here", [Mean(log), Size()], Here())
    script = tmp_path / "on_ray.py"
    script.write_text(ON_RAY)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["HOME"] = str(tmp_path)  # where Ray writes a token
    subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, check=True, timeout=250)
    assert contents(tmp_path / "run") == contents(tmp_path / "here")


ON_RAY = """
from pathlib import Path
import ray
from tests.curation.planted import Mean, Size, run_pass
from emu_lightning.curation.engine import Daft
if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False)
    here = Path.cwd()  # Ray's processes stand elsewhere
    run_pass(here / "pool", here / "run", [Mean(here / "log"), Size()], Daft("ray", num_workers=2))
"""


def test_two_scorers_may_not_share_a_name_or_a_column(tmp_path, log):
    shards = ingest(write_pictures(tmp_path / "pool", 1), tmp_path / "run")
    with pytest.raises(ValueError, match="the name size"):
        plan(tmp_path / "run", shards, [Size(), Size()])
    other = type("Other", (Size,), {})
    with pytest.raises(ValueError, match="the column num_pixels"):
        plan(tmp_path / "run", shards, [Size(), other()])
