"""What the stages of a growing source see in it: nothing yet, files that are not read, files that change while read."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.logging import disable_run_logger

import flows.customize
import qadapter.preferences.ledger
import qadapter.preferences.mixture
import qadapter.preferences.prepare
import tasks.preferences
from flows.customize import fingerprint_of
from qadapter.config.customization import Customization, load_customization
from qadapter.config.experiment import load_experiment
from qadapter.config.sources import Source
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import digest_tree, read_json, read_json_lines
from qadapter.preferences.ledger import UNREAD_FILE
from qadapter.preferences.sources import MissingPathError, NoDataError
from tasks.data import generate_toy_world, prepare_data
from tasks.preferences import (
    Seen,
    changes_of,
    collect_preferences,
    delivered,
    heldout_files,
    hold_out,
    mix_preferences,
    read_heldout,
)
from tasks.stages.context import RunContext
from tasks.stages.store import StageStore
from tasks.tracking.tracker import Tracker
from tests.support.tiny_deliveries import deliver, dialogue, evasions, refusals, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tracker, str]:
    """A place for MLflow runs."""
    tracker = Tracker.for_project(tmp_path_factory.mktemp("mlflow"))
    return tracker, tracker.start_parent("test", "run")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    with disable_run_logger():
        yield tmp_path


@pytest.fixture
def context(home: Path, run: tuple[Tracker, str]) -> RunContext:
    return RunContext(load_experiment("smoke"), StageStore(home / ".qadapter"), *run, home / "data")


@pytest.fixture
def customization(home: Path) -> Customization:
    return load_customization(write_config(home))


def written(file: Path, rows: list[dict[str, str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def changing(monkeypatch: pytest.MonkeyPatch, module: Any, function: str, file: Path) -> None:
    """A file gets one more row just when it has been read."""
    real = getattr(module, function)

    def changed(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        with file.open("a") as stream:
            stream.write(json.dumps(dialogue("one more ?", "yes .", "no .")) + "\n")
        return result

    monkeypatch.setattr(module, function, changed)


# ---- nothing yet


def test_where_nothing_was_delivered_yet_there_is_no_data(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Folders of a workspace come with their first delivery; elsewhere the folder around the source must be there."""
    for path in ("incoming", "preferences/incoming", "growing.jsonl"):
        with pytest.raises(NoDataError, match=f"{home}/{path} does not exist"):
            delivered(Source(path=path))
    (home / "incoming").mkdir()
    with pytest.raises(NoDataError, match=f"The folder {home}/incoming has no data files"):
        delivered(Source(path="incoming"))
    outside = tmp_path_factory.mktemp("outside")
    with pytest.raises(NoDataError, match="there is no 'incoming' in"):
        delivered(Source(path=str(outside / "incoming")))
    with pytest.raises(MissingPathError, match="there is no 'nowhere' in"):
        delivered(Source(path=str(outside / "nowhere" / "incoming")))
    written(outside / "preferences" / "a.jsonl", refusals()[:1])
    with pytest.raises(NoDataError, match=f"Did you mean {outside}/preferences"):
        delivered(Source(path=str(outside / "prefrences")))


def test_a_source_without_data_has_nothing_new(home: Path, customization: Customization) -> None:
    """Its fingerprint is that of what was dealt with last, whatever that was."""
    warned: list[str] = []

    class Logger:
        def warning(self, text: str, *arguments: Any) -> None:
            warned.append(text % arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flows.customize, "get_run_logger", Logger)
        assert fingerprint_of(customization) == "" == Seen.read(customization).fingerprint
        file = deliver(home, "a.jsonl", refusals()[:4])
        known = fingerprint_of(customization)
        Seen.update(customization, fingerprint=known)
        file.unlink()
        assert fingerprint_of(customization) == known
    assert [f"no data file in incoming now: {home}/incoming does not exist" in warned[0], len(warned)] == [True, 2]
    assert f"The folder {home}/incoming has no data files" in warned[1]


