"""The annotation application in a process of its own, a PostgreSQL to serve it, and people made of code."""

from __future__ import annotations

import http.client
import json
import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from emu_lightning.annotation.store import Batch, Store

ROOT = Path(__file__).parents[1]
EMU = [sys.executable, str(ROOT / "main.py")]
START_SECONDS = 300  # a busy machine imports slowly
FORM_TOKEN = re.compile(r'name="form_token" value="([^"]+)"')
SESSION = "emu_session"

Answer = dict[str, Any]
Decide = Callable[[Mapping[str, bytes]], Answer]  # from the pictures by side, to an answer in sides


class Served:
    """`emu annotate` over a store's folder, in a process that may be killed and started again."""

    def __init__(self, folder: Path, database: str | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [*EMU, "annotate", "--store", str(folder), "--port", str(self.port)]
        self._command += [] if database is None else ["--database", database]
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it answers.

        Raises:
            RuntimeError: it ended, or took too long.
        """
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        begun = time.monotonic()
        while time.monotonic() - begun < START_SECONDS and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/login").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"the server did not start: {self._log.read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL: it has no time for anything."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self.kill()


class NotHere(Exception):
    """What a part of the benchmark needs is not on this machine."""


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of a database in a cluster of its own, which ends with the block; its writes are durable.

    Raises:
        NotHere: PostgreSQL is not installed, or this is root and there is no user to run it.
    """
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not binaries:
        raise NotHere("PostgreSQL is not installed")
    owner = None
    if os.geteuid() == 0:  # it refuses to run as root
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            raise NotHere("PostgreSQL does not run as root, and there is no user postgres") from None
    folder = Path(tempfile.mkdtemp(prefix="emu-postgresql-"))
    if owner is not None:
        os.chown(folder, owner.pw_uid, owner.pw_gid)

    def control(*arguments: str) -> None:
        done = subprocess.run(
            [binaries[-1].with_name("pg_ctl"), "-D", folder / "data", *arguments],
            cwd=folder,
            user=owner and owner.pw_uid,
            group=owner and owner.pw_gid,
            extra_groups=owner and [],
            stdout=subprocess.DEVNULL,  # a pipe would be held open by the server
            stderr=subprocess.DEVNULL,
        )
        if done.returncode:
            log = folder / "log"
            raise RuntimeError(f"pg_ctl {arguments[0]}: {log.read_text()[-2000:] if log.is_file() else done}")

    try:
        control("initdb", "-o", "--auth=trust --username=emu --encoding=UTF8")
        control("start", "-w", "-l", str(folder / "log"), "-o", f"-c listen_addresses='' -k {folder}")
        try:
            yield f"postgresql+psycopg://emu@/postgres?host={folder}"
        finally:
            control("stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def join(url: str, token: str, password: str = "") -> httpx.Client:
    """Follows an invitation link as a browser does; a client that is signed in and follows no redirects.

    Raises:
        RuntimeError: the link lets nobody in.
    """
    client = httpx.Client(base_url=url, timeout=60)
    page = client.get(f"/join/{token}")
    found = FORM_TOKEN.search(page.text)
    fields = {"form_token": found[1] if found else "", "password": password}
    response = client.post(f"/join/{token}", data=fields)
    if response.status_code != 303 or SESSION not in client.cookies:
        raise RuntimeError(f"/join/{token} answered {response.status_code}")
    return client


def invite_all(store: Store, url: str, names: Sequence[str], role: Any = "generalist") -> list[str]:
    """The session cookies of people who followed their links."""
    cookies = []
    for name in names:
        with closing(join(url, store.invite(name, role))) as client:
            cookies.append(client.cookies[SESSION])
    return cookies


@dataclass(frozen=True)
class Acknowledged:
    """A vote that the server said is kept, as it was sent.

    Attributes:
        choice: in sides.
        seconds: from the last sending of it to the reply.
        waited: from the first.
    """

    nonce: str
    token: str
    choice: str
    seconds: float
    waited: float


@dataclass
class Worker:
    """A person at the working page: holds a few tasks, loads their pictures, answers, and sends again.

    Made for a thread of its own, and of the plainest client there is, since it shares the machine with the
    server.

    Args:
        url: of the server.
        session: the cookie's value.
        decide: the person's judgement.
        think: takes as long as the person does.
        gone: set where the server will not come back, so that nobody waits for it.

    Attributes:
        votes: that were acknowledged, in their order.
        refused: why votes were not taken, each one.
        errors: replies of the server that it failed; they are sent again.
    """

    url: str
    session: str
    decide: Decide
    think: Callable[[], None] = lambda: None
    gone: threading.Event = field(default_factory=threading.Event)
    votes: list[Acknowledged] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=120)

    def work(self, batch: Batch, is_over: Callable[[], bool] = lambda: True) -> None:
        """Answers until the batch has nothing for this person and it is over."""
        while True:
            _, _, content = self._send("POST", f"/api/{batch.public_id}/next", {"num": 6})
            tasks = json.loads(content)["tasks"]
            for task in tasks:
                self._vote(task)
            if not tasks:
                if is_over():
                    self._connection.close()
                    return
                self.think()  # then looks again: someone may have held what this person could answer

    def _vote(self, task: Mapping[str, Any]) -> None:
        shown_at, pictures, seen, loaded_at = time.time(), {}, {}, {}
        for picture in task["pictures"]:
            status, proof, content = self._send("GET", picture["url"])
            if status != 200:
                self.refused.append(content.decode())
                return
            side = picture["side"]
            pictures[side], seen[side], loaded_at[side] = content, proof, time.time()
        self.think()
        answer, nonce = self.decide(pictures), secrets.token_urlsafe(12)
        times = {"shown_at": shown_at, "loaded_at": loaded_at, "submitted_at": time.time()}
        body = {"token": task["token"], "nonce": nonce, "answer": answer, "seen": seen, "times": times}
        begun = time.monotonic()
        status, _, content = self._send(
            "POST", "/api/answer", {**body, "viewport": [1280, 720], "ui_version": "1"}
        )
        if status == 200:
            waited = time.monotonic() - begun
            self.votes.append(Acknowledged(nonce, task["token"], answer["choice"], self._seconds, waited))
        else:
            self.refused.append(content.decode())

    def _send(self, method: str, path: str, body: Any = None) -> tuple[int, str, bytes]:
        """Status, X-Seen and content of a reply, once there is one: the server may be starting again."""
        headers = {"Cookie": f"{SESSION}={self.session}", "X-Emu": "1", "Content-Type": "application/json"}
        while True:
            begun = time.monotonic()
            try:
                self._connection.request(method, path, None if body is None else json.dumps(body), headers)
                response = self._connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException):
                if self.gone.is_set():
                    raise
                self._connection.close()  # the next request opens it again
                time.sleep(0.1)
                continue
            if response.status < 500:
                self._seconds = time.monotonic() - begun
                return response.status, response.headers.get("X-Seen", ""), content
            self.errors.append(content.decode())
            time.sleep(0.1)
