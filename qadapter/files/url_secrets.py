"""Passwords and keys: none stands in a config; those that a URL needs come from the environment.

Which variables may be used is the operator's to say, not a config's: names that begin with `QADAPTER_`, and those that
the environment variable `QADAPTER_ALLOW_VARIABLES` lists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from qadapter.errors import QAdapterError
from qadapter.files.shown import holds_key, remember_secret, shown

PREFIX = "QADAPTER_"
ALLOWED = "QADAPTER_ALLOW_VARIABLES"
PUBLIC_QUERY = "public_query"
"""Key of a section that names query parameters whose literal values are no secrets."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_TELLING = {
    *("token", "secret", "sig", "signature", "password", "passwd", "pwd", "pass", "auth", "authorization"),
    *("credential", "credentials", "bearer", "cookie", "apikey", "accesskey"),
}
_HARMLESS_QUERY = {
    *("alt", "config", "dl", "download", "export", "format", "lang", "length", "limit", "offset", "page", "raw"),
    *("ref", "rev", "revision", "split", "subset", "version"),
}
_HARMLESS_VALUE = re.compile(r"[\w.-]{0,40}")
_SPECIAL_TOKENS = {"bos", "cls", "eos", "image", "mask", "pad", "sep", "think", "unk"}
_IN_ITS_PLACE = (
    "configs are logged and stored, so write ${NAME} in its place, and put the secret into the environment variable "
    f"NAME, which begins with {PREFIX} or is listed in {ALLOWED}"
)


def refuse_secrets(text: str, public: Sequence[str] = ()) -> None:
    """Refuse a text of a config that holds a password or key: a URL with one in it, or a known kind of key.

    Every literal value in a URL's query is taken for a secret unless its parameter is known to be harmless (`format`,
    `revision`, …) or named in `public`.

    Raises:
        ValueError: saying what to write instead; the text itself is not in the message.
    """
    if problem := _problem(text, public):
        raise ValueError(problem)


def _problem(text: str, public: Sequence[str] = ()) -> str | None:
    if holds_key(text):
        return f"a text looks like a key or token; {_IN_ITS_PLACE}"
    if "://" not in text:
        return None
    try:
        parts = urlsplit(text)
        query = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return None  # no URL; whoever reads it says so
    if not parts.scheme:
        return None
    user, at, _ = parts.netloc.rpartition("@")
    if at and not _VARIABLE.fullmatch(user):
        return f"a URL has a user or password before its host; {_IN_ITS_PLACE}"
    for name, value in query:
        harmless = name.lower() in _HARMLESS_QUERY and _HARMLESS_VALUE.fullmatch(value)
        if value and not (harmless or name in public or _VARIABLE.fullmatch(value)):
            return (
                f"a URL may have a secret in its query ({shown(name)[:40]}=…); {_IN_ITS_PLACE}; if it is none, name "
                f"the parameter in {PUBLIC_QUERY}"
            )
    if parts.fragment and not _VARIABLE.fullmatch(parts.fragment):
        return f"a URL has a fragment (#…), which may be a secret and no server is sent; remove it, or {_IN_ITS_PLACE}"
    return None


def secrets_in(value: Any, path: str = "", public: Sequence[str] = ()) -> Iterator[str]:
    """What of a config is refused as a secret, a sentence each with the key's path; at any depth, keys included.

    Args:
        value: what YAML or a caller gave.
        path: of `value`.
        public: see `refuse_secrets`; a mapping's own `public_query` is added.
    """
    if isinstance(value, str):
        if problem := _problem(value, public):
            yield f"{path}: {problem}" if path else problem
    elif isinstance(value, Mapping):
        own = value.get(PUBLIC_QUERY)
        named = (*public, *(own if isinstance(own, list | tuple) else ()))
        for key, entry in value.items():
            problem = _problem(key) if isinstance(key, str) else None
            name = "…" if problem else shown(str(key))
            place = f"{path}.{name}" if path else name
            if problem:
                yield f"{place}: {problem}"
            if isinstance(entry, str) and entry and _tells(str(key)) and not _VARIABLE.search(entry):
                yield f"{place}: its name says that it is a secret; {_IN_ITS_PLACE}"
            else:
                yield from secrets_in(entry, place, named)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for index, entry in enumerate(value):
            yield from secrets_in(entry, f"{path}.{index}" if path else str(index), public)


def _tells(key: str) -> bool:
    """Whether a key's name says that its value is a secret; `api_key_variable` names a variable and says not so."""
    last = key.rpartition(".")[2]
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", last)
    lower = [word.lower() for word in words]
    if not lower or lower[-1] in {"variable", "env", "file", "path", "name"}:
        return False
    if lower[-1] == "token" and lower[-2:-1] and lower[-2] in _SPECIAL_TOKENS:
        return False  # a tokenizer's
    return bool(_TELLING & set(lower)) or (len(lower) > 1 and lower[-1] == "key")


def filled_in(url: str) -> str:
    """The URL with each `${NAME}` replaced by the environment variable NAME; for the request itself, nothing else.

    Each value that is filled in is masked from then on in all that is logged, written or raised (`shown`).

    Raises:
        QAdapterError: a variable may not be used here, or is not set.
    """

    def value(match: re.Match[str]) -> str:
        check_variable(match[1], f"the address {shown(url)}")
        found = os.environ.get(match[1])
        if not found:
            raise QAdapterError(f"{shown(url)} needs the environment variable {match[1]}, which is not set. Set it.")
        remember_secret(found, match[1])
        return found

    return _VARIABLE.sub(value, url)


def check_variable(name: str, purpose: str, known: Sequence[str] = ()) -> None:
    """Whether a config may have this environment variable sent somewhere.

    Args:
        name: of the variable.
        purpose: what for, for the message.
        known: further names that are meant for this purpose.

    Raises:
        QAdapterError: it may not.
    """
    listed = {entry.strip() for entry in os.environ.get(ALLOWED, "").split(",")}
    if name in known or name in listed or (name.startswith(PREFIX) and name != ALLOWED):
        return
    raise QAdapterError(
        f"the environment variable {name} is not sent to {purpose}: a config may only name variables that begin with "
        f"{PREFIX}. Rename it, or list it in the environment variable {ALLOWED} ({ALLOWED}={name})."
    )


def public_address(url: str) -> str:
    """One URL without user, password, query and fragment, whatever characters these have."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "the URL"
    return shown(f"{parts.scheme}://{host}{parts.path}")
