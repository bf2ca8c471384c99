import json
import os
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emu_lightning.curation.ingest import Folder, Shards, Table, read_shard, write_pool
from emu_lightning.curation.scoring import READ, Reader, Scores, plan, score
from tests.curation.planted import Here, Size, encoded, pixels, write_pictures
from tests.data.tars import picture, sample, write_shard, write_tar


def rows(pool):
    return {row["uid"]: row for shard in pool.shards() for row in shard.rows.to_pylist()}


def bytes_of(row):
    content, _ = Reader().read(row["uri"], row["file_offset"], row["file_size"])
    return content


def test_a_folder_is_its_pictures_broken_or_not(tmp_path):
    folder = write_pictures(tmp_path / "pool", 2)
    (folder / "000.txt").write_text("  a red\n cube ")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.JPG").write_bytes(b"")
    (folder / "sub" / ".hidden.jpg").write_bytes(picture(0))
    (folder / "c.heic").write_bytes(b"x")
    (folder / "d.nef").write_bytes(b"x")
    (folder / "d.jpg").write_bytes(picture(1))  # the picture that was made of it
    (folder / "notes.pdf").write_bytes(b"x")
    about = [
        {"file_name": "b.JPG", "text": "a cube", "likes": 7, "posted_at": "2023-09-27T12:00:00+02:00"},
        {"file_name": "gone.png", "licence": "CC0", "views": 3},
    ]
    (folder / "sub" / "metadata.jsonl").write_text("\n".join(map(json.dumps, about)) + "\n")
    found = rows(Folder(str(folder), fields={"views": "views"}, source="mine"))
    assert list(found) == ["000.png", "001.png", "c.heic", "d.jpg", "sub/b.JPG", "sub/gone.png"]
    assert found["000.png"]["caption"] == "a red cube" and found["001.png"]["caption"] is None
    assert found["000.png"]["uri"] == str(folder / "000.png") and found["000.png"]["source"] == "mine"
    assert bytes_of(found["000.png"]) == encoded(pixels(0))
    assert found["sub/b.JPG"]["likes"] == 7 and found["000.png"]["likes"] is None
    assert found["sub/b.JPG"]["posted_at"] == datetime(2023, 9, 27, 10, tzinfo=UTC)
    assert (found["sub/gone.png"]["licence"], found["sub/gone.png"]["views"]) == ("CC0", 3)


def test_equal_pools_have_equal_shards_and_changes_show(tmp_path):
    folder = write_pictures(tmp_path / "pool", 7)

    def shards():
        return Folder(str(folder)).shards(3)

    first = shards()
    assert [(shard.id, len(shard.rows)) for shard in first] == [
        ("00000000", 3),
        ("00000001", 3),
        ("00000002", 1),
    ]
    write_pool(tmp_path / "run", first)
    for shard, again in zip(first, shards(), strict=True):
        read = read_shard(tmp_path / "run", shard.id)
        assert shard.rows.equals(again.rows) and shard.content == again.content == read.content
        assert read.rows.equals(shard.rows)
    (folder / "004.txt").write_text("a caption")
    assert [a.content == b.content for a, b in zip(first, shards(), strict=True)] == [True, False, True]
    os.utime(folder / "006.png", ns=(1, 1))
    assert [a.content == b.content for a, b in zip(first, shards(), strict=True)] == [True, False, False]
    (folder / "006.png").unlink()
    write_pool(tmp_path / "run", shards())
    assert sorted(os.listdir(tmp_path / "run" / "pool")) == ["00000000.parquet", "00000001.parquet"]


