"""The recurring pipeline as its user sees it: deliveries arrive, one after another, through real Prefect and MLflow."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from flows.check_champion import FELL, TURNED_DOWN, Checked, check_champion
from flows.customize import NAME, customize_on_new_preferences
from flows.watch_preferences import ANNOUNCED, watch_preferences
from qadapter.command.parser import main
from qadapter.config.customization import load_customization
from qadapter.evaluation.curve.budget import choose_among
from qadapter.files.artifacts import digest_tree
from qadapter.files.process_tags import ProcessTag
from qadapter.policy.dial import Dial
from qadapter.policy.files import saved_dial
from qadapter.toyworld.world import ToyWorld
from tasks.candidate import registry_of
from tasks.tracking.models import find_served_model
from tasks.tracking.registry import Registry, Version
from tasks.tracking.tracker import Tracker
from tests.support.tiny_deliveries import CONFIG, MODEL, deliver, evasions, flipped, refusals, write_config

pytestmark = pytest.mark.slow


class KilledError(BaseException):
    """Stands for the end of the process."""


@dataclass
class Step:
    """How a flow run ended, and the registry after it."""

    name: str
    message: str
    seconds: float
    versions: list[Version]

    @property
    def aliases(self) -> dict[str, int]:
        return {alias: version.number for version in self.versions for alias in version.aliases}


@dataclass
class Story:
    """A workspace and what happened in it, step by step."""

    home: Path
    config: str
    steps: dict[str, Step] = field(default_factory=dict)
    began: datetime = field(default_factory=lambda: datetime.now(UTC))

    def versions(self) -> list[Version]:
        return Registry(Tracker.for_project(self.home), MODEL, self.home / "aliases.lock").versions()

    def run(self, step: str, flow: Any = customize_on_new_preferences) -> Step:
        state = flow(self.config, return_state=True)
        times = state.state_details.flow_run_id
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(times)
        assert run.start_time is not None
        assert run.end_time is not None
        seconds = (run.end_time - run.start_time).total_seconds()
        self.steps[step] = Step(str(state.name), str(state.message), seconds, self.versions())
        return self.steps[step]

    def statuses(self) -> set[str]:
        tracker = Tracker.for_project(self.home)
        ids = [e.experiment_id for e in tracker.call("search_experiments")]
        return {run.info.status for run in tracker.call("search_runs", ids)}


def events(name: str, since: datetime) -> list[dict[str, Any]]:
    """Events of a name that the server has; it stores them a moment after they were sent."""
    wanted = {"event": {"name": [name]}, "occurred": {"since": since.isoformat()}}
    deadline = time.monotonic() + 20
    while True:
        with get_client(sync_client=True) as client:
            answer = client._client.post("/events/filter", json={"filter": wanted})
        found: list[dict[str, Any]] = answer.json()["events"]
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


@contextmanager
def workspace_at(home: Path) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("QADAPTER_HOME", str(home))
        yield patch


@pytest.fixture(scope="module")
def story(harness: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Better, worse and broken deliveries, and what happens between them."""
    home = tmp_path_factory.mktemp("home")
    with workspace_at(home) as patch:
        told = Story(home, write_config(home))
        told.run("nothing yet")
        told.run("watch nothing", watch_preferences)
        deliver(home, "1-first.jsonl", refusals()[:40])
        told.run("first")
        told.run("again")

        deliver(home, "2-better.jsonl", evasions()[:46])
        told.run("watch", watch_preferences)
        told.run("watch again", watch_preferences)
        with patch.context() as killing, contextlib.suppress(KilledError):
            killing.setattr(Registry, "promote", killed)
            told.run("not killed")
        told.steps["killed"] = Step("", "", 0.0, told.versions())
        told.run("watch after the kill", watch_preferences)
        told.run("better")

        worse = deliver(home, "3-worse.jsonl", flipped(refusals()[:80]))
        told.run("worse")
        also = deliver(home, "3-also.jsonl", flipped(evasions()[:20]))
        told.run("worse again")
        told.config = write_config(home, gate={**CONFIG["gate"], "max_over_refusals": None})
        told.run("other gate")
        told.config = write_config(home)
        broken = deliver(home, "4-broken.jsonl", "<html>502 Bad Gateway</html>\n")
        told.run("broken")
        told.run("broken again")
        worse.unlink()
        also.unlink()
        broken.unlink()
        told.run("removed")

        deliver(home, "5-week.xlsx", "chosen,rejected\n")
        told.run("unread")
        (home / "incoming").rename(home / "archive")
        told.run("archived")
        told.run("watch archived", watch_preferences)
        told.run("check", check_champion)
        (home / "archive").rename(home / "incoming")
        yield told


