"""The registry through real MLflow on SQLite: order of steps, a kill between any two of them, rollback, the history."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.recurring import main
from qadapter.errors import QAdapterError
from tasks.registry import Candidate, Registry, Version
from tasks.tracking import Tracker


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Tracker.for_project(tmp_path), "model", tmp_path / "model.lock")


def candidate(registry: Registry, key: str, parent: int | None = None, passed: bool = True) -> Candidate:
    run_id = registry.tracker.start_parent("experiment", key)
    registry.tracker.finish(run_id)
    return Candidate(
        key=key,
        run_id=run_id,
        passed=passed,
        reasons=[f"reason of {key}", "another"],
        parent=parent,
        facts={"data_digest": f"data-{key}", "config_digest": "c", "base_digest": "b"},
        metrics={"retention/mean": 0.5},
        config={"mix": {"rows": "all"}},
    )


def logged(registry: Registry, run_id: str, calls: list[str] | None = None) -> Callable[[], str]:
    """A logged model of no files: what the registry needs of one is its place."""

    def log() -> str:
        if calls is not None:
            calls.append(run_id)
        experiment = registry.tracker.experiment_id("experiment")
        model = registry.tracker.call("create_logged_model", experiment, name="policy", source_run_id=run_id)
        return str(model.artifact_location)

    return log


def register(registry: Registry, key: str, parent: int | None = None, passed: bool = True) -> Version:
    new = candidate(registry, key, parent, passed)
    return registry.register(new, logged(registry, new.run_id))


def aliases(registry: Registry) -> dict[str, int]:
    return {alias: version.number for version in registry.versions() for alias in version.aliases}


def test_nothing_is_there_before_the_first(registry: Registry) -> None:
    assert registry.versions() == []
    assert registry.champion() is None
    assert registry.finish() == []
    with pytest.raises(QAdapterError, match="has no champion"):
        registry.roll_back()


def test_promotion_moves_both_aliases(registry: Registry) -> None:
    first = register(registry, "one")
    assert aliases(registry) == {}
    registry.promote(first)
    assert aliases(registry) == {"champion": 1}
    registry.promote(register(registry, "two", parent=1))
    assert aliases(registry) == {"champion": 2, "previous": 1}
    champion = registry.champion()
    assert champion is not None
    assert "promoted_at" in champion.tags


def test_the_story_stands_on_the_version(registry: Registry) -> None:
    new = replace(candidate(registry, "one"), parent=None)
    version = registry.register(new, logged(registry, new.run_id))
    assert version.run_id == new.run_id
    assert version.metrics == {"retention/mean": 0.5}
    assert json.loads(version.tags["config"]) == {"mix": {"rows": "all"}}
    assert version.tags["reasons"] == "reason of one\nanother"
    assert (version.tags["parent"], version.tags["data_digest"]) == ("", "data-one")
    assert "Promoted by the gate. The first candidate" in version.description
    assert "- reason of one\n- another" in version.description


def test_a_rejected_version_has_no_alias(registry: Registry) -> None:
    registry.promote(register(registry, "one"))
    version = register(registry, "two", parent=1, passed=False)
    assert version.rejected
    assert version.tags["rejected"] == "true"
    assert version.aliases == ()
    assert "Rejected by the gate. Trained on from version 1." in version.description
    assert registry.finish() == []
    assert aliases(registry) == {"champion": 1}


def test_the_same_candidate_is_registered_once(registry: Registry) -> None:
    calls: list[str] = []
    new = candidate(registry, "one")
    numbers = [registry.register(new, logged(registry, new.run_id, calls)).number for _ in range(2)]
    assert numbers == [1, 1]
    assert calls == [new.run_id]


STEPS = ["_alias previous", "_alias champion", "_tag promoted_at"]


@pytest.mark.parametrize("killed_before", STEPS)
def test_a_kill_leaves_a_valid_champion_and_is_finished_later(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, killed_before: str
) -> None:
    """Version 2 is to follow 1; the process dies before one of the three steps; the next run calls `finish`."""
    registry.promote(register(registry, "one"))
    second = register(registry, "two", parent=1)
    with monkeypatch.context() as patch:
        for name in ("_alias", "_tag"):
            patch.setattr(Registry, name, dying(getattr(Registry, name), killed_before))
        with pytest.raises(KeyboardInterrupt):
            registry.promote(second)
    assert aliases(registry)["champion"] == (2 if killed_before == STEPS[2] else 1)
    assert registry.finish() == [2]
    assert aliases(registry) == {"champion": 2, "previous": 1}
    assert registry.finish() == []


def dying(method: Any, before: str) -> Any:
    name, argument = before.split()

    def call(self: Registry, *arguments: Any) -> None:
        if method.__name__ == name and argument in arguments:
            raise KeyboardInterrupt
        method(self, *arguments)

    return call


def test_finishing_does_not_undo_what_a_person_did(registry: Registry) -> None:
    """Version 3 was left unfinished, then somebody rolled back to 1: it stays 1."""
    registry.promote(register(registry, "one"))
    registry.promote(register(registry, "two", parent=1))
    register(registry, "three", parent=2)
    registry.roll_back()
    assert registry.finish() == []
    assert aliases(registry) == {"champion": 1, "previous": 2}
    assert "superseded_at" in registry.versions()[2].tags


def test_a_rollback_while_a_candidate_is_at_the_gate_is_kept(registry: Registry) -> None:
    """Version 3 was trained on from 2; before it is promoted, a person goes back to 1."""
    registry.promote(register(registry, "one"))
    registry.promote(register(registry, "two", parent=1))
    third = register(registry, "three", parent=2)
    registry.roll_back()
    reason = registry.promote(third)
    assert reason is not None
    assert "it was compared with version 2, but the champion is version 1 now" in reason
    assert aliases(registry) == {"champion": 1, "previous": 2}
    assert registry.finish() == []
    assert aliases(registry) == {"champion": 1, "previous": 2}


def test_a_rollback_of_a_half_finished_promotion_is_kept(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process died between moving the alias and saying so; then a person goes back."""
    registry.promote(register(registry, "one"))
    second = register(registry, "two", parent=1)
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "_tag", dying(Registry._tag, "_tag promoted_at"))
        with pytest.raises(KeyboardInterrupt):
            registry.promote(second)
    registry.roll_back()
    assert registry.finish() == []
    assert registry.promote(second) is not None, "the same candidate, found again by a later run"
    assert aliases(registry) == {"champion": 1, "previous": 2}


