"""Selection: columns joined by uid, ranks and quotas against brute force, and a result that is a function."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emu_lightning.curation.decode import FACTS
from emu_lightning.curation.filters import Filter, Where
from emu_lightning.curation.selection import (
    COLUMNS,
    METADATA,
    Balance,
    ScoredPool,
    ScoreTable,
    read_decisions,
)

CONCEPTS = ("car", "food", "portrait")
SCORED = {"score": pa.float32(), "likes_rank": pa.float64(), "concept": pa.string()}
LATE = {"num_words": pa.int32()}


def write_shards(folder: Path, rows: list[dict], types: dict, rows_per_shard: int = 8) -> list[Path]:
    """`rows` as files; those that are None are left out, as scores of what is not scored are."""
    paths = []
    for shard, first in enumerate(range(0, len(rows), rows_per_shard)):
        there = [row for row in rows[first : first + rows_per_shard] if row is not None]
        paths.append(folder / f"{shard:08d}.parquet")
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(there, pa.schema({"uid": pa.string(), **types})), paths[-1])
    return paths


def make_rows(num: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for number in range(num):
        is_broken = rng.random() < 0.1
        row = {
            "uid": f"{hashlib.sha256(bytes([number])).hexdigest()[:6]} ü'\n{number}",
            "caption": rng.choice([None, "a picture"]),
            "licence": "cc0",
            "error": "truncated" if is_broken else None,
            "width": None if is_broken else rng.randrange(32, 200),
            "height": None if is_broken else rng.randrange(32, 200),
            "score": rng.choice([None, float("nan"), 0.25, 0.5, 0.75]),
            "likes_rank": rng.choice([None, 0.0, 0.5, 1.0]),
            "concept": rng.choice([None, *CONCEPTS]),
            "num_words": rng.randrange(4),
        }
        rows.append(row | {"uri": f"/pictures/{row['uid']}", "sha256": f"{number:064x}"})
    return rows


def scored_pool(folder: Path, rows: list[dict], rows_per_shard: int = 8) -> ScoredPool:
    """As scoring leaves it: broken pictures have facts and no scores; rows lie in no order within a file."""
    told = {"uri": pa.string(), "caption": pa.string(), "licence": pa.string(), "file_version": pa.string()}
    told["width"] = pa.int32()  # what a site said; what was measured counts
    pool = write_shards(
        folder / "pool", [row | {"width": 1, "file_version": "1"} for row in rows], told, rows_per_shard
    )
    write_shards(folder / "read", rows, FACTS, rows_per_shard)
    whole = [row if row["error"] is None else None for row in rows]
    write_shards(folder / "scores", [row for row in whole], SCORED, rows_per_shard)
    for path in (folder / "scores").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.take(list(range(len(table)))[::-1]), path)
    write_shards(folder / "late", whole, LATE, rows_per_shard)
    return ScoredPool(
        pool,
        [
            ScoreTable("read", folder / "read", FACTS, "1"),
            ScoreTable("scores", folder / "scores", SCORED | {"embedding": pa.list_(pa.float32())}, "2"),
            ScoreTable("late", folder / "late", LATE, "3", True, {"clip.safetensors": "ab12"}),
        ],
    )


def select(pool: ScoredPool, folder: Path, balance: Balance | None = None, **filters) -> list[dict]:
    """The rows of the manifest."""
    selection = pool.select(filters, balance or Balance(), folder)
    rows = pq.read_table(folder / "manifest.parquet").to_pylist()
    assert selection.uids == sorted(row["uid"] for row in rows if row["selected"])
    return rows


# --- the manifest -------------------------------------------------------------------------------------------


def test_every_row_of_the_pool_is_in_the_manifest_with_its_columns(tmp_path: Path) -> None:
    rows = make_rows(50)
    made = select(scored_pool(tmp_path, rows), tmp_path, sharp=Filter("score", 0.5))
    assert [row["uid"] for row in made] == [row["uid"] for row in rows]
    for row, out in zip(rows, made, strict=True):
        is_broken = row["error"] is not None
        for name in ("uri", "sha256", "width", "height", "caption", "licence", "error"):
            assert out[name] == row[name]
        for name in ("likes_rank", "concept"):
            assert out[name] == (None if is_broken else row[name])
        score = None if is_broken or row["score"] != row["score"] else row["score"]  # NaN is missing
        assert out["score"] == score
        verdict = "readable" if is_broken else "sharp" if score is None or score < 0.5 else None
        assert out["rejected_by"] == verdict
        assert out["selected"] == (verdict is None)
        assert "file_version" not in out and "embedding" not in out


def test_the_manifest_is_one_for_training(tmp_path: Path) -> None:
    """Its columns are those that the data path reads, and it reads what was selected."""
    from emu_lightning.data import manifest
    from emu_lightning.data.storage import find_files

    assert COLUMNS == manifest.COLUMNS
    rows = [row | {"caption": "a picture"} for row in make_rows(30)]
    made = select(scored_pool(tmp_path, rows), tmp_path, sharp=Filter("score", 0.5))
    file = find_files(str(tmp_path / "manifest.parquet"))[0]
    kept = manifest.read_manifest(file, keep="selected", caption="caption")
    assert kept["uid"].to_pylist() == [row["uid"] for row in made if row["selected"]]
    assert kept["uri"].to_pylist() == [row["uri"] for row in made if row["selected"]]


def test_the_configuration_is_told_with_its_hash(tmp_path: Path) -> None:
    pool = scored_pool(tmp_path, make_rows(20))
    first = pool.select({"sharp": Filter("score", 0.5)}, Balance(5), tmp_path)
    told = json.loads(pq.read_schema(tmp_path / "manifest.parquet").metadata[METADATA.encode()])
    chosen = json.loads((tmp_path / "selection.json").read_text())
    assert chosen["uids"] == first.uids and chosen["num"] == len(first.uids)
    digest = told.pop("configuration_sha256")
    assert told.pop("weights") == {"clip.safetensors": "ab12"}
    assert chosen["configuration"] == told and chosen["configuration_sha256"] == digest
    assert digest == hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    assert told["scores"] == {"read": "1", "scores": "2", "late": "3"}
    others = [
        pool.select({"sharp": Filter("score", 0.6)}, Balance(5), tmp_path),
        pool.select({"sharper": Filter("score", 0.5)}, Balance(5), tmp_path),
        pool.select({"sharp": Filter("score", 0.5)}, Balance(6), tmp_path),
    ]
    assert len({digest, *(other.configuration_sha256 for other in others)}) == 4


def test_how_rows_lie_in_files_changes_no_selection(tmp_path: Path) -> None:
    rows = make_rows(60)
    balance = Balance(12, "concept", {"car": 1, "food": 2}, {"score": 0.7, "likes_rank": 0.3})
    made = []
    for rows_per_shard in (3, 8, 100):
        pool = scored_pool(tmp_path / str(rows_per_shard), rows, rows_per_shard)
        made.append(
            select(pool, tmp_path / str(rows_per_shard), balance, words=Filter("num_words", maximum=2))
        )
    assert made[0] == made[1] == made[2]


def test_the_same_again_is_the_same_bytes_and_scores_of_earlier_thresholds_do_not_show(
    tmp_path: Path,
) -> None:
    """A late scorer may have scored more than this configuration needs."""
    rows = make_rows(60)
    filters = {"sharp": Filter("score", 0.5), "words": Filter("num_words", maximum=2)}
    pool = scored_pool(tmp_path, rows)
    needed = set(
        ScoredPool(pool._shards, [one for one in pool._scores if not one.is_late])
        .passing(filters)["uid"]
        .to_pylist()
    )
    assert needed == {row["uid"] for row in rows if row["error"] is None and row["score"] in (0.5, 0.75)}
    pool.select(filters, Balance(9), tmp_path)
    before = [(tmp_path / name).read_bytes() for name in ("manifest.parquet", "selection.json")]
    few = [row if row["uid"] in needed else None for row in rows]
    write_shards(tmp_path / "late", few, LATE)
    scored_pool_again = ScoredPool(pool._shards, pool._scores)
    scored_pool_again.select(filters, Balance(9), tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("manifest.parquet", "selection.json")] == before
    table = pq.read_table(tmp_path / "manifest.parquet")
    words = {row["uid"]: row["num_words"] for row in table.to_pylist()}
    assert {uid for uid, num in words.items() if num is not None} == needed


def test_a_late_scorer_that_had_nothing_to_score(tmp_path: Path) -> None:
    pool = scored_pool(tmp_path, make_rows(10))
    for path in (tmp_path / "late").iterdir():
        path.unlink()
    made = select(pool, tmp_path, none=Filter("score", 2), words=Filter("num_words", maximum=2))
    assert all(row["rejected_by"] in ("none", "readable") and row["num_words"] is None for row in made)


def test_the_funnel_counts_every_row_once(tmp_path: Path) -> None:
    rows = make_rows(80)
    filters = {"sharp": Filter("score", 0.5), "wide": Where("width > height")}
    selection = scored_pool(tmp_path, rows).select(filters, Balance(7), tmp_path)
    left = [row for row in rows]
    assert [step.name for step in selection.funnel] == ["readable", "sharp", "wide", "balance"]
    tests = [
        lambda row: row["error"] is None,
        lambda row: row["score"] in (0.5, 0.75),
        lambda row: row["width"] > row["height"],
    ]
    for step, test in zip(selection.funnel, tests, strict=False):
        assert step.num_in == len(left)
        left = [row for row in left if test(row)]
        assert step.num_out == len(left)
    assert (selection.funnel[-1].num_in, selection.funnel[-1].num_out) == (len(left), 7)


# --- ranks --------------------------------------------------------------------------------------------------


def brute_percentile(values: list[float], value: float) -> float:
    return sum(1.0 if other < value else 0.5 if other == value else 0.0 for other in values) / len(values)


def test_ranks_and_places_are_those_of_brute_force(tmp_path: Path) -> None:
    rows = make_rows(120, seed=1)
    weights = {"score": 0.7, "likes_rank": 0.3}
    balance = Balance(30, "concept", {"car": 1, "food": 1, "portrait": 3}, weights)
    made = select(scored_pool(tmp_path, rows), tmp_path, balance, wide=Filter("width", 60))
    passing = [row for row in made if row["rejected_by"] is None]
    of_concept = {name: [row for row in passing if row["concept"] == name] for name in CONCEPTS}
    for concept, members in of_concept.items():
        known = {name: [row[name] for row in members if row[name] is not None] for name in weights}
        for row in members:
            parts = [
                (weight, brute_percentile(known[name], row[name]))
                for name, weight in weights.items()
                if row[name] is not None
            ]
            if not parts:
                assert row["rank"] is None
                continue
            mean = sum(weight * part for weight, part in parts) / sum(weight for weight, _ in parts)
            assert row["rank"] == pytest.approx(mean, abs=1e-12)
        best = sorted(members, key=lambda row: (row["rank"] is None, -(row["rank"] or 0), row["uid"]))
        num = sum(row["selected"] for row in members)
        assert [row["uid"] for row in best[:num]] == [row["uid"] for row in best if row["selected"]]
        assert num == balance.allot({name: len(each) for name, each in of_concept.items()})[concept]
    assert sum(row["selected"] for row in passing) == 30
    assert not any(row["selected"] for row in made if row["concept"] is None)
    assert all(row["rank"] is None for row in made if row["rejected_by"] is not None)


# --- quotas -------------------------------------------------------------------------------------------------


def water_level(available: dict[str, int], quotas: dict[str, Fraction], size: int) -> dict[str, Fraction]:
    """Shares in real numbers: all grow in proportion, each until it is full; found by trying every set."""
    size = min(size, sum(available.values()))
    for num in range(len(available) + 1):
        for full in itertools.combinations(sorted(available), num):
            others = [name for name in available if name not in full]
            left = size - sum(available[name] for name in full)
            whole = sum(quotas[name] for name in others)
            level = Fraction(left) / whole if others else Fraction(0)
            fits = all(level * quotas[name] <= available[name] for name in others)
            is_full = all(level * quotas[name] >= available[name] for name in full) or not others
            if left >= 0 and fits and is_full:
                return {name: Fraction(available[name]) for name in full} | {
                    name: level * quotas[name] for name in others
                }
    raise AssertionError


def test_quotas_are_the_nearest_whole_numbers_to_proportional_shares() -> None:
    """Largest remainder is the whole numbers of least squared distance that add up: tried are all of them."""
    rng = random.Random(0)
    for _ in range(60):
        names = ["a", "b", "c", "d"][: rng.randrange(1, 5)]
        available = {name: rng.randrange(0, 9) for name in names}
        quotas = {name: rng.choice([0.1, 0.2, 1 / 3, 0.5, 2.0]) for name in names}
        size = rng.randrange(1, 20)
        allotted = Balance(size, "concept", quotas).allot(available)
        shares = water_level(available, {name: Fraction(str(quotas[name])) for name in names}, size)
        total = min(size, sum(available.values()))
        ways = itertools.product(*(range(available[name] + 1) for name in names))
        distances = [
            sum((num - shares[name]) ** 2 for name, num in zip(names, way, strict=True))
            for way in ways
            if sum(way) == total
        ]
        assert sum(allotted.values()) == total
        assert all(0 <= allotted[name] <= available[name] for name in names)
        assert sum((allotted[name] - shares[name]) ** 2 for name in names) == min(distances)


def test_quotas_in_words() -> None:
    """10 of 1:1:2 are 2.5, 2.5, 5; a tie of remainders goes by name. What b lacks goes to a and c as 1:2."""
    balance = Balance(10, "concept", {"c": 2, "b": 1, "a": 1})
    assert balance.allot({"a": 9, "b": 9, "c": 9}) == {"a": 3, "b": 2, "c": 5}
    assert balance.allot({"a": 9, "b": 1, "c": 9}) == {"a": 3, "b": 1, "c": 6}
    assert balance.allot({"a": 9, "x": 9}) == {"a": 9, "b": 0, "c": 0}
    assert Balance(5, "concept").allot({"a": 9, "b": 1, "c": 9}) == {"a": 2, "b": 1, "c": 2}
    assert Balance(None, "concept").allot({"a": 9, "b": 1}) == {"a": 9, "b": 1}
    assert balance.allot({}) == {"a": 0, "b": 0, "c": 0}


# --- decisions and refusals ---------------------------------------------------------------------------------


def test_decisions_come_back_as_columns_and_edited_captions_stand_beside(tmp_path: Path) -> None:
    rows = make_rows(20)
    decided = [
        {"uid": row["uid"], "accepted": i % 2 == 0, "caption": f"edited {i}"} for i, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(decided[:15]), tmp_path / "people.parquet")
    pool = scored_pool(tmp_path, rows)
    pool = ScoredPool(pool._shards, [*pool._scores, *read_decisions([tmp_path / "people.parquet"])])
    made = select(pool, tmp_path, people=Where("accepted"))
    for i, (row, out) in enumerate(zip(rows, made, strict=True)):
        assert out["caption"] == row["caption"]
        assert out["edited_caption"] == (f"edited {i}" if i < 15 else None)
        assert out["accepted"] == (i % 2 == 0 if i < 15 else None)
        assert out["selected"] == (row["error"] is None and i < 15 and i % 2 == 0)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    pool = scored_pool(tmp_path, make_rows(10))
    for balance, message in [
        (Balance(rank={"scroe": 1}), "balance.rank.scroe names the column scroe.*did you mean score"),
        (Balance(rank={"concept": 1}), "give one of numbers"),
        (Balance(column="domain"), "balance.column domain"),
    ]:
        with pytest.raises(ValueError, match=message):
            pool.select({}, balance, tmp_path)
    assert not (tmp_path / "manifest.parquet").exists()
    for arguments, message in [
        ({"size": 0}, "balance.size is 0"),
        ({"quotas": {"car": 1}}, "balance.column"),
        ({"column": "concept", "quotas": {"car": 0}}, "balance.quotas.car is 0"),
        ({"rank": {"score": float("nan")}}, "balance.rank.score is nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            Balance(**arguments)
    twice = ScoreTable("other", tmp_path / "other", {"score": pa.float32()}, "4")
    with pytest.raises(ValueError, match="scores and other both have a column score"):
        ScoredPool(pool._shards, [*pool._scores, twice])
    with pytest.raises(ValueError, match="late is there twice"):
        ScoredPool(pool._shards, [*pool._scores, pool._scores[-1]])
    rows = make_rows(5)
    with pytest.raises(ValueError, match="more than one row of uid"):
        scored_pool(tmp_path / "twice", [*rows, rows[0]]).select({}, Balance(), tmp_path)


def test_decisions_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "people.parquet"
    with pytest.raises(FileNotFoundError, match="people.parquet do not exist"):
        read_decisions([path])
    path.write_text("no table")
    with pytest.raises(ValueError, match="no Parquet file"):
        read_decisions([path])
    for rows, message in [
        ([{"name": "a"}], "no column uid; they have name"),
        ([{"uid": "a"}, {"uid": "a"}], "a uid twice"),
        ([{"uid": "a"}, {"uid": None}], "without a uid"),
    ]:
        pq.write_table(pa.Table.from_pylist(rows), path)
        with pytest.raises(ValueError, match=message):
            read_decisions([path])
