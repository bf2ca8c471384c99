"""A store on SQLite and on PostgreSQL, with a clock that stands still, people and pictures."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from PIL import Image

from emu_lightning.annotation.questions import Slot
from emu_lightning.annotation.store import Batch, NewItem, Store


class Clock:
    """Seconds since 1970, as the test sets them."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    folders = (
        [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    )
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a cluster of its own, without the database's name; skipped where PostgreSQL is missing."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's initdb is not installed")
    as_postgres: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root and there is no user postgres")
        as_postgres = ["runuser", "-u", "postgres", "--"]
    folder = Path(tempfile.mkdtemp(prefix="emu-postgresql-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if as_postgres:
        shutil.chown(folder, "postgres")

    def control(*arguments: str) -> None:
        command = [*as_postgres, str(binaries / "pg_ctl"), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)

    try:
        control("initdb", "-o", "--auth=trust --username=emu --encoding=UTF8 --no-sync")
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c max_connections=200 -c fsync=off"
        control("start", "-w", "-l", str(folder / "log"), "-o", options)
        try:
            yield f"postgresql+psycopg://emu@127.0.0.1:{port}"
        finally:
            control("stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgresql_url(postgresql_server: str) -> str:
    """The URL of a new, empty database."""
    import psycopg

    name = f"votes_{uuid4().hex}"
    with psycopg.connect(
        f"{postgresql_server.replace('+psycopg', '')}/postgres", autocommit=True
    ) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{postgresql_server}/{name}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty database, once on each kind."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql_url"))
    return f"sqlite:///{tmp_path / 'votes.db'}"


@pytest.fixture
def store(database_url: str, clock: Clock) -> Iterator[Store]:
    store = Store(database_url, clock)
    yield store
    store.close()


@pytest.fixture
def sqlite_store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    """For what does not depend on the database."""
    store = Store(f"sqlite:///{tmp_path / 'votes.db'}", clock)
    yield store
    store.close()


MakeItems = Callable[..., list[NewItem]]


@pytest.fixture(scope="session")
def picture_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A few small pictures, each of its own size."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for index in range(4):
        paths.append(folder / f"{index}.png")
        Image.new("RGB", (8 + index, 6 + index), (40 * index, 90, 200)).save(paths[-1])
    return paths


@pytest.fixture
def make_items(picture_files: list[Path]) -> MakeItems:
    def make(batch: Batch, num: int, **fields: Any) -> list[NewItem]:
        """Items named item-0, item-1, ... that suit the batch's question."""
        slots: list[Slot] = ["A", "B"]
        chosen = list(zip(slots, picture_files, strict=False))[: batch.asks.num_pictures]
        texts: dict[str, Any] = {
            "prompt": "a fox in the snow" if batch.asks.shows_prompt else None,
            "caption": "A fox in the snow." if batch.asks.shows_caption else None,
        }
        return [
            NewItem(
                name=f"item-{index}",
                pictures={slot: (path, f"model-{slot}") for slot, path in chosen},
                **{**texts, **fields},
            )
            for index in range(num)
        ]

    return make