def test_a_rejected_version_is_promoted_by_nobody_and_rolled_back_to_only_on_demand(registry: Registry) -> None:
    registry.promote(register(registry, "one"))
    rejected = register(registry, "two", parent=1, passed=False)
    assert registry.promote(rejected) == "version 2 is not promoted: the gate rejected it"
    with pytest.raises(QAdapterError, match=r"was rejected by the gate \(reason of two; another\)"):
        registry.roll_back(to=2)
    assert aliases(registry) == {"champion": 1}
    registry.roll_back(to=2, even_rejected=True)
    assert aliases(registry) == {"champion": 2, "previous": 1}


def test_a_killed_rollback_is_harmless(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before any of the steps; then the person says it again, or a run comes first."""
    for killed_before, then in (
        ("_tag superseded_at", "again"),
        ("_alias champion", "again"),
        ("_alias previous", "again"),
        ("_alias previous", "a run"),
        ("_tag rolled_back_to_at", "again"),
    ):
        model = replace(registry, name=f"{killed_before} {then}")  # a database of its own takes a second to make
        model.promote(register(model, "one"))
        model.promote(register(model, "two", parent=1))
        with monkeypatch.context() as patch:
            for name in ("_alias", "_tag"):
                patch.setattr(Registry, name, dying(getattr(Registry, name), killed_before))
            with pytest.raises(KeyboardInterrupt):
                model.roll_back()
        moved = killed_before in ("_alias previous", "_tag rolled_back_to_at")
        assert aliases(model)["champion"] == (1 if moved else 2)
        if then == "a run":
            assert model.finish() == []
        else:
            before, now = model.roll_back()
            assert (before.number, now.number) == (2, 1)
        assert aliases(model) == {"champion": 1, "previous": 2}


def test_rollback_goes_back_and_forth_or_to_a_version(registry: Registry) -> None:
    registry.promote(register(registry, "one"))
    with pytest.raises(QAdapterError, match="no earlier champion"):
        registry.roll_back()
    registry.promote(register(registry, "two", parent=1))
    registry.promote(register(registry, "three", parent=2))
    before, now = registry.roll_back()
    assert (before.number, now.number) == (3, 2)
    assert aliases(registry) == {"champion": 2, "previous": 3}
    registry.roll_back()
    assert aliases(registry) == {"champion": 3, "previous": 2}
    registry.roll_back(to=1)
    assert aliases(registry) == {"champion": 1, "previous": 3}
    assert registry.versions()[0].tags["rolled_back_to_at"].endswith("from version 3")
    with pytest.raises(QAdapterError, match="has no version 9; its versions are 1, 2, 3"):
        registry.roll_back(to=9)


def test_the_history_says_what_became_of_each_version(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Version 2 passed while somebody moved the champion, and was made the champion by hand later."""
    registry.promote(register(registry, "one"))
    overtaken = [register(registry, key) for key in ("two", "three")]
    assert all(registry.promote(version) for version in overtaken)
    register(registry, "four", parent=1, passed=False)
    registry.roll_back(to=2)
    monkeypatch.setattr("tasks.candidate.registry_of", lambda _: registry)
    assert main(["history"]) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line[24:].rstrip() for line in lines if line[:4].strip()]
    assert verdicts == [
        "promoted       from the base  previous",
        "rolled back to from the base  champion",
        "superseded     from the base",
        "rejected       from 1",
    ]
    assert sum("rolled back to, " in line and "from version 1" in line for line in lines) == 1


def test_a_folder_among_the_runs_artifacts(registry: Registry, tmp_path: Path) -> None:
    version = register(registry, "one")
    assert not registry.has(version, "ledger")
    (tmp_path / "records.jsonl").write_text("{}")
    registry.tracker.log_file(version.run_id, tmp_path / "records.jsonl", "ledger")
    assert registry.has(version, "ledger")
    assert (registry.files(version, "ledger") / "records.jsonl").read_text() == "{}"
