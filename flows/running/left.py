"""What is left of a flow run: in its log, as Prefect's progress artifact, and as one line in a terminal.

The estimate starts from the plan's operations and follows what was measured: a stage that has not begun takes as long
as those of its kind took, and one of a new kind what the plan says, at the pace of the stages so far.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger
from tqdm import tqdm

from qadapter.errors import QAdapterError
from qadapter.methods.method import Need
from tasks.stages.context import Cell
from tasks.stages.live import Place, duration, places

BETWEEN_LINES = 60.0
_BETWEEN_FRAMES = 0.5  # of the line in a terminal
_LAST_WORDS = 3.0
_LOGGER = logging.getLogger(__name__)

PREPARES = "prepare_data"
"""Kind of the tasks after which more is known of how long the others take."""
_UNSURE = 1.5  # by this factor a plan may be wrong before anything was measured
_SHARE, _WARM = 0.1, 60.0  # of its steps and in seconds, from when on a training's rate is that of its end


@dataclass(frozen=True)
class Submitted:
    """A stage's task that was submitted.

    Attributes:
        name: of its Prefect task run.
        kind: tasks of one kind take about the same time, such as `train dpo`.
        planned: seconds that the plan estimates; None if the plan has no estimate.
    """

    name: str
    kind: str
    planned: float | None = None


def kind_of(task: str, inputs: Mapping[str, Any]) -> str:
    """The kind of a task, from its function's name and its inputs: `train dpo`, `answers`, `prepare_data`."""
    cell, need = inputs.get("cell"), inputs.get("need")
    if isinstance(cell, Cell):
        return f"{task.split('_')[0]} {cell.method}"
    return need.name if isinstance(need, Need) else task


def seconds_left(
    tasks: Sequence[Submitted], ended: set[str], now: Iterable[Place], parallel: int, clock: float
) -> float | None:
    """Estimate how long a flow run still takes.

    Args:
        tasks: all submitted tasks.
        ended: names of those that have ended.
        now: where the stages are.
        parallel: how many run side by side.
        clock: seconds since the epoch.

    Returns:
        None while nothing is known: no task of its own work has ended, none reports, and there is no plan.
    """
    by_task = _by_task(now)
    took: dict[str, list[float]] = {}
    for task in tasks:
        # Nothing was measured where every stage was found, or where one failed.
        if task.name in ended and (seconds := _took(by_task.get(task.name, []))):
            took.setdefault(task.kind, []).append(seconds)
    pace = measured_pace(tasks, ended, by_task, clock) or 1.0
    rest = []
    known = bool(took)
    for task in tasks:
        if task.name in ended:
            continue
        expected = fmean(took[task.kind]) if task.kind in took else task.planned and task.planned * pace
        known = known or task.planned is not None
        open_stages = [place for place in by_task.get(task.name, []) if not place.ended]
        if open_stages:
            place = open_stages[-1]
            gone = place.earlier + clock - min(other.began for other in by_task[task.name])
            known = known or place.left is not None
            rest.append(max(place.left or 0.0, (expected or 0.0) - gone))
        else:
            rest.append(expected or 0.0)
    if not known:
        return None
    # Stages side by side share the work, but the longest one is not divided.
    return max(sum(rest) / min(parallel, len(rest)), max(rest)) if rest else 0.0


def measured_pace(
    tasks: Sequence[Submitted], ended: set[str], by_task: Mapping[str, list[Place]], clock: float
) -> float | None:
    """Measured seconds per planned second, of the stages that ended and of trainings that go on long enough.

    None while nothing that the plan estimates was measured.
    """
    planned = measured = 0.0
    for task in tasks:
        own = by_task.get(task.name, [])
        if not own or not task.planned:
            continue
        gone = clock - min(place.began for place in own)
        last = own[-1]
        if task.name in ended:
            seconds = _took(own)
        elif last.unit == "step" and last.left is not None and last.share >= _SHARE and gone >= _WARM:
            seconds = last.earlier + gone + last.left
        else:
            continue
        if seconds:
            planned, measured = planned + task.planned, measured + seconds
    return measured / planned if planned and measured else None


def _by_task(now: Iterable[Place]) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = {}
    for place in now:
        found.setdefault(place.task, []).append(place)
    return found


def _took(own: Sequence[Place]) -> float:
    """Seconds that an ended task computed; 0 where every stage was found, and where one failed."""
    if any(place.ended and not place.cached and not place.seconds for place in own):
        return 0.0
    return sum(place.seconds for place in own if not place.cached)


def left_text(left: float, sure: bool) -> str:
    """For people: `about 2 h 54 min left`; where nothing was measured, `1 h 56 min to 4 h 21 min left by the plan`."""
    if sure:
        return f"about {duration(left)} left"
    return f"{duration(left / _UNSURE)} to {duration(left * _UNSURE)} left by the plan"


def summary(
    tasks: Sequence[Submitted], ended: set[str], now: Sequence[Place], left: float | None, sure: bool = True
) -> str:
    """For people: `7 of 23 stages have finished, about 1 h 20 min left in all; train-academy-dpo-0: training: …`."""
    text = f"{len(ended)} of {len(tasks)} stages have finished"
    if left is not None and len(ended) < len(tasks):
        text += f", {left_text(left, sure)} in all"
    at_work = [f"{place.task}: {place.text()}" for place in now if not place.ended and place.task not in ended]
    return "; ".join([text, *at_work])


