from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tarfile

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from emu_lightning.data import shards
from emu_lightning.data.buckets import Buckets
from emu_lightning.data.pictures import Pictures
from emu_lightning.data.shards import ShardData, Shards, order_in_windows
from emu_lightning.data.source import BrokenImage
from tests.data.tars import picture, sample, write_shard, write_tar


def open_shards(tmp_path, urls=None, **kwargs):
    return Shards(urls or f"{tmp_path}/*.tar", cache_dir=tmp_path / "cache", **kwargs)


# --- what is read -------------------------------------------------------------------------------------------


def test_every_picture_is_what_the_archive_holds(tmp_path):
    for name, first in (("00000", 0), ("00001", 5)):
        write_shard(tmp_path / f"{name}.tar", 5, first)
    source = open_shards(tmp_path, f"{tmp_path}/{{00000..00001}}.tar")
    assert len(source) == 10
    assert source.uids() == [f"0000{i // 5}/{i:09d}" for i in range(10)]
    assert [source.uid(index) for index in range(10)] == source.uids()
    for index in range(10):
        sample = source[index]
        with tarfile.open(tmp_path / f"0000{index // 5}.tar") as archive:
            stored = Image.open(io.BytesIO(archive.extractfile(f"{index:09d}.jpg").read()))
        assert (np.asarray(sample.image) == np.asarray(stored)).all()
        assert sample.text == source.text(index) == f"picture {index}"
        assert sample.uid == source.uid(index)
        assert sample.original_size == source.size(index) == (stored.height, stored.width)
    assert source.sizes().tolist() == [list(source.size(index)) for index in range(10)]
    assert pickle.loads(pickle.dumps(source))[7].uid == source.uid(7)  # data workers are sent it


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_kinds_of_tar_with_folders_and_long_names(tmp_path, tar_format):
    folder = "./deep/" + "x" * 90
    key = "y" * (60 if tar_format == tarfile.USTAR_FORMAT else 120)
    members = {
        "._000.jpg": b"left by another system",
        f"{folder}/{key}.JPG": picture(0),
        f"{folder}/{key}.txt": b"\xef\xbb\xbfa  red\nhouse\n",
        f"{folder}/{key}.cls": b"3",
        "readme": b"no picture",
    }
    write_tar(tmp_path / "a.tar", members, tar_format)
    source = open_shards(tmp_path)
    assert source.uids() == [f"a/{folder[2:]}/{key}"]
    assert source.text(0) == "a red house"


def test_sizes_are_those_of_the_upright_picture(tmp_path):
    write_tar(tmp_path / "a.tar", sample("0", 0, width=24, height=16, orientation=6))
    source = open_shards(tmp_path)
    assert source.size(0) == source[0].original_size == (24, 16)


def test_a_caption_from_the_json(tmp_path):
    write_shard(tmp_path / "a.tar", 2)
    source = open_shards(tmp_path, caption="long")
    assert [source.text(0), source.text(1)] == ["a long caption of 0", "a long caption of 1"]
    assert open_shards(tmp_path).text(0) == "picture 0"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickles_in_a_shard_are_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    members = sample("0", 0) | {f"0.{kind}": bomb for kind in ("pyd", "pickle", "pkl", "pth", "npy")}
    write_tar(tmp_path / "a.tar", members | {"1.jpg": bomb, "1.txt": b"x"})
    source = open_shards(tmp_path)
    assert source[0].text == "picture 0"
    with pytest.raises(BrokenImage, match="a/1: "):
        source[1]
    assert not (tmp_path / "exploded").exists()


def test_a_broken_picture_is_stepped_over_by_name(tmp_path):
    members = sample("0", 0) | sample("1", 1) | sample("2", 2)
    members["1.jpg"] = members["1.jpg"][:-100]
    write_tar(tmp_path / "a.tar", members)
    batch = Pictures(open_shards(tmp_path), 8)[(5, 1)]
    assert batch.broken == ["a/1"] and batch.uids == ["a/2"]
    assert open_shards(tmp_path).sizes()[1].tolist() == [16, 24]  # its header is whole