def killed(*_: Any) -> None:
    raise KilledError


def test_the_first_candidate_is_compared_with_the_base(story: Story) -> None:
    step = story.steps["first"]
    assert step.name == "Promoted", step.message
    assert step.aliases == {"champion": 1}
    (version,) = step.versions
    assert version.tags["parent"] == ""
    assert "of the base" in version.tags["reasons"]
    assert version.metrics["adaptation/implied_reward_accuracy"] > 0.5
    assert version.tags["data_pairs"] == "40 (40 new)"


def test_a_source_that_is_empty_or_not_there_has_nothing_new(story: Story) -> None:
    """Before the first delivery, and after all of them were archived."""
    for step in ("nothing yet", "archived"):
        assert story.steps[step].name == "NothingNew", story.steps[step].message
        assert story.steps[step].message.startswith(f"no data file in incoming now: {story.home}/incoming does not")
    assert story.steps["nothing yet"].versions == []
    assert {story.steps[name].name for name in ("watch nothing", "watch archived")} == {"NothingNew"}
    assert story.steps["archived"].aliases == story.steps["removed"].aliases


def test_a_delivery_that_is_not_read_is_quarantined(story: Story) -> None:
    step = story.steps["unread"]
    assert step.name == "Quarantined"
    assert "\n  5-week.xlsx: its name ends in none of .json, .jsonl" in step.message
    assert len(step.versions) == 5


def test_nothing_new_ends_at_once_and_says_so(story: Story) -> None:
    step = story.steps["again"]
    assert step.name == "NothingNew"
    assert step.message.startswith("nothing new in incoming; the last time: version 1")
    assert step.seconds <= 2.0
    assert len(step.versions) == 1


def test_the_watcher_announces_a_change_once(story: Story) -> None:
    assert [story.steps[name].name for name in ("watch", "watch again")] == ["Announced", "NothingNew"]
    event, _ = events(ANNOUNCED, story.began)
    assert event["resource"]["prefect.resource.id"] == "qadapter.preferences.tiny"
    assert event["payload"] == {"config": "tiny"}


def test_the_watcher_announces_again_what_a_run_did_not_finish(story: Story) -> None:
    step = story.steps["watch after the kill"]
    assert step.name == "Announced"
    assert "the run of this content did not finish" in step.message


def test_a_kill_before_the_promotion_keeps_the_champion(story: Story) -> None:
    step = story.steps["killed"]
    assert "not killed" not in story.steps, story.steps["not killed"].message
    assert len(step.versions) == 2
    assert step.aliases == {"champion": 1}


def test_the_next_run_finishes_it_without_training_again(story: Story) -> None:
    step = story.steps["better"]
    assert (step.name, len(step.versions)) == ("Promoted", 2)
    assert "what a killed run had left was finished" in step.message
    assert step.aliases == {"champion": 2, "previous": 1}


def test_the_better_delivery_was_trained_on_from_the_champion(story: Story) -> None:
    first, better = story.steps["better"].versions
    assert better.tags["parent"] == "1"
    assert better.tags["data_pairs"] == "86 (46 new)"
    assert better.tags["base_digest"] == first.tags["base_digest"]
    assert better.tags["adapter_digest"] != first.tags["adapter_digest"]
    gained = better.metrics["adaptation/implied_reward_accuracy"] - first.metrics["adaptation/implied_reward_accuracy"]
    assert gained >= 0.1
    assert "of the champion (version 1)" in better.tags["reasons"]


