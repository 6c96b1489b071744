"""Passwords and keys: configs contain none. Those that a URL needs come from environment variables.

The operator, not the config, decides which variables may be used: those whose names begin with `QADAPTER_`, and those
that the environment variable `QADAPTER_ALLOW_VARIABLES` lists.
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
"""Config key that lists query parameters whose literal values are not secrets."""

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
    """Refuse config text that contains a password or key, in a URL or in the format of a known kind of key.

    Every literal value in a URL's query is treated as a secret unless its parameter is known to be harmless (`format`,
    `revision`, …) or listed in `public`.

    Raises:
        ValueError: the text contains a secret. The message says what to write instead, and does not repeat the text.
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
        return None  # not a URL: the code that reads it reports that
    if not parts.scheme:
        return None
    user, at, _ = parts.netloc.rpartition("@")
    if at and not _VARIABLE.fullmatch(user):
        return f"a URL has a user or password before its host; {_IN_ITS_PLACE}"
    for name, value in query:
        harmless = name.lower() in _HARMLESS_QUERY and _HARMLESS_VALUE.fullmatch(value)
        if value and not (harmless or name in public or _VARIABLE.fullmatch(value)):
            return (
                f"a URL may have a secret in its query ({shown(name)[:40]}=…); {_IN_ITS_PLACE}; if it is not a secret, "
                f"list the parameter in {PUBLIC_QUERY}"
            )
    if parts.fragment and not _VARIABLE.fullmatch(parts.fragment):
        return f"a URL has a fragment (#…), which may be a secret and is never sent; remove it, or {_IN_ITS_PLACE}"
    return None


def secrets_in(value: Any, path: str = "", public: Sequence[str] = ()) -> Iterator[str]:
    """Find secrets in a config, at any depth and in keys too: one sentence per secret, with the key's path.

    Args:
        value: the config, as read from YAML or given by a caller.
        path: the key path of `value`.
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
                yield f"{place}: its name is that of a secret; {_IN_ITS_PLACE}"
            else:
                yield from secrets_in(entry, place, named)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for index, entry in enumerate(value):
            yield from secrets_in(entry, f"{path}.{index}" if path else str(index), public)


def _tells(key: str) -> bool:
    """Whether a key's name marks its value as a secret. `api_key_variable` does not: its value is a variable's name."""
    last = key.rpartition(".")[2]
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", last)
    lower = [word.lower() for word in words]
    if not lower or lower[-1] in {"variable", "env", "file", "path", "name"}:
        return False
    if lower[-1] == "token" and lower[-2:-1] and lower[-2] in _SPECIAL_TOKENS:
        return False  # settings of a tokenizer
    return bool(_TELLING & set(lower)) or (len(lower) > 1 and lower[-1] == "key")


def filled_in(url: str) -> str:
    """Replace each `${NAME}` in a URL by the environment variable NAME. Use the result for the request only.

    Each value that was filled in is masked from then on in everything logged, written or raised (`shown`).

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
    """Refuse an environment variable that a config may not send to a server.

    Args:
        name: the name of the variable.
        purpose: the receiver, for the message.
        known: further names that are allowed for this purpose.

    Raises:
        QAdapterError: the variable may not be sent.
    """
    listed = {entry.strip() for entry in os.environ.get(ALLOWED, "").split(",")}
    if name in known or name in listed or (name.startswith(PREFIX) and name != ALLOWED):
        return
    raise QAdapterError(
        f"the environment variable {name} is not sent to {purpose}: a config may only name variables that begin with "
        f"{PREFIX}. Rename it, or list it in the environment variable {ALLOWED} ({ALLOWED}={name})."
    )


def public_address(url: str) -> str:
    """One URL without user, password, query and fragment, even if these contain special characters."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "the URL"
    return shown(f"{parts.scheme}://{host}{parts.path}")
