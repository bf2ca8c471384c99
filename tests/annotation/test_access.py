from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi import FastAPI, Request, Response
from itsdangerous import URLSafeTimedSerializer

from emu_lightning.annotation import access
from emu_lightning.annotation.access import Settings, Throttle, check_origin, read_secret_key
from emu_lightning.annotation.passwords import hash_password, password_fits
from emu_lightning.annotation.server import create_app
from emu_lightning.annotation.store import Person, Refused, Store

KEY = "k" * 64


@pytest.fixture
def app(sqlite_store: Store, tmp_path: Path) -> FastAPI:
    return create_app(sqlite_store, Settings(KEY, picture_roots=(tmp_path,)))


def request(app: FastAPI, method: str = "GET", path: str = "/", **headers: str) -> Request:
    """Headers by name with _ for -, in lower case; ``cookies`` are sent as they are."""
    headers = {"host": "emu.example:8000", **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b"", "app": app}
    return Request(
        {**scope, "client": ("192.0.2.1", 5000), "server": ("emu.example", 8000), "scheme": "http"}
    )


def session_cookie(app: FastAPI, person: Person) -> str:
    response = Response()
    access.sign_in(request(app), response, person)
    return response.headers["set-cookie"].split(";")[0]


def is_in(app: FastAPI, cookie: str) -> bool:
    try:
        access.signed_in(request(app, cookie=cookie))
    except Refused as refused:
        assert refused.status == 401
        return False
    return True


# --- passwords and keys -----------------------------------------------------------------------------------


def test_a_password_fits_only_its_own_hash() -> None:
    first, second = hash_password("correct horse"), hash_password("correct horse")
    assert first != second and first.startswith("$argon2id$")
    assert password_fits("correct horse", first) and password_fits("correct horse", second)
    for password, kept in [
        ("correct hors", first),
        ("", first),
        ("correct horse", None),
        ("x" * 10_000, first),
    ]:
        assert not password_fits(password, kept)
    assert not password_fits("correct horse", "correct horse")  # what is not a hash fits nothing
    assert password_fits("\ud800" * 8, hash_password("\ud800" * 8))


@pytest.mark.parametrize("password", ["", "x" * 7, "x" * 1001])
def test_a_password_has_a_length(password: str) -> None:
    with pytest.raises(ValueError, match="8 to 1000"):
        hash_password(password)


def test_the_key_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    with ThreadPoolExecutor(1) as pool:
        keys = set(pool.map(read_secret_key, [path] * 3))
    assert len(keys) == 1 and len(keys.pop()) >= 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["secret"]
    assert read_secret_key(tmp_path / "other") != read_secret_key(path)
    path.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_secret_key(path)


# --- sessions ---------------------------------------------------------------------------------------------


