"""When the watcher announces, on a real Prefect server: once, and again where the announcement came to nothing."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Completed, Pending, Running, Scheduled, State

import flows.watch_preferences
from flows.customize import NAME, at_work, customize_on_new_preferences, fingerprint_of, one_at_a_time
from flows.watch_preferences import distance, watch_preferences
from qadapter.config.customization import Customization, load_customization
from tasks.preferences import Seen
from tests.support.prefect_away import prefect_away
from tests.support.tiny_deliveries import deliver, refusals, write_config

pytestmark = pytest.mark.slow

HOUR = 3600.0


@flow(name=NAME)
def customize(config: str = "smoke", force: bool = False) -> None:
    """It is never run."""


@pytest.fixture
def config(prefect_client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a customisation with one delivery."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    deliver(tmp_path, "1-first.jsonl", refusals()[:4])
    return write_config(tmp_path)


@pytest.fixture
def tiny(config: str) -> Customization:
    return load_customization(config)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, tiny: Customization) -> list[Seen]:
    """What was known of the source at each announcement."""
    found: list[Seen] = []
    monkeypatch.setattr(flows.watch_preferences, "announce", lambda _: found.append(Seen.read(tiny)))
    return found


def look(config: str) -> tuple[str, str]:
    state = watch_preferences(config, return_state=True)
    return str(state.name), str(state.message)


def ask_for(prefect_client: SyncPrefectClient, state: State, **parameters: Any) -> None:
    prefect_client.create_flow_run(customize, parameters=parameters, state=state)


def test_a_change_is_written_down_and_then_announced(config: str, tiny: Customization, heard: list[Seen]) -> None:
    before = time.time()
    assert look(config) == ("Announced", "incoming has changed")
    assert look(config)[0] == "NothingNew"
    (seen,) = heard
    assert seen.announced == fingerprint_of(tiny)
    assert before <= seen.announced_at <= time.time()


@pytest.mark.parametrize(
    ("begun", "minutes"),
    [(True, [0, 30, 60, 120, 240, 480, 960, 1440, 1440]), (False, [60, 120, 240, 480, 960, 1440, 1440])],
    ids=["its run began and came to no end", "no run began"],
)
def test_the_distance_between_repeats_doubles_up_to_a_day(begun: bool, minutes: list[int]) -> None:
    assert [distance(times, begun=begun) / 60 for times in range(1, len(minutes) + 1)] == minutes
    assert distance(10_000, begun=begun) == 24 * HOUR


def test_an_announcement_that_came_to_nothing_is_repeated(
    config: str, tiny: Customization, heard: list[Seen], prefect_client: SyncPrefectClient
) -> None:
    """After an hour, then after two, unless a run of this config waits for its turn."""
    look(config)
    Seen.update(tiny, announced_at=time.time() - HOUR + 60)
    assert look(config)[0] == "NothingNew"
    Seen.update(tiny, announced_at=time.time() - HOUR)
    ask_for(prefect_client, Scheduled(scheduled_time=datetime.now(UTC) + timedelta(days=3)), config=config)
    ask_for(prefect_client, Pending(), config="another")
    ask_for(prefect_client, Running(), config=config)
    ask_for(prefect_client, Completed(), config=config)
    assert look(config) == ("Announced", "incoming announced again: no run of this content has started since")
    Seen.update(tiny, announced_at=time.time() - 2 * HOUR + 60)
    assert look(config)[0] == "NothingNew", "and then waited for longer"
    for state in (Scheduled(), Pending()):
        run = prefect_client.create_flow_run(customize, parameters={"config": config}, state=state)
        Seen.update(tiny, announced_at=time.time() - 2 * HOUR)
        assert look(config)[0] == "NothingNew"
        prefect_client.delete_flow_run(run.id)
    Seen.update(tiny, announced_at=time.time() + 10 * HOUR)
    assert look(config)[0] == "Announced", "the clock was set back"
    assert [seen.announcements for seen in heard] == [1, 2, 3]


def test_a_failing_run_is_requested_at_growing_intervals(
    config: str, tiny: Customization, heard: list[Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two days of a watcher that looks every 15 minutes; each run begins and fails within a minute. Then new rows."""
    clock = SimpleNamespace(now=time.time())
    start = clock.now
    # Only of what the watcher decides by: Prefect has the real time.
    monkeypatch.setattr(flows.watch_preferences, "time", SimpleNamespace(time=lambda: clock.now))
    monkeypatch.setattr(flows.watch_preferences, "_is_about_to_run", lambda _: False)
    fingerprint, announced = fingerprint_of(tiny), []
    for minute in range(0, 2 * 24 * 60, 15):
        clock.now = start + 60 * minute
        if flows.watch_preferences._why_announce(config, tiny, fingerprint) is None:
            continue
        assert look(config)[0] == "Announced"
        announced.append(minute)
        Seen.update(tiny, started=fingerprint, started_at=clock.now + 60)
    assert announced == [0, 15, 45, 105, 225, 465, 945, 1905], "and not 192 times"
    deliver(tmp_path, "2-second.jsonl", refusals()[4:6])
    assert look(config) == ("Announced", "incoming has changed")
    assert [seen.announcements for seen in heard] == [1, 2, 3, 4, 5, 6, 7, 8, 1]