def test_pictures_that_are_not_read_are_named(tmp_path):
    write_tar(tmp_path / "a.tar", sample("0", 0) | {"1.heic": b"", "1.txt": b"x", "0.dng": b""})
    for _ in range(2):  # indexed now, and before
        with pytest.warns(
            UserWarning, match=r"1 pictures in the shards are left out, such as a/1.heic: .heic"
        ):
            assert len(open_shards(tmp_path)) == 1


# --- one line for what is wrong -----------------------------------------------------------------------------


def test_a_shard_truncated_anywhere_is_named(tmp_path):
    whole = write_shard(tmp_path / "whole.tar", 2).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + 512  # where the mark of the end begins
    (tmp_path / "whole.tar").unlink()
    path = tmp_path / "cut.tar"
    for length in [0, 1, 511, 512, 513, *range(600, end, 97), end, end + 511]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"^shard {path} is truncated.*get it anew$"):
            open_shards(tmp_path)
    path.write_bytes(whole[: end + 512])
    assert len(open_shards(tmp_path)) == 2


def test_a_damaged_header_is_no_end(tmp_path):
    path = write_shard(tmp_path / "a.tar", 2)
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2]
    content[third.offset : third.offset + 8] = b"\xff" * 8
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="a.tar is truncated or damaged in or after 000000000.json"):
        open_shards(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.txt": b"x", "0.json": b"{}"}, "shard .*a.tar holds no pictures"),
        ({"0.jpg": b"", "0.png": b""}, "a.tar has two pictures for 0: 0.jpg, 0.png"),
        (
            sample("0", 0) | {"1.jpg": b""},
            "1 of 2 pictures in shard .*a.tar have no caption .*such as 1.jpg: put",
        ),
        (sample("0", 0, caption=" "), "1 of 1 pictures .* such as 0.jpg: put a .txt beside it"),
        ({"0.jpg": b"", "0.txt": b"\xff"}, "no caption in UTF-8, such as 0.jpg"),
    ],
)
def test_wrong_shards_are_named(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=message) as caught:
        open_shards(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"[1]", b"{", b'{"long": 3}', b"\xff"])
def test_a_missing_caption_in_the_json_is_named(tmp_path, content):
    write_tar(tmp_path / "a.tar", {"0.jpg": picture(0), "0.json": content, "0.txt": b"x"})
    with pytest.raises(ValueError, match="such as 0.jpg: put a .json with 'long' beside it"):
        open_shards(tmp_path, caption="long")


def test_a_compressed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.add(__file__, "0.jpg")
    with pytest.raises(ValueError, match="a.tar is truncated or damaged at its beginning, or no plain .tar"):
        open_shards(tmp_path)


def test_two_shards_of_one_name_are_refused(tmp_path):
    urls = [str(write_shard(tmp_path / folder / "0.tar", 1)) for folder in ("a", "b")]
    with pytest.raises(ValueError, match="two shards have one name, .*a/0.tar and .*b/0.tar"):
        open_shards(tmp_path, urls)


def test_too_many_shards_at_once_are_refused(tmp_path):
    write_shard(tmp_path / "a.tar", 1)
    for number in (0, 129):
        with pytest.raises(ValueError, match=f"shuffle_shards must be from 1 to 128, got {number}"):
            open_shards(tmp_path, shuffle_shards=number)


# --- the index ----------------------------------------------------------------------------------------------


