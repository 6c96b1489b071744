"""Files that are either whole or absent: digests, atomic writes, and the manifest of a finished folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError

MANIFEST = "manifest.json"

_STORAGE_ADVICE = {
    errno.ENOSPC: ("the disk is full", "free some space, then run again: what was finished is kept"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, then run again: what was finished is kept"),
    errno.EROFS: ("the file system is read-only", "give a writable folder"),
    errno.EACCES: ("permission was denied", "give a writable folder, or change its permissions"),
    errno.EPERM: ("permission was denied", "give a writable folder, or change its permissions"),
}

_FULL_DISK = (
    "No space left on device",
    "PytorchStreamWriter failed writing",
    "] . unexpected pos ",  # what closing torch's half-written file makes of the same
)


def digest_file(file: Path) -> str:
    """sha256 of a file's bytes, as 64 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(folder: Path, *, exclude: Collection[str] = ()) -> dict[str, Path]:
    """List every file below `folder`: POSIX path relative to it → file, sorted by path.

    Links are followed (a folder that links back to one above it is entered once), because a link's target is what a
    reader would read. Names in `exclude` are relative too.
    """
    found: dict[str, Path] = {}
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in files:
            path = Path(parent, name)
            found[path.relative_to(folder).as_posix()] = path
    return {name: found[name] for name in sorted(found) if name not in exclude}


def _combine(digests: Mapping[str, str]) -> str:
    """Combine the digests of named files into one sha256. Names are sorted, and separated from the digests."""
    lines = json.dumps(sorted(digests.items()), ensure_ascii=True)
    return hashlib.sha256(lines.encode()).hexdigest()


def digest_tree(folder: Path, *, exclude: Collection[str] = ()) -> str:
    """sha256 of a folder's content: the sorted relative names and each file's bytes, not its own name or any date.

    Args:
        folder: what to digest. A single file is digested by its bytes alone.
        exclude: relative names to leave out.

    Raises:
        QAdapterError: there is no such file or folder.
    """
    if folder.is_file():
        return digest_file(folder)
    if not folder.is_dir():
        raise QAdapterError(f"{folder} is missing; a file or folder was expected there. Check the path.")
    return _combine({name: digest_file(path) for name, path in list_files(folder, exclude=exclude).items()})


def _storage_failure(error: BaseException) -> tuple[int, str | None] | None:
    """Find a full, read-only or forbidden disk in an exception's chain: its errno, and the file where it is known.

    Libraries written in Rust or C++ (safetensors, torch) report a full disk as text, not as an errno.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _STORAGE_ADVICE:
            named = seen.filename if seen.filename2 is None else seen.filename2  # of a copy, what is written
            return seen.errno, os.fsdecode(named) if isinstance(named, str | bytes | os.PathLike) else None
        if any(sign in str(seen) for sign in _FULL_DISK):
            return errno.ENOSPC, None
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn a full disk, a read-only file system or a forbidden folder into a message with a remedy.

    Args:
        target: the file or folder being written, for the message. If the error names a file elsewhere (in a temporary
            folder or cache), the message is about that file.

    Raises:
        QAdapterError: in place of the `OSError` (which stays its cause). Any other exception passes unchanged, a
            `QAdapterError` among them.
    """
    try:
        yield
    except QAdapterError:
        raise
    except Exception as error:
        found = _storage_failure(error)
        if found is None:
            raise
        code, named = found
        what, advice = _STORAGE_ADVICE[code]
        failed = f"Cannot write {target}"
        if named is not None and _lies_elsewhere(Path(named), target):
            failed = f"{named} cannot be used, so {target} was not written"
        raise QAdapterError(f"{failed}: {what}. Nothing half-written was left there; {advice}.") from error


def _lies_elsewhere(file: Path, target: Path) -> bool:
    """Whether `file` is neither near the target (it is first written under another name) nor a folder above it."""
    file, folder = file.absolute(), target.absolute().parent
    return not (file.is_relative_to(folder) or folder.is_relative_to(file))


