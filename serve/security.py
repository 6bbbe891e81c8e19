"""What every request passes before the routes see it: who may ask, an id, and a line in the log."""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import secrets
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from hotlap.common.log import log
from hotlap.serve.errors import APIError
from hotlap.serve.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEY_VARIABLE = "HOTLAP_API_KEY"
SHORTEST_KEY = 16  # characters
OPEN = ("/health",)  # needs no key
LONGEST_PATH = 200  # characters of it in the log


def read_key(file: Path | None) -> str | None:
    """The API key: of the file, or else of the environment. ValueError if it is no good key."""
    text, where = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
    if file is not None:
        try:
            text, where = file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"api_key_file={file} cannot be read: {error}; give a text file") from None
    if text is None:
        return None
    key = text.strip()
    if len(key) < SHORTEST_KEY or not re.fullmatch("[!-~]+", key):
        raise ValueError(
            f"the API key in {where} must be at least {SHORTEST_KEY} ASCII characters without spaces; "
            "make one with: openssl rand -hex 16"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether a name or address is of this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def check_host(headers: Headers) -> None:
    """Refuse requests for another host, which a browser sends if a web page's name was pointed at this
    machine (DNS rebinding): that page could read the answers.
    """
    name = re.sub(r":\d*$", "", headers.get("host", ""))
    if not is_loopback(name):
        raise APIError(
            403,
            "without an API key, the Host header must be localhost, 127.0.0.1 or [::1]",
            code="wrong_host",
        )


def check_key(headers: Headers, key: str) -> None:
    """Refuse requests without the key, in `Authorization: Bearer KEY` or `api-key: KEY`."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get("api-key", "")
    if not hmac.compare_digest(given.strip().encode(), key.encode()):
        what = "wrong API key" if given else "an API key is needed, as in `Authorization: Bearer KEY`"
        raise APIError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def error_response(error: APIError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def failure(error: Exception) -> APIError:
    """Log an error of ours, and return what the client is told. Its message stays out of the log: it may
    quote a prompt.
    """
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("a bug: %s\n%s", type(error).__name__, where)
    return APIError(500, "the server failed on this request; its log says where", code="internal_error")


class Gate:
    """ASGI middleware around all routes.

    key: what clients must send; None: nothing, but the Host header must be of this machine.
    """

    def __init__(self, app: ASGIApp, key: str | None, metrics: Metrics):
        self.app, self.key, self.metrics = app, key, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name, began, status = f"req-{secrets.token_hex(8)}", time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            self.check(scope)
            await self.app(scope, receive, send_with_id)
        except APIError as error:
            await error_response(error)(scope, receive, send_with_id)
        except Exception as error:
            found = failure(error)
            if not status:  # else uvicorn closes the connection, and the client misses the end
                await error_response(found)(scope, receive, send_with_id)
        finally:
            milliseconds = 1000 * (time.perf_counter() - began)
            path = scope["raw_path"][:LONGEST_PATH].decode("ascii", "replace")  # percent-encoded: one line
            log.info("%s %s %d %.0f ms %s", scope["method"], path, status, milliseconds, name)
            self.metrics.requests.labels(status).inc()

    def check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if scope["path"] in OPEN:
            return
        if self.key is None:
            check_host(headers)
        else:
            check_key(headers, self.key)
