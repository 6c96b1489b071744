"""Access to the Prefect servers of this project: the generated auth string, and the proof that a server knows it.

Every server that the project starts asks for the auth string (`PREFECT_SERVER_API_AUTH_STRING`); every client of it
sends it (`PREFECT_API_AUTH_STRING`). Any user of the machine can listen on a loopback port, so a client first lets the
server prove that it knows the string (an HMAC over a random challenge), and sends the string only then.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import tomllib
import uuid
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import storage_errors
from qadapter.files.private import private_folder

AUTH_VARIABLE = "PREFECT_API_AUTH_STRING"
"""Prefect's setting of its clients; its server's is `SERVER_AUTH_VARIABLE`."""
SERVER_AUTH_VARIABLE = "PREFECT_SERVER_API_AUTH_STRING"
AUTH_FILE = "auth-string"
PROOF_PATH = "/qadapter/proof"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_PROBE_SECONDS = 5.0


class Standing(Enum):
    """What answers at an address."""

    ABSENT = "nothing answers"
    OURS = "a server of this machine that knows the auth string"
    REMOTE = "a server of another machine, which the user named"
    FOREIGN = "something else"


def prefect_home(root: Path) -> Path:
    """The folder of Prefect's database and of the auth string: `PREFECT_HOME`, else what `prefect.toml` names.

    Args:
        root: the project folder.
    """
    named = os.environ.get("PREFECT_HOME") or _project_settings(root).get("home") or ".prefect"
    return (root / Path(named).expanduser()).absolute()


def api_url(root: Path) -> str:
    """Address of the Prefect API: `PREFECT_API_URL`, else the one in the project's `prefect.toml`.

    Raises:
        QAdapterError: neither names one.
    """
    configured = os.environ.get("PREFECT_API_URL") or _project_settings(root).get("api", {}).get("url")
    if not configured:
        raise QAdapterError(
            "No Prefect API is configured: PREFECT_API_URL is not set and prefect.toml has no [api] url. "
            "Set one, for example http://127.0.0.1:4200/api."
        )
    return str(configured).rstrip("/")


def is_loopback(url: str) -> bool:
    """Whether an address is one of this machine's loopback names; False for what is no URL."""
    try:
        return urlsplit(url).hostname in LOOPBACK
    except ValueError:
        return False


def auth_string(home: Path) -> str:
    """The auth string: the user's own (`PREFECT_API_AUTH_STRING`), else that of the project, generated at first use.

    Args:
        home: Prefect's home folder; the string lies there in a file with mode 0600.

    Raises:
        QAdapterError: the file can be read by others, is empty, or cannot be written.
    """
    return os.environ.get(AUTH_VARIABLE) or generated_auth_string(home)


def generated_auth_string(home: Path) -> str:
    """As `auth_string`, whatever the environment says."""
    file = home / AUTH_FILE
    with storage_errors(file):
        if not file.exists():
            _generate(file)
        return _read(file)


def _generate(file: Path) -> None:
    """Write a new string; of several processes that do so at once, the first one's string holds."""
    private_folder(file.parent)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(secrets.token_urlsafe(32) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, file)  # unlike a rename, it never replaces a string that is in use
    finally:
        temporary.unlink(missing_ok=True)


def _read(file: Path) -> str:
    with file.open(encoding="ascii", errors="replace") as stream:
        status, text = os.fstat(stream.fileno()), stream.read().strip()
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise QAdapterError(
            f"{file} has mode {stat.S_IMODE(status.st_mode):04o}: other users may have read the auth string. Stop the "
            "Prefect server and delete the file; the next start generates another one."
        )
    if not text:
        raise QAdapterError(f"{file} is empty; delete it, and the next start generates an auth string.")
    return text


def proof(auth: str, challenge: str, port: int) -> str:
    """What a server answers to a challenge; the port keeps another listener from passing a challenge on.

    Args:
        auth: the auth string.
        challenge: random text of the asker.
        port: that the server listens on.
    """
    text = f"qadapter prefect server\n{challenge}\n{port}"
    return hmac.new(auth.encode(), text.encode(), hashlib.sha256).hexdigest()


def standing(url: str, home: Path) -> Standing:
    """What answers at the address of a Prefect API.

    A server of this machine has to know the auth string. One that this project started proves it without being sent
    the string. One that the user started himself is asked with the string only where the user has set one
    (`PREFECT_API_AUTH_STRING`). A server of another machine is the user's choice.

    Args:
        url: of the API, with its path.
        home: Prefect's home folder.
    """
    auth = auth_string(home)
    try:
        if not is_loopback(url):
            return Standing.REMOTE if _get(f"{url}/health", verify=True).is_success else Standing.ABSENT
        port = urlsplit(url).port or 80
        challenge = secrets.token_hex(32)
        answer = _get(_origin(url) + PROOF_PATH, params={"challenge": challenge})
        if answer.status_code == 200 and hmac.compare_digest(answer.text, proof(auth, challenge, port)):
            return Standing.OURS
        if _is_the_users_own(auth, home) and _asks_for(url, auth):
            return Standing.OURS
        return Standing.FOREIGN
    except (httpx.ConnectError, httpx.TimeoutException):
        return Standing.ABSENT
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return Standing.FOREIGN


def not_ours(url: str) -> str:
    """The sentence about a server that does not know the auth string."""
    return (
        f"The server that answers at {url} does not know this project's auth string, so it is not used: it may be "
        f"another user's. Stop it or name another address in PREFECT_API_URL; for a server of your own, set "
        f"{AUTH_VARIABLE} to the string that it asks for."
    )


def _asks_for(url: str, auth: str) -> bool:
    """Whether a server refuses those without the auth string, and those with it not."""
    path = f"{url}/admin/version"
    return _get(path).status_code == 401 and _get(path, auth=_Basic(auth)).status_code == 200


def _is_the_users_own(auth: str, home: Path) -> bool:
    """Whether the user set the auth string, rather than this project for its own processes."""
    file = home / AUTH_FILE
    return not file.exists() or auth != _read(file)


class _Basic(httpx.Auth):
    """Prefect's form of basic authentication: the string as a whole, with or without a colon in it."""

    def __init__(self, auth: str) -> None:
        self._auth = auth

    def auth_flow(self, request: httpx.Request) -> Any:
        from base64 import b64encode

        request.headers["Authorization"] = f"Basic {b64encode(self._auth.encode()).decode()}"
        yield request


def _get(url: str, **options: Any) -> httpx.Response:
    # Without the environment's proxies: what answers on this machine is asked about.
    verify = options.pop("verify", False)
    with httpx.Client(trust_env=verify, verify=verify, timeout=_PROBE_SECONDS) as client:
        return client.get(url, **options)


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _project_settings(root: Path) -> dict[str, Any]:
    file = root / "prefect.toml"
    if not file.exists():
        return {}
    with file.open("rb") as stream:
        return tomllib.load(stream)
