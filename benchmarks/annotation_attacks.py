"""Attacks on the annotation application: what people with a browser, a script or a copied cookie may try.

One function an attack; each yields what it tried, whether it was refused, and whether the refusal was logged.
The tests run the same list. Where nothing is refused but what was typed has to be shown harmless, or nothing
must happen twice, there is nothing to log.
"""

from __future__ import annotations

import http.client
import json
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from itsdangerous import URLSafeTimedSerializer
from PIL import Image

from benchmarks.annotation_client import FORM_TOKEN, SESSION, Served, join
from emu_lightning.annotation.questions import Photography
from emu_lightning.annotation.store import Batch, NewItem, Store

SCRIPT = "<script>alert(1)</script>"
MODELS = ("secret-model-one", "secret-model-two")
JSON = {"X-Emu": "1"}
KIB = 1024


@dataclass(frozen=True)
class Tried:
    """Attributes:
    logged: None where there was nothing to log.
    """

    what: str
    refused: bool
    logged: bool | None


@dataclass
class Site:
    """A running application with a batch of each kind that is attacked, and its store, read from behind."""

    url: str
    store: Store
    batches: dict[str, Batch]
    clients: list[httpx.Client] = field(default_factory=list)

    def person(self, role: Any = "generalist", name: str | None = None, password: str = "") -> httpx.Client:
        """Someone new who is signed in."""
        token = self.store.invite(name or f"{role} {secrets.token_hex(4)}", role)
        self.clients.append(join(self.url, token, password))
        return self.clients[-1]

    def task(self, client: httpx.Client, question: str = "appeal") -> dict[str, Any]:
        """One that the person holds."""
        url = f"/api/{self.batches[question].public_id}/next"
        task: dict[str, Any] = (
            client.post(url, json={"num": 1}, headers=JSON).raise_for_status().json()["tasks"][0]
        )
        return task

    def body(self, client: httpx.Client, task: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
        """An answer that would be taken, but for what is changed."""
        sides = [picture["side"] for picture in task["pictures"]]
        proofs = {side: client.get(f"/pictures/{task['token']}/{side}").headers["X-Seen"] for side in sides}
        now = time.time()
        times = {"shown_at": now - 1, "loaded_at": dict.fromkeys(sides, now - 0.5), "submitted_at": now}
        taken = {"token": task["token"], "nonce": secrets.token_hex(8), "answer": {"choice": "left"}}
        return {**taken, "seen": proofs, "times": times, "viewport": [800, 600], "ui_version": "1", **changed}

    def answer(self, client: httpx.Client, body: Mapping[str, Any]) -> httpx.Response:
        return client.post("/api/answer", json=body, headers=JSON)

    def raw(
        self, client: httpx.Client, path: str, method: str = "GET", body: Any = None, **headers: str
    ) -> tuple[int, bytes]:
        """A request as it is written, by a client that mends nothing; a body of parts is sent in chunks."""
        host = self.url.removeprefix("http://")
        with closing(http.client.HTTPConnection(host, timeout=60)) as connection:
            cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
            sent = {"Cookie": cookie} | {name.replace("_", "-"): value for name, value in headers.items()}
            try:
                connection.request(method, path, body, sent, encode_chunked=True)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it was refused before all was sent; the reply is there
            response = connection.getresponse()
            return response.status, response.read()

    def form(self, client: httpx.Client, page: str) -> dict[str, str]:
        """The hidden fields of a page of this person's."""
        found = FORM_TOKEN.search(client.get(page).text)
        return {"form_token": found[1] if found else ""}

    def num_answers(self) -> int:
        return sum(len(self.store.events(batch)) for batch in self.batches.values())

    def tries(self, what: str, is_refused: Callable[[], bool], *, is_logged: bool = True) -> Tried:
        """Tries it, and looks for a new line in the log."""
        num_before = len(self.store.refusals(10**6))
        refused = is_refused()
        logged = len(self.store.refusals(10**6)) > num_before
        return Tried(what, refused, logged if is_logged else None)

    def close(self) -> None:
        for client in self.clients:
            client.close()


def prepare(store: Store, folder: Path, url: str) -> Site:
    """Fills a store with what is attacked."""
    picture = folder / "picture.png"
    Image.new("RGB", (16, 16), "red").save(picture)
    batches = {
        question: store.add_batch(question, f"{question} {SCRIPT}", guideline=f"Look. {SCRIPT}")
        for question in ("appeal", "faithfulness", "photography", "verification", "screening")
    }
    for batch in batches.values():
        models = dict(zip(("A", "B")[: batch.asks.num_pictures], MODELS, strict=False))
        items = [
            NewItem(
                f"{number}",
                {slot: (picture, model) for slot, model in models.items()},  # type: ignore[misc]
                prompt=SCRIPT if batch.asks.num_pictures == 2 else None,
                caption=SCRIPT,
                group=SCRIPT,
            )
            for number in range(20)
        ]
        store.add_items(batch, items)
    return Site(url, store, batches)


# --- what belongs to others ---------------------------------------------------------------------------------


def other_persons_item(site: Site) -> Iterator[Tried]:
    alice, bob = site.person(), site.person()
    task = site.task(alice)
    token = task["token"]
    yield site.tries("its picture", lambda: bob.get(f"/pictures/{token}/left").status_code == 404)
    body = site.body(alice, task)
    yield site.tries("an answer to it, with its proofs", lambda: site.answer(bob, body).status_code == 404)
    site.answer(alice, body).raise_for_status()
    yield site.tries("the same when it is answered", lambda: site.answer(bob, body).status_code == 404)
    undo = f"/api/{site.batches['appeal'].public_id}/undo"
    yield site.tries("taking it back", lambda: bob.post(undo, headers=JSON).status_code == 409)
    nobody = httpx.Client(base_url=site.url)
    site.clients.append(nobody)
    yield site.tries(
        "its picture, signed out", lambda: nobody.get(f"/pictures/{token}/left").status_code == 401
    )
    yield site.tries("an answer, signed out", lambda: site.answer(nobody, body).status_code == 401)


def contact_sheets_picture(site: Site) -> Iterator[Tried]:
    alice, bob = site.person("specialist"), site.person("specialist")
    sheet = alice.get(f"/sheet/{site.batches['photography'].public_id}").text
    found = re.search(r'src="(/pictures/[^"]+)"', sheet)
    assert found and alice.get(found[1]).status_code == 200
    changed = found[1].replace("/pictures/", "/pictures/A")
    yield site.tries("another person's address of it", lambda: bob.get(found[1]).status_code == 404)
    yield site.tries("a changed one", lambda: alice.get(changed).status_code == 404)


def forged_cookie(site: Site) -> Iterator[Tried]:
    real = site.person().cookies[SESSION]
    payload, rest = real.split(".", 1)
    lead = next(person for person in site.store.people() if person.role == "lead")
    forged = URLSafeTimedSerializer("guess", salt="session").dumps([lead.id, lead.session_version])
    cookies = {
        "another signature": real[:-4] + ("AAAA" if not real.endswith("AAAA") else "BBBB"),
        "another key": forged,
        "a lead's number before a real signature": f"{forged.split('.', 1)[0]}.{rest}",
        "no signature": payload,
        "JSON": json.dumps([lead.id, lead.session_version]),
        "nothing": "",
        "far too long": "A" * 6000,
    }
    url = f"/api/{site.batches['appeal'].public_id}/next"
    for what, cookie in cookies.items():
        with httpx.Client(base_url=site.url) as client:
            headers = {**JSON, "Cookie": f"{SESSION}={cookie}"}
            yield site.tries(
                what, lambda c=client, h=headers: c.post(url, json={"num": 1}, headers=h).status_code == 401
            )


def old_session(site: Site) -> Iterator[Tried]:
    name = f"leaver {secrets.token_hex(4)}"
    client = site.person(name=name)
    copied = {**JSON, "Cookie": f"{SESSION}={client.cookies[SESSION]}"}
    url = f"/api/{site.batches['appeal'].public_id}/next"

    def is_refused() -> bool:
        with httpx.Client(base_url=site.url) as thief:
            return thief.post(url, json={"num": 1}, headers=copied).status_code == 401

    assert not is_refused()
    client.post("/logout", data=site.form(client, "/"))
    yield site.tries("a copied cookie after signing out", is_refused)
    again = site.person(name=name)
    copied["Cookie"] = f"{SESSION}={again.cookies[SESSION]}"
    assert not is_refused()
    (person,) = (person for person in site.store.people() if person.name == name)
    site.store.set_active(person, False)
    yield site.tries("a cookie of someone locked out", is_refused)
    token = site.store.invite(name, "generalist")
    yield site.tries("an invitation of someone locked out", lambda: not _joins(site, token))


def _joins(site: Site, token: str) -> bool:
    try:
        join(site.url, token).close()
    except RuntimeError:
        return False
    return True


def invitation(site: Site) -> Iterator[Tried]:
    token = site.store.invite(f"guest {secrets.token_hex(4)}", "generalist")
    join(site.url, token).close()
    yield site.tries("used twice", lambda: not _joins(site, token))
    yield site.tries("guessed", lambda: not _joins(site, secrets.token_urlsafe(24)))
    name = f"guest {secrets.token_hex(4)}"
    first, _second = site.store.invite(name, "generalist"), site.store.invite(name, "generalist")
    yield site.tries("replaced by a newer one", lambda: not _joins(site, first))


def password_guessing(site: Site) -> Iterator[Tried]:
    name = f"known {secrets.token_hex(4)}"
    site.person(name=name, password="a long password")
    with httpx.Client(base_url=site.url) as client:
        fields = site.form(client, "/login")

        def status(guess: str, who: str = name) -> int:
            return client.post("/login", data={**fields, "name": who, "password": guess}).status_code

        yield site.tries("a wrong password", lambda: status("password") == 401)
        yield site.tries("an unknown name", lambda: status("password", "nobody at all") == 401)
        yield site.tries("SQL as a name", lambda: status("x", "' OR '1'='1' -- ") == 401)
        yield site.tries(
            "many, the right one among the last",
            lambda: (
                [status(f"guess {number}") for number in range(8)][-1] == 429
                and status("a long password") == 429
            ),
        )
        target = f"//evil.example/{secrets.token_hex(4)}"
        yield site.tries(
            "a way on to another site",
            lambda: (
                "evil"
                not in client.post("/login", data={**fields, "next": target}).headers.get("location", "")
            ),
            is_logged=False,
        )


# --- votes that are none ------------------------------------------------------------------------------------


def replayed_submit(site: Site) -> Iterator[Tried]:
    alice = site.person()
    body = site.body(alice, site.task(alice))
    site.answer(alice, body).raise_for_status()
    num = site.num_answers()
    yield site.tries(
        "the same request again: the same reply, and no second answer",
        lambda: site.answer(alice, body).status_code == 200 and site.num_answers() == num,
        is_logged=False,
    )
    changed = body | {"answer": {"choice": "right"}}
    yield site.tries(
        "the same nonce with another answer: no second answer",
        lambda: site.answer(alice, changed).status_code in (200, 409) and site.num_answers() == num,
        is_logged=False,
    )
    fresh = body | {"nonce": secrets.token_hex(8)}
    yield site.tries("with a new nonce", lambda: site.answer(alice, fresh).status_code == 409)
    other = site.body(alice, site.task(alice), nonce=body["nonce"])
    yield site.tries("its nonce for another item", lambda: site.answer(alice, other).status_code == 409)


def concurrent_submit(site: Site) -> Iterator[Tried]:
    alice = site.person()
    for what, nonce in {"eight nonces": None, "one nonce": secrets.token_hex(8)}.items():
        body, num = site.body(alice, site.task(alice)), site.num_answers()
        bodies = [body | {"nonce": nonce or secrets.token_hex(8)} for _ in range(8)]

        def at_once(bodies: Any = bodies, num: int = num) -> bool:
            headers = {**JSON, "Cookie": f"{SESSION}={alice.cookies[SESSION]}"}
            with ThreadPoolExecutor(8) as threads:
                replies = threads.map(
                    lambda one: httpx.post(f"{site.url}/api/answer", json=one, headers=headers, timeout=60),
                    bodies,
                )
                statuses = [reply.status_code for reply in replies]
            return (
                statuses.count(200) in (1, 8)
                and set(statuses) <= {200, 409}
                and site.num_answers() == num + 1
            )

        yield site.tries(f"{what} at a time: one answer", at_once, is_logged=nonce is None)


def pictures_not_seen(site: Site) -> Iterator[Tried]:
    alice, bob = site.person(), site.person()
    first, second = site.body(alice, site.task(alice)), site.body(bob, site.task(bob))
    left, right = first["seen"]["left"], first["seen"]["right"]
    seen = {
        "none": {},
        "one of two": {"left": left},
        "one proof for both": {"left": left, "right": left},
        "proofs swapped": {"left": right, "right": left},
        "proofs of another assignment": second["seen"],
        "made up": {"left": "0" * 64, "right": "0" * 64},
        "empty": {"left": "", "right": ""},
    }
    for what, proofs in seen.items():
        body = first | {"seen": proofs}
        yield site.tries(what, lambda body=body: site.answer(alice, body).status_code == 422)
    times = first["times"]
    late = first | {
        "times": times | {"loaded_at": {side: times["submitted_at"] + 1 for side in ("left", "right")}}
    }
    yield site.tries("loaded after the answer", lambda: site.answer(alice, late).status_code == 422)


def answers_that_are_none(site: Site) -> Iterator[Tried]:
    alice = site.person()
    body = site.body(alice, site.task(alice))
    bodies = {
        "a slot instead of a side": {"answer": {"choice": "A"}},
        "fields that are not asked for": {"answer": {"choice": "left", "person_id": 1}},
        "another person's name beside it": {"person_id": 1},
        "a list": {"answer": ["left"]},
        "nothing": {"answer": {}},
        "times that are none": {"times": {"shown_at": "now"}},
        "a nonce of blanks": {"nonce": "   "},
        "an endless window": {"viewport": [10**9, 1]},
    }
    for what, changed in bodies.items():
        yield site.tries(what, lambda c=changed: site.answer(alice, body | c).status_code == 422)
    not_json = {**JSON, "Content-Type": "application/json"}
    for what, content in {
        "no JSON": b"choice=left",
        "NaN": b'{"token": NaN}',
        "nested": b"[" * 30_000,
    }.items():
        yield site.tries(
            what,
            lambda c=content: (
                alice.post("/api/answer", content=c, headers=not_json).status_code in (400, 422)
            ),
        )
    closed = site.store.add_batch("appeal", "closed")
    picture = site.store.items(site.batches["appeal"])[0].pictures["A"].path
    site.store.add_items(closed, [NewItem("1", {"A": (picture, None), "B": (picture, None)})])
    site.batches["closed"] = closed
    body = site.body(alice, site.task(alice, "closed"))
    site.store.set_open(closed, False)
    yield site.tries("after the batch was closed", lambda: site.answer(alice, body).status_code == 409)


def sql_in_fields(site: Site) -> Iterator[Tried]:
    alice, lead = site.person(), site.person("lead")
    body, num = site.body(alice, site.task(alice)), site.num_answers()
    bad = "x' OR '1'='1"
    yield site.tries("a token", lambda: site.answer(alice, body | {"token": bad}).status_code == 404)
    yield site.tries("a nonce", lambda: site.answer(alice, body | {"nonce": bad}).status_code == 422)
    yield site.tries(
        "an answer", lambda: site.answer(alice, body | {"answer": {"choice": bad}}).status_code == 422
    )
    yield site.tries(
        "a batch",
        lambda: alice.post(f"/api/{quote(bad)}/next", json={"num": 1}, headers=JSON).status_code == 404,
    )
    yield site.tries("a picture", lambda: alice.get(f"/pictures/{quote(bad)}/left").status_code == 404)
    group = quote("'; DROP TABLE events; --")
    batch = site.batches["photography"].public_id
    yield site.tries(
        "a group: nothing is lost",
        lambda: (
            site.person("specialist").get(f"/sheet/{batch}?group={group}").status_code in (200, 404)
            and site.num_answers() == num
        ),
        is_logged=False,
    )
    yield site.tries(
        "a format",
        lambda: lead.get(f"/lead/{batch}/export?format={quote('csv; DROP TABLE events')}").status_code == 404,
    )


# --- places on the disk -------------------------------------------------------------------------------------


def path_traversal(site: Site) -> Iterator[Tried]:
    alice = site.person()
    token = site.task(alice)["token"]
    paths = [
        "/pictures/../../../../etc/passwd",
        "/pictures/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/pictures/%2e%2e%2f%2e%2e%2fetc%2fpasswd/left",
        "/pictures/%252e%252e%252fetc%252fpasswd",
        f"/pictures/{token}/../../../etc/passwd",
        f"/pictures/{token}/..%2f..%2fetc%2fpasswd",
        f"/pictures/{token}/left%00.png",
        f"/pictures/{token}/%2fetc%2fpasswd",
        f"/pictures/{token}/A",
        "/pictures//etc/passwd",
        "/pictures/....//....//etc/passwd",
        "/static/../store.py",
        "/static/%2e%2e/store.py",
        "/static/..%2fstore.py",
        "/static/..%5cstore.py",
        "/static//etc/passwd",
        "/../../etc/passwd",
        "/work/..%2f..%2fetc%2fpasswd",
        "/sheet/..%2f..%2fetc%2fpasswd",
    ]
    for path in paths:

        def is_refused(path: str = path) -> bool:
            status, content = site.raw(alice, path)
            return status in (400, 404, 422) and b"root:" not in content and b"sqlalchemy" not in content

        yield site.tries(path.replace(token, "TOKEN"), is_refused)


def directory_listing(site: Site) -> Iterator[Tried]:
    alice = site.person()
    for path in (
        "/static/",
        "/static",
        "/pictures/",
        "/pictures",
        "/static/.",
        "/runs/",
        "/.git/config",
        "/docs",
    ):

        def is_refused(path: str = path) -> bool:
            status, content = site.raw(alice, path)
            return status == 404 and b"viewer.js" not in content and b"Index of" not in content

        yield site.tries(path, is_refused)


def import_of_other_files(site: Site) -> Iterator[Tried]:
    lead = site.person("lead")
    batch = site.batches["screening"].public_id
    num = len(site.store.items(site.batches["screening"]))
    for named in ("/etc/passwd", "../../../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.png"):

        def is_refused(named: str = named) -> bool:
            rows = {
                "jsonl": json.dumps({"item": named, "path": named}),
                "json": json.dumps([{"data": {"item": named, "image": named}}]),
            }
            statuses = [
                lead.post(
                    f"/lead/{batch}/import",
                    data=site.form(lead, "/lead"),
                    files={"file": (f"x.{suffix}", content)},
                ).status_code
                for suffix, content in rows.items()
            ]
            return statuses == [422, 422] and len(site.store.items(site.batches["screening"])) == num

        yield site.tries(named, is_refused)


# --- other sites --------------------------------------------------------------------------------------------


def cross_site_post(site: Site) -> Iterator[Tried]:
    alice, lead = site.person(), site.person("lead")
    body = site.body(alice, site.task(alice))
    for what, headers in {
        "its origin": {"Origin": "https://evil.example"},
        "no origin": {"Origin": "null"},
        "a name that begins as ours": {"Origin": f"{site.url}.evil.example"},
        "another port of this machine": {"Origin": "http://127.0.0.1:1"},
        "said by the browser": {"Sec-Fetch-Site": "cross-site"},
        "a neighbour": {"Sec-Fetch-Site": "same-site"},
    }.items():
        yield site.tries(
            f"an answer, {what}",
            lambda h=headers: alice.post("/api/answer", json=body, headers=JSON | h).status_code == 403,
        )
        fields = {**site.form(lead, "/lead/people"), "name": "eve", "role": "lead"}
        yield site.tries(
            f"a form, {what}",
            lambda h=headers, f=fields: lead.post("/lead/people", data=f, headers=h).status_code == 403,
        )
    yield site.tries(
        "an answer as a form would send it",
        lambda: (
            alice.post(
                "/api/answer", content=json.dumps(body), headers={"Content-Type": "text/plain"}
            ).status_code
            == 403
        ),
    )


def missing_header(site: Site) -> Iterator[Tried]:
    alice = site.person()
    body = site.body(alice, site.task(alice))
    batch = site.batches["appeal"].public_id
    yield site.tries("of an answer", lambda: alice.post("/api/answer", json=body).status_code == 403)
    yield site.tries("of next", lambda: alice.post(f"/api/{batch}/next", json={"num": 1}).status_code == 403)
    yield site.tries("of undo", lambda: alice.post(f"/api/{batch}/undo").status_code == 403)
    other = {"X-Emu": "2"}
    yield site.tries(
        "another", lambda: alice.post("/api/answer", json=body, headers=other).status_code == 403
    )


def missing_form_token(site: Site) -> Iterator[Tried]:
    lead, other = site.person("lead"), site.person("lead")
    batch = site.batches["appeal"].public_id
    stolen = site.form(other, "/lead/people")
    for path, fields in {
        "/lead/people": {"name": "eve", "role": "lead"},
        f"/lead/{batch}/open": {"is_open": "no"},
        f"/lead/{batch}/guideline": {"text": "always left"},
        f"/lead/{batch}/adjudicate": {"item": "1", "option": "accept"},
        "/logout": {},
    }.items():
        for what, token in {
            "none": {},
            "another person's": stolen,
            "made up": {"form_token": "0" * 64},
        }.items():
            yield site.tries(
                f"{what} at {path.replace(batch, 'BATCH')}",
                lambda p=path, f=fields, t=token: lead.post(p, data={**f, **t}).status_code == 403,
            )
    assert lead.get("/lead").status_code == 200  # still signed in


# --- too much, and too high ---------------------------------------------------------------------------------


def oversized_upload(site: Site) -> Iterator[Tried]:
    alice, lead = site.person(), site.person("lead")
    batch = site.batches["screening"].public_id
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="x.jsonl"\r\n\r\n'
    kib = b" " * KIB

    def chunks(num: int) -> Iterator[bytes]:
        yield part
        yield from (kib for _ in range(num))

    uploads = {
        "an answer": (alice, "/api/answer", 65, {"X_Emu": "1", "Content_Type": "application/json"}),
        "a login": (alice, "/login", 65, {"Content_Type": "application/x-www-form-urlencoded"}),
        "an import": (
            lead,
            f"/lead/{batch}/import",
            32 * KIB + 1,
            {"Content_Type": "multipart/form-data; boundary=x"},
        ),
        "an import by no lead": (
            alice,
            f"/lead/{batch}/import",
            65,
            {"Content_Type": "multipart/form-data; boundary=x"},
        ),
    }
    for what, (client, path, num, headers) in uploads.items():
        refusals = (413,) if client is lead or "import" not in path else (400, 403, 413, 422)
        yield site.tries(
            f"{what}, its length told",
            lambda c=client, p=path, n=num, h=headers, r=refusals: (
                site.raw(c, p, "POST", part + kib * n, **h)[0] in r
            ),
        )
        yield site.tries(
            f"{what}, in chunks of no length",
            lambda c=client, p=path, n=num, h=headers, r=refusals: (
                site.raw(c, p, "POST", chunks(n), **h)[0] in r
            ),
        )
    yield site.tries(
        "an endless length",
        lambda: site.raw(alice, "/api/answer", "POST", b"{}", X_Emu="1", Content_Length="9" * 15)[0] == 413,
    )


def role_escalation(site: Site) -> Iterator[Tried]:
    alice, specialist = site.person(), site.person("specialist")
    batch = site.batches["photography"].public_id
    for path in (
        "/lead",
        "/lead/people",
        "/lead/security",
        f"/lead/{batch}",
        f"/lead/{batch}/export?format=jsonl",
        f"/lead/{batch}/adjudicate",
        f"/work/{batch}",
        f"/sheet/{batch}",
        f"/guideline/{batch}",
    ):
        yield site.tries(
            f"a generalist reads {path}".replace(batch, "BATCH"),
            lambda p=path: alice.get(p).status_code == 403,
        )
        if path.startswith("/lead"):
            yield site.tries(
                f"a specialist reads {path}".replace(batch, "BATCH"),
                lambda p=path: specialist.get(p).status_code == 403,
            )
    for path, fields in {
        "/lead/people": {"name": "eve", "role": "lead"},
        "/lead/batches": {"question": "appeal", "title": "mine"},
        f"/lead/{batch}/open": {"is_open": "no"},
        f"/lead/{batch}/guideline": {"text": "always left"},
        f"/lead/{batch}/adjudicate": {"item": "1", "option": "accept"},
        "/lead/people/1/active": {"is_active": "no"},
    }.items():
        token = site.form(specialist, "/")
        yield site.tries(
            f"a specialist posts {path}".replace(batch, "BATCH"),
            lambda p=path, f=fields, t=token: specialist.post(p, data={**f, **t}).status_code == 403,
        )
    upload = {"file": ("x.jsonl", b"{}")}
    yield site.tries(
        "a specialist imports",
        lambda: (
            specialist.post(
                f"/lead/{batch}/import", data=site.form(specialist, "/"), files=upload
            ).status_code
            == 403
        ),
    )
    yield site.tries(
        "a generalist asks for a review",
        lambda: alice.post(f"/api/{batch}/next", json={"num": 1}, headers=JSON).status_code == 403,
    )
    token = site.store.invite(f"guest {secrets.token_hex(4)}", "generalist")

    def joins_as_lead() -> bool:
        with httpx.Client(base_url=site.url) as client:
            client.post(f"/join/{token}", data={**site.form(client, f"/join/{token}"), "role": "lead"})
            return client.get("/lead").status_code == 403

    yield site.tries("a guest joins as a lead", joins_as_lead)


def other_methods(site: Site) -> Iterator[Tried]:
    alice = site.person()
    for method, path in (("PUT", "/api/answer"), ("DELETE", "/"), ("TRACE", "/"), ("PATCH", "/logout")):
        yield site.tries(
            f"{method} {path}", lambda m=method, p=path: alice.request(m, p, headers=JSON).status_code == 405
        )


# --- what is shown ------------------------------------------------------------------------------------------


def script_in_texts(site: Site) -> Iterator[Tried]:
    """Names, titles, prompts, captions, comments and groups: each page shows them as text."""
    lead = site.person("lead", name=f"{SCRIPT} {secrets.token_hex(2)}")
    alice, one, two = site.person(), site.person("specialist", name=f"{SCRIPT} 1"), site.person("specialist")
    photography = site.batches["photography"].public_id
    marks = dict.fromkeys(Photography.criteria, 1)
    for client, accepts in ((one, True), (two, False)):  # they disagree, so that the lead sees both
        while tasks := client.post(f"/api/{photography}/next", json={"num": 20}, headers=JSON).json()[
            "tasks"
        ]:
            for task in tasks:
                answer = {**marks, "accept": accepts, "reasons": [], "comment": SCRIPT}
                site.answer(client, site.body(client, task, answer=answer)).raise_for_status()
    with httpx.Client(base_url=site.url) as client:
        link = f"/join/{site.store.invite(f'{SCRIPT} 2', 'generalist')}"
        pages = [client.get(link), client.get(f"/login?next={quote(SCRIPT)}")]
        fields = {**site.form(client, "/login"), "name": SCRIPT, "password": "x", "next": f'"{SCRIPT}'}
        pages.append(client.post("/login", data=fields))
    batches = [batch.public_id for batch in site.batches.values()]
    pages += [lead.get(path) for path in ("/lead", "/lead/people", "/lead/security")]
    pages += [lead.get(f"/lead/{batch}") for batch in batches]
    pages += [lead.get(f"/lead/{photography}/adjudicate"), one.get(f"/sheet/{photography}"), alice.get("/")]
    pages += [one.get(f"/{page}/{photography}") for page in ("work", "guideline")]
    pages += [
        alice.get(f"/work/{site.batches[question].public_id}") for question in ("appeal", "verification")
    ]
    pages += [alice.get(f"/{quote(SCRIPT)}"), alice.get(f"/work/{quote(SCRIPT)}")]
    for page in pages:

        def is_harmless(page: httpx.Response = page) -> bool:
            policy = page.headers["Content-Security-Policy"]
            is_html = page.headers["Content-Type"].startswith("text/html")
            is_strict = "default-src 'self'" in policy and "unsafe-inline" not in policy
            return is_html and SCRIPT not in page.text and "onerror" not in page.text and is_strict

        path = page.request.url.path.replace(link.rpartition("/")[2], "TOKEN")
        for question, batch in site.batches.items():
            path = path.replace(batch.public_id, question)
        yield site.tries(f"{page.request.method} {path}", is_harmless, is_logged=False)
    shown = [page for page in pages if "&lt;script&gt;" in page.text]
    yield site.tries("they are shown at all", lambda: len(shown) > 10, is_logged=False)
    tasks = alice.post(f"/api/{site.batches['verification'].public_id}/next", json={"num": 1}, headers=JSON)
    yield site.tries(
        "a caption is sent as JSON that no browser takes for a page",
        lambda: (
            tasks.headers["Content-Type"] == "application/json"
            and tasks.headers["X-Content-Type-Options"] == "nosniff"
        ),
        is_logged=False,
    )


def models_in_what_raters_see(site: Site) -> Iterator[Tried]:
    alice, specialist = site.person(), site.person("specialist")
    batch = site.batches["appeal"]
    task = site.task(alice)
    replies = {
        "the list of batches": alice.get("/"),
        "the working page": alice.get(f"/work/{batch.public_id}"),
        "the tasks": alice.post(f"/api/{batch.public_id}/next", json={"num": 6}, headers=JSON),
        "a picture": alice.get(task["pictures"][0]["url"]),
        "the reply to an answer": site.answer(alice, site.body(alice, task)),
        "what is taken back": alice.post(f"/api/{batch.public_id}/undo", headers=JSON),
        "the contact sheet": specialist.get(f"/sheet/{site.batches['photography'].public_id}"),
    }
    for what, reply in replies.items():
        reply.raise_for_status()
        told = f"{reply.url} {dict(reply.headers)} {reply.text}"
        yield site.tries(
            f"{what}: no model, slot or path",
            lambda t=told: not any(name in t for name in (*MODELS, '"A"', '"B"', "picture.png")),
            is_logged=False,
        )


ATTACKS: tuple[Callable[[Site], Iterator[Tried]], ...] = (
    other_persons_item,
    contact_sheets_picture,
    forged_cookie,
    old_session,
    invitation,
    password_guessing,
    replayed_submit,
    concurrent_submit,
    pictures_not_seen,
    answers_that_are_none,
    sql_in_fields,
    path_traversal,
    directory_listing,
    import_of_other_files,
    cross_site_post,
    missing_header,
    missing_form_token,
    oversized_upload,
    role_escalation,
    other_methods,
    script_in_texts,
    models_in_what_raters_see,
)


def attack_all(folder: Path) -> dict[str, Any]:
    """Against a server process; how many attempts there were, and how many were refused and logged."""
    store = Store(f"sqlite:///{folder / 'annotation.db'}")
    served = Served(folder)
    site = prepare(store, folder, served.url)
    store.invite("first lead", "lead")
    with served.running():
        tried = {attack.__name__: list(attack(site)) for attack in ATTACKS}
    site.close()
    store.close()
    every = [one for attempts in tried.values() for one in attempts]
    return {
        "tried": len(every),
        "refused": sum(one.refused for one in every),
        "to_log": sum(one.logged is not None for one in every),
        "logged": sum(one.logged is True for one in every),
        "by_attack": {
            name: {"tried": len(attempts), "refused": sum(one.refused for one in attempts)}
            for name, attempts in tried.items()
        },
        "not_refused": [
            f"{name}: {one.what}" for name, some in tried.items() for one in some if not one.refused
        ],
        "not_logged": [
            f"{name}: {one.what}" for name, some in tried.items() for one in some if one.logged is False
        ],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(attack_all(Path(folder)), indent=1))


if __name__ == "__main__":
    main()
