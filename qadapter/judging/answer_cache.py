"""A file of a judge's earlier answers, safe for several threads and processes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from qadapter.files.artifacts import json_line, storage_errors
from qadapter.files.locks import private_lock


class AnswerCache:
    """Answers by the digest of their question, as JSON lines.

    Each line is appended in one write under a file lock. Before a question counts as new, lines of other processes are
    read. A line truncated by a crash is ignored, and the next answer starts a new line.
    """

    def __init__(self, file: Path | None) -> None:
        """Read the existing answers.

        Args:
            file: created with the first answer; None keeps the answers in memory only.
        """
        self._file = file
        self._answers: dict[str, str] = {}
        self._read_to = 0  # bytes
        self._lock = threading.Lock()
        self._read_new()

    def get(self, key: str) -> str | None:
        """The answer to a question, from any process; None if there is none yet."""
        with self._lock:
            if key not in self._answers:
                self._read_new()
            return self._answers.get(key)

    def put(self, key: str, text: str) -> None:
        """Store an answer.

        Raises:
            QAdapterError: the disk is full, or the file cannot be written.
        """
        with self._lock:
            self._answers[key] = text
            if self._file is None:
                return
            line = json_line({"key": key, "text": text})
            with storage_errors(self._file):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with private_lock(Path(f"{self._file}.lock")), self._file.open("ab+") as stream:
                    if (end := stream.seek(0, 2)) and (stream.seek(end - 1), stream.read(1))[1] != b"\n":
                        line = b"\n" + line
                    stream.write(line)

    def _read_new(self) -> None:
        """Read the complete lines that were added since the last read."""
        if self._file is None or not self._file.is_file():
            return
        with self._file.open("rb") as stream:
            if stream.seek(0, 2) < self._read_to:
                self._read_to = 0  # the file was replaced
            stream.seek(self._read_to)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self._read_to += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            try:
                row = json.loads(line.decode(errors="replace"))  # a crash may truncate within a character
                self._answers[row["key"]] = row["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