def test_the_worse_delivery_is_rejected_with_reasons(story: Story) -> None:
    step = story.steps["worse"]
    assert step.name == "Rejected"
    assert step.aliases == {"champion": 2, "previous": 1}
    rejected = step.versions[2]
    assert rejected.tags["rejected"] == "true"
    assert rejected.tags["parent"] == "2"
    assert "implied_reward_accuracy" in rejected.tags["reasons"]
    assert (
        "wanted not worse beyond noise, because the champion (version 2) is at the ceiling" in rejected.tags["reasons"]
    )
    assert "of 80 new pairs the candidate prefers the chosen reply in" in rejected.tags["reasons"]
    assert "labels may be flipped, because the champion is sure of the opposite" in rejected.tags["reasons"]
    assert rejected.aliases == ()


def test_rejected_rows_are_new_until_a_champion_has_learnt_them(story: Story) -> None:
    step = story.steps["worse again"]
    assert (step.name, len(step.versions)) == ("Rejected", 4)
    assert step.versions[3].tags["data_pairs"] == "186 (100 new)", "the 80 rejected ones and 20 more"
    assert step.versions[3].tags["parent"] == "2"


def test_other_rules_judge_again_and_keep_the_old_verdict(story: Story) -> None:
    step = story.steps["other gate"]
    assert (step.name, len(step.versions)) == ("Rejected", 5)
    before, after = step.versions[3:]
    assert after.tags["adapter_digest"] == before.tags["adapter_digest"]
    assert after.tags["config_digest"] != before.tags["config_digest"]


def test_the_broken_delivery_is_quarantined_and_trains_nothing(story: Story) -> None:
    step = story.steps["broken"]
    assert step.name == "Quarantined"
    assert "nothing was trained and the champion stays" in step.message
    assert "4-broken.jsonl has no JSON object" in step.message.replace(str(story.home / "incoming") + "/", "")
    assert len(step.versions) == 5
    assert step.aliases == {"champion": 2, "previous": 1}
    quarantine = Path(step.message.split("each record: ")[1].split("\n")[0])
    assert json.loads(quarantine.read_text())["file"] == "4-broken.jsonl"
    assert story.steps["broken again"].name == "NothingNew", "it is reported once"


def test_removed_rows_train_nothing(story: Story) -> None:
    step = story.steps["removed"]
    assert step.name == "NothingNew"
    assert "0 new, 0 changed, 101 removed and 86 unchanged records" in step.message


def test_no_run_is_left_open(story: Story) -> None:
    assert story.statuses() <= {"FINISHED", "KILLED", "FAILED"}


def test_what_is_registered_is_what_was_judged(story: Story) -> None:
    champion = story.steps["removed"].versions[1]
    served = find_served_model(f"{MODEL}@champion")
    assert digest_tree(served.adapter) == champion.tags["adapter_digest"]
    assert digest_tree(Path(served.base)) == champion.tags["base_digest"]


def test_only_what_was_new_was_validated(story: Story) -> None:
    tracker = Tracker.for_project(story.home)
    (experiment,) = [e for e in tracker.call("search_experiments") if e.name == "customize-on-new-preferences"]
    runs = tracker.call(
        "search_runs", [experiment.experiment_id], "tags.stage = 'new-preferences'", order_by=["start_time ASC"]
    )
    counts = [(run.data.metrics["data/validated"], run.data.metrics["data/unchanged"]) for run in runs]
    assert counts == [(40, 0), (46, 40), (80, 86), (20, 166), (0, 186), (0, 186), (0, 86), (0, 86)]


