"""A running stage shows where it is, in time and at a bounded cost, and its curves arrive once."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient
from prefect.logging import disable_run_logger

from qadapter.config.experiment import load_experiment
from qadapter.progress.reports import Row, counted, report_row
from tasks.stages import live as live_module
from tasks.stages.context import RunContext
from tasks.stages.live import LiveStage, Place, duration, places, shown_live, speed
from tasks.stages.stage_run import run_stage
from tasks.stages.store import StageStore
from tasks.tracking.tracker import Tracker


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become hundredths."""
    for name in ("FIRST_LINE", "BETWEEN_LINES", "_BETWEEN_ROWS", "_TICK"):
        monkeypatch.setattr(live_module, name, getattr(live_module, name) / 100)


class Sent(list[list[Row]]):
    """Stands for MLflow."""

    def __call__(self, rows: Sequence[Row]) -> None:
        self.append([{name: value for name, value in row.items() if name != "timestamp"} for row in rows])


def stage(log_rows: Callable[[Sequence[Row]], None], folder: Path | None = None) -> LiveStage:
    logger = logging.getLogger("tasks.test")
    return LiveStage("train", "academy · dpo", log_rows=log_rows, logger=logger, folder=folder)


def point(step: int) -> dict[str, float]:
    return {"step": step, "train/loss": 1 / step}


def test_the_first_line_is_in_time() -> None:
    """Within 30 seconds, and then at least once a minute."""
    assert 100 * live_module.FIRST_LINE + 100 * live_module._TICK < 30
    assert 100 * live_module.BETWEEN_LINES + 100 * live_module._TICK < 60


