"""`emu curate`: one configuration from a folder to a manifest, and what a second run leaves alone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from emu_lightning import cli
from tests.curation.planted import write_pictures

CONFIGS = Path(__file__).parent.parent.parent / "configs"
CONFIG = """
pool: {class_path: tests.curation.planted.Files, init_args: {path: pictures}}
out: run
rows_per_shard: 4
passes:
  - scorers:
      - {class_path: tests.curation.planted.Mean, init_args: {log: early.txt}}
  - after: true
    scorers:
      - {class_path: tests.curation.planted.Size}
columns:
  - {class_path: emu_lightning.curation.pool_columns.NearDuplicates}
filters:
  bright: {column: mean, minimum: 127}
  large: {column: num_pixels, minimum: 100}
balance: {size: 4, column: source, rank: {mean: 1}}
engine: {class_path: tests.curation.planted.Here}
"""
FILES = ("manifest.parquet", "selection.json")


@pytest.fixture
def run(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Curates ten pictures, one of them broken, in `run`; returns the rows of the manifest."""
    write_pictures(Path("pictures"), 9)
    Path("pictures/it's <bad>.png").write_bytes(b"no picture")
    Path("config.yaml").write_text(CONFIG)

    def curate(*argv: str) -> list[dict]:
        cli.main(["curate", "--config", "config.yaml", *argv])
        return pq.read_table("run/manifest.parquet").to_pylist()

    return curate