def test_the_history_is_read_from_the_registry_alone(story: Story) -> None:
    out = StringIO()
    with redirect_stdout(out):
        assert main(["history", "--config", story.config]) == 0
    text = out.getvalue()
    assert [line.split()[0] for line in text.splitlines() if line[:4].strip()] == ["1", "2", "3", "4", "5"]
    assert "promoted       from 1         champion" in text
    assert "rejected       from 2" in text
    assert "wanted at least +0.010 and beyond noise" in text
    assert "labels may be flipped" in text


def test_the_champion_is_checked_and_an_event_raised_when_it_fell(story: Story) -> None:
    """First with the source away and the held-out pairs it was judged by; then these are turned, as if tastes had."""
    step = story.steps["check"]
    assert step.name == "Steady", step.message
    heldout = story.home / "heldout.jsonl"
    before = heldout.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    heldout.write_text("".join(json.dumps(row) + "\n" for row in flipped(rows)))
    try:
        step = story.run("fell", check_champion)
    finally:
        heldout.write_text(before)
    assert step.name == "Fell"
    assert "implied_reward_accuracy fell by +" in step.message
    assert "on other items" in step.message, "as many pairs as before, but not the same ones"
    (event,) = events(FELL, story.began)
    assert event["resource"]["prefect.resource.id"] == f"qadapter.model.{MODEL}"
    assert event["payload"]["version"] == 2
    assert step.aliases == {"champion": 2, "previous": 1}, "a check moves nothing"


def test_a_check_measures_again(story: Story) -> None:
    """The champion's own measurements are not looked up; on the same files they come out the same."""
    tracker = Tracker.for_project(story.home)
    (experiment,) = [e for e in tracker.call("search_experiments") if e.name == "check-champion"]
    runs = tracker.call(
        "search_runs", [experiment.experiment_id], "tags.stage = 'adapter'", order_by=["start_time ASC"]
    )
    assert runs[0].info.run_name == "version 2"
    measured = tracker.call("search_runs", [experiment.experiment_id], "metrics.`data/preferences/heldout_pairs` = 48")
    assert len(measured) == 2 * 2, (
        "the quality of the pairs it is checked with: two checks, each in its run and a stage's"
    )
    tags, metrics = runs[0].data.tags, runs[0].data.metrics
    assert {tags["cached.adaptation"], tags["cached.retention"]} == {"False"}
    registered = story.versions()[1].metrics
    assert {name: metrics[name] for name in registered if not name.startswith("cost/")} == {
        name: value for name, value in registered.items() if not name.startswith("cost/")
    }
    assert not (story.home / ".qadapter" / "checks" / MODEL).exists()


def test_a_run_with_nothing_new_closes_killed_runs(story: Story) -> None:
    process = replace(ProcessTag.own(), pid=4_194_305).text()  # no process has a number above 2^22
    Tracker.for_project(story.home).start_parent(NAME, "killed", tags={"qadapter.process": process})
    assert "RUNNING" in story.statuses()
    assert story.run("nothing").name == "NothingNew"
    assert "RUNNING" not in story.statuses()


# ---- a forgetting budget --------------------------------------------------------------------------------------------

BUDGET: dict[str, Any] = {"max_forgetting": 0.1}
LAX = {
    "adaptation": {**CONFIG["gate"]["adaptation"], "min_items": 16},
    "retention": {"max_drop": 1.0, "min_items": 8},
}


@dataclass
class Dialled:
    """A workspace whose champion is found beyond its budget."""

    home: Path
    began: datetime
    trained: Step
    alarm: Step
    turned: Step
    after: Step