def test_lines_say_what_where_and_how_long(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tasks.test")
    with shown_live(stage(Sent())):
        time.sleep(0.3)
        with counted("training", "step", 400, done=100) as work:
            for step in range(101, 201):
                work.at(step)
            report_row({"step": 200, "train/loss": 0.25})
            time.sleep(0.6)
    first, second = caplog.messages[0], caplog.messages[1]
    assert first == "academy · dpo: train has been working for 0 s"
    assert second.startswith("academy · dpo: training: step 200 of 400 (50 %), ")
    assert second.endswith(" left, loss 0.2500")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (4800, "80 min"), (6000, "1 h 40 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rates_and_what_is_left() -> None:
    place = Place("train", "t", "", 0.0, "training", "step", 30, 120, rate=2.5)
    assert place.left == 225
    assert place.text() == "training: step 30 of 120 (25 %), 2.5 s per step, about 4 min left"
    assert speed(0.02, "prompt") == "50.0 prompts per s"
    assert speed(0.5, "reply") == "2.0 replies per s"
    assert Place("train", "t", "", 0.0, "training", "step", 0, 120).text() == "training: step 0 of 120 (0 %)"


def test_a_short_stage_says_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO, "tasks.test")
    with shown_live(stage(Sent(), tmp_path)) as live, counted("training", "step", 2) as work:
        work.advance()
    live.end()
    assert caplog.messages == []


def test_curves_arrive_while_the_stage_runs_and_once() -> None:
    sent = Sent()
    with shown_live(stage(sent)) as live:
        for step in (1, 2):
            report_row(point(step))
        deadline = time.monotonic() + 10
        while not sent:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        report_row(point(3))
    live.end()
    assert [row for rows in sent for row in rows] == [point(1), point(2), point(3)]
    assert live.unsent([point(1), point(2), point(3), point(4)]) == [point(4)]
    assert live.unsent([{"step": 3, "train/eval_loss": 1.0}]) == [{"step": 3, "train/eval_loss": 1.0}]


def test_the_stage_does_not_wait_for_mlflow(caplog: pytest.LogCaptureFixture) -> None:
    """A store that hangs, and then refuses: the curves are logged at the end, with their own times."""
    hang = threading.Event()

    def refuse(_: Sequence[Row]) -> None:
        hang.wait(10)
        raise OSError("no such run")

    start = time.monotonic()
    with shown_live(stage(refuse)) as live:
        report_row(point(1))
        time.sleep(0.2)
        report_row(point(2))
        assert time.monotonic() - start < 5
        hang.set()
    live.end()
    assert "its curves cannot be shown while it runs: no such run" in caplog.text
    first, second = live.unsent([point(1), point(2)])
    assert {**first, "timestamp": 0} == {**point(1), "timestamp": 0}
    assert first["timestamp"] <= time.time() * 1000
    assert second["step"] == 2


def context_of(home: Path, **changes: Any) -> RunContext:
    tracker = Tracker(f"sqlite:///{home}/mlflow.db", str(home / "mlruns"))
    parent = tracker.start_parent("live", "test")
    return RunContext(load_experiment("smoke", changes), StageStore(home / ".qadapter"), tracker, parent)


def trained(context: RunContext, *, killed_after: int = 99, seen: Callable[[str], None] = lambda _: None) -> str:
    """A stage that logs a point at each of six steps, and goes on at the step that its scratch folder names."""
    run_id = context.tracker.start_child(context.parent_run_id, "curves")

    def compute(out: Path, scratch: Path) -> None:
        kept = scratch / "step"
        done = int(kept.read_text()) if kept.exists() else 0
        with counted("training", "step", 6, done) as work:
            for step in range(1, done + 1):  # as a resumed training does
                report_row(point(step))
            for step in range(done + 1, 7):
                report_row(point(step))
                work.at(step)
                kept.write_text(str(step))
                seen(run_id)
                if step == killed_after:
                    raise KeyboardInterrupt
        (out / "history.jsonl").write_text("".join(json.dumps(point(step)) + "\n" for step in range(1, 7)))

    with disable_run_logger():
        run_stage(context, "train", module="qadapter.errors", config={}, inputs={}, compute=compute, run_id=run_id)
    return run_id


def test_curves_in_mlflow_have_no_gaps_and_no_doubles(tmp_path: Path) -> None:
    """While it runs, after a kill and a resume, and where the stage is found."""
    context = context_of(tmp_path)
    client = MlflowClient(context.tracker.uri)

    def curve(run_id: str) -> list[tuple[int, float]]:
        return [(entry.step, entry.value) for entry in client.get_metric_history(run_id, "train/loss")]

    during: list[int] = []

    def seen(run_id: str) -> None:
        time.sleep(0.2)
        during.append(len(curve(run_id)))

    expected = [(step, 1 / step) for step in range(1, 7)]
    with pytest.raises(KeyboardInterrupt):
        trained(context, killed_after=4, seen=seen)
    assert during[0] >= 1, "the first point is there before the second one"
    assert during == sorted(during)
    killed = [run.info.run_id for run in client.search_runs(["1"], "attributes.status = 'KILLED'")]
    assert [curve(run_id) for run_id in killed] == [expected[:4]]
    for _ in range(2):  # resumed, then found
        assert curve(trained(context)) == expected


def test_a_progress_artifact_moves(prefect_client: SyncPrefectClient, tmp_path: Path) -> None:
    context = context_of(tmp_path)
    shares, files = [], []

    def page() -> Any:
        found = [a for a in prefect_client.read_artifacts() if str(a.key).startswith("progress-measure-academy")]
        return found[0] if found else None

    def compute(out: Path, _: Path) -> None:
        with counted("answering", "prompt", 8) as work:
            for done in (2, 6):
                work.at(done)
                deadline = time.monotonic() + 20
                while page() is None or page().data != 100 * done / 8:
                    assert time.monotonic() < deadline, page()
                    time.sleep(0.05)
                shares.append(page().description)
                files.append(places(context.live))
        (out / "done").write_text("")

    @task(task_run_name="measure-academy")
    def measure() -> None:
        run_stage(context, "adaptation", module="qadapter.errors", config={}, inputs={}, compute=compute)

    @flow
    def measuring() -> None:
        measure()

    measuring()
    assert [text.split(",")[0] for text in shares] == [
        "adaptation: answering: prompt 2 of 8 (25 %)",
        "adaptation: answering: prompt 6 of 8 (75 %)",
    ]
    assert page().data == 100
    assert page().key == "progress-measure-academy-adaptation"
    assert [(place.task, place.stage, place.done) for (place,) in files][1] == ("measure-academy", "adaptation", 6)
    (last,) = places(context.live)
    assert (last.ended, last.cached) == (True, False)


def test_reporting_costs_little() -> None:
    """Ten thousand reports: less than what one training step takes."""
    with shown_live(stage(Sent())) as live, counted("training", "step", 10_000) as work:
        start = time.perf_counter()
        for step in range(10_000):
            work.at(step)
        assert time.perf_counter() - start < 0.5
    live.end()