def test_shards_with_what_is_beside_the_pictures(tmp_path):
    write_shard(tmp_path / "00000.tar", 3)
    members = sample("a", 7) | {"b.png": b"broken", "c.jpg": picture(8), "c.json": b"not JSON"}
    likes = {"like_count": 12, "posted_at": 1_695_816_000, "licence": "CC0"}
    members |= {"d.jpg": picture(9), "d.json": json.dumps(likes).encode()}
    write_tar(tmp_path / "00001.tar", members)
    pool = Shards(
        str(tmp_path / "{00000..00001}.tar"), fields={"likes": "like_count"}, cache_dir=str(tmp_path)
    )
    found = rows(pool)
    assert len(found) == 7
    assert bytes_of(found["00000/000000002"]) == picture(2, width=22)
    assert (found["00001/a"]["caption"], found["00001/c"]["caption"]) == ("picture 7", None)
    assert found["00001/d"]["likes"] == 12 and found["00001/d"]["licence"] == "CC0"
    assert found["00001/d"]["posted_at"] == datetime(2023, 9, 27, 12, tzinfo=UTC)
    assert found["00001/d"]["uri"] == f"{tmp_path}/00001.tar#d.jpg"
    long = Shards(str(tmp_path / "00000.tar"), caption="long", cache_dir=str(tmp_path))
    assert rows(long)["00000/000000001"]["caption"] == "a long caption of 1"
    assert rows(pool) == found  # from the cache


def test_a_table_names_pictures_loose_or_in_shards(tmp_path):
    write_shard(tmp_path / "00000.tar", 3)
    write_pictures(tmp_path / "pool", 1)
    uris = ["pool/000.png", "00000.tar#000000001.jpg", "00000.tar#gone.jpg", "gone.tar#a.jpg", "gone.png"]
    table = {"file": uris, "likes": [1, 2, None, 4, 5], "pwatermark": [0.5] * 5, "width": [1] * 5}
    pq.write_table(pa.table(table), tmp_path / "table.parquet")
    pool = Table(str(tmp_path / "table.parquet"), uri="file", caption=None, cache_dir=str(tmp_path / "cache"))
    found = rows(pool)
    assert set(found) == set(uris)
    assert bytes_of(found["pool/000.png"]) == encoded(pixels(0))
    assert bytes_of(found["00000.tar#000000001.jpg"]) == picture(1, width=21, height=17)
    assert found["pool/000.png"]["pwatermark"] == 0.5 and "width" not in found["pool/000.png"]
    assert found["00000.tar#gone.jpg"]["likes"] is None
    run = tmp_path / "run"
    shards = pool.shards()
    write_pool(run, shards)
    list(score(run, plan(run, shards, [Size()]), [Size()], Here()))
    errors = {row["uid"]: row["error"] for row in pq.read_table(READ.file(run, "00000000")).to_pylist()}
    assert errors == dict.fromkeys(uris[:2]) | dict.fromkeys(uris[2:], "missing")
    assert len(pq.read_table(Scores.of(Size()).file(run, "00000000"))) == 2


def test_pools_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Folder(str(tmp_path / "nowhere")).shards()
    with pytest.raises(FileNotFoundError, match="holds no images"):
        Folder(str(tmp_path)).shards()
    write_pictures(tmp_path, 1)
    with pytest.raises(ValueError, match="rows_per_shard"):
        Folder(str(tmp_path)).shards(0)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "000.png"}\n{"text": "a cube"}\n')
    with pytest.raises(ValueError, match="metadata.jsonl, line 2"):
        Folder(str(tmp_path)).shards()
    lines = ('{"file_name": "000.png", "likes": 3}', '{"file_name": "b.png", "likes": "many"}')
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="likes are of several types"):
        Folder(str(tmp_path)).shards()
    write_tar(tmp_path / "a" / "x.tar", sample("k", 1))
    write_tar(tmp_path / "b" / "x.tar", sample("k", 1))
    with pytest.raises(ValueError, match="uids more than once, such as x/k"):
        Shards(str(tmp_path / "{a,b}" / "x.tar"), cache_dir=str(tmp_path / "cache")).shards()
    (tmp_path / "a" / "x.tar").write_bytes((tmp_path / "b" / "x.tar").read_bytes()[:-9000])
    with pytest.raises(ValueError, match="x.tar is truncated or damaged"):
        Shards(str(tmp_path / "a" / "x.tar"), cache_dir=str(tmp_path / "cache")).shards()
    pq.write_table(pa.table({"url": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="has no column uri, caption; it has url"):
        Table(str(tmp_path / "t.parquet")).shards()