def test_a_server_that_cannot_be_asked_leaves_the_time(config: str, prefect_client: SyncPrefectClient) -> None:
    ask_for(prefect_client, Pending(), config=config)
    assert flows.watch_preferences._is_about_to_run(config)
    with prefect_away():
        assert not flows.watch_preferences._is_about_to_run(config)


def test_only_an_unfinished_later_run_is_a_reason_at_once(config: str, tiny: Customization, heard: list[Seen]) -> None:
    fingerprint = fingerprint_of(tiny)
    Seen.update(tiny, started=fingerprint, started_at=time.time() - 60)
    assert look(config) == ("Announced", "incoming has changed")
    assert heard[0].started == fingerprint, "nothing is wiped that a run has written"
    assert look(config)[0] == "NothingNew", "that run was killed before the announcement"
    Seen.update(tiny, started=fingerprint, started_at=time.time())
    with one_at_a_time(tiny):
        assert look(config)[0] == "NothingNew", "it is at work"
    assert look(config) == ("Announced", "incoming announced again: the run of this content did not finish")
    Seen.update(tiny, started=fingerprint, started_at=time.time(), fingerprint=fingerprint)
    assert look(config)[0] == "NothingNew", "it came to its end"


def test_an_announcement_that_failed_is_tried_again_at_once(
    config: str, heard: list[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Customization) -> None:
        raise ConnectionError("the server is away")

    with monkeypatch.context() as patch:
        patch.setattr(flows.watch_preferences, "announce", refuse)
        assert watch_preferences(config, return_state=True).is_failed()
    assert look(config) == ("Announced", "incoming announced again: no run of this content has started since")
    assert [seen.announcements for seen in heard] == [1], "the first reached no server"


def test_a_run_begins_behind_its_lock(config: str, tiny: Customization, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is never taken for one that was killed, while it is checked or waits."""
    begun: list[tuple[bool, str]] = []

    def note(*_: Any) -> Any:
        begun.append((at_work(tiny), Seen.read(tiny).started))
        return SimpleNamespace(check=lambda: None)

    def stop(*_: Any) -> None:
        note()
        raise InterruptedError("as far as this test goes")

    monkeypatch.setattr("flows.customize.request_of", note)
    monkeypatch.setattr("flows.customize.prepared", stop)
    with pytest.raises(InterruptedError):
        customize_on_new_preferences(config)
    assert begun == [(False, ""), (True, fingerprint_of(tiny))]
    assert 0 < Seen.read(tiny).started_at <= time.time()
