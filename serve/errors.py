"""Errors as OpenAI's clients expect them: an HTTP status, and a body with message, type, param and code."""

from __future__ import annotations

from collections.abc import Mapping

TYPES = {  # by status; any other below 500 is an invalid_request_error
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class APIError(Exception):
    """What a client gets instead of an answer.

    param: the field of the request that is wrong. code: what programs tell errors apart by. headers: further
    ones of the response, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict:
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": fields}


def refused(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """The error for a request that has something wrong in it: status 400."""
    return APIError(400, message, param, code)
