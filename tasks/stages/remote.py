"""Finished stages on a path or object store that several machines share, by URL (fsspec).

Below the URL, `<stage>/<key>.json` is a finished stage: its manifest, and which folder beside it holds its files. That
one small file is written last, so that a stage whose upload was cut short is never seen. Each upload has a folder of
its own: two machines that finish the same stage at once cannot mix their files.
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
_AWAY_FOR = 120.0  # seconds for which a store that did not answer is left alone
_away_until: dict[str, float] = {}  # URL → time.monotonic(); of this process
Result = TypeVar("Result")


class _AwayError(Exception):
    """The store does not answer; whoever asked goes on without it."""


@dataclass(frozen=True)
class RemoteStore:
    """Finished stages by key, shared. Holds a string only, so it can be handed to any thread or process.

    A store that does not answer stops nothing: it is asked again a few times, then a warning is logged and the run
    goes on with what lies here. Stages that were not pushed then are pushed when a later run finds them.

    Attributes:
        url: any fsspec URL: `s3://bucket/folder`, `gs://…`, `file:///mnt/shared`. Credentials come from the
            environment of the file system's own library.
    """

    url: str

    @classmethod
    def from_environment(cls) -> RemoteStore | None:
        """The store that `QADAPTER_STORE` names; None if it is not set.

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
                f"QADAPTER_STORE is {url!r}, which no installed file system serves: {error}. Install what it names, or "
                "give a URL such as s3://bucket/folder (pip install s3fs) or file:///mnt/shared."
            ) from error
        return cls(url.rstrip("/"))

    def fetch(self, name: str, key: str, folder: Path) -> Manifest | None:
        """Download a finished stage.

        Args:
            name: the stage's name.
            key: its whole cache key.
            folder: where to, absent as yet; it appears only when every byte was held against the manifest.

        Returns:
            The stage's manifest; None if there is no such stage, it is damaged, or the store is away.

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
        """Upload a finished stage, unless a whole one is there already.

        Args:
            manifest: the stage's.
            folder: its files.

        Returns:
            Whether the store holds it now.
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
            if problems := manifest.verify(out):  # a file that was not there is missing here
                raise _DamagedError("; ".join(problems[:5]))
            write_json(out / MANIFEST, asdict(manifest))
        _LOGGER.info("Stage %s was fetched from %s", manifest.stage, self.url)
        return manifest

    def _try(self, action: Callable[..., Result], *arguments: Any) -> Result:
        """Call `action(file system, root path, *arguments)`; wait and try again where the store fails.

        Raises:
            _AwayError: it failed every time, or did so a moment ago.
        """
        if time.monotonic() < _away_until.get(self.url, 0.0):
            raise _AwayError

        def attempt() -> Result:
            fs, root = fsspec.url_to_fs(self.url)
            return action(fs, str(root).rstrip("/"), *arguments)

        try:
            return retrying(_PAUSES, lambda error: isinstance(error, Exception))(attempt)
        except Exception as error:  # every file system has exceptions of its own
            _away_until[self.url] = time.monotonic() + _AWAY_FOR
            _LOGGER.warning(
                "The store %s does not answer (%s: %s); going on without it for %.0f s. Nothing is lost: what is "
                "finished lies here and is pushed by a later run.",
                self.url,
                type(error).__name__,
                str(error).splitlines()[0][:200] if str(error) else "no message",
                _AWAY_FOR,
            )
            raise _AwayError from error


class _DamagedError(Exception):
    """What lies in the store is not a whole stage."""


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
    """Write a small file so that a reader sees all of it or none: written aside, then moved."""
    fs.makedirs(posixpath.dirname(f"{root}/{name}"), exist_ok=True)
    fs.pipe_file(f"{root}/{temporary}", content)
    fs.mv(f"{root}/{temporary}", f"{root}/{name}")