def refusal(capsys: pytest.CaptureFixture[str], run, *argv: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(*argv)
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def scored() -> list[str]:
    return Path("early.txt").read_text().splitlines()


def test_one_configuration_from_pictures_to_a_selection(run) -> None:
    rows = run()
    assert len(rows) == 10
    bad = next(row for row in rows if row["uid"] == "it's <bad>.png")
    assert bad["rejected_by"] == "readable" and bad["error"] == "not_an_image" and not bad["selected"]
    passing = sorted((row for row in rows if row["rejected_by"] is None), key=lambda row: -row["mean"])
    assert all(row["mean"] >= 127 and row["num_pixels"] == 12 * 9 for row in passing)
    chosen = [row["uid"] for row in passing[:4]]
    assert sorted(chosen) == json.loads(Path("run/selection.json").read_text())["uids"]
    assert all(row["num_pixels"] is None for row in rows if row["rejected_by"] == "bright")
    assert all(row["is_duplicate"] is False for row in rows if row is not bad)
    results = json.loads(Path("run/results.json").read_text())
    assert results["funnel"]["readable"] == {"in": 10, "out": 9}
    assert results["funnel"]["balance"] == {"in": len(passing), "out": len(chosen)}
    assert "it&#x27;s &lt;bad&gt;.png" in Path("run/report.html").read_text()


def test_a_second_run_scores_nothing_and_another_threshold_selects_anew(run) -> None:
    first = run()
    files = [Path("run", name).read_bytes() for name in FILES]
    assert len(scored()) == 9
    assert run() == first and [Path("run", name).read_bytes() for name in FILES] == files
    loose = run("--filters.bright.minimum", "0")
    assert len(scored()) == 9  # a late scorer has more to do, the early one nothing
    assert {row["rejected_by"] for row in loose} == {None, "readable"}
    assert run() == first and [Path("run", name).read_bytes() for name in FILES] == files


def test_the_resolved_configuration_is_enough_to_repeat_it(run) -> None:
    run("--balance.size", "2")
    files = [Path("run", name).read_bytes() for name in FILES]
    kept = yaml.safe_load(Path("run/config.yaml").read_text())
    assert kept["balance"]["size"] == 2 and kept["filters"]["bright"]["missing"] == "reject"
    Path("again.yaml").write_text(Path("run/config.yaml").read_text())
    cli.main(["curate", "--config", "again.yaml", "--out", "other"])
    assert [Path("other", name).read_bytes() for name in FILES] == files


def test_decisions_of_people_come_back_and_filters_can_name_them(run) -> None:
    chosen = [row["uid"] for row in run() if row["selected"]]
    decided = [{"uid": uid, "accepted": uid == chosen[0], "caption": "edited"} for uid in chosen]
    pq.write_table(pa.Table.from_pylist(decided), "people.parquet")
    rows = run("--decisions", "people.parquet", "--filters", "{people: {sql: accepted}}")
    assert [row["uid"] for row in rows if row["selected"]] == chosen[:1]
    assert {row["edited_caption"] for row in rows} == {"edited", None}


def test_decisions_about_another_pool_are_refused_and_some_of_them_told(run, capsys) -> None:
    named = {"uid": "000.png", "accepted": True}
    pq.write_table(pa.Table.from_pylist([named, {"uid": "x", "accepted": True}]), "people.parquet")
    run("--decisions", "people.parquet")
    assert (
        "decisions people.parquet: 1 of 2 are about pictures that the pool lacks" in capsys.readouterr().out
    )
    pq.write_table(pa.Table.from_pylist([{"uid": "x", "accepted": True}]), "people.parquet")
    assert "has no picture of the pool: x" in refusal(capsys, run, "--decisions", "people.parquet")


def test_curating_a_folder_without_a_network_loads_neither_torch_nor_lightning(in_tmp_path: Path) -> None:
    write_pictures(Path("pictures"), 3)
    argv = [
        "curate",
        "--pool",
        "emu_lightning.curation.ingest.Folder",
        "--pool.path",
        "pictures",
        "--out",
        "run",
    ]
    argv += ["--passes", '[{"scorers": ["emu_lightning.curation.scorers.Photometry"]}]']
    argv += ["--engine", "emu_lightning.curation.engine.Processes"]
    code = f"from emu_lightning import cli; cli.main({argv!r}); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "lightning"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--filters.bright.minimun", "3"], "minimun"),
        (["--filters.bright.column", "maen"], "did you mean mean"),
        (["--balance.quotas", "{a: 1}", "--balance.column", "null"], "balance.column"),
        (["--balance.rank", "{likes: 1}"], "balance.rank.likes"),
        (["--decisions", "nobody.parquet"], "decisions nobody.parquet do not exist"),
        (["--pool", "emu_lightning.curation.ingest.Folder", "--pool.path", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_scored(run, capsys, argv, message) -> None:
    assert message in refusal(capsys, run, *argv)
    assert not Path("early.txt").exists()


@pytest.mark.parametrize("package", ["duckdb", "rapidocr"])
def test_a_missing_package_is_told_in_one_line(package: str, run, capsys, monkeypatch) -> None:
    find = importlib.util.find_spec
    without = lambda name, *more: None if name == package else find(name, *more)  # noqa: E731
    monkeypatch.setattr("emu_lightning.verbs.curate.find_spec", without)
    monkeypatch.setattr("emu_lightning.curation.scorers.ocr.find_spec", without)
    ocr = ["--passes", '[{"scorers": ["emu_lightning.curation.scorers.OCR"]}]', "--filters", "{}"]
    assert "pip install 'emu_lightning[curation]'" in refusal(capsys, run, *ocr)


@pytest.mark.parametrize("path", sorted((CONFIGS / "curation").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_configuration_names_its_command_and_parses(path: Path, in_tmp_path, capsys) -> None:
    head = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"emu curate --config configs/curation/{path.name}" in head
    assert "choice" in head.lower() and "paper" in head
    where = {"Folder": ["--pool.path", "x"], "Shards": ["--pool.urls", "x"], "Table": ["--pool.path", "x"]}
    config = yaml.safe_load(path.read_text())
    argv = where[config["pool"]["class_path"].rpartition(".")[2]]
    with pytest.raises(SystemExit) as exit_:
        cli.main(["curate", "--config", str(path), *argv, "--print_config"])
    assert not exit_.value.code
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert set(parsed["filters"] or {}) == set(config.get("filters", {}))
