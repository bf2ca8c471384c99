from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request, Response
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from emu_lightning.annotation import access, api, pages
from emu_lightning.annotation.access import Settings
from emu_lightning.annotation.server import create_app
from emu_lightning.annotation.store import Batch, Person, Store
from tests.annotation.conftest import MakeItems


class Browser(TestClient):
    """One person's, signed in."""

    def __init__(self, app: Any, person: Person | None = None) -> None:
        super().__init__(app, "http://emu.example", headers={"X-Emu": "1"}, follow_redirects=False)
        if person is not None:
            response = Response()
            access.sign_in(Request({"type": "http", "app": app, "headers": []}), response, person)
            name, _, value = response.headers["set-cookie"].split(";")[0].partition("=")
            self.cookies.set(name, value)

    def next(self, batch: Batch, num: int = 6) -> dict[str, Any]:
        response = self.post(f"/api/{batch.public_id}/next", json={"num": num})
        assert response.status_code == 200, response.text
        return response.json()  # type: ignore[no-any-return]

    def look(self, task: dict[str, Any]) -> dict[str, str]:
        """Loads every picture; the proofs."""
        return {picture["side"]: self.get(picture["url"]).headers["X-Seen"] for picture in task["pictures"]}


def answer_to(task: dict[str, Any], seen: dict[str, str], **fields: Any) -> dict[str, Any]:
    return {
        "token": task["token"],
        "nonce": f"nonce-{task['token']}"[:64],
        "answer": {"choice": "left"},
        "seen": seen,
        "times": {
            "shown_at": 100.0,
            "loaded_at": dict.fromkeys(seen, 99.5),
            "first_input_at": 101.0,
            "submitted_at": 102.0,
        },
        "viewport": [390, 844],
        "ui_version": "1",
        **fields,
    }


class World:
    """A batch of pairs on a server, with two people."""

    def __init__(self, store: Store, make_items: MakeItems, picture_files: list[Path]) -> None:
        self.store = store
        self.pictures = picture_files
        self.app = create_app(store, Settings("k" * 64, picture_roots=(picture_files[0].parent,)))
        self.batch = store.add_batch("appeal", "Pairs", num_people=2)
        texts = {"prompt": "secret prompt", "caption": "secret caption", "group": "secret group"}
        self.items = make_items(self.batch, 6, **texts, extra={"uid": "secret uid"})
        store.add_items(self.batch, self.items)
        self.one, self.two = (store.add_person(name, "generalist") for name in ("Ann", "Bob"))

    def browser(self, person: Person | None) -> Browser:
        return Browser(self.app, person)

    def statuses(self) -> list[str]:
        """Of the refusals in the log, oldest first."""
        return [refusal.what for refusal in reversed(self.store.refusals())]


@pytest.fixture
def world(sqlite_store: Store, make_items: MakeItems, picture_files: list[Path]) -> World:
    return World(sqlite_store, make_items, picture_files)


@pytest.fixture
def both(store: Store, make_items: MakeItems, picture_files: list[Path]) -> World:
    """The same on each kind of database."""
    return World(store, make_items, picture_files)


# --- the way of one answer --------------------------------------------------------------------------------


