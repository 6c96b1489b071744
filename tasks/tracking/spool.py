"""A file of pending writes: it keeps them in order while the server is unavailable, until they are delivered."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qadapter.files.artifacts import json_line, storage_errors, sync_to_disk
from qadapter.files.locks import held

Entry = dict[str, Any]
_LOCK_SECONDS = 900.0  # a delivery sends all pending writes, and may wait a minute for the server


class Spool:
    """JSON lines that threads, processes and later runs share.

    A delivery records what is left only at its end. A killed delivery is repeated, so the entries must be idempotent.

    Attributes:
        file: the pending entries; absent if there are none.
        refused: entries that no later attempt can deliver, each with its reason.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._names = file.with_suffix(".names.jsonl")
        self.refused = file.with_suffix(".refused.jsonl")

    @property
    def waiting(self) -> bool:
        """Whether any entry is pending."""
        return self.file.exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other threads and processes from adding or delivering.

        Raises:
            QAdapterError: another process holds the lock for too long, or its file cannot be opened.
        """
        with held(self.file.with_suffix(".lock"), guards="the spool of MLflow", seconds=_LOCK_SECONDS):
            yield

    def append(self, entry: Entry) -> None:
        """Add an entry; it is on the disk when this returns."""
        with self.locked():
            _append(self.file, entry)

    def entries(self) -> list[Entry]:
        """All entries in order; a line that a power cut left incomplete is skipped."""
        return _read(self.file)

    def refuse(self, entry: Entry, reason: str) -> None:
        """Move an entry that no later attempt can deliver to the file of refused ones."""
        _append(self.refused, {"reason": reason, **entry})

    def keep(self, entries: Sequence[Entry]) -> None:
        """Keep only these entries, after all others were delivered; call it only under `locked`.

        Raises:
            QAdapterError: the disk is full or read-only; the file is then unchanged.
        """
        if not entries:
            self.file.unlink(missing_ok=True)
            return
        rest = self.file.with_suffix(".rest")
        with storage_errors(self.file):
            with rest.open("wb") as stream:
                stream.writelines(map(json_line, entries))
                stream.flush()
                os.fsync(stream.fileno())
            rest.replace(self.file)
            sync_to_disk(self.file.parent)

    def name(self, ticket: str, identity: str) -> None:
        """Remember the id that a ticket received on delivery."""
        _append(self._names, {"ticket": ticket, "identity": identity})

    def identity_of(self, ticket: str) -> str | None:
        """The id behind a ticket; None before its delivery."""
        return {row["ticket"]: str(row["identity"]) for row in _read(self._names)}.get(ticket)


def _append(file: Path, entry: Entry) -> None:
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as stream:
            if stream.tell() and not _ends_in_newline(stream):
                stream.write(b"\n")
            stream.write(json_line(entry))
            stream.flush()
            os.fsync(stream.fileno())


def _ends_in_newline(stream: Any) -> bool:
    stream.seek(-1, os.SEEK_END)
    return bool(stream.read(1) == b"\n")


def _read(file: Path) -> list[Entry]:
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]
