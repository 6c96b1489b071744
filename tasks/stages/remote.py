"""Finished stages on a shared path or object store, by URL (fsspec).

Below the URL, `<stage>/<key>.json` describes a finished stage: its manifest and the name of the folder with its files.
This small file is written last, so that an interrupted upload is never visible. Each upload has its own folder, so that
two machines that finish the same stage at the same time cannot mix their files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import posixpath
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import MANIFEST, Manifest, atomic_folder, write_json
from tasks.stages.retries import retrying

_LOGGER = logging.getLogger(__name__)
_PAUSES = (0.5, 2.0)  # seconds between attempts
_AWAY_FOR = 120.0  # seconds during which a store that did not answer is not contacted
_away_until: dict[str, float] = {}  # URL → time.monotonic(); of this process
Result = TypeVar("Result")


class _AwayError(Exception):
    """The store does not answer; the caller continues without it."""


@dataclass(frozen=True)
class RemoteStore:
    """A shared store of finished stages. It holds only a string, so it can be passed to any thread or process.

    An unavailable store stops no run: after a few attempts a warning is logged and the run continues with the local
    store. A later run that finds these stages locally pushes them.

    Attributes:
        url: any fsspec URL: `s3://bucket/folder`, `gs://…`, `file:///mnt/shared`. Credentials come from the
            environment of the file system's own library.
    """

    url: str

    @classmethod
    def from_environment(cls) -> RemoteStore | None:
        """The store at the URL in `QADAPTER_STORE`; None if that is not set.

        Raises:
            QAdapterError: the URL holds credentials, or no installed file system knows its scheme.
        """
        url = os.environ.get("QADAPTER_STORE", "").strip()
        if not url:
            return None
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query:
            raise QAdapterError(
                "QADAPTER_STORE holds credentials or options. Give scheme://bucket/folder only; credentials belong in "
                "the environment of the file system's own library, for example AWS_ACCESS_KEY_ID."
            )
        try:
            fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))
        except (ImportError, ValueError) as error:
            raise QAdapterError(
                f"QADAPTER_STORE is {url!r}, which no installed file system serves: {error}. Install that package, or "
                "give a URL such as s3://bucket/folder (pip install s3fs) or file:///mnt/shared."
            ) from error
        return cls(url.rstrip("/"))

    def fetch(self, name: str, key: str, folder: Path) -> Manifest | None:
        """Download a finished stage.

        Args:
            name: the stage's name.
            key: its full cache key.
            folder: the target, which must not exist; it appears only after every byte was verified.

        Returns:
            The stage's manifest; None if the stage is missing or damaged, or the store is unavailable.

        Raises:
            QAdapterError: the local disk is full or read-only.
        """
        try:
            found = self._read_pointer(name, key)
            if found is None:
                return None
            return self._download(*found, folder)
        except _AwayError:
            return None
        except _DamagedError as error:
            _LOGGER.warning("Stage %s of %s is damaged and will be computed here: %s", name, self.url, error)
        with contextlib.suppress(_AwayError):
            self._try(_remove, f"{name}/{key}.json")
        return None

    def push(self, manifest: Manifest, folder: Path) -> bool:
        """Upload a finished stage, unless the store already has it complete.

        Args:
            manifest: the stage's manifest.
            folder: the folder of its files.

        Returns:
            Whether the store has the stage now.
        """
        upload = posixpath.join(manifest.stage, f"{manifest.key}.{uuid.uuid4().hex[:12]}")
        try:
            with contextlib.suppress(_DamagedError):
                if self._read_pointer(manifest.stage, manifest.key) is not None:
                    return True
            for file in manifest.files:
                self._try(_put, folder / file, f"{upload}/{file}")
            text = json.dumps({"folder": posixpath.basename(upload), "manifest": asdict(manifest)}).encode()
            self._try(_replace, f"{upload}.tmp", f"{manifest.stage}/{manifest.key}.json", text)
        except _AwayError:
            return False
        _LOGGER.info("Stage %s was pushed to %s", manifest.stage, self.url)
        return True

    def _read_pointer(self, name: str, key: str) -> tuple[Manifest, str] | None:
        """A finished stage's manifest and the name of its folder; None if there is none."""
        text = self._try(_read, f"{name}/{key}.json")
        if text is None:
            return None
        try:
            found = json.loads(text)
            manifest, place = Manifest(**found["manifest"]), str(found["folder"])
            for entry in manifest.files.values():
                str(entry["sha256"]), int(entry["bytes"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _DamagedError(f"its manifest cannot be read ({error})") from error
        if (manifest.stage, manifest.key) != (name, key):
            raise _DamagedError("its manifest belongs to another stage")
        for path in (place, *manifest.files):
            if PurePosixPath(path).is_absolute() or {"..", "", "."} & set(path.split("/")) or "\\" in path:
                raise _DamagedError(f"its manifest names {path!r}, which would leave the folder")
        if "/" in place or MANIFEST in manifest.files:
            raise _DamagedError("its manifest is not one that was pushed")
        return manifest, place

    def _download(self, manifest: Manifest, place: str, folder: Path) -> Manifest:
        with atomic_folder(folder) as out:
            for file in manifest.files:
                (out / file).parent.mkdir(parents=True, exist_ok=True)
                self._try(_get, f"{manifest.stage}/{place}/{file}", out / file)
            if problems := manifest.verify(out):  # includes files that the store lacks
                raise _DamagedError("; ".join(problems[:5]))
            write_json(out / MANIFEST, asdict(manifest))
        _LOGGER.info("Stage %s was fetched from %s", manifest.stage, self.url)
        return manifest

    def _try(self, action: Callable[..., Result], *arguments: Any) -> Result:
        """Call `action(file system, root path, *arguments)`, with retries if the store fails.

        Raises:
            _AwayError: every attempt failed, or the store failed recently.
        """
        if time.monotonic() < _away_until.get(self.url, 0.0):
            raise _AwayError

        def attempt() -> Result:
            fs, root = fsspec.url_to_fs(self.url)
            return action(fs, str(root).rstrip("/"), *arguments)

        try:
            return retrying(_PAUSES, lambda error: isinstance(error, Exception))(attempt)
        except Exception as error:  # each file system raises its own exceptions
            _away_until[self.url] = time.monotonic() + _AWAY_FOR
            _LOGGER.warning(
                "The store %s does not answer (%s: %s); continuing without it for %.0f s. Nothing is lost: "
                "finished stages are kept here and pushed by a later run.",
                self.url,
                type(error).__name__,
                str(error).splitlines()[0][:200] if str(error) else "no message",
                _AWAY_FOR,
            )
            raise _AwayError from error


class _DamagedError(Exception):
    """The store's copy of a stage is incomplete or damaged."""


def _read(fs: Any, root: str, name: str) -> bytes | None:
    try:
        return bytes(fs.cat_file(f"{root}/{name}"))
    except FileNotFoundError:
        return None


def _get(fs: Any, root: str, name: str, file: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        fs.get_file(f"{root}/{name}", str(file))


def _remove(fs: Any, root: str, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(f"{root}/{name}")


def _put(fs: Any, root: str, file: Path, name: str) -> None:
    target = f"{root}/{name}"
    fs.makedirs(posixpath.dirname(target), exist_ok=True)
    fs.put_file(str(file), target)


def _replace(fs: Any, root: str, temporary: str, name: str, content: bytes) -> None:
    """Write a small file atomically: under a temporary name, then moved."""
    fs.makedirs(posixpath.dirname(f"{root}/{name}"), exist_ok=True)
    fs.pipe_file(f"{root}/{temporary}", content)
    fs.mv(f"{root}/{temporary}", f"{root}/{name}")