def test_the_index_is_made_once_for_each_content(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.tar", 2)
    before = open_shards(tmp_path).fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(shards, "scan", lambda *args: pytest.fail("indexed again"))
        assert open_shards(tmp_path).fingerprint() == before
    write_shard(path, 3)
    assert len(open_shards(tmp_path)) == 3
    assert open_shards(tmp_path).fingerprint() != before


def test_the_identity_of_the_pictures_does_not_depend_on_the_folder(tmp_path):
    write_shard(tmp_path / "a" / "0.tar", 2)
    before = open_shards(tmp_path, f"{tmp_path}/a/0.tar").fingerprint()
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_shards(tmp_path, f"{tmp_path}/b/0.tar").fingerprint() == before


def test_several_processes_make_the_same_index_and_pass_errors_on(tmp_path):
    for number in range(4):
        write_shard(tmp_path / f"{number}.tar", 3, 3 * number)
    urls = f"{tmp_path}/{{0..3}}.tar"
    state = torch.get_rng_state()
    one = Shards(urls, cache_dir=tmp_path / "one")
    two = Shards(urls, cache_dir=tmp_path / "two", num_workers=2)
    assert torch.equal(torch.get_rng_state(), state)
    read = lambda name: {p.name: p.read_bytes() for p in (tmp_path / name / "shard_index").glob("*.arrow")}  # noqa: E731
    assert read("one") == read("two") and len(read("two")) == 4
    assert one.uids() == two.uids()
    for number in (1, 3):
        (tmp_path / f"{number}.tar").write_bytes(b"0" * 600)
    with pytest.raises(ValueError, match=r"^shard .*/1.tar is truncated.* \(2 of 4 shards cannot be used\)$"):
        Shards(urls, cache_dir=tmp_path / "two", num_workers=2)


def test_processes_that_ask_at_once_share_the_work(tmp_path, monkeypatch):
    for number in range(6):
        write_shard(tmp_path / f"{number}.tar", 3, 3 * number)
    scan = shards.scan

    def counted(file, name, caption):
        with open(tmp_path / "scanned", "a") as log:
            log.write(f"{name}\n")
        return scan(file, name, caption)

    monkeypatch.setattr(shards, "scan", counted)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=open_shards, args=(tmp_path,)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert sorted((tmp_path / "scanned").read_text().split()) == [f"{tmp_path}/{n}.tar" for n in range(6)]
    assert len(open_shards(tmp_path)) == 18


def test_a_damaged_index_says_what_to_do(tmp_path):
    write_shard(tmp_path / "a.tar", 2)
    open_shards(tmp_path)
    (index,) = (tmp_path / "cache" / "shard_index").glob("*.arrow")
    index.write_bytes(b"0" * 100)
    shards.read_index.cache_clear()
    with pytest.raises(ValueError, match="is damaged .* delete it, it is made again"):
        open_shards(tmp_path)


# --- order --------------------------------------------------------------------------------------------------


def test_the_order_stays_within_windows_of_shards():
    groups = np.repeat(np.arange(12), 50)
    order = order_in_windows(groups, window=3, seed=7, epoch=1)
    assert sorted(order) == list(range(600))
    windows = [set(groups[order[first : first + 150]]) for first in range(0, 600, 150)]
    assert [len(window) for window in windows] == [3] * 4 and set.union(*windows) == set(range(12))
    mixed = groups[order[:150]]
    assert (np.diff(mixed) != 0).mean() > 0.5  # 2 of 3 neighbours come from another shard
    assert (order == order_in_windows(groups, 3, 7, 1)).all()
    for other in ((8, 1), (7, 2)):
        assert (order != order_in_windows(groups, 3, *other)).mean() > 0.9


def test_within_a_window_every_order_is_as_likely():
    groups = np.array([0, 0, 1, 1])
    firsts = [order_in_windows(groups, 2, seed, 0)[0] for seed in range(2000)]
    assert np.abs(np.bincount(firsts, minlength=4) - 500).max() < 80  # 4 sigma


def test_a_pass_over_some_samples_is_theirs(tmp_path):
    for number in range(4):
        write_shard(tmp_path / f"{number}.tar", 3, 3 * number)
    source = open_shards(tmp_path, shuffle_shards=1)
    chosen = np.array([0, 2, 3, 7, 8, 11])
    order = source.order(0, 0, chosen)
    assert sorted(order) == list(range(6))
    visited = [source.uid(index).split("/")[0] for index in chosen[order]]
    assert sum(a != b for a, b in zip(visited, visited[1:], strict=False)) == 3  # each shard once


# --- URLs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path):
    """Four shards in an object store in memory."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    for number in range(4):
        path = write_shard(tmp_path / f"{number}.tar", 3, 3 * number)
        store.pipe_file(f"/b/{number}.tar", path.read_bytes())
    yield store
    store.store.clear()


def test_remote_shards_are_local_ones(tmp_path, bucket):
    size = (tmp_path / "0.tar").stat().st_size
    local = open_shards(tmp_path, f"{tmp_path}/*.tar")
    gigabytes = 2.5 * size / 1e9  # two of four fit
    remote = open_shards(tmp_path, "memory://b/{0..3}.tar", cache_gb=gigabytes, shuffle_shards=2)
    shards.read_index.cache_clear()
    assert remote.uids() == local.uids()
    for index in [0, 11, 5, 8, 1, 10]:
        assert (np.asarray(remote[index].image) == np.asarray(local[index].image)).all()
        assert len(list((tmp_path / "cache" / "shards").glob("*.copy"))) <= 2
    with pytest.raises(ValueError, match="cannot hold the 3 shards of .* GB .* raise cache_gb"):
        open_shards(tmp_path, "memory://b/{0..3}.tar", cache_gb=gigabytes, shuffle_shards=3)


# --- training data ------------------------------------------------------------------------------------------


def test_shard_data_gives_the_same_batches_from_any_number_of_workers(tmp_path):
    for number in range(4):
        write_shard(tmp_path / f"{number}.tar", 3, 3 * number)
    seen = []
    for num_workers in (0, 2):
        data = ShardData(
            urls=f"{tmp_path}/{{0..2}}.tar",
            val_urls=f"{tmp_path}/3.tar",
            resolution=8,
            batch_size=3,
            shuffle_shards=1,
            num_workers=num_workers,
            cache_dir=str(tmp_path / "cache"),
        )
        loader = iter(data.train_dataloader())
        batches = [next(loader) for _ in range(6)]
        seen.append([(batch.uids, batch.images) for batch in batches])
        assert [batch.uids for batch in data.val_dataloader()] == [[f"3/{i:09d}" for i in range(9, 12)]]
        assert sorted(uid for batch in batches[:3] for uid in batch.uids) == data.source("train").uids()
        assert all(len({uid[0] for uid in batch.uids}) == 1 for batch in batches)  # one shard at a time
    for (uids, images), (again, pixels) in zip(*seen, strict=True):
        assert uids == again and torch.equal(images, pixels)
    assert ShardData(urls="x").val_source() is None


def test_buckets_of_shards_need_no_decoding(tmp_path, monkeypatch):
    members = {}
    for key in range(12):
        members |= sample(f"{key}", key, width=64 if key % 2 else 16, height=16)
    write_tar(tmp_path / "a.tar", members)
    data = ShardData(
        urls=f"{tmp_path}/a.tar",
        batch_size=4,
        buckets=Buckets(16, step=8, max_ratio=4.0),
        num_workers=0,
        cache_dir=str(tmp_path / "cache"),
    )
    with monkeypatch.context() as patch:
        patch.setattr(shards, "decode", lambda *args: pytest.fail("decoded"))
        bucketing = data.bucketing("train")
    loader = data.train_dataloader()
    batches = [batch for batch, _ in zip(loader, range(6), strict=False)]
    shapes = {(*batch.images.shape[2:], int(uid[2:]) % 2) for batch in batches for uid in batch.uids}
    assert len(bucketing.sizes) == 2 and shapes == {(16, 16, 0), (8, 32, 1)}
