"""Bodies of requests: JSON, of limited size, sent in limited time."""

from __future__ import annotations

import json
from typing import NoReturn

import anyio
from anyio import to_thread
from fastapi import Request
from starlette.requests import ClientDisconnect

from hotlap.serve.errors import APIError, refused

SLOWEST = 30.0  # seconds for a whole body


async def read_json(request: Request, most: int) -> object:
    """The body of a request, of at most so many bytes, as JSON. APIError 400, 408, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # the one that a web page cannot send here without asking first
        raise APIError(415, "the body must be JSON, with `Content-Type: application/json`")
    too_large = APIError(413, f"the body must have at most {most} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    body = bytearray()
    try:
        with anyio.fail_after(SLOWEST):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        message = f"the body was not complete after {SLOWEST:g} seconds"
        raise APIError(408, message, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise APIError(499, "the client closed the connection") from None
    return await to_thread.run_sync(parse, bytes(body))


def parse(body: bytes) -> object:
    """JSON as its standard has it, in UTF-8."""
    try:
        return json.loads(body.decode(), parse_constant=no_number)
    except UnicodeDecodeError as error:
        raise refused(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise refused("the body is nested too deeply") from None
    except ValueError as error:  # also a number of too many digits
        raise refused(f"the body is not JSON: {error}") from None


def no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