def test_from_the_next_item_to_an_answer_and_back(both: World) -> None:
    browser, store, batch = both.browser(both.one), both.store, both.batch
    given = browser.next(batch, 2)
    assert given["guideline_version"] == 1
    assert given["progress"] == {"done": 0, "total": 12, "mine": 0, "seconds_left": None}
    task, other = given["tasks"]
    assert task["answer"] is None
    lent = {one.token: one for one in store.lend(both.one, batch, 2)}[task["token"]]
    paths = {"A": both.pictures[0], "B": both.pictures[1]}
    for picture in task["pictures"]:
        response = browser.get(picture["url"])
        assert response.content == paths[lent.sides[picture["side"]]].read_bytes()
        assert response.headers["content-type"] == "image/png"
        stored = lent.item.pictures[lent.sides[picture["side"]]]
        assert (picture["width"], picture["height"]) == (stored.width, stored.height)

    response = browser.post("/api/answer", json=answer_to(task, browser.look(task)))
    assert response.status_code == 200
    assert response.json()["progress"]["done"] == response.json()["progress"]["mine"] == 1
    [counted] = store.answers(batch)
    assert counted.answer == {"choice": lent.sides["left"]} and counted.person == both.one
    assert counted.times["first_input_at"] == 101.0
    assert store.events(batch)[0].body["client"] == {"viewport": [390, 844], "ui_version": "1"}

    back = browser.post(f"/api/{batch.public_id}/undo")
    assert back.status_code == 200
    assert back.json()["task"] == {**task, "answer": {"choice": "left"}}
    assert browser.post(f"/api/{batch.public_id}/undo").status_code == 409
    tasks = {one["token"]: one for one in browser.next(batch, 2)["tasks"]}
    assert tasks == {task["token"]: back.json()["task"], other["token"]: other}


def test_an_answer_sent_again_has_the_same_reply(both: World) -> None:
    browser = both.browser(both.one)
    [task] = browser.next(both.batch, 1)["tasks"]
    body = answer_to(task, browser.look(task))
    first, second = (browser.post("/api/answer", json=body) for _ in range(2))
    assert (first.status_code, first.json()) == (second.status_code, second.json()) == (200, first.json())
    assert len(both.store.events(both.batch)) == 1
    assert browser.post("/api/answer", json={**body, "nonce": "another"}).status_code == 409


@pytest.mark.parametrize("question", ["screening", "photography", "caption", "verification", "faithfulness"])
def test_a_task_shows_what_its_question_shows(world: World, make_items: MakeItems, question: str) -> None:
    batch = world.store.add_batch(question, "Other")
    texts = {"prompt": "the prompt", "caption": "the caption", "group": "the group"}
    world.store.add_items(batch, make_items(batch, 1, **texts))
    person = world.store.add_person("Zoë", batch.asks.roles[0])
    [task] = world.browser(person).next(batch)["tasks"]
    is_pair = question == "faithfulness"
    assert task["prompt"] == ("the prompt" if is_pair else None)
    assert task["caption"] == ("the caption" if question == "verification" else None)
    assert task["group"] == (None if is_pair else "the group")
    assert [picture["side"] for picture in task["pictures"]] == (["left", "right"] if is_pair else ["only"])


def test_nothing_tells_which_model_made_a_picture(world: World) -> None:
    browser = world.browser(world.one)
    response = browser.post(f"/api/{world.batch.public_id}/next", json={"num": 6})
    words = [response.text, *map(str, response.headers.values())]
    for task in response.json()["tasks"]:
        for picture in task["pictures"]:
            words += [str(pair) for pair in browser.get(picture["url"]).headers.items()]
        body = answer_to(task, browser.look(task))
        words.append(browser.post("/api/answer", json=body).text)
    words.append(browser.post(f"/api/{world.batch.public_id}/undo").text)
    text = "\n".join(words)
    for secret in ("model", "secret", "item-", ".png", "png'", str(world.pictures[0].parent), "slot"):
        assert secret not in text.replace("image/png", ""), secret
    # Each picture is on either side for somebody, so that an address says nothing either.
    sides = {one.left_slot for one in world.store.answers(world.batch)}
    assert sides == {"A", "B"}


# --- what is refused --------------------------------------------------------------------------------------