@pytest.fixture(scope="module")
def dialled(harness: None, tmp_path_factory: pytest.TempPathFactory) -> Dialled:
    """A champion as trained, three checks. A base this small has nothing to forget: that it forgot, and which of the
    measured points is within the budget, is said for it; all else is what a check does."""
    home = tmp_path_factory.mktemp("dialled")
    questions = [f"how do i {verb} the {thing} ?" for verb, thing in ToyWorld(0).harmless_requests()[:60]]
    quiz = [
        {"question": text, "choices": ["today .", "no , that would do harm ."], "answer": "A"} for text in questions
    ]
    (home / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    changes = {
        "evaluation.retention.tasks": [],
        "evaluation.retention.own": {"quiz": str(home / "quiz.jsonl")},
        "evaluation.retention.limit": None,
        "evaluation.curve": {"points": 2, "values": [0.5]},
    }

    def run(flow: Any, **settings: Any) -> Step:
        overrides = CONFIG["overrides"] | changes
        return Story(home, write_config(home, overrides=overrides, gate=LAX, **settings)).run("", flow)

    def half(curves: Any, budget: Any) -> Any:
        return replace(choose_among(curves, budget), value=0.5)

    with workspace_at(home) as patch:
        deliver(home, "1-first.jsonl", refusals()[:40])
        began = datetime.now(UTC)
        trained = run(customize_on_new_preferences)
        with patch.context() as said:
            said.setattr("flows.check_champion.beyond_budget", lambda *_: ["forgetting +0.3 is beyond the budget"])
            alarm = run(check_champion, budget=BUDGET)
            said.setattr("qadapter.evaluation.curve.budget.choose_among", half)
            turned = run(check_champion, budget=BUDGET, turn_down=True)
        after = run(check_champion, budget=BUDGET, turn_down=True)
    # Out of its workspace again: tests of the other story follow.
    return Dialled(home, began, trained, alarm, turned, after)


def test_a_check_without_the_setting_only_raises_an_alarm(dialled: Dialled) -> None:
    assert dialled.trained.name == "Promoted", dialled.trained.message
    assert "dial" not in dialled.trained.versions[0].tags
    assert dialled.alarm.name == "Fell"
    assert dialled.alarm.message.startswith("version 1 of qadapter-tiny: forgetting +0.3 is beyond the budget")
    assert dialled.alarm.aliases == {"champion": 1}


def test_a_check_turns_the_dial_down(dialled: Dialled) -> None:
    step = dialled.turned
    assert step.name == "TurnedDown", step.message
    assert step.aliases == {"champion": 2, "previous": 1}
    before, version = step.versions
    assert "the dial was turned down from scale=1: dial q-weight=0.5: adaptation" in step.message
    assert step.message.endswith("; version 2, q-weight=0.5, is the champion now")
    assert (version.tags["dial"], version.tags["turned_down"]) == ("q-weight=0.5", "scale=1")
    assert version.tags["data_digest"] == before.tags["data_digest"]
    assert version.tags["adapter_digest"] != before.tags["adapter_digest"]
    assert version.description.startswith("Promoted by the gate. Version 1 with its dial turned down.")
    assert "retention/quiz/acc" in version.metrics
    with workspace_at(dialled.home):
        served = find_served_model(f"{MODEL}@champion")
        out = StringIO()
        with redirect_stdout(out):
            assert main(["history", "--config", str(dialled.home / "tiny.yaml")]) == 0
    assert saved_dial(served.adapter) == Dial("q-weight", 0.5)
    assert "the dial was turned down from scale=1" in out.getvalue()
    (event,) = events(TURNED_DOWN, dialled.began)
    assert (event["payload"]["version"], event["payload"]["now"]) == (1, 2)
    assert event["payload"]["dial"] == "q-weight=0.5"


def test_the_check_after_it_has_nothing_to_do(dialled: Dialled) -> None:
    """The new version is compared with its own measurements at its own dial."""
    assert dialled.after.name == "Steady", dialled.after.message
    assert len(dialled.after.versions) == 2


def test_two_checks_at_once_follow_each_other(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []

    def alone(*_: Any) -> Any:
        assert not inside
        inside.append(1)
        time.sleep(1)
        inside.pop()
        return Checked([])

    monkeypatch.setattr("flows.check_champion._what_fell", alone)
    with ThreadPoolExecutor(2) as pool:
        states = list(pool.map(lambda _: check_champion(story.config, return_state=True), range(2)))
    assert [state.name for state in states] == ["Steady", "Steady"]


def test_a_run_can_be_forced(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.customize._customize", looked)
    state = customize_on_new_preferences(story.config, force=True, return_state=True)
    assert state.is_failed()
    assert "looked although nothing is new" in str(state.message)


def looked(*_: Any) -> None:
    raise RuntimeError("looked although nothing is new")


def test_two_runs_at_once_train_once_and_rollback_is_one_command(story: Story) -> None:
    deliver(story.home, "5-more.jsonl", refusals()[40:60])
    with ThreadPoolExecutor(2) as pool:
        states = list(pool.map(lambda _: customize_on_new_preferences(story.config, return_state=True), range(2)))
    names = sorted(str(state.name) for state in states)
    assert names[0] == "NothingNew"
    assert names[1] in ("Promoted", "Rejected")
    assert len(story.versions()) == 6

    champion = registry_of(load_customization(story.config)).champion()
    assert champion is not None
    out = StringIO()
    with redirect_stdout(out):
        assert main(["rollback", "--config", story.config, "--to", "1"]) == 0
    assert out.getvalue() == f"{MODEL}: version 1 is the champion again, after version {champion.number}\n"
    assert digest_tree(find_served_model(f"{MODEL}@champion").adapter) == story.versions()[0].tags["adapter_digest"]


def test_a_champion_keeps_its_base_when_the_profile_has_another(story: Story) -> None:
    champion = registry_of(load_customization(story.config)).champion()
    assert champion is not None
    known = set((story.home / ".qadapter/stages/pretrain").iterdir())
    deliver(story.home, "6-more.jsonl", refusals()[110:124])
    config = write_config(story.home, overrides=CONFIG["overrides"] | {"base_seed": 5})
    state = customize_on_new_preferences(config, return_state=True)
    assert state.name in {"Promoted", "Rejected"}, state.message
    candidate = story.versions()[-1]
    assert len(set((story.home / ".qadapter/stages/pretrain").iterdir()) - known) == 1, "the profile has another base"
    assert candidate.tags["parent"] == str(champion.number)
    assert candidate.number > champion.number
    assert candidate.tags["base_digest"] == champion.tags["base_digest"]


def test_a_version_registered_by_hand_stops_no_run(story: Story) -> None:
    """It has none of a candidate's tags, and says nothing about what was dealt with."""
    newest = story.versions()[-1]
    registry = registry_of(load_customization(story.config))
    registry.tracker.call("create_model_version", MODEL, newest.source)
    by_hand = story.versions()[-1]
    assert (by_hand.number, "candidate" in by_hand.tags) == (newest.number + 1, False)
    step = story.run("after it")
    assert (step.name, step.message.split(";")[0]) == ("NothingNew", "nothing new in incoming")


@pytest.mark.usefixtures("story")
def test_a_message_about_a_source_has_no_query(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor where the config says that its value is no secret: `public_query` is about the config, not about messages."""
    url = "https://example.org/d.json?code=canary"
    broken = deliver(tmp_path, "copy", "<html>502 Bad Gateway</html>\n")
    config = write_config(tmp_path, model_name="qadapter-away", source={"path": url, "public_query": ["code"]})
    heldout = str(tmp_path / "heldout.jsonl")
    monkeypatch.setattr(
        "qadapter.preferences.sources.locate",
        lambda where, **_: [Path(heldout) if where == heldout else broken],
    )
    states = [customize_on_new_preferences(config, return_state=True) for _ in range(2)]
    assert [state.name for state in states] == ["Quarantined", "NothingNew"]
    for state in states:
        assert "https://example.org/d.json?…" in str(state.message)
        assert "canary" not in str(state.message)
    assert "https://example.org/d.json?…" in caplog.text
    assert "canary" not in caplog.text
