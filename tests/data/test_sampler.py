from __future__ import annotations

from itertools import islice, product

import numpy as np
import pytest

from emu_lightning.data.sampler import (
    BucketTurns,
    Passes,
    ResumableBatchSampler,
    SequentialBatchSampler,
    local_batch_size,
    permutation,
)


def passes(num_samples, seed=1, first=0):
    members = np.arange(first, first + num_samples)
    return Passes(members, lambda epoch, indices: permutation(seed, epoch, len(indices)))


def turns(sizes, batch_size=4, seed=0):
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    streams = [passes(size, seed, start) for size, start in zip(sizes, starts, strict=True)]
    return BucketTurns(streams, sizes, batch_size, seed)


def take(sampler, num_batches):
    return list(islice(iter(sampler), num_batches))


def flat(batches):
    return [place for batch in batches for place in batch]


# --- endless streams ----------------------------------------------------------------------------------------


def test_permutation_is_a_bijection_that_depends_on_seed_and_epoch():
    orders = [permutation(seed, epoch, 101) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(101))
    assert len({tuple(order) for order in orders}) == 4


def test_permutation_never_changes():  # an old checkpoint must resume in the order it was made with
    assert permutation(0, 0, 8).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert permutation(3, 2, 5).tolist() == [4, 0, 3, 1, 2]


def test_permutation_is_uniform():
    firsts = np.bincount([permutation(0, epoch, 5)[0] for epoch in range(2000)], minlength=5)
    assert np.abs(firsts - 400).max() < 5 * np.sqrt(400 * 0.8)


@pytest.mark.parametrize("num_samples", [1, 3, 10, 64])
def test_each_pass_holds_each_sample_once(num_samples):
    stream = flat(take(ResumableBatchSampler(passes(num_samples, seed=7), batch_size=4), 3 * num_samples))
    assert [position for position, _ in stream] == list(range(len(stream)))
    for first in range(0, len(stream), num_samples):
        assert sorted(index for _, index in stream[first : first + num_samples]) == list(range(num_samples))


def test_a_stream_is_a_function_of_the_position():
    stream, again = passes(10), passes(10)
    whole = stream.indices(0, 100)
    assert [int(again.indices(position, 1)[0]) for position in reversed(range(100))] == whole[::-1].tolist()


# --- buckets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(7,), (1, 1), (5, 11, 200), (64, 3, 3, 900, 30)])
@pytest.mark.parametrize("seed", [0, 1, 12345678901])
def test_turns_are_counted_as_if_one_walked(sizes, seed):
    stream, had = turns(sizes, seed=seed), [0] * len(sizes)
    for step in range(2000):
        bucket, before = stream.turn(step)
        assert before == had[bucket]
        had[bucket] += 1
        share = np.array(sizes) / sum(sizes) * (step + 1)
        assert np.abs(had - share).max() < 6  # a random draw would be off by tens
    far = 10**15  # a later step costs no more
    assert stream.turn(far)[1] == pytest.approx(far * sizes[stream.turn(far)[0]] / sum(sizes), abs=100)


def test_turns_never_change():
    assert [turns((30, 50, 20)).turn(step)[0] for step in range(12)] == [2, 1, 0, 1, 1, 2, 1, 0, 2, 1, 0, 1]


def test_each_bucket_is_an_endless_stream_of_its_own_and_no_step_mixes_two():
    sizes, batch_size = (5, 11, 24), 4
    stream = turns(sizes, batch_size)
    starts = np.cumsum([0, *sizes])
    seen = [[] for _ in sizes]
    for batch in take(ResumableBatchSampler(stream, batch_size), 400):
        indices = [index for _, index in batch]
        bucket = int(np.searchsorted(starts, indices[0], "right")) - 1
        assert all(starts[bucket] <= index < starts[bucket + 1] for index in indices)
        seen[bucket] += indices
    for bucket, indices in enumerate(seen):
        assert indices == passes(sizes[bucket], 0, starts[bucket]).indices(0, len(indices)).tolist()