def test_pictures_not_loaded_are_not_judged(world: World) -> None:
    browser = world.browser(world.one)
    task, other = browser.next(world.batch, 2)["tasks"]
    seen, elsewhere = browser.look(task), browser.look(other)
    swapped = {"left": seen["right"], "right": seen["left"]}
    good = answer_to(task, seen)["times"]
    for proofs, times in [
        ({}, good),
        ({"left": seen["left"]}, good),
        (elsewhere, good),
        (swapped, good),
        ({**seen, "right": ""}, good),
        (seen, {**good, "loaded_at": {"left": 99.0}}),
        (seen, {**good, "loaded_at": {"left": 99.0, "right": 102.5}}),  # after the answer
    ]:
        response = browser.post("/api/answer", json=answer_to(task, proofs, times=times))
        assert response.status_code == 422 and "every picture" in response.json()["error"]
    assert world.statuses() == ["422 POST /api/answer"] * 7
    assert world.store.refusals()[0].person == "Ann"
    assert browser.post("/api/answer", json=answer_to(task, seen)).status_code == 200


def test_another_persons_item_is_refused_whatever_is_known_of_it(world: World) -> None:
    ann, bob = world.browser(world.one), world.browser(world.two)
    [task] = ann.next(world.batch, 1)["tasks"]
    seen = ann.look(task)
    assert bob.post("/api/answer", json=answer_to(task, seen)).status_code == 404
    assert bob.get(task["pictures"][0]["url"]).status_code == 404
    assert world.browser(None).get(task["pictures"][0]["url"]).status_code == 401
    assert world.browser(None).post("/api/answer", json=answer_to(task, seen)).status_code == 401
    assert world.store.events(world.batch) == []
    assert [what[:3] for what in world.statuses()] == ["404", "404", "401", "401"]
    assert {refusal.person for refusal in world.store.refusals()} == {"Bob", None}


