"""The application, put together: routes, guard, and what becomes of errors."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from emu_lightning.annotation import access, api, pages
from emu_lightning.annotation.access import SESSION_COOKIE, Guard, Settings, Throttle
from emu_lightning.annotation.store import Refused, Store


def create_app(store: Store, settings: Settings) -> FastAPI:
    """The application over one store."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.store = store
    app.state.settings = settings
    app.state.login_tries = Throttle(access.LOGIN_TRIES, access.TRIES_SECONDS)
    app.state.address_failures = Throttle(access.ADDRESS_TRIES, access.TRIES_SECONDS)
    app.state.logged = Throttle(access.LOGGED_REFUSALS, access.LOGGED_SECONDS)
    app.include_router(api.router)
    app.include_router(pages.router)
    app.mount("/static", _Static(directory=Path(__file__).with_name("static")))
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(DataError, _on_unkeepable)
    app.add_exception_handler(UnicodeEncodeError, _on_unkeepable)
    app.add_exception_handler(OperationalError, _on_busy)
    app.add_exception_handler(PoolTimeout, _on_busy)
    app.add_middleware(Guard, refuse=refuse)
    return app


class _Static(StaticFiles):
    """Scripts and styles, which browsers keep but ask about each time: they change together."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "private, no-cache"
        return response


def serve(app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves until interrupted. By default only this machine can reach it.

    It speaks http; https is left to a proxy on this machine. Only with one is a request believed when it says
    which address it came from.
    """
    threading.Thread(target=_read_ahead, args=[app.state.store], daemon=True).start()
    has_proxy = app.state.settings.is_https
    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    uvicorn.run(app, host=host, port=port, proxy_headers=has_proxy, **quiet)


def _read_ahead(store: Store) -> None:
    """Reads the logs, so that a lead's first look at a large batch need not wait for it."""
    for batch in store.batches():
        store.standing(batch)


def refuse(request: Request, refused: Refused) -> Response:
    """Logs a refusal and answers it. A visit without a session is only sent to sign in."""
    is_page = not request.url.path.startswith(("/api/", "/pictures/", "/static/"))
    is_visit = is_page and request.method == "GET" and SESSION_COOKIE not in request.cookies
    if not (refused.status == 401 and is_visit):
        access.log_refusal(request, refused, refused.message)
    if is_page:
        return pages.refusal(request, refused)
    return JSONResponse({"error": refused.message}, refused.status)


def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return refuse(request, error)


def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = refuse(request, Refused(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    return refuse(request, Refused(422, f"{place}: {first['msg']}" if place else first["msg"]))


def _on_unkeepable(request: Request, error: Exception) -> Response:
    return refuse(request, Refused(422, "this holds characters that cannot be kept"))


def _on_busy(request: Request, error: Exception) -> Response:
    """Not the person's fault, and nothing was kept: the page sends it again."""
    access.logger.warning("%s %s: %s", request.method, request.url.path, error)
    headers = {"Retry-After": "1"}
    return JSONResponse({"error": "the database is busy: try again"}, 503, headers)