# --- steps, ranks and accumulated batches -------------------------------------------------------------------

STREAMS = {"plain": lambda: passes(10), "buckets": lambda: turns((5, 11), batch_size=8)}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("steps", [0, 1, 5, 6, 13])
def test_a_later_start_continues_the_same_stream(stream, steps):
    whole = take(ResumableBatchSampler(STREAMS[stream](), 8), 20)
    assert take(ResumableBatchSampler(STREAMS[stream](), 8, start=8 * steps), 20 - steps) == whole[steps:]


def test_another_batch_size_continues_the_same_stream():
    whole = flat(take(ResumableBatchSampler(passes(10), 4), 10))
    assert flat(take(ResumableBatchSampler(passes(10), 6, start=12), 4)) == whole[12:36]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("world_size", "num_accumulated"), list(product([1, 2, 4], [1, 2])))
def test_a_step_learns_the_same_places_however_it_is_spread(stream, world_size, num_accumulated):
    whole = take(ResumableBatchSampler(STREAMS[stream](), 8, start=8), 6)
    ranks = [
        take(
            ResumableBatchSampler(STREAMS[stream](), 8, 8, rank, world_size, num_accumulated),
            6 * num_accumulated,
        )
        for rank in range(world_size)
    ]
    at_once = [sum(slices, []) for slices in zip(*ranks, strict=True)]
    steps = [flat(at_once[i : i + num_accumulated]) for i in range(0, len(at_once), num_accumulated)]
    assert steps == whole
    assert {len(batch) for batches in ranks for batch in batches} == {8 // world_size // num_accumulated}


def test_consumed_counts_whole_steps_on_every_rank():
    for rank in range(2):
        sampler = ResumableBatchSampler(passes(10), 8, 16, rank, world_size=2, num_accumulated=2)
        consumed = []
        for batch in take(sampler, 6):
            consumed.append(sampler.consumed_after(batch[0][0]))
            sampler.start = consumed[-1]  # as the data module does
        assert consumed == [16, 24, 24, 32, 32, 40]


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="8 must be a multiple of 3 devices x 1 accumulated"):
        ResumableBatchSampler(passes(10), 8, world_size=3)
    with pytest.raises(ValueError, match="8 must be a multiple of 2 devices x 8 accumulated"):
        ResumableBatchSampler(passes(10), 8, world_size=2, num_accumulated=8)
    with pytest.raises(ValueError, match="no samples"):
        passes(0)
    with pytest.raises(ValueError, match="at least 1"):
        local_batch_size(0, 1)


# --- validation ---------------------------------------------------------------------------------------------


def test_sequential_order_shows_each_sample_once():
    batches = list(SequentialBatchSampler([np.arange(10)], 4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert flat(batches) == [(i, i) for i in range(10)]


def test_sequential_ranks_have_equally_many_batches():
    ranks = [list(SequentialBatchSampler([np.arange(10)], 2, rank, 2)) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [3, 3]
    assert len(SequentialBatchSampler([np.arange(10)], 2, 0, 2)) == 3
    together = flat(sum(slices, []) for slices in zip(*ranks, strict=True))
    assert together == [(i, i % 10) for i in range(12)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_groups_are_shown_apart_and_whole(world_size):
    groups = [np.array([3, 1, 8]), np.array([0]), np.array([2, 4, 5, 6, 7])]
    ranks = [list(SequentialBatchSampler(groups, 2, rank, world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(SequentialBatchSampler(groups, 2, 0, world_size))}
    for batches in zip(*ranks, strict=True):
        assert any(set(index for _, index in flat(batches)) <= set(group.tolist()) for group in groups)
    shown = flat(flat(ranks))
    assert {index for _, index in shown} == set(range(9))
    if world_size == 1:
        assert [index for _, index in shown] == [3, 1, 8, 0, 2, 4, 5, 6, 7]
        assert [position for position, _ in shown] == list(range(9))
    else:
        assert {len(batch) for batches in ranks for batch in batches} == {2}