def test_held_out_files_are_not_waited_for(home: Path, customization: Customization) -> None:
    deliver(home, "a.jsonl", refusals()[:4])
    (home / "heldout.jsonl").unlink()
    with pytest.raises(
        QAdapterError, match=r"the held-out pairs are missing: .*heldout\.jsonl does not exist"
    ) as caught:
        fingerprint_of(customization)
    assert not isinstance(caught.value, NoDataError)


@pytest.mark.slow
def test_held_out_files_are_the_same_side_without_a_source(context: RunContext, customization: Customization) -> None:
    """What a candidate was judged by and what its champion is checked with are one set, byte for byte."""
    home = context.store.root.parent
    deliver(home, "a.jsonl", [*refusals()[:40], *evasions()[:10]])
    arguments: dict[str, Any] = {"customization": customization, "world": None}
    ledger = collect_preferences.fn(context, previous="", **arguments)
    judged = hold_out.fn(context, mix_preferences.fn(context, ledger=ledger, learnt=None, everything=True, **arguments))
    (home / "incoming" / "a.jsonl").unlink()
    alone = read_heldout.fn(context, **arguments)
    assert read_json(alone.path / "summary.json")["heldout_pairs"] == 48
    assert alone.output.digest == judged.output.digest

    # A source whose prompts are all held out trains nothing, but the champion can be checked all the same.
    everything = written(home / "all.jsonl", refusals()[80:110])
    other = customization.model_copy(
        update={"source": customization.source.model_copy(update={"path": str(everything)})}
    )
    ledger = collect_preferences.fn(context, customization=other, previous="", world=None)
    with pytest.raises(QAdapterError, match="No training pair is left"):
        mix_preferences.fn(context, other, ledger, learnt=None, world=None, everything=True)
    assert _result(read_heldout.fn(context, other, None)).output.digest == alone.output.digest


def _result(returned: Any) -> Any:
    """What a task hands on; a stage that was found comes in a state."""
    return getattr(returned, "data", returned)


# ---- files that are not read


