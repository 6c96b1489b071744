"""A check measures the champion again, wherever else its measurements are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import flows.check_champion
from tasks.stages.store import StageStore


class _ReachedError(Exception):
    """The store of the check is known."""


def test_a_check_finds_nothing_in_a_shared_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QADAPTER_STORE", "memory://shared")
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    assert StageStore(tmp_path).remote is not None
    stores: list[StageStore] = []

    def storing_in(store: StageStore) -> None:
        stores.append(store)
        raise _ReachedError

    @contextmanager
    def prepared(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(experiment=SimpleNamespace(toy_world=None), storing_in=storing_in), None

    def nothing(*_: Any, **__: Any) -> Any:
        return nothing

    monkeypatch.setattr(flows.check_champion, "prepared", prepared)
    for name in ("_heldout", "lay_ground", "fetch", "measuring"):
        monkeypatch.setattr(flows.check_champion, name, nothing)
    anything: Any = SimpleNamespace(model_name="tiny", domain="harmless")
    with pytest.raises(_ReachedError):
        flows.check_champion._what_fell("tiny", anything, anything, anything)
    (store,) = stores
    assert store.remote is None
