"""Errors of the server, in OpenAI's format."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that cannot be answered, with the fields of OpenAI's error body.

    Attributes:
        status: the HTTP status.
        code: machine-readable code, such as `context_length_exceeded`.
        param: the invalid field, if there is one.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """`{"error": …}`."""
        return error_body(str(self), self.status, self.code, self.param)


def error_body(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error body."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    text = message.encode(errors="replace").decode()  # a lone surrogate in a request cannot be sent back
    return {"error": {"message": text[:2000], "type": kind, "param": param, "code": code}}
