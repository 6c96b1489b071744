"""Access to the Prefect servers of this project: the generated auth string, and the proof that a server knows it.

Every server that the project starts requires the auth string (`PREFECT_SERVER_API_AUTH_STRING`); its clients send it
(`PREFECT_API_AUTH_STRING`). Any user of the machine can listen on a loopback port. A client therefore sends the string
only after the server has proved that it knows it, by an HMAC over a random challenge.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import time
import tomllib
import uuid
from enum import Enum
from pathlib import Path
from subprocess import Popen
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
    """The kind of server at an address."""

    ABSENT = "nothing answers"
    OURS = "a server of this machine that knows the auth string"
    REMOTE = "a server on another machine, which the user configured"
    FOREIGN = "something else"


def prefect_home(root: Path) -> Path:
    """The folder of Prefect's database and of the auth string: `PREFECT_HOME`, or the folder in `prefect.toml`.

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
    """Whether an address has a loopback name of this machine; False if it is not a URL."""
    try:
        return urlsplit(url).hostname in LOOPBACK
    except ValueError:
        return False


def auth_string(home: Path) -> str:
    """The auth string: the user's (`PREFECT_API_AUTH_STRING`), or the project's, which is generated at first use.

    Args:
        home: Prefect's home folder; the string lies there in a file with mode 0600.

    Raises:
        QAdapterError: the file can be read by others, is empty, or cannot be written.
    """
    return os.environ.get(AUTH_VARIABLE) or generated_auth_string(home)


def generated_auth_string(home: Path) -> str:
    """As `auth_string`, but without the environment variable."""
    file = home / AUTH_FILE
    with storage_errors(file):
        if not file.exists():
            _generate(file)
        return _read(file)


def _generate(file: Path) -> None:
    """Write a new string; if several processes do so at the same time, the first one's string is kept."""
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
    """A server's answer to a challenge. It contains the port, so that another listener cannot forward the challenge.

    Args:
        auth: the auth string.
        challenge: random text from the client.
        port: the server's port.
    """
    text = f"qadapter prefect server\n{challenge}\n{port}"
    return hmac.new(auth.encode(), text.encode(), hashlib.sha256).hexdigest()


def standing(url: str, home: Path) -> Standing:
    """Find out what kind of server answers at the address of a Prefect API.

    A server on this machine must know the auth string. One that this project started proves it without receiving the
    string. One that the user started is sent the string only if the user has set it (`PREFECT_API_AUTH_STRING`). A
    server on another machine is the user's choice.

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


def wait_for_answer(server: Popen[bytes], url: str, home: Path, seconds: float) -> str:
    """Wait until a server that this process started answers.

    Args:
        server: its process.
        url: the address of its API.
        home: Prefect's home folder.
        seconds: the longest wait.

    Returns:
        What went wrong, as the end of a sentence; empty if it answers.
    """
    deadline = time.monotonic() + seconds
    while standing(url, home) is not Standing.OURS:
        if server.poll() is not None:
            return f"did not start (code {server.returncode})"
        if time.monotonic() > deadline:
            return f"did not answer at {url} within {seconds:.0f} s"
        time.sleep(0.05)
    return ""


def not_ours(url: str) -> str:
    """The message about a server that does not know the auth string."""
    return (
        f"The server that answers at {url} does not know this project's auth string, so it is not used: it may be "
        f"another user's. Stop it or set PREFECT_API_URL to another address; for a server of your own, set "
        f"{AUTH_VARIABLE} to its auth string."
    )


def _asks_for(url: str, auth: str) -> bool:
    """Whether a server accepts requests with the auth string, and refuses those without."""
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
    # Without the environment's proxies: only a server on this machine is meant.
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
