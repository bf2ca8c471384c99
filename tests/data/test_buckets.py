from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from emu_lightning.data.buckets import Buckets
from emu_lightning.data.folder import Folder


def log_ratio(size):
    return np.log(size[0] / size[1])


@pytest.fixture
def photographs():
    """(500, 2) sizes, from panoramas to bookmarks."""
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(300, 5000, 500), rng.integers(300, 5000, 500)], axis=1)


@pytest.mark.parametrize(
    ("resolution", "step", "max_ratio"),
    [(1024, 64, 2.0), (1024, 64, 4.0), (512, 8, 3.0), (64, 64, 2.0), (8, 2, 1.0)],
)
def test_sizes_are_of_one_area_and_symmetric(resolution, step, max_ratio):
    sizes = Buckets(resolution, step, max_ratio).sizes()
    assert (sizes % step == 0).all() and [resolution, resolution] in sizes.tolist()
    assert (sizes.prod(1) <= resolution**2).all()
    assert (
        (sizes.min(1) + step) * sizes.max(1) > resolution**2 - step * sizes.max(1)
    ).all()  # no room for more
    assert (sizes.max(1) <= max_ratio * sizes.min(1)).all()
    assert sorted(sizes.tolist()) == sorted(sizes[:, ::-1].tolist())
    ratios = [log_ratio(size) for size in sizes]
    assert ratios == sorted(set(ratios))


def test_the_sizes_of_sdxl_are_among_them():
    sizes = Buckets(1024, 64, 4.0).sizes().tolist()
    for size in ([1024, 1024], [896, 1152], [832, 1216], [768, 1344]):  # Podell et al. 2023, appendix I
        assert size in sizes and size[::-1] in sizes


def test_each_picture_has_the_bucket_of_the_nearest_log_ratio(photographs):
    buckets = Buckets(1024)
    bucketing = buckets.assign(photographs)
    used = {tuple(size) for size in bucketing.sizes.tolist()}
    assert used <= {tuple(size) for size in buckets.sizes().tolist()} and not bucketing.merged
    for size, bucket in zip(photographs, bucketing.picture_sizes, strict=True):
        distances = [abs(log_ratio(size) - log_ratio(each)) for each in buckets.sizes()]
        assert abs(log_ratio(size) - log_ratio(bucket)) == pytest.approx(min(distances))


def test_too_small_buckets_join_their_nearest_and_nothing_is_dropped(photographs):
    bucketing = Buckets(1024).assign(photographs, min_pictures=40)
    counts = [len(members) for members in bucketing.members]
    assert min(counts) >= 40 and sum(counts) == 500
    assert sorted(np.concatenate(bucketing.members).tolist()) == list(range(500))
    assert bucketing.merged and all(0 < num < 40 for _, num in bucketing.merged)
    for size, bucket in zip(photographs, bucketing.picture_sizes, strict=True):
        distances = [abs(log_ratio(size) - log_ratio(each)) for each in bucketing.sizes]
        assert abs(log_ratio(size) - log_ratio(bucket)) == pytest.approx(min(distances))


def test_the_emptiest_goes_first():
    squares, wides, panoramas = [(8, 8)] * 9, [(8, 12)] * 3, [(4, 16)] * 2
    bucketing = Buckets(8, 2, max_ratio=4).assign(np.array([*squares, *wides, *panoramas]), min_pictures=5)
    # The two panoramas join the three wide ones, which then are enough; these would have joined the squares.
    assert bucketing.sizes.tolist() == [[6, 10], [8, 8]]
    assert bucketing.bucket_of.tolist() == [1] * 9 + [0] * 5
    assert bucketing.merged == [((4, 16), 2)]


def test_few_pictures_share_one_bucket():
    bucketing = Buckets(1024).assign(np.array([(600, 800), (800, 600), (610, 800)]), min_pictures=64)
    assert bucketing.sizes.tolist() == [[896, 1152]] and bucketing.merged == [((1152, 896), 1)]
    assert bucketing.bucket_of.tolist() == [0, 0, 0]


def test_every_bucket_is_described():
    text = Buckets(8, step=2).assign(np.array([(8, 8)] * 4 + [(10, 6)]), min_pictures=2).describe()
    assert text.splitlines() == [
        "bucket 8 x 8: 5 pictures",
        "bucket 10 x 6 has 1 pictures, too few for a batch: they join the nearest bucket",
    ]


def test_wrong_buckets_are_named():
    with pytest.raises(ValueError, match="buckets.resolution 1000 must be a multiple of buckets.step 64"):
        Buckets(1000)
    with pytest.raises(ValueError, match="buckets.max_ratio must be at least 1"):
        Buckets(1024, max_ratio=0.5)


def test_sizes_of_a_folder_are_those_of_its_upright_pictures(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / f"{orientation}.jpg", exif=exif)
        (tmp_path / f"{orientation}.txt").write_text("noise")
    (tmp_path / "torn.png").write_bytes(b"no picture")
    (tmp_path / "torn.txt").write_text("torn")
    folder = Folder(tmp_path)
    sizes = folder.sizes().tolist()
    assert sizes[:8] == [list(folder[index].original_size) for index in range(8)]
    assert sizes[:8] == [[20, 30]] * 4 + [[30, 20]] * 4 and sizes[8] == [1, 1]
