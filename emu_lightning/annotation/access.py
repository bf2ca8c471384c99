"""Who may come in: sessions, logins, links, proofs; and what every request and response must carry.

A session is a signed cookie with the person's id and session version; counting the version up ends it
everywhere. A request that changes something is refused when a browser says it comes from another site; JSON
also needs the header ``X-Emu: 1``, which a foreign page cannot send, and a form its hidden token.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

from fastapi import Form, Request, Response
from itsdangerous import BadData, URLSafeTimedSerializer
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emu_lightning.annotation.passwords import new_token
from emu_lightning.annotation.questions import Slot
from emu_lightning.annotation.store import Item, Person, Refused, Store

SESSION_COOKIE, VISITOR_COOKIE = "emu_session", "emu_visitor"
SESSION_SECONDS = 14 * 24 * 3600
TICKET_SECONDS = 24 * 3600
LOGIN_TRIES, ADDRESS_TRIES, TRIES_SECONDS = 5, 200, 15 * 60
LOGGED_REFUSALS, LOGGED_SECONDS = 1000, 60  # of one address
LARGEST_BODY, LARGEST_IMPORT = 64 * 1024, 32 * 1024 * 1024

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # Not no-referrer: with it browsers send the forms of our own pages with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the server needs to know beside its database.

    Attributes:
        secret_key: signs cookies and proofs; see :func:`read_secret_key`.
        is_https: whether browsers reach the server by https; cookies are then sent no other way.
        picture_roots: the folders whose pictures an import over the web may name, and no others.
        ui_version: of the pages, stored with each answer.
    """

    secret_key: str
    is_https: bool = False
    picture_roots: tuple[Path, ...] = ()
    ui_version: str = "1"


def read_secret_key(path: str | Path) -> str:
    """The key in a file only its owner can read; made at the first call, whole or not at all.

    Raises:
        ValueError: others can read the file.
    """
    path = Path(path)
    if not path.exists():
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.unlink(missing_ok=True)
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w") as stream:
            stream.write(new_token() + new_token())
            os.fsync(file)
        try:
            os.link(partial, path)  # unlike a move, never over the key of another process
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} can be read by others: run chmod 600 on it")
    return path.read_text()


