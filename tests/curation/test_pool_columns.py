"""Popularity by its definition, near-duplicates against all pairs."""

import hashlib
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest

from emu_lightning.curation.pool_columns import NearDuplicates, Popularity, leaders_of, pairs_within


def shuffled(table: pa.Table, seed: int) -> pa.Table:
    return table.take(pa.array(np.random.default_rng(seed).permutation(len(table))))


def by_uid(table: pa.Table) -> dict[str, tuple]:
    rows = table.to_pylist()
    return {row["uid"]: tuple(value for name, value in row.items() if name != "uid") for row in rows}


# --- popularity ---------------------------------------------------------------------------------------------


def likes_table(num: int = 900, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    days = rng.integers(0, 60, num)  # many on one day
    start = datetime(2023, 1, 1)
    return pa.table(
        {
            "uid": [f"u{n:04d}" for n in range(num)],
            "source": [["a", "b", None][k] for k in rng.choice(3, num, p=[0.6, 0.3, 0.1])],
            "likes": [None if rng.random() < 0.1 else int(k) for k in rng.poisson(5 + days)],
            "posted_at": pa.array(
                [None if rng.random() < 0.1 else start + timedelta(days=int(d)) for d in days],
                pa.timestamp("ms", "UTC"),
            ),
        }
    )


def popularity_by_definition(rows: list[dict], period: int, fewest: int) -> dict[str, float | None]:
    """Row by row, with no sorting: counts of those that are lower and equal among its peers."""
    liked = [row for row in rows if row["likes"] is not None]

    def peers(row: dict) -> tuple:
        group = [
            other
            for other in liked
            if other["source"] == row["source"] and (other["posted_at"] is None) == (row["posted_at"] is None)
        ]
        if row["posted_at"] is None:
            return row["source"], None
        earlier = sum(other["posted_at"] < row["posted_at"] for other in group)
        return row["source"], earlier * max(1, len(group) // period) // len(group)

    keys = [peers(row) for row in liked]
    result: dict[str, float | None] = {row["uid"]: None for row in rows}
    for row, key in zip(liked, keys, strict=True):
        likes = [other["likes"] for other, k in zip(liked, keys, strict=True) if k == key]
        if len(likes) >= fewest:
            lower = sum(one < row["likes"] for one in likes)
            equal = sum(one == row["likes"] for one in likes)
            result[row["uid"]] = (lower + equal / 2) / len(likes)
    return result


def test_popularity_is_a_percentile_among_pictures_of_source_and_age():
    table = likes_table()
    made = by_uid(Popularity(period=60, fewest=15).compute(table))
    expected = popularity_by_definition(table.to_pylist(), 60, 15)
    assert made.keys() == expected.keys()
    for uid, (value,) in made.items():
        assert value == (None if expected[uid] is None else pytest.approx(expected[uid], abs=1e-6)), uid
    assert {value is None for value in expected.values()} == {True, False}


def test_popularity_does_not_depend_on_the_order_of_rows():
    table = likes_table()
    column = Popularity(period=60, fewest=15)
    assert by_uid(column.compute(shuffled(table, 1))) == by_uid(column.compute(table))


def test_old_pictures_are_no_more_popular_than_new_ones():
    """Likes that grow with age alone say nothing: every period has the mean percentile of one half."""
    num = 4000
    days = np.arange(num) % 400
    table = pa.table(
        {
            "uid": [str(n) for n in range(num)],
            "source": ["a"] * num,
            "likes": np.random.default_rng(0).poisson(10 + days),
            "posted_at": pa.array(days * -86_400_000_000, pa.timestamp("us")),
        }
    )
    values = Popularity(period=200).compute(table)["popularity"].to_numpy()
    assert abs(values[days < 100].mean() - values[days >= 300].mean()) < 0.02


@pytest.mark.parametrize("names", [["uid"], ["uid", "source"], ["uid", "source", "posted_at"]])
def test_a_pool_without_likes_has_no_popularity(names):
    made = Popularity().compute(likes_table(30).select(names))
    assert made["popularity"].null_count == 30


def test_few_pictures_say_nothing():
    assert Popularity().compute(likes_table(19))["popularity"].null_count == 19


def test_no_rows():
    assert len(Popularity().compute(likes_table(5).slice(0, 0))) == 0
    assert len(NearDuplicates().compute(hash_table(5).slice(0, 0))) == 0


# --- near-duplicates ----------------------------------------------------------------------------------------


def near_hashes(num: int, seed: int = 0) -> np.ndarray:
    """Clusters: random hashes, and others a few bits away from them or from one another."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, num, dtype=np.uint64)
    for n in range(1 + num // 3, num):
        if rng.random() < 0.7:
            flips = sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 9), replace=False))
            hashes[n] = hashes[rng.integers(0, n)] ^ np.uint64(flips)
    return hashes


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7, 10])
@pytest.mark.parametrize("num", [1, 300, 1500])
def test_pairs_are_those_of_all_against_all(num, distance):
    hashes = near_hashes(num)
    found = set()
    for left, right in pairs_within(hashes, distance):
        found |= set(zip(left.tolist(), right.tolist(), strict=True))
    rows, columns = np.triu_indices(num, 1)
    is_near = np.bitwise_count(hashes[rows] ^ hashes[columns]) <= distance
    assert found == set(zip(rows[is_near].tolist(), columns[is_near].tolist(), strict=True))


def test_candidates_come_in_pieces(monkeypatch):
    """Equal hashes, where all pairs are candidates of every band."""
    monkeypatch.setattr("emu_lightning.curation.pool_columns.MAX_CANDIDATES", 1000)
    pieces = list(pairs_within(np.zeros(100, np.uint64), 2))
    pairs = {pair for left, right in pieces for pair in zip(left.tolist(), right.tolist(), strict=True)}
    assert len(pairs) == 100 * 99 // 2
    assert max(len(left) for left, _ in pieces) <= 1000


def test_leaders_of_a_chain():
    """0 - 1 - 2 - 3: 1 goes for 0; 2 is like 1 only, which is gone, so it stays, and takes 3."""
    edges = [(0, 1), (1, 2), (2, 3), (0, 1)]
    pairs = iter([tuple(np.array(edges).T)])
    assert leaders_of(5, pairs).tolist() == [0, 0, 2, 2, 4]


def hash_table(num: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    hashes = near_hashes(num, seed)
    colours = rng.integers(60, 200, (num, 8))
    for n in range(1, num):
        if rng.random() < 0.8:
            colours[n] = np.clip(colours[rng.integers(0, n)] + rng.integers(-12, 13, 8), 0, 255)
    chroma = [int.from_bytes(row.astype(np.uint8).tobytes(), "big") for row in colours]
    digests = [hashlib.sha256(str(n % (num - num // 10)).encode()).hexdigest() for n in range(num)]
    side = rng.integers(1, 6, num) * 100
    table = pa.table(
        {
            "uid": [f"u{n:04d}" for n in rng.permutation(num)],
            "sha256": digests,
            "width": pa.array(side, pa.int32()),
            "height": pa.array(side + 10, pa.int32()),
            "phash": pa.array([None if rng.random() < 0.05 else int(one) for one in hashes], pa.uint64()),
            "chroma": pa.array(chroma, pa.uint64()),
        }
    )
    broken = pa.array(rng.random(num) < 0.05)
    for name in ("width", "height"):
        column = pa.compute.if_else(broken, None, table[name])
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def duplicates_by_definition(rows: list[dict], distance: int, chroma_distance: int) -> dict[str, tuple]:
    """From the best to the worst, each against all that were kept, in this order."""

    def is_same(one: dict, other: dict) -> bool:
        if one["phash"] is None or other["phash"] is None:
            return False
        levels = (row["chroma"].to_bytes(8, "big") for row in (one, other))
        furthest = max(abs(a - b) for a, b in zip(*levels, strict=True))
        return (one["phash"] ^ other["phash"]).bit_count() <= distance and furthest <= chroma_distance

    pictures = [row for row in rows if row["width"] is not None]
    pictures.sort(key=lambda row: (-row["width"] * row["height"], row["uid"]))
    result: dict[str, tuple] = {row["uid"]: (None, None) for row in rows}
    first: dict[str, dict] = {}
    kept: list[dict] = []
    for row in pictures:
        if row["sha256"] in first:  # the same bytes: whatever became of the first of them
            of = result[first[row["sha256"]]["uid"]][0]
        else:
            first[row["sha256"]] = row
            of = next((other["uid"] for other in kept if is_same(row, other)), row["uid"])
            if of == row["uid"]:
                kept.append(row)
        result[row["uid"]] = (of, of != row["uid"])
    return result


@pytest.mark.parametrize(("distance", "chroma_distance"), [(4, 10), (8, 20), (0, 0)])
def test_duplicates_are_those_of_the_definition(distance, chroma_distance):
    table = hash_table(500)
    made = by_uid(NearDuplicates(distance, chroma_distance).compute(table))
    assert made == duplicates_by_definition(table.to_pylist(), distance, chroma_distance)
    assert by_uid(NearDuplicates(distance, chroma_distance).compute(shuffled(table, 1))) == made


def test_the_same_bytes_are_found_without_any_hash():
    table = hash_table(60).select(["uid", "sha256", "width", "height"])
    duplicates = NearDuplicates().compute(table)["is_duplicate"].to_pylist()
    assert duplicates.count(True) > 0


@pytest.mark.parametrize("distance", [-1, 17])
def test_a_distance_that_cannot_be_searched_is_refused(distance):
    with pytest.raises(ValueError, match="distance"):
        NearDuplicates(distance)


def test_a_column_of_another_type_is_named():
    with pytest.raises(ValueError, match="likes of the pool is string"):
        Popularity().compute(pa.table({"uid": ["a"], "likes": ["many"]}))
