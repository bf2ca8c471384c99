"""Every attack of benchmarks/annotation_attacks.py is refused, and logged, by a server that listens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn

from benchmarks.annotation_attacks import ATTACKS, Site, Tried, prepare
from emu_lightning.annotation.access import Settings
from emu_lightning.annotation.server import create_app
from emu_lightning.annotation.store import Store


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("attacked")
    store = Store(f"sqlite:///{folder / 'annotation.db'}")
    app = create_app(store, Settings(secret_key="of the test", picture_roots=(folder,)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    site = prepare(store, folder, f"http://127.0.0.1:{port}")
    store.invite("first lead", "lead")
    yield site
    site.close()
    server.should_exit = True
    thread.join()
    store.close()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_an_attack_is_refused_and_logged(site: Site, attack: Callable[[Site], Iterator[Tried]]) -> None:
    tried = list(attack(site))
    assert tried
    assert [one.what for one in tried if not one.refused] == []
    assert [one.what for one in tried if one.logged is False] == []


def test_a_refusal_that_is_none_is_noticed(site: Site) -> None:
    """An attempt that gets through, or is not logged, would be counted."""
    client = site.person()
    taken = site.tries("no attack", lambda: client.get("/").status_code == 403)
    assert not taken.refused and taken.logged is False


def test_the_log_holds_no_secret(site: Site, tmp_path: Path) -> None:
    client = site.person(name="careful", password="a very long password")
    cookie = client.cookies["emu_session"]
    client.post("/login", data={**site.form(client, "/login"), "name": "careful", "password": "wrong secret"})
    client.post("/api/answer", json={}, headers={"X-Emu": "2"})
    told = " ".join(f"{line.what} {line.detail}" for line in site.store.refusals(50))
    assert "POST /login" in told and "POST /api/answer" in told
    assert (
        "secret" not in told
        and cookie not in told
        and "password is" not in told.replace("name or password is", "")
    )