def frame(
    tasks: Sequence[Submitted],
    ended: set[str],
    now: Sequence[Place],
    left: float | None,
    width: int,
    sure: bool = True,
) -> str:
    """The line in a terminal: a bar over all stages, what is left in all, and where the running stages are."""
    bar = tqdm.format_meter(
        len(ended),
        len(tasks),
        0,
        ncols=min(width, 50),
        bar_format="{n_fmt}/{total_fmt} stages |{bar}| {percentage:.0f} %",
    )
    parts = [bar] + ([left_text(left, sure)] if left is not None and len(ended) < len(tasks) else [])
    for place in now:
        if not place.ended and place.task not in ended:
            count = f" {place.unit} {place.done}/{place.total}" if place.work else ""
            parts.append(f"{place.task} {place.work or place.stage}{count}")
    return " · ".join(parts)[: max(0, width - 1)]


class Teller:
    """Shows what is left of a flow run while it runs, from threads of its own."""

    def __init__(
        self,
        folder: Path,
        parallel: int,
        *,
        name: str,
        plan: Callable[[], Mapping[str, float]] | None = None,
        terminal: TextIO | None = None,
    ) -> None:
        """Prepare without starting.

        Args:
            folder: where the stages write where they are.
            parallel: how many stages run side by side.
            name: of the experiment, for the artifact.
            plan: from nothing to task name → planned seconds; asked if the run lasts so long that a line is due, and
                again when more data are prepared.
            terminal: stream of the line; by default stderr. Only a terminal gets one.
        """
        self.tasks: list[Submitted] = []
        self.ended: set[str] = set()
        self._folder, self._parallel, self._name = folder, parallel, name
        self._plan, self._planned = plan, None if plan else {}  # type: ignore[var-annotated]
        self._prepared = 0  # data that were prepared when the plan was asked
        self._terminal = terminal or sys.stderr
        self._page: UUID | None = None
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def submitted(self, name: str, kind: str) -> None:
        """A task was submitted."""
        if all(task.name != name for task in self.tasks):
            self.tasks.append(Submitted(name, kind))

    def start(self) -> None:
        """Begin to show."""
        shows = [self._tell, *([self._draw] if self._terminal.isatty() else [])]
        for show in shows:
            thread = threading.Thread(target=copy_context().run, args=(show,), name="left", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Stop to show; an unavailable Prefect server is not waited for."""
        self._stop.set()
        for thread in self._threads:
            thread.join(_LAST_WORDS)
        self._threads.clear()

    def left(self, now: Sequence[Place]) -> tuple[float | None, bool]:
        """Seconds that are left in all, as far as they can be estimated, and whether something was measured for it."""
        planned = self._planned or {}
        tasks = [replace(task, planned=planned.get(task.name)) for task in list(self.tasks)]
        ended, clock = set(self.ended), time.time()
        pace = measured_pace(tasks, ended, _by_task(now), clock)
        return seconds_left(tasks, ended, now, self._parallel, clock), pace is not None

    def _tell(self) -> None:
        while not self._stop.wait(BETWEEN_LINES):
            if len(self.ended) >= len(self.tasks):
                continue
            self._read_plan()
            now = places(self._folder)
            text = summary(self.tasks, self.ended, now, *self.left(now))
            get_run_logger().info("%s", text)
            self._show(100 * len(self.ended) / max(1, len(self.tasks)), text)
        if self._page is not None:
            self._show(100.0, f"{len(self.ended)} of {len(self.tasks)} stages have finished")

    def _read_plan(self) -> None:
        prepared = sum(task.kind == PREPARES and task.name in self.ended for task in list(self.tasks))
        if self._plan is not None and (self._planned is None or prepared > self._prepared):
            self._prepared = prepared
            try:
                self._planned = dict(self._plan())
            except QAdapterError as error:  # a model whose size is unknown: what was measured has to do
                self._planned = {}
                _LOGGER.debug("no plan: %s", error)

    def _show(self, share: float, text: str) -> None:
        try:
            if self._page is None:
                key = "progress-" + re.sub(r"[^a-z0-9]+", "-", self._name.lower()).strip("-")
                found: Any = create_progress_artifact(round(share, 1), key=key, description=text)
                self._page = found
            else:
                update_progress_artifact(self._page, round(share, 1), description=text)
        except Exception as error:  # of Prefect's client or of the connection
            _LOGGER.debug("no progress artifact of %s: %s", self._name, error)

    def _draw(self) -> None:
        """Draw the line and leave the cursor at its start: the next line of the log takes its place."""
        while not self._stop.wait(_BETWEEN_FRAMES):
            now = places(self._folder)
            width = shutil.get_terminal_size().columns
            left, sure = self.left(now)
            self._terminal.write(f"\r\x1b[K{frame(self.tasks, self.ended, now, left, width, sure)}\r")
            self._terminal.flush()
        self._terminal.write("\r\x1b[K")
        self._terminal.flush()
