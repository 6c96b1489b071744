"""MLflow's tables: made once in each test process, which takes a second, and copied into each further database."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from mlflow.store.db import utils
from mlflow.store.model_registry import sqlalchemy_store
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

_made = utils._initialize_tables
_tables = b""


def _copied(engine: Any) -> None:
    """MLflow's `_initialize_tables` for a SQLite file: an exact copy of what the first call made."""
    global _tables
    file = engine.url.database if engine.url.get_backend_name() == "sqlite" else None
    if not file or not utils._is_empty_database(engine):
        _made(engine)
    elif not _tables:
        _made(engine)
        with closing(sqlite3.connect(file)) as database:
            _tables = database.serialize()
    else:
        try:
            with closing(sqlite3.connect(":memory:")) as first, closing(sqlite3.connect(file)) as database:
                first.deserialize(_tables)
                first.backup(database)
        except sqlite3.Error:  # a full or read-only disk: the error is MLflow's
            _made(engine)


def share_tables() -> None:
    """Copy tables from now on, also in processes that are forked from this one."""
    utils._initialize_tables = sqlalchemy_store._initialize_tables = _copied  # type: ignore[assignment]


def make_tables() -> None:
    """Make the tables now, for processes that are forked from this one."""
    with tempfile.TemporaryDirectory() as folder:
        SqlAlchemyStore(f"sqlite:///{Path(folder, 'mlflow.db')}", folder).engine.dispose()


def make_own_tables() -> None:
    """Let this process make tables by MLflow's own migrations again."""
    utils._initialize_tables = sqlalchemy_store._initialize_tables = _made