def test_a_delivery_that_is_not_read_is_named(
    context: RunContext, customization: Customization, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home = context.store.root.parent
    deliver(home, "1.jsonl", refusals()[:4])
    before = fingerprint_of(customization)
    first = _result(collect_preferences.fn(context, customization, "", None))
    for beside in ("README.txt", "notes.md", ".week3.xlsx", "week3.csv.part", "_SUCCESS", "week3.csv~"):
        deliver(home, beside, "rows")
    assert fingerprint_of(customization) == before

    deliver(home, "week3.xlsx", "chosen,rejected\n")
    after = fingerprint_of(customization)
    assert after != before, "the watcher announces it"
    deliver(home, "week3.xlsx", "chosen,rejected\nyes,no\n")
    assert fingerprint_of(customization) not in (before, after)
    monkeypatch.setattr(tasks.preferences, "get_run_logger", lambda: logging.getLogger("flow"))
    second = _result(collect_preferences.fn(context, customization, str(first.path), None))
    changes = changes_of(second)
    assert (changes.new, changes.unchanged, changes.fresh_pairs) == (1, 4, 0)
    assert changes.fresh_quarantined == changes.quarantined == {UNREAD_FILE: 1}
    assert read_json_lines(second.path / "quarantine.jsonl") == [
        {"file": "week3.xlsx", "line": 1, "reason": UNREAD_FILE}
    ]
    assert "1 files of incoming are not used:\n  week3.xlsx: its name ends in none of .json, .jsonl" in caplog.text
    third = _result(collect_preferences.fn(context, customization, str(second.path), None))
    assert changes_of(third).fresh_quarantined == {}, "it is reported once as new"

    (home / "incoming" / "1.jsonl").unlink()
    alone = changes_of(_result(collect_preferences.fn(context, customization, str(second.path), None)))
    assert (alone.removed, alone.unchanged, list(alone.refused_files)) == (4, 1, ["week3.xlsx"])


# ---- files that change while they are read


@pytest.mark.parametrize("side", ["harmless.jsonl", "harmless-heldout.jsonl"])
def test_a_prepared_source_that_changes_is_refused(
    context: RunContext, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the pairs of another file would be found under the key of the first."""
    assert context.data is not None
    files = {
        "harmless.jsonl": written(context.data / "hh-rlhf" / "harmless.jsonl", refusals()[:20]),
        "harmless-heldout.jsonl": written(context.data / "hh-rlhf" / "harmless-heldout.jsonl", refusals()[20:30]),
    }
    source = context.experiment.sources["harmless"]
    assert (source.path, source.heldout_path) == tuple(f"{{data}}/hh-rlhf/{name}" for name in files)
    with monkeypatch.context() as patch:
        changing(patch, qadapter.preferences.prepare, "prepare", files[side])
        with pytest.raises(QAdapterError, match=rf"files of .*{side} changed while they were read"):
            prepare_data.fn(context, "harmless", None)
    prepared = _result(prepare_data.fn(context, "harmless", None))
    summary = read_json(prepared.path / "summary.json")
    expected = (21, 10) if side == "harmless.jsonl" else (20, 11)
    assert (summary["train_pairs"], summary["heldout_pairs"]) == expected
    assert not prepared.output.cached


def test_a_growing_source_that_changes_is_refused(
    context: RunContext, customization: Customization, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = context.store.root.parent
    file = deliver(home, "a.jsonl", refusals()[:4])
    arguments: dict[str, Any] = {"customization": customization, "world": None}
    with monkeypatch.context() as patch:
        changing(patch, qadapter.preferences.ledger, "update", file)
        with pytest.raises(QAdapterError, match="files of incoming changed while they were read"):
            collect_preferences.fn(context, previous="", **arguments)
    ledger = _result(collect_preferences.fn(context, previous="", **arguments))
    assert changes_of(ledger).new == 5

    heldout = home / "heldout.jsonl"
    with monkeypatch.context() as patch:
        changing(patch, qadapter.preferences.mixture, "write_mixture", heldout)
        with pytest.raises(QAdapterError, match=rf"files of {heldout} changed while they were read"):
            mix_preferences.fn(context, ledger=ledger, learnt=None, everything=True, **arguments)
    with monkeypatch.context() as patch:
        changing(patch, qadapter.preferences.mixture, "write_heldout", heldout)
        with pytest.raises(QAdapterError, match=rf"files of {heldout} changed while they were read"):
            read_heldout.fn(context, **arguments)


def test_a_message_about_a_source_has_no_query(
    context: RunContext, customization: Customization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`code` is no name that a config is refused for, and may be a key all the same."""
    copy = written(context.store.root / "downloads" / "copy", refusals()[:4])
    away = customization.source.model_copy(update={"path": "https://example.org/d.json?code=canary"})
    monkeypatch.setattr("qadapter.preferences.sources.locate", lambda *_, **__: [copy])
    changing(monkeypatch, qadapter.preferences.ledger, "update", copy)
    with pytest.raises(QAdapterError, match=r"files of https://example.org/d.json\?… changed") as caught:
        collect_preferences.fn(context, customization.model_copy(update={"source": away}), "", None)
    assert "canary" not in str(caught.value)


# ---- the toy world as a source


def test_a_toy_worlds_preferences_can_be_the_source(context: RunContext, customization: Customization) -> None:
    toy = customization.source.model_copy(
        update={"path": "{data}/hh-rlhf/harmless.jsonl", "heldout_path": "{data}/hh-rlhf/harmless-heldout.jsonl"}
    )
    made = customization.model_copy(update={"source": toy})
    assert fingerprint_of(made) == fingerprint_of(made)
    other = made.model_copy(update={"overrides": {**made.overrides, "toy_world.seed": 1}})
    assert fingerprint_of(other) != fingerprint_of(made), "another world has other preferences"
    small = RunContext(made.experiment(), context.store, context.tracker, context.parent_run_id)
    world = _result(generate_toy_world.fn(small))
    changes = changes_of(_result(collect_preferences.fn(small, made, "", world)))
    assert changes.new == len(read_json_lines(world.path / "hh-rlhf" / "harmless.jsonl")) > 50
    assert heldout_files(toy, world.path) == [world.path / "hh-rlhf" / "harmless-heldout.jsonl"]
    assert digest_tree(world.path, exclude={"manifest.json"}) == world.output.digest, "nothing was written into it"