def sync_to_disk(path: Path) -> None:
    """Flush a file's or folder's entry to the disk, so that a power cut after a rename cannot empty it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Call `sync_to_disk` on a folder and everything in it."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync_to_disk(Path(parent, name))
        sync_to_disk(Path(parent))


def _temporary_sibling(final: Path) -> Path:
    """A new hidden name beside `final`, on the same file system, so that the rename is atomic."""
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.tmp")


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable UTF-8 JSON, atomically: a reader sees the old file or the new one, never a part.

    Raises:
        QAdapterError: the disk is full or the folder cannot be written to.
        ValueError: the value contains NaN or an infinity, which JSON cannot represent.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = _temporary_sibling(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
            sync_to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        QAdapterError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise QAdapterError(f"{path} is missing; a JSON file was expected there. Check the path.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise QAdapterError(f"{path} is not JSON ({error}). Restore it, or delete it to have it rebuilt.") from error


def read_json_lines(path: Path) -> list[Any]:
    """Read the values of a JSON lines file, skipping blank lines.

    `str.splitlines` is not used: it also splits at U+2028, U+2029 and U+0085, which JSON strings may contain unescaped.

    Raises:
        QAdapterError: the file is missing, or a line is not JSON.
    """
    values: list[Any] = []
    number = 1
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    values.append(json.loads(line))
                number += 1
        return values
    except FileNotFoundError as error:
        raise QAdapterError(f"{path} is missing; a JSON lines file was expected there. Check the path.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise QAdapterError(
            f"{path} is not JSON lines (line {number}: {error}). Restore it, or delete it to have it rebuilt."
        ) from error


_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode


def json_line(value: Any) -> bytes:
    """A value as one line of a JSON lines file, in UTF-8; what JSON cannot represent is written as its string."""
    try:
        return _encode(value).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate cannot be encoded in UTF-8
        return json.dumps(value, default=str).encode() + b"\n"


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write values as UTF-8 JSON lines, one value per line (`json_line`); missing folders are created.

    Args:
        path: the file, written from its beginning; a process that is killed leaves a part of it.
        rows: the values.

    Raises:
        QAdapterError: the disk is full or the folder cannot be written to.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.writelines(map(json_line, rows))


@contextlib.contextmanager
def atomic_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Create a folder that appears under its name only when it is complete.

    The body writes into a temporary sibling; at its end, every file is flushed to the disk and the sibling is renamed.
    An exception removes the sibling. A killed process leaves it under its hidden name, `.<name>.<random>.tmp`, which
    no reader accepts as a result; `remove_leftovers` deletes it.

    Args:
        final: the folder's final name.
        replace: replace an existing folder; without it, an existing folder is an error.

    Yields:
        The temporary folder, empty.

    Raises:
        QAdapterError: the disk is full, the folder cannot be written to, or `final` exists and `replace` is off.
    """
    if final.exists() and not replace:
        raise QAdapterError(f"{final} already exists and is not overwritten. Remove it or give another folder.")
    temporary = _temporary_sibling(final)
    with storage_errors(final):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            sync_tree(temporary)
            if replace and final.exists():
                # A folder cannot be renamed onto a non-empty one: for an instant neither exists, but never half of one.
                outgoing = _temporary_sibling(final)
                final.rename(outgoing)
                temporary.rename(final)
                shutil.rmtree(outgoing, ignore_errors=True)
            else:
                temporary.rename(final)
            sync_to_disk(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(final: Path) -> None:
    """Delete what killed `atomic_folder` blocks of this name left. Call it only while no other process can write."""
    for leftover in final.parent.glob(f".{final.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a finished folder holds and what it was made from; stored in it as `manifest.json`.

    Attributes:
        stage: name of the stage that wrote the folder.
        key: sha256 of everything that determines the content.
        config: the stage's settings.
        inputs: content digest of each input, by name.
        code: digest of the code that ran.
        versions: versions of the libraries that the result can depend on.
        files: sha256 and size in bytes of every file, by relative name (the manifest itself is not among them).
        seconds: how long the computation took.
        created: when it ended, UTC, ISO 8601.
    """

    stage: str
    key: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    code: str
    versions: Mapping[str, str]
    seconds: float
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    created: str = ""

    @property
    def digest(self) -> str:
        """Content digest of the folder, equal to `digest_tree(folder, exclude={"manifest.json"})`."""
        return _combine({name: entry["sha256"] for name, entry in self.files.items()})

    def write(self, folder: Path) -> Manifest:
        """Digest a folder's files and write the manifest into it.

        Returns:
            The manifest as written, with `files` and `created` filled in.
        """
        files = {
            name: {"sha256": digest_file(path), "bytes": path.stat().st_size}
            for name, path in list_files(folder, exclude={MANIFEST}).items()
        }
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        whole = Manifest(**{**asdict(self), "files": files, "created": created})
        write_json(folder / MANIFEST, asdict(whole))
        return whole

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a finished folder.

        Raises:
            QAdapterError: it is missing, not JSON, or lacks a field.
        """
        fields = read_json(folder / MANIFEST)
        try:
            manifest = cls(**fields)
            for entry in manifest.files.values():
                str(entry["sha256"]), int(entry["bytes"])
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise QAdapterError(f"{folder / MANIFEST} is not a manifest ({error}). Remove {folder}.") from error
        return manifest

    def verify(self, folder: Path, *, hashes: bool = True) -> list[str]:
        """Compare the folder with the manifest.

        Args:
            folder: where the files lie.
            hashes: read every byte; without it only names and sizes are compared. Files that the manifest does not
                list are ignored.

        Returns:
            One sentence for each file that is missing or changed; empty when the folder is whole.
        """
        problems = []
        for name, entry in self.files.items():
            path = folder / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != entry["bytes"]:
                problems.append(f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}")
            elif hashes and digest_file(path) != entry["sha256"]:
                problems.append(f"{name} has changed since it was written")
        return problems
