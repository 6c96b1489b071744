"""A run that waited for another one goes by the config as it is then: what it joins was requested for that one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.logging import disable_run_logger

import flows.check_champion
import flows.customize
from flows.check_champion import Checked, check_champion
from flows.customize import customize_on_new_preferences
from qadapter.errors import QAdapterError
from tests.support.tiny_deliveries import CONFIG, MODEL, write_config

STRICT = {**CONFIG["gate"], "max_over_refusals": 0.0}


def waited(home: Path, monkeypatch: pytest.MonkeyPatch, flow: Any, module: Any, **changes: Any) -> list[Any]:
    """The customizations that a flow works with whose config is changed while it waits for another run."""
    worked: list[Any] = []

    @contextmanager
    def lock(*_: Any) -> Iterator[None]:
        write_config(home, **changes)
        yield

    def look(_config: str, customization: Any, _force: bool) -> Any:
        worked.append(customization)
        return SimpleNamespace(name="NothingNew")

    def fell(_config: str, customization: Any, *_: Any) -> Checked:
        worked.append(customization)
        return Checked([])

    monkeypatch.setenv("QADAPTER_HOME", str(home))
    registry = SimpleNamespace(champion=lambda: SimpleNamespace(number=1))
    for name, stand_in in {
        "one_at_a_time": lock,
        "close_abandoned": lambda *_: None,
        "request_of": lambda *_: SimpleNamespace(check=lambda: None),
        "registry_of": lambda _: registry,
    }.items():
        monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(flows.customize, "_look", look)
    monkeypatch.setattr(flows.customize, "fingerprint_of", lambda _: "changed")
    monkeypatch.setattr(flows.customize, "join_waiting_runs", lambda *_: [])
    monkeypatch.setattr(flows.check_champion, "_damage", lambda *_: [])
    monkeypatch.setattr(flows.check_champion, "_what_fell", fell)
    with disable_run_logger():
        flow.fn(write_config(home))
    return worked


FLOWS = [(customize_on_new_preferences, flows.customize), (check_champion, flows.check_champion)]


@pytest.mark.parametrize(("flow", "module"), FLOWS)
def test_a_config_edited_during_the_wait_counts(
    flow: Any, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (worked,) = waited(tmp_path, monkeypatch, flow, module, gate=STRICT)
    assert worked.gate.max_over_refusals == 0.0


@pytest.mark.parametrize(("flow", "module"), FLOWS)
def test_another_model_is_refused_since_its_lock_is_not_held(
    flow: Any, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(QAdapterError, match=f"another model_name, 'other' instead of '{MODEL}'"):
        waited(tmp_path, monkeypatch, flow, module, model_name="other")
