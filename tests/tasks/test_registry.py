"""The registry through real MLflow on SQLite: order of steps, a kill between any two of them, rollback, the history."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from prefect.logging import disable_run_logger

from qadapter.command.parser import main
from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from tasks.candidate import champions_adapter, champions_base, learnt_by
from tasks.tracking.registry import Candidate, Registry, Version
from tasks.tracking.tracker import Tracker
from tasks.train import Base


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


@pytest.mark.slow
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


def as_strict_as_a_server(registry: Registry) -> None:
    """What PostgreSQL and MySQL refuse, SQLite takes: a description of more than 5,000 characters, a tag of 64 kB."""
    assert registry.versions() == []  # so that the tables are there
    with sqlite3.connect(registry.tracker.uri.removeprefix("sqlite:///")) as database:
        for table, column, limit in (("model_versions", "description", 5000), ("model_version_tags", "value", 65_535)):
            for event in ("INSERT", "UPDATE"):
                database.execute(
                    f"CREATE TRIGGER {table}_{event} BEFORE {event} ON {table} "
                    f"WHEN length(CAST(NEW.{column} AS BLOB)) > {limit} "
                    f"BEGIN SELECT RAISE(ABORT, 'value too long for type character varying({limit})'); END"
                )


@pytest.mark.slow
def test_a_long_story_is_cut_to_what_every_database_takes(registry: Registry) -> None:
    """200 tasks with a sentence each, and the metrics of 2,000."""
    as_strict_as_a_server(registry)
    reasons = [
        f"mmlu_{n} down from the champion by +0.001 [-0.010, +0.012], allowed 0.020 beyond noise" for n in range(200)
    ]
    metrics = {f"retention/mmlu_{n}/exact_match": n / 7 for n in range(2000)} | {"retention/mean": 0.5}
    new = replace(candidate(registry, "long"), reasons=reasons, metrics=metrics)
    version = registry.register(new, logged(registry, new.run_id))
    assert len(version.description) <= 5000
    lines = version.description.splitlines()
    listed = [line.removeprefix("- ") for line in lines if line.startswith("- mmlu_")]
    assert listed == reasons[: len(listed)]
    assert lines[2 + len(listed) :] == [
        f"- … and {200 - len(listed)} more: the tag `reasons` has them, and gate.json among the run's artifacts"
    ]
    assert len(version.description) + len(reasons[0]) > 5000 - 10, "no more would have fitted"
    assert version.tags["reasons"].splitlines() == reasons
    assert version.metrics["retention/mean"] == 0.5
    assert version.metrics.items() <= metrics.items()
    assert 1000 < len(version.metrics) < 2000

    many = replace(new, key="longer", reasons=10 * reasons)
    version = registry.register(many, logged(registry, many.run_id))
    lines = version.tags["reasons"].splitlines()
    assert lines[-1] == f"… and {2000 - (len(lines) - 1)} more: see gate.json among the run's artifacts"
    assert lines[:-1] == (10 * reasons)[: len(lines) - 1]


def test_no_secret_of_a_url_is_in_a_tag(registry: Registry) -> None:
    """In a query that does not look like one, so that the config is not refused."""
    url = "https://example.org/d.json?code=pa55word"
    new = candidate(registry, "one")
    new = replace(new, facts={**new.facts, "data_source": url}, config={"customization": {"source": {"path": url}}})
    version = registry.register(new, logged(registry, new.run_id))
    assert version.tags["data_source"] == "https://example.org/d.json?…"
    assert json.loads(version.tags["config"]) == {"customization": {"source": {"path": "https://example.org/d.json?…"}}}
    assert "pa55word" not in "".join(version.tags.values())


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_finishing_does_not_undo_what_a_person_did(registry: Registry) -> None:
    """Version 3 was left unfinished, then somebody rolled back to 1: it stays 1."""
    registry.promote(register(registry, "one"))
    registry.promote(register(registry, "two", parent=1))
    register(registry, "three", parent=2)
    registry.roll_back()
    assert registry.finish() == []
    assert aliases(registry) == {"champion": 1, "previous": 2}
    assert "superseded_at" in registry.versions()[2].tags


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_rejected_version_is_champion_only_on_demand(registry: Registry) -> None:
    registry.promote(register(registry, "one"))
    rejected = register(registry, "two", parent=1, passed=False)
    assert registry.promote(rejected) == "version 2 is not promoted: the gate rejected it"
    with pytest.raises(QAdapterError, match=r"was rejected by the gate \(reason of two; another\)"):
        registry.roll_back(to=2)
    assert aliases(registry) == {"champion": 1}
    registry.roll_back(to=2, even_rejected=True)
    assert aliases(registry) == {"champion": 2, "previous": 1}


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_champion_registered_by_hand_is_refused_with_its_gaps(registry: Registry) -> None:
    run_id = registry.tracker.start_parent("experiment", "by hand")
    place = logged(registry, run_id)()
    registry.tracker.call("create_registered_model", "model")
    for tags in ({}, {"ledger": "/there", "adapter_digest": "a" * 64}):
        made = registry.tracker.call("create_model_version", "model", place, run_id=run_id, tags=tags)
        registry.tracker.call("set_registered_model_alias", "model", "champion", made.version)
        champion = registry.champion()
        assert champion is not None
        lacking = "base_digest" if tags else "ledger, base_digest, adapter_digest"
        base, model = Base("owner/model", None, "x"), ModelSettings(pretrained="x")
        for use in (
            partial(learnt_by, champion, registry),
            partial(champions_adapter, champion, "model"),
            partial(champions_base, base, champion, model, "model"),
        ):
            with pytest.raises(QAdapterError) as caught:
                use()
            said = str(caught.value)
            assert said.startswith(
                f"Version {made.version} of 'model', the champion, was not registered by this pipeline"
            )
            assert f"it lacks the tags {lacking}, which" in said
            assert "make rollback TO=number" in said


@pytest.mark.slow
def test_a_run_that_was_removed_for_good_takes_its_folders_along(registry: Registry, tmp_path: Path) -> None:
    """`mlflow gc` does so with deleted runs; the ledger's stage is gone too."""
    new = candidate(registry, "one")
    facts = {**new.facts, "ledger": str(tmp_path / "gone"), "adapter_digest": "a" * 64}
    version = registry.register(replace(new, facts=facts), logged(registry, new.run_id))
    registry.promote(version)
    (tmp_path / "records.jsonl").write_text("{}")
    registry.tracker.log_file(version.run_id, tmp_path / "records.jsonl", "ledger")
    with disable_run_logger():
        assert learnt_by(version, registry) == registry.files(version, "ledger")
        registry.tracker.call("delete_run", version.run_id)
        SqlAlchemyStore(registry.tracker.uri, registry.tracker.artifact_root)._hard_delete_run(version.run_id)
        shutil.rmtree(next((tmp_path / "mlruns").glob(f"*/{version.run_id}")))
        assert learnt_by(version, registry) is None, "every preference counts as new, as where the ledger is damaged"
    with pytest.raises(QAdapterError) as caught:
        registry.files(version, "retention")
    said = str(caught.value)
    assert said.startswith(
        f"The run {version.run_id} of version 1 of 'model' is gone from MLflow at {registry.tracker.uri}"
    )
    assert "`mlflow gc`" in said
    assert "Restore the run from a backup, or make a version the champion whose run is there (`make rollback`)." in said