class Throttle:
    """Counts what happened under a key within the last ``seconds``, and says when it was too much."""

    def __init__(self, num: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._num, self._seconds, self._clock = num, seconds, clock
        self._times: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def take(self, key: str) -> bool:
        """Counts one more, unless there were too many already: then False."""
        with self._lock:
            if len(self._times) > 10_000:  # a flood of keys takes no memory: whatever has ended is forgotten
                self._times = {known: times for known, times in self._times.items() if self._recent(times)}
            times = self._times.setdefault(key, deque(maxlen=self._num))
            if self._recent(times) >= self._num:
                return False
            times.append(self._clock())
            return True

    def is_full(self, key: str) -> bool:
        with self._lock:
            return self._recent(self._times.get(key, deque())) >= self._num

    def forget(self, key: str) -> None:
        with self._lock:
            self._times.pop(key, None)

    def _recent(self, times: deque[float]) -> int:
        while times and times[0] <= self._clock() - self._seconds:
            times.popleft()
        return len(times)


def store(request: Request) -> Store:
    return cast(Store, request.app.state.store)


def settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


def address(request: Request) -> str:
    return request.client.host if request.client else ""


def log_refusal(request: Request, refused: Refused, detail: str) -> None:
    """Keeps a refusal, as long as its address has not had very many: a flood does not fill the disk."""
    if request.app.state.logged.take(address(request)):
        person = getattr(request.state, "person", None)
        what = f"{refused.status} {request.method} {request.url.path}"
        store(request).log_refusal(person.id if person else None, address(request), what, detail)


# Signatures


def _signer(request: Request, purpose: str) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(
        settings(request).secret_key, salt=purpose, signer_kwargs={"digest_method": hashlib.sha256}
    )


def _mac(request: Request, *parts: str) -> str:
    key = settings(request).secret_key.encode()
    return hmac.new(key, "\n".join(parts).encode(errors="replace"), hashlib.sha256).hexdigest()


def proof(request: Request, token: str, side: str) -> str:
    """What only someone who was sent this picture can know."""
    return _mac(request, "seen", token, side)


def is_proof(request: Request, token: str, side: str, given: str) -> bool:
    return hmac.compare_digest(proof(request, token, side).encode(), given.encode(errors="replace"))


def picture_url(request: Request, person: Person, item: Item, slot: Slot) -> str:
    """Where this person, and nobody else, finds a picture that is not part of their assignment, for a day.

    For contact sheets and leads: unlike an assignment's, such an address can be read to say which slot it is.
    """
    return f"/pictures/{_signer(request, 'picture').dumps([person.id, item.id, slot])}"


def read_ticket(request: Request, person: Person, ticket: str) -> tuple[int, Slot]:
    """Item and slot of a picture's address.

    Raises:
        Refused: it is not one of ours, is another person's, or is too old.
    """
    try:
        person_id, item_id, slot = _signer(request, "picture").loads(ticket, max_age=TICKET_SECONDS)
    except BadData:
        person_id = None
    if person_id != person.id:
        raise Refused(404, "there is no such picture")
    return item_id, slot


# Sessions


def login(request: Request, name: str, password: str) -> Person:
    """The person of this name and password.

    Raises:
        Refused: 401, they do not fit; 429, there were too many failures. Both are logged here.
    """
    tries: Throttle = request.app.state.login_tries
    failures: Throttle = request.app.state.address_failures
    key = f"{name[:80].casefold()}\n{address(request)}"
    refused = Refused(429, "too many failed attempts: try again in 15 minutes")
    # Counted before the password is looked at, so that trying many at once brings nothing.
    if not failures.is_full(address(request)) and tries.take(key):
        person = store(request).check_password(name, password)
        if person is not None:
            tries.forget(key)
            return person
        failures.take(address(request))
        refused = Refused(401, "name or password is wrong")
    log_refusal(request, refused, f"{refused.message}, as {name}")
    raise refused


def sign_in(request: Request, response: Response, person: Person) -> None:
    value = _signer(request, "session").dumps([person.id, person.session_version])
    _set_cookie(response, SESSION_COOKIE, value, settings(request).is_https, SESSION_SECONDS)


def sign_out(request: Request, response: Response) -> None:
    """Ends all of the person's sessions: a copied cookie ends with the one it was copied from."""
    person = _session(request)
    if person is not None:
        store(request).end_sessions(person)
    response.delete_cookie(SESSION_COOKIE)


def signed_in(request: Request) -> Person:
    """Who sent this request.

    Raises:
        Refused: 401, nobody who is signed in.
    """
    person = _session(request)
    if person is None:
        raise Refused(401, "you are not signed in")
    return person


def lead(request: Request) -> Person:
    """Who sent this request, if a lead.

    Raises:
        Refused: 401 as for :func:`signed_in`; 403, not a lead.
    """
    person = signed_in(request)
    if person.role != "lead":
        raise Refused(403, "this is for leads")
    return person


def _session(request: Request) -> Person | None:
    if not hasattr(request.state, "person"):
        person_id, version = session_claim(request) or (None, None)
        person = None if person_id is None else store(request).person(person_id)
        is_current = person is not None and person.is_active and person.session_version == version
        request.state.person = person if is_current else None
    return cast("Person | None", request.state.person)


def session_claim(request: Request) -> tuple[int, int] | None:
    """Person id and session version of the cookie, if it is signed by us and not too old."""
    try:
        cookie = request.cookies.get(SESSION_COOKIE, "")
        person_id, version = _signer(request, "session").loads(cookie, max_age=SESSION_SECONDS)
        return person_id, version
    except BadData:
        return None


# Forms


def form_token(request: Request) -> str:
    """The value of the hidden field ``form_token``, good in this browser until it signs in or out."""
    visitor = request.cookies.get(VISITOR_COOKIE) or getattr(request.state, "new_visitor", None)
    if visitor is None:
        visitor = request.state.new_visitor = new_token()  # the guard sets the cookie
    return _mac(request, "form", visitor, request.cookies.get(SESSION_COOKIE, ""))


def form_posted(request: Request, form_token: Annotated[str, Form()] = "") -> None:
    """Checks the hidden field.

    Raises:
        Refused: 403, the form is not from a page of ours in this browser.
    """
    parts = ("form", request.cookies.get(VISITOR_COOKIE, ""), request.cookies.get(SESSION_COOKIE, ""))
    is_ours = hmac.compare_digest(_mac(request, *parts).encode(), form_token.encode(errors="replace"))
    if VISITOR_COOKIE not in request.cookies or not is_ours:
        raise Refused(403, "this form is too old or from elsewhere: load the page again")


def _set_cookie(
    response: Response, name: str, value: str, is_https: bool, seconds: int | None = None
) -> None:
    response.set_cookie(name, value, max_age=seconds, httponly=True, samesite="strict", secure=is_https)


# Every request


def check_origin(request: Request) -> None:
    """Where a request that would change something comes from.

    Raises:
        Refused: 403, from another site, or perhaps.
    """
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    site = request.headers.get("sec-fetch-site", "none")
    origin = request.headers.get("origin")
    if site not in ("same-origin", "none"):
        raise Refused(403, "this request comes from another site")
    # The scheme is left aside: where a proxy ends TLS, the browser's is https and ours is http.
    host = request.headers.get("host", "").lower()
    if origin is not None and (not host or origin.lower().partition("://")[2] != host):
        raise Refused(403, "this request comes from another site")
    if request.url.path.startswith("/api/") and request.headers.get("x-emu") != "1":
        raise Refused(403, "this request lacks the header X-Emu: 1")


class Guard:
    """Refuses foreign and oversized requests, and puts the security headers on every response.

    Args:
        app: what it guards.
        refuse: logs a refusal and makes its response.
    """

    def __init__(self, app: ASGIApp, refuse: Callable[[Request, Refused], Response]) -> None:
        self._app, self._refuse = app, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        request = Request(scope)
        is_https = settings(request).is_https
        has_started = False

        async def send_guarded(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
                if is_https:
                    headers["Strict-Transport-Security"] = "max-age=31536000"
                if "new_visitor" in state:
                    cookie = Response()
                    _set_cookie(cookie, VISITOR_COOKIE, state["new_visitor"], is_https)
                    headers.append("Set-Cookie", cookie.headers["set-cookie"])
            await send(message)

        is_import = scope["path"].startswith("/lead/") and scope["path"].endswith("/import")
        largest = LARGEST_IMPORT if is_import and session_claim(request) else LARGEST_BODY
        try:
            try:
                check_origin(request)
                if _length(request) > largest:
                    raise _too_large(largest)
            except Refused as refused:
                response = await run_in_threadpool(self._refuse, request, refused)
                await response(scope, receive, send_guarded)
            else:
                await self._app(scope, _counted(receive, largest), send_guarded)
        except Exception:
            logger.exception("%s %s failed", request.method, request.url.path)
            if has_started:
                raise
            failed = JSONResponse({"error": "something went wrong here; it has been written down"}, 500)
            await failed(scope, receive, send_guarded)


def _too_large(largest: int) -> Refused:
    return Refused(413, f"more than {largest // 1024} KiB were sent")


def _length(request: Request) -> int:
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else 0


def _counted(receive: Receive, largest: int) -> Receive:
    """Counts what arrives: a sender need not say how much it sends, or say the truth."""
    num_bytes = 0

    async def counted() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > largest:
            # An HTTPException: what reads the body lets nothing else through.
            raise HTTPException(413, _too_large(largest).message)
        return message

    return counted
