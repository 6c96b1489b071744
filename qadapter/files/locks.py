"""File locks between processes. Lock files are private, and a long wait is logged with the lock's holder."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import storage_errors
from qadapter.files.private import private_folder

_LOGGER = logging.getLogger(__name__)
_NOTICE_SECONDS = 10.0


def private_lock(file: Path, **options: Any) -> FileLock:
    """A lock whose file only its owner can open, so that no other user can hold or see it.

    Args:
        file: the lock's file; its folder is created.
        options: arguments of `filelock.FileLock`.

    Raises:
        QAdapterError: the folder cannot be created.
    """
    with storage_errors(file):
        if not file.parent.exists():
            private_folder(file.parent)
    return FileLock(file, mode=0o600, **options)


@contextlib.contextmanager
def held(file: Path, *, guards: str, seconds: float) -> Iterator[None]:
    """Hold a lock for the length of a block. The operating system frees it when its holder ends or is killed.

    A wait of more than a few seconds is logged once, with the holder.

    Args:
        file: the lock's file.
        guards: the resource behind the lock, for messages, for example "MLflow's database".
        seconds: how long to wait for the holder.

    Raises:
        QAdapterError: the lock is still held after that time, or its file cannot be opened.
    """
    lock = private_lock(file)
    notice = min(_NOTICE_SECONDS, seconds)
    with storage_errors(file):
        try:
            lock.acquire(timeout=notice)
        except Timeout:
            _LOGGER.warning("Waiting for %s, which guards %s and is held by %s.", file, guards, holder(file))
            try:
                lock.acquire(timeout=seconds - notice)
            except Timeout:
                raise QAdapterError(
                    f"The lock {file}, which guards {guards}, was held for {seconds:.0f} s by {holder(file)}. "
                    "End that process, or wait for it, and run again: finished stages are kept."
                ) from None
    try:
        yield
    finally:
        lock.release()


def holder(file: Path) -> str:
    """Describe a lock's holder, as far as the system shows it: process id, name and user."""
    try:
        status = file.stat()
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        rows = [line.split() for line in Path("/proc/locks").read_text().strip().split("\n")]
        numbers = [int(row[4]) for row in rows if len(row) > 5 and row[1] == "FLOCK" and row[5] == place]
        process = psutil.Process(numbers[0])
        return f"process {process.pid} ({process.name()}, user {process.username()})"
    except (OSError, IndexError, ValueError, psutil.Error):
        return "another process"