def test_a_batch_for_others_is_refused(world: World, make_items: MakeItems) -> None:
    lead = world.store.add_person("Zoë", "lead")
    assert world.browser(lead).post(f"/api/{world.batch.public_id}/next", json={}).status_code == 403
    ann = world.browser(world.one)
    assert ann.post("/api/000000000000/next", json={}).status_code == 404
    assert ann.post("/api/%00/next", json={}).status_code == 404
    world.store.set_open(world.batch, False)
    assert ann.post(f"/api/{world.batch.public_id}/next", json={}).status_code == 409


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": {"choice": "A"}}, "choice"),
        ({"answer": {"choice": "left", "model": "x"}}, "model"),
        ({"answer": "left"}, "answer"),
        ({"answer": {"\ud800": 1}}, ""),
        ({"nonce": ""}, "nonce"),
        ({"nonce": "a\x00"}, "nonce"),
        ({"nonce": "\ud800"}, ""),
        ({"viewport": [1, 2, 3]}, "viewport"),
        ({"viewport": [-1, 2]}, "viewport.0"),
        ({"ui_version": "\x00"}, "ui_version"),
        ({"ui_version": "<script>"}, "ui_version"),
        ({"times": {"shown_at": 1, "submitted_at": 2}}, "loaded_at"),
        ({"times": {"shown_at": "x", "loaded_at": {}, "submitted_at": 2}}, "shown_at"),
        ({"times": {"shown_at": 1e300, "loaded_at": {}, "submitted_at": 2}}, "shown_at"),
        ({"seen": {str(side): "x" for side in range(3)}}, "seen"),
        ({"more": 1}, "more"),
    ],
)
def test_a_body_that_is_no_answer_is_refused_in_one_line(
    world: World, change: dict[str, Any], words: str
) -> None:
    browser = world.browser(world.one)
    [task] = browser.next(world.batch, 1)["tasks"]
    body = json.dumps({**answer_to(task, browser.look(task)), **change})
    response = browser.post("/api/answer", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422, response.text
    assert words in response.json()["error"] and "\n" not in response.json()["error"]
    assert world.store.events(world.batch) == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "[" * 60_000, '{"num": NaN}', '{"num": 1e999}', '{"num": 0}', '{"num": 21}', "\xff"],
)
def test_a_body_that_is_no_wish_is_refused(world: World, content: str) -> None:
    response = world.browser(world.one).post(
        f"/api/{world.batch.public_id}/next",
        content=content.encode("latin-1"),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code in (400, 422)
    assert set(response.json()) == {"error"}


def test_numbers_that_are_none_are_not_kept(world: World) -> None:
    browser = world.browser(world.one)
    [task] = browser.next(world.batch, 1)["tasks"]
    body = json.dumps(answer_to(task, browser.look(task))).replace("101.0", "NaN")
    response = browser.post("/api/answer", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422


def test_foreign_requests_are_refused_and_logged(world: World) -> None:
    browser = world.browser(world.one)
    url = f"/api/{world.batch.public_id}/next"
    assert browser.post(url, json={}, headers={"Origin": "https://evil.example"}).status_code == 403
    assert browser.post(url, json={}, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert browser.post(url, json={}, headers={"X-Emu": ""}).status_code == 403
    assert browser.post(url, data={"num": "1"}).status_code == 422  # what a foreign form could send
    assert browser.post("/login", data={"name": "Ann"}).status_code == 403  # no token
    assert browser.options(url, headers={"Origin": "https://evil.example"}).status_code == 405
    assert len(world.statuses()) == 6
    assert browser.post(url, json={}, headers={"Origin": "http://emu.example"}).status_code == 200


def test_a_forged_cookie_is_logged_and_a_visit_without_one_is_not(world: World) -> None:
    visitor = world.browser(None)
    assert visitor.get("/").status_code in (302, 303, 307)
    assert world.statuses() == []
    visitor.cookies.set("emu_session", "WzEsMV0.forged.signature")
    assert visitor.get("/").status_code in (302, 303, 307)
    assert world.statuses() == ["401 GET /"]


def body_in_chunks(num_bytes: int) -> Iterator[bytes]:
    for _ in range(num_bytes // 1024):
        yield b"x" * 1024


def test_too_much_is_refused_whatever_length_is_claimed(world: World) -> None:
    browser = world.browser(world.one)
    url = f"/api/{world.batch.public_id}/next"
    kind = {"Content-Type": "application/json"}
    assert browser.post(url, content=b"x" * 65 * 1024, headers=kind).status_code == 413
    # Without a length, and with a false one.
    assert browser.post(url, content=body_in_chunks(66 * 1024), headers=kind).status_code == 413
    lie = {**kind, "Content-Length": "10"}
    assert browser.post(url, content=body_in_chunks(66 * 1024), headers=lie).status_code == 413
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert browser.post("/login", content=body_in_chunks(66 * 1024), headers=form).status_code == 413
    assert browser.post(url, content=b" " * 60 * 1024 + b"{}", headers=kind).status_code == 200
    assert [what[:3] for what in world.statuses()] == ["413"] * 4


def test_only_someone_signed_in_may_send_as_much_as_an_import(world: World) -> None:
    url = f"/lead/{world.batch.public_id}/import"
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    large = b"x" * 100 * 1024
    assert world.browser(None).post(url, content=large, headers=form).status_code == 413
    assert world.browser(world.one).post(url, content=large, headers=form).status_code in (403, 422)
    huge = b"x" * (access.LARGEST_IMPORT + 1)
    assert world.browser(world.one).post(url, content=huge, headers=form).status_code == 413


@pytest.mark.parametrize(
    "path",
    [
        "/pictures/../../etc/passwd",
        "/pictures/..%2f..%2fetc%2fpasswd/left",
        "/pictures/%2e%2e/left",
        "/pictures/x%00/left",
        "/pictures/",
        "/pictures",
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static/",
        "/static",
        "/openapi.json",
        "/docs",
    ],
)
def test_there_is_nothing_else_to_read(world: World, path: str) -> None:
    response = world.browser(world.one).get(path)
    assert response.status_code == 404
    assert "root:" not in response.text and "create_app" not in response.text


def test_only_the_pictures_that_were_added_leave_the_disk(
    sqlite_store: Store, make_items: MakeItems, tmp_path: Path, picture_files: list[Path]
) -> None:
    store, person = sqlite_store, sqlite_store.add_person("Ann", "generalist")
    path = tmp_path / "fox.png"
    path.write_bytes(picture_files[0].read_bytes())
    batch = store.add_batch("screening", "Screen")
    store.add_items(batch, [item.__class__("fox", {"A": (path, None)}) for item in make_items(batch, 1)])
    browser = Browser(create_app(store, Settings("k")), person)
    [task] = browser.next(batch)["tasks"]
    url = task["pictures"][0]["url"]
    assert browser.get(url).status_code == 200
    path.write_bytes(picture_files[1].read_bytes())
    assert browser.get(url).status_code == 410  # another picture than the one to be judged
    path.unlink()
    assert browser.get(url).status_code == 404
    path.symlink_to("/etc/passwd")
    assert browser.get(url).status_code == 410
    path.unlink()
    path.write_bytes(picture_files[0].read_bytes())
    assert browser.get(url).status_code == 200


def test_a_picture_of_a_contact_sheet_is_one_persons(world: World) -> None:
    item = world.store.items(world.batch)[0]
    here = Request({"type": "http", "app": world.app, "headers": []})
    url = access.picture_url(here, world.one, item, "A")
    assert world.browser(world.one).get(url).content == world.pictures[0].read_bytes()
    assert "X-Seen" not in world.browser(world.one).get(url).headers  # no proof for a judgement
    assert world.browser(world.two).get(url).status_code == 404
    assert world.browser(None).get(url).status_code == 401


# --- every response ---------------------------------------------------------------------------------------


def test_every_response_carries_the_headers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = world.browser(world.one)
    [task] = browser.next(world.batch, 1)["tasks"]
    responses = [
        browser.get(task["pictures"][0]["url"]),
        browser.get("/"),
        browser.get("/nothing"),
        browser.get("/login"),
        browser.get("/static/app.css"),
        browser.post("/api/answer", json={}),
        browser.post("/api/answer", content=b"x" * 70_000),
        browser.post("/api/answer", headers={"Origin": "null"}),
        world.browser(None).get("/"),
    ]
    monkeypatch.setattr(world.store, "batches", lambda: 1 / 0)
    responses.append(browser.get("/"))
    assert [response.status_code for response in responses] == [
        200,
        200,
        404,
        200,
        200,
        422,
        413,
        403,
        303,
        500,
    ]
    for response in responses:
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy and "img-src 'self' blob:" in policy
        assert "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "same-origin"
        assert response.headers["Cache-Control"].split(",")[0] in ("no-store", "private")
        assert "Strict-Transport-Security" not in response.headers


def test_https_is_kept_to(world: World) -> None:
    secure = Browser(create_app(world.store, Settings("k", is_https=True)))
    response = secure.get("/login")
    assert response.headers["Strict-Transport-Security"] == "max-age=31536000"
    assert "; Secure" in response.headers["Set-Cookie"]


def test_a_failure_of_ours_says_nothing_and_is_written_down(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(world.store, "lend", fail)
    with caplog.at_level(logging.ERROR):
        response = world.browser(world.one).post(f"/api/{world.batch.public_id}/next", json={})
    assert response.status_code == 500
    assert "secret" not in response.text and "RuntimeError" in caplog.text


def test_a_busy_database_is_no_failure_of_the_person(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OperationalError("", {}, Exception("database is locked"))

    monkeypatch.setattr(world.store, "lend", fail)
    response = world.browser(world.one).post(f"/api/{world.batch.public_id}/next", json={})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert world.statuses() == []


def test_a_flood_does_not_fill_the_log(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.app.state.logged = access.Throttle(3, 60)
    browser = world.browser(world.one)
    assert [browser.get("/nothing").status_code for _ in range(5)] == [404] * 5
    assert len(world.statuses()) == 3


def test_what_blocks_runs_beside_the_loop() -> None:
    """A route that is a coroutine would hold up everyone while it waits for the database."""
    for router in (api.router, pages.router):
        for route in router.routes:
            assert not inspect.iscoroutinefunction(route.endpoint), route.path  # type: ignore[attr-defined]
