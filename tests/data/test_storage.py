from __future__ import annotations

import subprocess
from pathlib import Path

import fsspec
import pytest

from emu_lightning.data.storage import (
    LocalCopies,
    expand_braces,
    filesystem,
    find_files,
    is_url,
    read_file,
    read_part,
)


@pytest.fixture
def bucket():
    """An object store in memory; gives what writes to it."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store.pipe_file
    store.store.clear()


@pytest.mark.parametrize(
    "pattern",
    ["a", "{00..11}.tar", "{7..11}", "{007..11}", "{b,a}/{0..1}.tar", "x{,y}z", "{a,{b,c}}", "{a}", "a{1..2"],
)
def test_braces_are_those_of_a_shell(pattern):
    shell = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True)
    assert expand_braces(pattern) == shell.stdout.split()


def test_local_files_are_found_once_and_in_order(tmp_path, monkeypatch):
    for name in ("00.tar", "01.tar", "02.tar", "x.txt"):
        (tmp_path / name).write_bytes(b"123")
    monkeypatch.chdir(tmp_path)
    for pattern in ("{00..02}.tar", f"{tmp_path}/*.tar", f"file://{tmp_path}/0?.tar", ["*.tar", "01.tar"]):
        assert [file.name for file in find_files(pattern)] == ["00", "01", "02"]
    assert find_files("01.tar")[0].url == str(tmp_path / "01.tar")
    assert find_files("01.tar")[0].size == 3


def test_missing_files_are_counted_and_named(tmp_path):
    (tmp_path / "00.tar").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"2 of 3 files are missing or out of reach, such as .*/01.tar"
    ):
        find_files(f"{tmp_path}/{{00..02}}.tar")
    with pytest.raises(FileNotFoundError, match=r"no file is named .*/\*.zip"):
        find_files(f"{tmp_path}/*.zip")
    with pytest.raises(FileNotFoundError, match="empty list"):
        find_files([])


def test_remote_files_are_found_and_read(bucket):
    for name in ("00", "01"):
        bucket(f"/b/{name}.tar", name.encode())
    for pattern in ("memory://b/{00..01}.tar", "memory://b/*.tar"):
        files = find_files(pattern)
        assert [file.name for file in files] == ["00", "01"]
        assert all(is_url(file.url) for file in files)
        assert read_file(files[1].url) == b"01"
    with pytest.raises(
        FileNotFoundError, match="1 of 1 files are missing or out of reach, such as memory://b/02.tar"
    ):
        find_files("memory://b/02.tar")
    with pytest.raises(FileNotFoundError, match=r"memory://c/\*.tar"):
        find_files("memory://c/*.tar")


def test_what_a_store_needs_is_said():
    fsspec.register_implementation(
        "needy", "not_installed.Store", errtxt="Install not_installed", clobber=True
    )
    with pytest.raises(ValueError, match="needy://a/b.tar cannot be read: Install not_installed"):
        find_files("needy://a/b.tar")
    with pytest.raises(ValueError, match="pipe://cat cannot be read: Protocol not known: pipe"):
        filesystem("pipe://cat")


def test_a_store_that_does_not_answer_is_no_missing_file(bucket, monkeypatch):
    def info(self, path, **kwargs):
        raise RuntimeError("no credentials")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", info)
    with pytest.raises(OSError, match="memory://b/0.tar cannot be looked up: RuntimeError: no credentials"):
        find_files("memory://b/0.tar")


def test_a_remote_file_is_copied_once(tmp_path, bucket, monkeypatch):
    bucket("/b/0.tar", b"0123456789")
    (file,) = find_files("memory://b/0.tar")
    copies = LocalCopies(tmp_path, 1)
    assert read_part(copies, file, 3, 4) == b"3456"
    monkeypatch.setattr(
        type(fsspec.filesystem("memory")), "get_file", lambda *args: pytest.fail("copied again")
    )
    with copies.open(file) as opened:
        assert opened.read() == b"0123456789"
    bucket("/b/0.tar", b"abcdefghij")
    assert find_files("memory://b/0.tar")[0].key != file.key  # another version is another copy


def test_copies_stay_within_their_budget_and_the_least_recently_used_goes(tmp_path, bucket):
    for name in range(4):
        bucket(f"/b/{name}.tar", bytes([name]) * 100)
    files = find_files("memory://b/{0..3}.tar")
    copies = LocalCopies(tmp_path, 300e-9)
    there = lambda: [(tmp_path / f"{file.key}.copy").exists() for file in files]  # noqa: E731
    opened = [copies.open(file) for file in files[:3]]
    copies.open(files[0]).close()  # so that 1 is the oldest
    with copies.open(files[3]) as last:
        assert there() == [True, False, True, True]
        assert last.read() == bytes([3]) * 100
    assert [each.read() for each in opened] == [bytes([name]) * 100 for name in range(3)]  # 1 was open
    for each in opened:
        each.close()
    copies.open(files[1]).close()
    assert there() == [True, True, False, True]
    assert {path.suffix for path in tmp_path.iterdir()} == {".copy", ".lock"}


def test_half_a_copy_is_no_copy(tmp_path, bucket, monkeypatch):
    bucket("/b/0.tar", b"0123456789")
    (file,) = find_files("memory://b/0.tar")
    with monkeypatch.context() as patch:
        halved = lambda self, path, local: Path(local).write_bytes(b"01234")  # noqa: E731
        patch.setattr(type(fsspec.filesystem("memory")), "get_file", halved)
        with pytest.raises(OSError, match="memory://b/0.tar was copied with 5 of 10 bytes"):
            LocalCopies(tmp_path, 1).open(file)
    with LocalCopies(tmp_path, 1).open(file) as opened:
        assert opened.read() == b"0123456789"


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    (file,) = find_files(str(path))
    path.write_bytes(b"0123")
    with pytest.raises(OSError, match="/a has become shorter"):
        read_part(LocalCopies(tmp_path, 1), file, 0, 10)
