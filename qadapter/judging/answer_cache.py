"""A judge's earlier answers in one file that several threads and processes add to at a time."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from qadapter.files.artifacts import storage_errors
from qadapter.files.locks import private_lock


class AnswerCache:
    """Answers by the digest of their question, as JSON lines.

    Lines are added under a file lock, each in one write; before a question counts as new, the lines that other
    processes have added are read. A line that a crash cut off is ignored, and the next one begins on a line of its own.
    """

    def __init__(self, file: Path | None) -> None:
        """Read what is there.

        Args:
            file: made with its first answer; None keeps the answers in memory only.
        """
        self._file = file
        self._answers: dict[str, str] = {}
        self._read_to = 0  # bytes
        self._lock = threading.Lock()
        self._read_new()

    def get(self, key: str) -> str | None:
        """The answer to a question, from this or any other process; None if there is none yet."""
        with self._lock:
            if key not in self._answers:
                self._read_new()
            return self._answers.get(key)

    def put(self, key: str, text: str) -> None:
        """Keep an answer.

        Raises:
            QAdapterError: the disk is full, or the file cannot be written.
        """
        with self._lock:
            self._answers[key] = text
            if self._file is None:
                return
            # ASCII: a judge may send half a surrogate pair, which no encoding has bytes for.
            line = json.dumps({"key": key, "text": text}).encode() + b"\n"
            with storage_errors(self._file):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with private_lock(Path(f"{self._file}.lock")), self._file.open("ab+") as stream:
                    if (end := stream.seek(0, 2)) and (stream.seek(end - 1), stream.read(1))[1] != b"\n":
                        line = b"\n" + line
                    stream.write(line)

    def _read_new(self) -> None:
        """Read the whole lines that were added since the last time."""
        if self._file is None or not self._file.is_file():
            return
        with self._file.open("rb") as stream:
            if stream.seek(0, 2) < self._read_to:
                self._read_to = 0  # the file was put in place anew
            stream.seek(self._read_to)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self._read_to += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            try:
                row = json.loads(line.decode(errors="replace"))  # a crash can cut a character in two
                self._answers[row["key"]] = row["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