def test_a_session_cookie(app: FastAPI, sqlite_store: Store) -> None:
    person = sqlite_store.add_person("Ann", "generalist")
    response = Response()
    access.sign_in(request(app), response, person)
    flags = {flag.strip().lower() for flag in response.headers["set-cookie"].split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/", f"max-age={14 * 24 * 3600}"} == flags
    assert access.signed_in(request(app, cookie=session_cookie(app, person))) == person
    with pytest.raises(Refused) as refused:
        access.lead(request(app, cookie=session_cookie(app, person)))
    assert refused.value.status == 403


def test_cookies_are_secure_over_https(sqlite_store: Store) -> None:
    app = create_app(sqlite_store, Settings(KEY, is_https=True))
    response = Response()
    access.sign_in(request(app), response, sqlite_store.add_person("Ann", "lead"))
    assert "; Secure" in response.headers["set-cookie"]


def test_a_forged_or_borrowed_cookie_lets_nobody_in(app: FastAPI, sqlite_store: Store) -> None:
    ann, bob = sqlite_store.add_person("Ann", "lead"), sqlite_store.add_person("Bob", "generalist")
    cookie = session_cookie(app, ann)
    assert is_in(app, cookie)
    value = cookie.partition("=")[2]
    payload, time, signature = value.split(".")
    other_payload = session_cookie(app, bob).partition("=")[2].split(".")[0]
    foreign = URLSafeTimedSerializer("another key", salt="session").dumps([ann.id, 1])
    other_use = URLSafeTimedSerializer(KEY, salt="picture").dumps([ann.id, 1])
    for forged in (
        "",
        "x",
        f"{payload}.{time}.",
        f"{other_payload}.{time}.{signature}",
        f"{payload}.{time}.{signature[:-2]}",
        value[:-3] + "AAA",
        foreign,
        other_use,
        "\x00",
    ):
        assert not is_in(app, f"emu_session={forged}")
    assert not is_in(app, "")


def test_a_session_ends_with_its_time_its_version_and_its_person(
    app: FastAPI, sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = sqlite_store.add_person("Ann", "lead")
    cookie = session_cookie(app, person)
    with monkeypatch.context() as later:
        now = __import__("time").time() + 14 * 24 * 3600 + 10
        later.setattr("itsdangerous.timed.time.time", lambda: now)
        assert not is_in(app, cookie)
    assert is_in(app, cookie)
    response = Response()
    access.sign_out(request(app, cookie=cookie), response)
    assert not is_in(app, cookie)  # also the copy somebody else has
    assert 'emu_session=""' in response.headers["set-cookie"]
    current = sqlite_store.person(person.id)
    assert current is not None
    cookie = session_cookie(app, current)
    assert is_in(app, cookie)
    sqlite_store.set_active(current, False)
    assert not is_in(app, cookie)


# --- logins -----------------------------------------------------------------------------------------------


def test_a_login_is_throttled_per_name_and_address(
    app: FastAPI, sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sqlite_store.add_person("Ann", "lead", "correct horse")
    sqlite_store.add_person("Bob", "lead", "correct horse")
    looked_at = []
    check = sqlite_store.check_password
    monkeypatch.setattr(
        sqlite_store, "check_password", lambda *given: looked_at.append(given) or check(*given)
    )

    def status(name: str, password: str) -> int:
        try:
            access.login(request(app, "POST"), name, password)
        except Refused as refused:
            return refused.status
        return 200

    assert status("Ann", "correct horse") == 200
    assert [status("Ann", "hunter22") for _ in range(4)] == [401] * 4
    assert status("Ann", "correct horse") == 200  # and all is forgotten
    assert [status("Ann", "hunter22") for _ in range(6)] == [401] * 5 + [429]
    num_looked_at = len(looked_at)
    assert status("ANN", "correct horse") == 429  # even the right one, unseen
    assert len(looked_at) == num_looked_at
    assert status("Bob", "correct horse") == 200
    assert [refusal.what[:3] for refusal in sqlite_store.refusals()] == ["429", "429"] + ["401"] * 9
    assert not any("hunter22" in refusal.detail for refusal in sqlite_store.refusals())


def test_one_password_tried_on_many_names_is_throttled(
    app: FastAPI, sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sqlite_store.add_person("Ann", "lead", "correct horse")
    app.state.address_failures = Throttle(6, 60)
    statuses = []
    for number in range(8):
        with pytest.raises(Refused) as refused:
            access.login(request(app, "POST"), f"name {number}", "correct horse")
        statuses.append(refused.value.status)
    assert statuses == [401] * 6 + [429] * 2
    with pytest.raises(Refused):  # then not even a right one
        access.login(request(app, "POST"), "Ann", "correct horse")


def test_a_throttle_forgets_with_time_and_takes_no_memory() -> None:
    now = [0.0]
    throttle = Throttle(2, 10, lambda: now[0])
    assert [throttle.take("a") for _ in range(3)] == [True, True, False]
    assert throttle.take("b")
    now[0] = 9.9
    assert not throttle.take("a")
    now[0] = 10.1
    assert throttle.take("a")
    for number in range(25_000):
        now[0] += 0.01
        throttle.take(f"flood {number}")
    assert len(throttle._times) <= 10_002


def test_many_tries_at_once_are_counted_before_they_are_looked_at() -> None:
    throttle = Throttle(5, 60)
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(throttle.take, ["a"] * 40)) == 5


# --- proofs, tickets, forms -------------------------------------------------------------------------------


def test_a_proof_is_of_one_picture(app: FastAPI) -> None:
    here = request(app)
    proof = access.proof(here, "token", "left")
    assert access.is_proof(here, "token", "left", proof)
    for token, side, given in [
        ("token", "right", proof),
        ("other", "left", proof),
        ("token\nleft", "", proof),
        ("token", "left", ""),
        ("token", "left", proof.upper()),
        ("token", "left", "\ud800"),
    ]:
        assert not access.is_proof(here, token, side, given)


def test_a_ticket_is_one_persons(app: FastAPI, sqlite_store: Store) -> None:
    ann, bob = sqlite_store.add_person("Ann", "lead"), sqlite_store.add_person("Bob", "lead")
    signer = access._signer(request(app), "picture")
    ticket = signer.dumps([ann.id, 7, "A"])
    assert access.read_ticket(request(app), ann, ticket) == (7, "A")
    session = session_cookie(app, ann).partition("=")[2]
    for person, given in [(bob, ticket), (ann, ticket + "x"), (ann, session), (ann, ""), (ann, "../../etc")]:
        with pytest.raises(Refused) as refused:
            access.read_ticket(request(app), person, given)
        assert refused.value.status == 404


def test_a_form_token_belongs_to_one_browser_and_session(app: FastAPI) -> None:
    def accepted(token: str, cookie: str) -> bool:
        try:
            access.form_posted(request(app, "POST", cookie=cookie), token)
        except Refused as refused:
            assert refused.status == 403
            return False
        return True

    page = request(app)
    token = access.form_token(page)
    assert access.form_token(page) == token  # one page, several forms
    visitor = f"emu_visitor={page.state.new_visitor}"
    assert accepted(token, visitor)
    assert access.form_token(request(app, cookie=visitor)) == token
    assert not accepted(token, "")
    assert not accepted("", visitor)
    assert not accepted(token, "emu_visitor=another")
    assert not accepted(token, f"{visitor}; emu_session=later")
    assert not accepted("é\ud800", visitor)
    nobody = access._mac(page, "form", "", "")
    assert not accepted(nobody, "")


# --- where a request comes from ---------------------------------------------------------------------------

HERE = "http://emu.example:8000"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": HERE},
        {"origin": "https://EMU.example:8000"},  # behind a proxy that ends TLS
        {"origin": HERE, "sec_fetch_site": "same-origin"},
        {"sec_fetch_site": "none"},
    ],
)
def test_our_own_posts_pass(app: FastAPI, headers: dict[str, str]) -> None:
    check_origin(request(app, "POST", "/login", **headers))
    check_origin(request(app, "POST", "/api/answer", **headers, x_emu="1"))


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "http://emu.example:8001"},
        {"origin": "http://emu.example:8000.evil.example"},
        {"origin": "http://emu.example:8000@evil.example"},
        {"origin": "null"},
        {"origin": "null", "host": ""},
        {"origin": "http://[", "sec_fetch_site": "same-origin"},
        {"origin": ""},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "cross-site", "origin": HERE},
        {"sec_fetch_site": "same-origin", "origin": "https://evil.example"},
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_foreign_posts_are_refused(app: FastAPI, headers: dict[str, str], method: str) -> None:
    for path in ("/login", "/api/answer"):
        with pytest.raises(Refused) as refused:
            check_origin(request(app, method, path, **headers, x_emu="1"))
        assert refused.value.status == 403
    check_origin(request(app, "GET", "/", **headers))  # looking changes nothing


@pytest.mark.parametrize("headers", [{}, {"x_emu": "0"}, {"x_emu": ""}])
def test_json_needs_a_header_that_foreign_pages_cannot_send(app: FastAPI, headers: dict[str, str]) -> None:
    with pytest.raises(Refused, match="X-Emu"):
        check_origin(request(app, "POST", "/api/answer", **headers))
