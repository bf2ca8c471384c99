from __future__ import annotations

import hashlib
import io
import pickle

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from emu_lightning.data import manifest as manifests
from emu_lightning.data.folder import Folder
from emu_lightning.data.manifest import Manifest, ManifestData
from emu_lightning.data.pictures import Pictures
from emu_lightning.data.source import BrokenImage
from examples.manifest import write_manifest
from tests.data.tars import picture, write_shard, write_tar


def row(uid: str, uri: str, content: bytes, **others) -> dict:
    width, height = Image.open(io.BytesIO(content)).size
    sha256 = hashlib.sha256(content).hexdigest()
    about = {"source": "tests", "licence": "CC0", "score": 0.5}
    return {"uid": uid, "uri": uri, "sha256": sha256, "width": width, "height": height} | about | others


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def pool(tmp_path):
    """A manifest of loose pictures and of members of shards, in all ways of naming them."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    contents = [picture(seed, width=20 + seed) for seed in range(6)]
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "1#.jpg").write_bytes(contents[1])
    (tmp_path / "2.jpg").write_bytes(contents[2])
    store.pipe_file("/b/3.jpg", contents[3])
    write_tar(tmp_path / "shards" / "a.tar", {"x/0.jpg": contents[0], "x/9.jpg": b"not chosen"})
    write_tar(tmp_path / "b.tar", {"4.jpg": contents[4], "4.txt": b"\xff"})
    store.pipe_file("/b/c.tar", write_tar(tmp_path / "c.tar", {"5.jpg": contents[5]}).read_bytes())
    uris = [
        "../shards/a.tar#x/0.jpg",
        "../loose/1#.jpg",
        f"file://{tmp_path}/2.jpg",
        "memory://b/3.jpg",
        f"{tmp_path}/b.tar#4.jpg",
        "memory://b/c.tar#5.jpg",
    ]
    rows = [
        row(f"u{i}", uri, content, caption=f" picture\n{i} ", short=f"p{i}", good=[True, False, None][i % 3])
        for i, (uri, content) in enumerate(zip(uris, contents, strict=True))
    ]
    yield rows, contents
    store.store.clear()


def open_manifest(tmp_path, rows, **kwargs):
    path = write(tmp_path / "tables" / "m.parquet", rows)
    return Manifest(path, cache_dir=tmp_path / "cache", **kwargs)


def pixels(image):
    return np.asarray(image).tolist()


# --- what is read -------------------------------------------------------------------------------------------


def test_pictures_are_found_wherever_they_lie(tmp_path, pool):
    rows, contents = pool
    source = open_manifest(tmp_path, rows, verify=True)
    assert source.uids() == [f"u{i}" for i in range(6)]
    for index, content in enumerate(contents):
        sample = source[index]
        assert pixels(sample.image) == pixels(Image.open(io.BytesIO(content)))
        assert (
            sample.uid == source.uid(index) == f"u{index}"
            and sample.text == source.text(index) == f"picture {index}"
        )
        assert sample.original_size == source.size(index) == (16, 20 + index)
    assert source.sizes().tolist() == [[16, 20 + index] for index in range(6)]
    assert pickle.loads(pickle.dumps(source))[5].uid == "u5"  # data workers are sent it


def test_a_decision_chooses_and_a_column_tells(tmp_path, pool):
    rows, _ = pool
    source = open_manifest(tmp_path, rows, keep="good", caption="short")
    assert source.uids() == ["u0", "u3"]  # neither no nor undecided
    assert [source.text(0), source.text(1)] == ["p0", "p3"]
    source[1]


def test_several_manifests_each_with_its_own_folder(tmp_path, pool):
    rows, _ = pool
    write(tmp_path / "one" / "0.parquet", rows[:3])
    write(tmp_path / "two" / "0.parquet", rows[3:])
    source = Manifest(f"{tmp_path}/{{one,two}}/*.parquet", cache_dir=tmp_path / "cache")
    assert source.uids() == [f"u{i}" for i in range(6)]
    assert source[0].uid == "u0"


def test_a_manifest_by_url_names_pictures_beside_it(tmp_path, pool):
    rows, contents = pool
    rows[3]["uri"] = "3.jpg"
    local = write(tmp_path / "m.parquet", rows[3:4])
    with open(local, "rb") as file:
        fsspec.filesystem("memory").pipe_file("/b/m.parquet", file.read())
    source = Manifest("memory://b/m.parquet", cache_dir=tmp_path / "cache")
    assert pixels(source[0].image) == pixels(Image.open(io.BytesIO(contents[3])))


@pytest.mark.parametrize(
    "type_", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_strings_as_other_programs_write_them(tmp_path, pool, type_):
    rows, _ = pool
    table = pa.Table.from_pylist(rows)
    for name in ("uid", "uri", "caption"):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(type_))
    (tmp_path / "tables").mkdir()
    pq.write_table(table, tmp_path / "tables" / "m.parquet")
    assert Manifest(str(tmp_path / "tables" / "m.parquet"), cache_dir=tmp_path).uids() == [
        f"u{i}" for i in range(6)
    ]


def test_the_manifest_of_a_folder_is_the_folder(tmp_path):
    for seed, orientation in enumerate((1, 6)):
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / "deep" / f"{seed}.jpg").write_bytes(picture(seed, orientation=orientation))
        (tmp_path / "deep" / f"{seed}.txt").write_text(f"picture {seed}")
    write_manifest(tmp_path / "deep", tmp_path / "m.parquet")
    folder, source = Folder(tmp_path / "deep"), Manifest(str(tmp_path / "m.parquet"), verify=True)
    for index in range(2):
        ours, theirs = source[index], folder[index]
        assert pixels(ours.image) == pixels(theirs.image)
        assert (ours.uid, ours.text, ours.original_size) == (theirs.uid, theirs.text, theirs.original_size)
        assert source.size(index) == ours.original_size


# --- identity -----------------------------------------------------------------------------------------------


def test_the_identity_is_that_of_the_named_bytes(tmp_path, pool):
    rows, _ = pool
    before = open_manifest(tmp_path, rows).fingerprint()
    rows[0]["caption"], rows[2]["uri"] = "another", "../2.jpg"
    assert open_manifest(tmp_path, rows).fingerprint() == before
    rows[0]["sha256"] = "0" * 64
    assert open_manifest(tmp_path, rows).fingerprint() != before


def test_other_bytes_are_found_on_request(tmp_path, pool):
    rows, contents = pool
    (tmp_path / "2.jpg").write_bytes(contents[1])
    assert open_manifest(tmp_path, rows)[2].original_size == (16, 21)
    source = open_manifest(tmp_path, rows, verify=True)
    with pytest.raises(BrokenImage, match="u2: its sha256 is not that of the manifest"):
        source[2]
    assert Pictures(source, 8)[(0, 2)].broken == ["u2"]


def test_a_picture_that_goes_while_it_is_read_is_broken(tmp_path, pool):
    rows, _ = pool
    source = open_manifest(tmp_path, rows)
    (tmp_path / "2.jpg").unlink()
    fsspec.filesystem("memory").rm("/b/3.jpg")
    for index in (2, 3):
        with pytest.raises(BrokenImage, match=f"u{index}: there is no .*{index}.jpg"):
            source[index]


# --- one line for what is wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "error"),
    [
        (
            lambda rows: [r.pop("sha256") for r in rows],
            {},
            "m.parquet has no column sha256; it has uid, uri, width",
        ),
        (lambda rows: None, {"caption": "long", "keep": "best"}, "has no column long, best; it has"),
        (lambda rows: None, {"keep": "score"}, "keep=score of .* is double, not a decision"),
        (lambda rows: [r.update(good=False) for r in rows], {"keep": "good"}, "has no row with good"),
        (
            lambda rows: rows[1].update(caption="\t"),
            {},
            "1 of 6 rows of .* have no caption, such as that of u1",
        ),
        (
            lambda rows: rows[4].update(sha256=None),
            {},
            "1 of 6 rows of .* have no sha256, such as that of u4",
        ),
        (lambda rows: rows[4].update(width=0), {}, "1 of 6 rows of .* have no width, such as that of u4"),
        (lambda rows: [r.update(height="high") for r in rows], {}, "height of .* is string, not int32"),
        (lambda rows: rows[4].update(uid="u3"), {}, "has 1 uids more than once, such as u3"),
        (
            lambda rows: rows[0].update(uri="../a.tar#x"),
            {},
            "1 of 3 files are missing or out of reach, such as .*/a.tar",
        ),
        (
            lambda rows: rows[1].update(uri="gone.jpg"),
            {},
            "1 pictures of the manifest are missing, such as .*gone.jpg",
        ),
        (
            lambda rows: rows[0].update(uri="../shards/a.tar#0.jpg"),
            {},
            "a.tar lacks 1 pictures .* such as 0.jpg",
        ),
    ],
)
def test_wrong_manifests_are_named(tmp_path, pool, change, options, error):
    rows, _ = pool
    change(rows)
    with pytest.raises((ValueError, FileNotFoundError), match=error) as caught:
        open_manifest(tmp_path, rows, **options)
    assert "\n" not in str(caught.value)


def test_what_is_no_manifest_is_named(tmp_path):
    (tmp_path / "m.parquet").write_text("uid,uri\n")
    with pytest.raises(ValueError, match="m.parquet is no Parquet file, or damaged"):
        Manifest(str(tmp_path / "m.parquet"))
    with pytest.raises(
        FileNotFoundError, match="1 of 1 files are missing or out of reach, such as .*/none.parquet"
    ):
        Manifest(str(tmp_path / "none.parquet"))


# --- order and training data --------------------------------------------------------------------------------


def test_the_order_reads_shard_by_shard_and_loose_pictures_anywhere(tmp_path):
    rows = []
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", 4, 4 * number)
        rows += [
            row(f"{number}/{i}", f"../{number}.tar#{i:09d}.jpg", picture(0))
            for i in range(4 * number, 4 * number + 4)
        ]
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
        rows.append(row(f"loose{number}/", f"../{number}.jpg", picture(number)))
    source = open_manifest(tmp_path, [r | {"caption": "x"} for r in rows], shuffle_shards=1)
    order = source.order(0, 0, np.arange(15))
    assert sorted(order) == list(range(15))
    files = [source.uid(index).split("/")[0] for index in order]
    assert sum(a != b for a, b in zip(files, files[1:], strict=False)) == 5  # six files, each once


def test_manifest_data_trains_on_what_is_kept(tmp_path, pool):
    rows, _ = pool
    more = [rows[2] | {"uid": f"v{i}", "good": True} for i in range(20)]
    data = ManifestData(
        manifest=write(tmp_path / "tables" / "m.parquet", rows + more),
        keep="good",
        val_fraction=0.3,
        resolution=8,
        batch_size=4,
        num_workers=0,
        cache_dir=str(tmp_path / "cache"),
    )
    train, val = data.source("train").uids(), data.source("val").uids()
    assert val and sorted(train + val) == sorted(["u0", "u3", *(f"v{i}" for i in range(20))])
    batch = next(iter(data.train_dataloader()))
    assert set(batch.uids) <= set(train) and batch.images.shape == (4, 3, 8, 8)
    assert torch.isfinite(batch.images).all()


def test_sizes_need_no_decoding(tmp_path, pool, monkeypatch):
    rows, _ = pool
    monkeypatch.setattr(manifests, "decode", lambda *args: pytest.fail("decoded"))
    source = open_manifest(tmp_path, rows)
    assert source.size(5) == (16, 25)
