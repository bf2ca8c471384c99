"""Columns that need the whole pool: what a number means among all others, and which pictures are the same.

They are functions of columns that are there already, and so cheap that they are made for every selection.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Hashes = NDArray[np.uint64]

HASH_BITS = 64
MAX_KEY_BITS = 22  # of a band, whose table of starts then takes 32 MB
MAX_CANDIDATES = 1 << 22  # pairs compared at once, about 100 MB


class PoolColumns(ABC):
    """Columns about all pictures of a pool at once.

    Attributes:
        needs: names of the columns that are used, besides `uid`; one that the pool lacks is all missing.
        columns: name and type of what is made.
    """

    needs: Sequence[str]
    columns: Mapping[str, pa.DataType]

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of version and arguments."""

    @abstractmethod
    def compute(self, table: pa.Table) -> pa.Table:
        """The pool's rows, in any order, with `uid` and those of `needs` that it has, to `uid` and `columns`.

        The values of a row do not depend on the order of rows, which stays.
        """


class Popularity(PoolColumns):
    """How many likes a picture has among those of its source and age, which had as long to get them.

    Column `popularity`: the share of them with fewer likes, equal ones counted half, in (0, 1). Pictures of
    one source are ordered by when they were posted and cut into periods of equally many; those of unknown age
    are a period of their own. Missing where likes are, and where a period has too few pictures to say.

    Args:
        period: pictures that are compared with one another.
        fewest: where there are fewer, popularity is missing.
    """

    needs = ("source", "likes", "posted_at")
    columns = {"popularity": pa.float32()}

    def __init__(self, period: int = 500, fewest: int = 20) -> None:
        if not 2 <= fewest <= period:
            raise ValueError(f"popularity needs 2 <= fewest <= period, got fewest={fewest}, period={period}")
        self.period, self.fewest = period, fewest

    def fingerprint(self) -> str:
        return _fingerprint("popularity 1", self.period, self.fewest)

    def compute(self, table: pa.Table) -> pa.Table:
        likes = _column(table, "likes", pa.float64())
        rows = np.flatnonzero(pc.is_valid(likes).to_numpy(zero_copy_only=False))
        counts = likes.to_numpy(zero_copy_only=False)[rows]
        source = _column(table, "source", pa.large_string())
        sources = pc.fill_null(source.dictionary_encode(null_encoding="encode").indices, 0).to_numpy()[rows]
        times = _times(table)
        has_time = pc.is_valid(times).to_numpy(zero_copy_only=False)[rows]
        posted = pc.fill_null(times, 0).to_numpy()[rows]
        group = 2 * sources.astype(np.int64) + has_time
        earlier, _, size = _places(group, posted)
        num_periods = np.where(has_time, np.maximum(1, size // self.period), 1)
        period = earlier * num_periods // np.maximum(1, size)
        _, peers = np.unique(group * (len(rows) + 1) + period, return_inverse=True)
        lower, equal, size = _places(peers, counts)
        share = (lower + equal / 2) / size
        values = np.full(len(table), np.nan)
        values[rows] = np.where(size >= self.fewest, share, np.nan)
        popularity = pa.array(values, pa.float32(), from_pandas=True)  # not a number: missing
        return pa.table({"uid": table["uid"], "popularity": popularity})


def _places(group: Rows, values: NDArray[Any]) -> tuple[Rows, Rows, Rows]:
    """Of each row's group: how many have a lower value, how many an equal one, and how many there are."""
    order = np.lexsort((values, group))
    is_group = np.ones(len(order), bool)
    is_group[1:] = np.diff(group[order]) != 0
    is_value = is_group.copy()
    is_value[1:] |= np.diff(values[order]) != 0
    results = []
    for is_first in (is_group, is_value):
        starts = np.flatnonzero(is_first)
        run = np.cumsum(is_first) - 1
        results.append((starts[run], np.diff(starts, append=len(order))[run]))
    (group_start, group_size), (start, size) = results
    places = np.empty((3, len(order)), np.int64)
    places[:, order] = start - group_start, size, group_size
    return places[0], places[1], places[2]


def _times(table: pa.Table) -> pa.Array:
    """`posted_at` as microseconds, int64."""
    times = _column(table, "posted_at", None)
    if pa.types.is_null(times.type):
        return times.cast(pa.int64())
    if not pa.types.is_temporal(times.type):
        raise ValueError(f"column posted_at of the pool is {times.type}, not a time")
    return times.cast(pa.timestamp("us", getattr(times.type, "tz", None))).cast(pa.int64())


class NearDuplicates(PoolColumns):
    """Which pictures are the same: the same bytes, or hashes (:mod:`.scorers.hashes`) that hardly differ.

    Pictures are taken from the best to the worst: most pixels, then lowest uid. One that is the same as a
    better one that was kept is its duplicate, so that no chain of small differences throws out a picture
    unlike all that are kept.

    Columns `duplicate_of`: the uid of the one kept, its own for those kept; and `is_duplicate`. Both are
    missing for what is no picture.

    Args:
        distance: bits of `phash` that may differ.
        chroma_distance: levels of 255 by which the mean colours of a quarter may differ.

    Raises:
        ValueError: a distance is negative, or so large that all pairs would have to be compared.
    """

    needs = ("sha256", "width", "height", "phash", "chroma")
    columns = {"duplicate_of": pa.large_string(), "is_duplicate": pa.bool_()}

    def __init__(self, distance: int = 4, chroma_distance: int = 10) -> None:
        if not 0 <= distance <= 16 or chroma_distance < 0:
            raise ValueError(
                f"near-duplicates need 0 <= distance <= 16 and chroma_distance >= 0, got {distance} and "
                f"{chroma_distance}"
            )
        self.distance, self.chroma_distance = distance, chroma_distance

    def fingerprint(self) -> str:
        return _fingerprint("near-duplicates 1", self.distance, self.chroma_distance)

    def compute(self, table: pa.Table) -> pa.Table:
        sha256 = _column(table, "sha256", pa.large_string())
        is_picture = pc.is_valid(_column(table, "width", pa.int64()))
        rows = np.flatnonzero(pc.and_(is_picture, pc.is_valid(sha256)).to_numpy(zero_copy_only=False))
        width, height = (_integers(table, name)[rows] for name in ("width", "height"))
        names = table["uid"].combine_chunks().take(pa.array(rows))
        by_uid = np.empty(len(rows), np.int64)
        by_uid[pc.sort_indices(names).to_numpy()] = np.arange(len(rows))
        rows = rows[np.lexsort((by_uid, -width * height))]  # the best first
        digests = sha256.take(pa.array(rows)).dictionary_encode().indices.to_numpy()
        _, first, same = np.unique(digests, return_index=True, return_inverse=True)
        kept = first[same]  # of each row, the best with its bytes
        has_hash = pc.is_valid(_column(table, "phash", pa.uint64())).to_numpy(zero_copy_only=False)[rows]
        nodes = np.flatnonzero((kept == np.arange(len(rows))) & has_hash)
        hashes, chroma = (_bits(table, name)[rows[nodes]] for name in ("phash", "chroma"))
        leaders = nodes[leaders_of(len(nodes), self._pairs(hashes, chroma))]
        kept[nodes] = leaders
        kept = kept[kept]  # of copies of a duplicate
        duplicate_of = np.full(len(table), -1)
        duplicate_of[rows] = rows[kept]
        is_known = duplicate_of >= 0
        is_duplicate = duplicate_of != np.arange(len(table))
        of = pa.array(duplicate_of, mask=~is_known)
        return pa.table(
            {
                "uid": table["uid"],
                "duplicate_of": table["uid"].combine_chunks().take(of).cast(pa.large_string()),
                "is_duplicate": pa.array(is_duplicate, mask=~is_known),
            }
        )

    def _pairs(self, hashes: Hashes, chroma: Hashes) -> Iterator[tuple[Rows, Rows]]:
        levels = chroma.view(np.uint8).reshape(-1, 8).astype(np.int16)
        for better, worse in pairs_within(hashes, self.distance):
            is_alike = np.abs(levels[better] - levels[worse]).max(axis=1) <= self.chroma_distance
            yield better[is_alike], worse[is_alike]


def leaders_of(num: int, pairs: Iterator[tuple[Rows, Rows]]) -> Rows:
    """Of each of `num` nodes the first leader it is paired with, itself for leaders.

    A node is a leader when it is paired with none before it. Nodes and leaders are taken from 0 on.

    Args:
        num: nodes.
        pairs: node numbers, the lower ones first; a pair may come several times.
    """
    found = [np.stack(pair, axis=1) for pair in pairs]
    edges = np.unique(np.concatenate([np.empty((0, 2), np.int64), *found]), axis=0)
    edges = edges[np.lexsort((edges[:, 0], edges[:, 1]))]  # by the worse, then by the better
    leaders = np.arange(num)
    for better, worse in edges.tolist():
        if leaders[worse] == worse and leaders[better] == better:
            leaders[worse] = better
    return leaders


def pairs_within(hashes: Hashes, distance: int) -> Iterator[tuple[Rows, Rows]]:
    """All pairs i < j whose hashes differ in at most `distance` bits, some of them several times.

    Hashes are cut into bands. If two differ in d bits, they differ in at most d / bands of some band: only
    those are looked up and compared (multi-index hashing, Norouzi et al. 2012).
    """
    num = len(hashes)
    bands = _num_bands(num, distance)
    for band in range(bands):
        bits = range(band, HASH_BITS, bands)  # neighbours are alike, so that each band gets some of all
        keys = np.zeros(num, np.int64)
        for place, bit in enumerate(bits):
            keys |= ((hashes >> np.uint64(bit)) & np.uint64(1)).astype(np.int64) << place
        order = np.argsort(keys, kind="stable")
        keys = keys[order]  # in order, where the starts that are looked up lie near one another
        starts = np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=1 << len(bits)))])
        for flips in range(distance // bands + 1):
            for places in combinations(range(len(bits)), flips):
                # Of two with different keys, one has 0 at the first of the places: that one is the left.
                left = np.arange(num) if not places else np.flatnonzero(keys & (1 << places[0]) == 0)
                partners = keys[left] ^ sum(1 << place for place in places)
                for rows, columns in _expand(starts[partners], starts[partners + 1]):
                    one, other = order[left[rows]], order[columns]
                    is_near = np.bitwise_count(hashes[one] ^ hashes[other]) <= distance
                    is_near &= one != other
                    one, other = one[is_near], other[is_near]
                    yield np.minimum(one, other), np.maximum(one, other)


def _expand(begin: Rows, end: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Pairs of each row i with begin[i], ..., end[i] - 1, not too many at once."""
    rows = np.flatnonzero(end > begin)
    begin, counts = begin[rows], (end - begin)[rows]
    sums = np.concatenate([[0], np.cumsum(counts)])
    first = 0
    while first < len(rows):
        last = max(first + 1, int(np.searchsorted(sums, sums[first] + MAX_CANDIDATES, side="right")) - 1)
        some = counts[first:last]
        shifts = np.repeat(begin[first:last] - sums[first:last], some)
        yield np.repeat(rows[first:last], some), shifts + np.arange(sums[first], sums[last])
        first = last


def _num_bands(num: int, distance: int) -> int:
    """The number of bands with the least work: keys that are looked up, and candidates that are compared."""

    def work(bands: int) -> float:
        bits = -(-HASH_BITS // bands)
        lookups = sum(comb(bits, flips) for flips in range(distance // bands + 1))
        return bands * (2.0**bits + lookups * num * (1 + num / 2.0 ** (HASH_BITS // bands)))

    return min(range(-(-HASH_BITS // MAX_KEY_BITS), HASH_BITS // 4 + 1), key=work)


def _column(table: pa.Table, name: str, type_: pa.DataType | None) -> pa.Array:
    """A column in one piece; all missing where the pool does not have it."""
    if name not in table.column_names:
        return pa.nulls(len(table), type_ or pa.null())
    column = table[name].combine_chunks()
    try:
        return column if type_ is None else column.cast(type_)
    except pa.ArrowException:
        raise ValueError(f"column {name} of the pool is {column.type}, not {type_}") from None


def _integers(table: pa.Table, name: str) -> Rows:
    numbers: Rows = pc.fill_null(_column(table, name, pa.int64()), 0).to_numpy()
    return numbers


def _bits(table: pa.Table, name: str) -> Hashes:
    bits: Hashes = pc.fill_null(_column(table, name, pa.uint64()), 0).to_numpy()
    return bits


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
