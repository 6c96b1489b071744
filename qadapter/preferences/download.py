"""One file from a URL to the local cache: whole or not at all, fetched again only if it changed."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import fsspec

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import digest_file, sync_to_disk
from qadapter.files.shown import shown
from qadapter.files.url_secrets import filled_in, public_address

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30.0
MOST_FILES = 10_000
# Sizes and digests must be those of the file, so it must not be compressed on its way.
HEADERS = {"User-Agent": "qadapter-pipeline", "Accept-Encoding": "identity"}
NETWORK_ERRORS = (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException)


class UnreachableError(QAdapterError):
    """A server did not answer, or broke off. The same request may succeed later, so a retry can help."""


def fetch(url: str, folder: Path) -> Path:
    """A local copy of a URL's file.

    An earlier copy is used again if the server says that it is unchanged (ETag or Last-Modified; other stores: fsspec's
    `ukey`), and, with a warning, if the server cannot be reached; in either case only if it still has the sha256 that
    was noted. A copy and its note are on the disk itself before they have their names: a power cut leaves no empty one.

    Args:
        url: `http://`, `https://` or any other protocol that fsspec has a file system for.
        folder: where copies are kept; created if needed.

    Raises:
        QAdapterError: the URL is refused or has no file, or the copy cannot be stored.
        UnreachableError: no answer, an answer that broke off, or a server's own error, and no earlier copy.
    """
    target = folder / _file_name(url)
    known = _read_note(target)
    get = _fetch_http if _is_http(url) else _fetch_other
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note = get(url, target, known)
    except UnreachableError as error:
        if not known:
            raise
        logger.warning("%s Using the copy of an earlier download.", error)
        return target
    except OSError as error:
        raise QAdapterError(
            f"{public_address(url)} cannot be stored in {folder}: {error.strerror or error}. "
            "Free some space there or choose another cache folder."
        ) from error
    if note != known:
        _store(_note_file(target), lambda stream: stream.write(json.dumps(note).encode()))
    return target


def size(url: str) -> int | None:
    """Size in bytes of a URL's file without downloading it; None where the server does not tell. Raises as `fetch`."""
    if not _is_http(url):
        return _ask_other(url)[2]
    try:
        # A one-byte range, because many servers that hand out files answer HEAD with an error.
        request = urllib.request.Request(filled_in(url), headers={**HEADERS, "Range": "bytes=0-0"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            total = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
            length = response.headers.get("Content-Length") if response.status == 200 else total and total.group(1)
            return int(length) if length else None
    except urllib.error.HTTPError as error:
        if error.code == 416:  # an empty file has no first byte
            return 0
        raise _http_error(url, error) from error
    except (ValueError, http.client.InvalidURL) as error:
        raise _bad_url(url) from error
    except NETWORK_ERRORS as error:
        raise _unreachable(url, error) from error


def files_below(url: str, is_data: Callable[[str], bool]) -> list[str]:
    """The URLs of the data files in a folder of an object store, sorted; a file's own URL where it is one.

    Args:
        url: `http(s)://` has no folders.
        is_data: whether a path relative to the folder is a data file.

    Raises:
        QAdapterError: it does not exist, or the folder has more than `MOST_FILES` data files.
    """
    if _is_http(url):
        return [url]
    system, path, info = _look_up(url)
    if info["type"] != "directory":
        return [url]
    try:
        found = [str(name) for name in system.find(path)]
    except Exception as error:  # every store has errors of its own
        raise _unreachable(url, error) from error
    names = [name[len(path.rstrip("/")) + 1 :] for name in found if name.startswith(path.rstrip("/") + "/")]
    files = sorted(name for name in names if is_data(name) and ".." not in name.split("/"))
    if len(files) > MOST_FILES:
        raise QAdapterError(f"{public_address(url)} has {len(files):,} data files; at most {MOST_FILES:,} are fetched.")
    return [f"{url.rstrip('/')}/{name}" for name in files]


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _file_name(url: str) -> str:
    """A name of our own: no part of a URL can lead out of the cache folder."""
    try:
        last = unquote(urlsplit(url).path).rpartition("/")[2]
    except ValueError as error:
        raise _bad_url(url) from error
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", last).lstrip(".")[-80:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{readable or 'data'}"


def _note_file(target: Path) -> Path:
    return target.with_name(target.name + ".meta")


def _read_note(target: Path) -> dict[str, Any]:
    """What is known of an earlier copy; empty if there is none or it is not the file that was noted."""
    try:
        note = json.loads(_note_file(target).read_text(encoding="utf-8"))
        same = target.stat().st_size == note["size"] and digest_file(target) == note["sha256"]
        return note if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _store(target: Path, write: Callable[[IO[bytes]], Any]) -> dict[str, Any]:
    """Writes beside the target and renames, so that no reader ever sees a part. Returns `size` and `sha256`."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name + ".", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
        written = {"size": part.stat().st_size, "sha256": digest_file(part)}
        sync_to_disk(part)
        part.replace(target)
        sync_to_disk(target.parent)
    finally:
        part.unlink(missing_ok=True)
    return written


def _fetch_http(url: str, target: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    asked = {"If-None-Match": known.get("etag"), "If-Modified-Since": known.get("modified")}
    headers = {**HEADERS, **{name: value for name, value in asked.items() if value}}
    address = filled_in(url)
    try:
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            expected = response.headers.get("Content-Length")

            def write(stream: IO[bytes]) -> None:
                shutil.copyfileobj(response, stream)
                if expected is not None and stream.tell() != int(expected):
                    raise UnreachableError(
                        f"{public_address(url)} broke off after {stream.tell()} of {expected} bytes. Try again."
                    )

            written = _store(target, write)
            modified = response.headers.get("Last-Modified")
            etag = response.headers.get("ETag")
            if etag and shown(etag) != etag:  # a server that repeats what it was sent; the note would keep it
                etag = None
            return {"etag": etag, "modified": modified, **written}
    except urllib.error.HTTPError as error:
        if error.code == 304:
            return dict(known)
        raise _http_error(url, error) from error
    except (ValueError, http.client.InvalidURL) as error:
        raise _bad_url(url) from error
    except NETWORK_ERRORS as error:
        raise _unreachable(url, error) from error


def _http_error(url: str, error: urllib.error.HTTPError) -> QAdapterError:
    message = f"{public_address(url)} was answered with {error.code} {error.reason}."
    if error.code >= 500 or error.code in (408, 429):
        return UnreachableError(f"{message} The server has a problem; try again later.")
    return QAdapterError(f"{message} A file was expected there; check the URL and whether it needs a login.")


def _unreachable(url: str, error: Exception) -> UnreachableError:
    reason = getattr(error, "reason", None) or str(error) or type(error).__name__
    return UnreachableError(
        f"{public_address(url)} cannot be reached: {shown(str(reason))}. Check the network and the URL, then try again."
    )


def _bad_url(url: str) -> QAdapterError:
    return QAdapterError(
        f"{public_address(url)} is not a usable URL; http(s):// or a protocol of fsspec's was expected."
    )


def _look_up(url: str) -> tuple[Any, str, dict[str, Any]]:
    """(file system, path in it, what it says of the path) of a URL that is not http."""
    if "::" in url:
        raise QAdapterError(
            f"{public_address(url)} is a chain of file systems; give the URL of one file, not of an archive's part."
        )
    try:
        system, path = fsspec.core.url_to_fs(filled_in(url))
        return system, path, system.info(path)
    except QAdapterError:
        raise
    except FileNotFoundError as error:
        raise QAdapterError(f"{public_address(url)} does not exist; check the URL.") from error
    except (ImportError, ValueError) as error:
        raise QAdapterError(f"{public_address(url)} cannot be opened: {shown(str(error))}.") from error
    except Exception as error:  # every store has errors of its own
        raise _unreachable(url, error) from error


def _ask_other(url: str) -> tuple[Any, str, int | None, str]:
    """(file system, path in it, size, a value that changes with the file) of a URL that is not http."""
    system, path, info = _look_up(url)
    if info["type"] != "file":
        raise QAdapterError(f"{public_address(url)} is not a file; give the URL of one file.")
    try:
        return system, path, info.get("size"), str(system.ukey(path))
    except Exception as error:  # every store has errors of its own
        raise _unreachable(url, error) from error


def _fetch_other(url: str, target: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    system, path, expected, key = _ask_other(url)
    if known.get("etag") == key:
        return dict(known)

    def write(stream: IO[bytes]) -> None:
        try:
            with system.open(path, "rb") as source:
                shutil.copyfileobj(source, stream)
        except Exception as error:  # every store has errors of its own
            raise _unreachable(url, error) from error
        if expected is not None and stream.tell() != expected:
            raise UnreachableError(
                f"{public_address(url)} broke off after {stream.tell()} of {expected} bytes. Try again."
            )

    return {"etag": key, **_store(target, write)}
