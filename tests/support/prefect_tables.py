"""Prefect's database: its hundreds of migrations run once per session, and each further server starts on a copy."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of this session that all its test processes share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextmanager
def prefect_tables(database: Path, shared: Path) -> Iterator[None]:
    """The block starts a Prefect server on a database that is not there yet, and ends when the server answers.

    The first block of a session makes the tables, as every server does on a new database. The others find a copy of
    what was made then.
    """
    database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = shared / "prefect-tables.db"
    with FileLock(shared / "prefect-tables.lock"):
        first = not made.exists()
        if first:
            yield
            part = made.with_suffix(".part")
            part.unlink(missing_ok=True)
            _copy(database, part)
            part.rename(made)
    if not first:
        _copy(made, database)
        yield


def _copy(one: Path, other: Path) -> None:
    os.close(os.open(other, os.O_CREAT | os.O_EXCL, 0o600))
    with closing(sqlite3.connect(one)) as source, closing(sqlite3.connect(other)) as copy:
        source.backup(copy)
