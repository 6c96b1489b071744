"""Refusals of the server, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that cannot be answered, as OpenAI's error body says it.

    Attributes:
        status: of HTTP.
        code: for programs, such as `context_length_exceeded`.
        param: the field at fault, if one is.
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
    text = message.encode(errors="replace").decode()  # half a surrogate pair of a request cannot be sent back
    return {"error": {"message": text[:2000], "type": kind, "param": param, "code": code}}
