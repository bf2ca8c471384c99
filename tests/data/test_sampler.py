from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from emu_lightning.data.sampler import ResumableBatchSampler, SequentialBatchSampler, permutation


def take(sampler, num_batches):
    return list(islice(iter(sampler), num_batches))


def flat(batches):
    return [place for batch in batches for place in batch]


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
    stream = flat(take(ResumableBatchSampler(num_samples, batch_size=4, seed=7), 3 * num_samples))
    assert [position for position, _ in stream] == list(range(len(stream)))
    for first in range(0, len(stream), num_samples):
        assert sorted(index for _, index in stream[first : first + num_samples]) == list(range(num_samples))


@pytest.mark.parametrize("steps", [0, 1, 5, 6, 13])
def test_a_later_start_continues_the_same_stream(steps):
    whole = take(ResumableBatchSampler(24, 4, seed=1), 20)
    assert take(ResumableBatchSampler(24, 4, seed=1, start=4 * steps), 20 - steps) == whole[steps:]


def test_another_batch_size_continues_the_same_stream():
    whole = flat(take(ResumableBatchSampler(10, 4, seed=1), 10))
    assert flat(take(ResumableBatchSampler(10, 6, seed=1, start=12), 4)) == whole[12:36]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_one_global_stream(world_size):
    whole = take(ResumableBatchSampler(10, 8, seed=3, start=8), 6)
    ranks = [take(ResumableBatchSampler(10, 8, 3, 8, rank, world_size), 6) for rank in range(world_size)]
    assert [sum(slices, []) for slices in zip(*ranks, strict=True)] == whole


def test_consumed_counts_the_global_batch_on_every_rank():
    for rank in range(2):
        sampler = ResumableBatchSampler(10, 8, 0, start=16, rank=rank, world_size=2)
        first, second = take(sampler, 2)
        assert sampler.consumed_after(first[0][0]) == 24
        assert sampler.consumed_after(second[0][0]) == 32


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="8 must be a multiple of 3 devices"):
        ResumableBatchSampler(10, 8, 0, world_size=3)
    with pytest.raises(ValueError, match="no samples"):
        ResumableBatchSampler(0, 8, 0)
    with pytest.raises(ValueError, match="at least 1"):
        SequentialBatchSampler(10, 0)


def test_sequential_order_shows_each_sample_once():
    batches = list(SequentialBatchSampler(10, 4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert flat(batches) == [(i, i) for i in range(10)]


def test_sequential_ranks_have_equally_many_batches():
    ranks = [list(SequentialBatchSampler(10, 4, rank, 2)) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [3, 3] and len(SequentialBatchSampler(10, 4, 0, 2)) == 3
    together = flat(sum(slices, []) for slices in zip(*ranks, strict=True))
    assert together == [(i, i % 10) for i in range(12)]
