"""Passwords and keys in URLs: none in a config, taken from the environment, left out of whatever is written."""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl, urlsplit

from qadapter.errors import QAdapterError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_TELLING = re.compile(r"token|key|secret|sig|password|passwd|pwd|auth|credential", re.IGNORECASE)
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s\"']*@", re.IGNORECASE)
_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s\"'?]*\?)[^\s\"']*", re.IGNORECASE)


def refuse_secrets(url: str) -> None:
    """Refuse a URL with a password or a key in clear text: configs are logged, stored and shared.

    Raises:
        ValueError: saying what to write instead; the URL itself is not in the message.
    """
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return  # no URL; whoever reads it says so
    if not parts.scheme or "://" not in url:
        return
    place = None
    user, at, _ = parts.netloc.rpartition("@")
    if at and not _VARIABLE.fullmatch(user):
        place = "a user or password before its host"
    for name, value in query:
        if _TELLING.search(name) and not _VARIABLE.fullmatch(value):
            place = f"a secret in its query ({name}=…)"
    if place:
        raise ValueError(
            f"a URL has {place}; configs are logged and stored, so write ${{NAME}} in its place, "
            "and put the secret into the environment variable NAME"
        )


def filled_in(url: str) -> str:
    """The URL with each `${NAME}` replaced by the environment variable NAME; for the request itself, nothing else.

    Raises:
        QAdapterError: a variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if not found:
            raise QAdapterError(f"{shown(url)} needs the environment variable {match[1]}, which is not set. Set it.")
        return found

    return _VARIABLE.sub(value, url)


def shown(text: str) -> str:
    """A text with the user, password and query of every URL in it left out: what may be printed, logged or stored."""
    return _QUERY.sub(r"\1…", _USER.sub(r"\1", text))


def public_address(url: str) -> str:
    """One URL without user, password, query and fragment, whatever characters these have."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "the URL"
    return f"{parts.scheme}://{host}{parts.path}"
