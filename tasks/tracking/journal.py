"""The journal of MLflow's SQLite file: a write-ahead log where the file system has what that needs.

With it a commit waits for the disk once instead of several times, and worker processes read while another one writes.
A commit is on the disk when it returns, as with SQLite's default journal.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import psutil

_LOCAL = frozenset({"apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfs", "overlay", "tmpfs", "xfs", "zfs"})
_BUSY_SECONDS = 1.0


def write_ahead(database: Path) -> None:
    """Let a database use a write-ahead log from now on; the file itself says so to each program that opens it.

    The processes that use such a database share memory, so they must run on one machine. A file system that may be a
    network's keeps SQLite's default, and so does a database that another process is just using.

    Args:
        database: an existing file.
    """
    if _file_system(database) not in _LOCAL:
        return
    with closing(sqlite3.connect(database, timeout=_BUSY_SECONDS)) as connection:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:  # it is in use, or read-only: the next process tries again
            return


def _file_system(path: Path) -> str:
    """The type of the file system that a path lies on; empty if it is unknown."""
    above = {str(folder) for folder in path.resolve().parents}
    mounted = [each for each in psutil.disk_partitions(all=True) if each.mountpoint in above]
    return max(mounted, key=lambda each: len(each.mountpoint)).fstype if mounted else ""
