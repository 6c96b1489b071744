"""What a running stage shows: lines in the log, Prefect's progress artifact, its curves in MLflow, a file for the flow.

The stage itself only writes down where it is (`Board`). Threads show it, so that no stage waits for MLflow or Prefect.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.runtime import task_run

from qadapter.progress.reports import Row, listening

FIRST_LINE = 20.0
"""Seconds after which a stage's first line is logged; shorter stages log none."""
BETWEEN_LINES = 45.0
_BETWEEN_ROWS = 5.0  # seconds between two deliveries of curves
_TICK = 1.0
_LAST_WORDS = 3.0  # seconds that the end of a stage waits for Prefect's progress page


@dataclass(frozen=True)
class Place:
    """Where a stage is.

    Attributes:
        stage: name of the stage.
        title: name of its MLflow run.
        task: name of its Prefect task run; empty outside of one.
        began: when the stage began, seconds since the epoch.
        work, unit: the piece of work that it does now, and what is counted; empty before the first one.
        done, total: of the items of that work.
        rate: seconds per item; None before the first item.
        before: of the done items those of earlier sittings, which were killed.
        ended: whether the stage has ended.
        seconds: how long the computation took, once it has ended.
        cached: whether it was found.
    """

    stage: str
    title: str
    task: str
    began: float
    work: str = ""
    unit: str = ""
    done: int = 0
    total: int = 0
    rate: float | None = None
    before: int = 0
    ended: bool = False
    seconds: float = 0.0
    cached: bool = False

    @property
    def left(self) -> float | None:
        """Seconds until the current work is done, at the rate so far; None if there is no rate yet."""
        return None if self.rate is None else self.rate * (self.total - self.done)

    @property
    def earlier(self) -> float:
        """Seconds that the current work took in earlier sittings, at the rate of this one."""
        return (self.rate or 0.0) * self.before

    @property
    def share(self) -> float:
        """The done part of the current work, from 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def text(self) -> str:
        """For people: `training: step 12 of 120 (10 %), 3.1 s per step, about 6 min left`."""
        if not self.work:
            return f"{self.stage} has been working for {duration(time.time() - self.began)}"
        parts = [f"{self.work}: {self.unit} {self.done:,} of {self.total:,} ({100 * self.share:.0f} %)"]
        if self.rate is not None and self.left is not None:
            parts.append(f"{speed(self.rate, self.unit)}, about {duration(self.left)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A duration for people: `40 s`, `14 min`, `1 h 20 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def speed(seconds: float, unit: str) -> str:
    """A rate for people: `3.1 s per step`, `42 prompts per s`."""
    several = f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}s"  # replies
    return f"{seconds:.1f} s per {unit}" if seconds >= 1 else f"{1 / max(seconds, 1e-9):,.1f} {several} per s"


@dataclass
class _Work:
    work: str
    unit: str
    total: int
    before: int
    done: int
    began: float = field(default_factory=time.monotonic)


class Board:
    """Where a stage is, written by the stage and read by the threads that show it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works: list[_Work] = []
        self._rows: list[dict[str, float]] = []
        self._loss: float | None = None

    def begin(self, work: str, unit: str, total: int, done: int) -> None:
        """See `Listener`."""
        with self._lock:
            self._works.append(_Work(work, unit, total, done, done))

    def at(self, done: int) -> None:
        """See `Listener`."""
        if self._works:
            self._works[-1].done = done

    def end(self) -> None:
        """See `Listener`."""
        with self._lock:
            if self._works:
                self._works.pop()

    def row(self, row: Row) -> None:
        """See `Listener`."""
        with self._lock:
            self._rows.append({**row, "timestamp": int(time.time() * 1000)})
            self._loss = row.get("train/loss", self._loss)

    def now(self) -> dict[str, Any]:
        """The current work, as fields of `Place`; empty between two pieces of work."""
        with self._lock:
            if not self._works:
                return {}
            current = self._works[-1]
            fresh = current.done - current.before
            rate = (time.monotonic() - current.began) / fresh if fresh > 0 else None
            return {
                "work": current.work,
                "unit": current.unit,
                "done": current.done,
                "total": current.total,
                "rate": rate,
                "before": current.before,
            }

    @property
    def loss(self) -> str:
        """The last training loss, as the end of a line."""
        return "" if self._loss is None else f", loss {self._loss:.4f}"

    def take_rows(self) -> list[dict[str, float]]:
        """The points of curves that were reported since the last time, each with its time."""
        with self._lock:
            rows, self._rows = self._rows, []
        return rows


class _Background:
    """Makes one call at a time, in a thread that does not keep the process from ending."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Make the call, unless the last one is still in progress."""
        if self._thread is None or not self._thread.is_alive():
            context = copy_context()  # Prefect finds its run in it
            self._thread = threading.Thread(target=context.run, args=(self._call,), name="live", daemon=True)
            self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the call that is in progress."""
        if self._thread is not None:
            self._thread.join(seconds)


class LiveStage:
    """Shows one stage while it runs.

    Attributes:
        board: what the stage writes to.
    """

    def __init__(
        self,
        stage: str,
        title: str,
        *,
        log_rows: Callable[[Sequence[Row]], None],
        logger: Any,
        folder: Path | None = None,
    ) -> None:
        """Prepare without starting.

        Args:
            stage: the stage's name.
            title: of its MLflow run.
            log_rows: sends points of curves to that run.
            logger: of the Prefect run.
            folder: for the file that the flow reads; None writes none.
        """
        task = task_run.get_name() or ""
        self.board = Board()
        self._place = Place(stage, title, task, time.time())
        self._logger, self._log_rows = logger, log_rows
        self._file = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', f'{task} {stage}')}.json" if folder and task else None
        self._times: dict[_Point, float] = {}  # of the points that were reported, when
        self._sent: set[_Point] = set()
        self._refused = False
        self._page: UUID | None = None
        self._stop = threading.Event()
        self._rows, self._progress = _Background(self._send_rows), _Background(self._show_progress)
        self._teller: threading.Thread | None = None

    def place(self) -> Place:
        """Where the stage is now."""
        return Place(**{**asdict(self._place), **self.board.now()})

    def start(self) -> None:
        """Begin to show."""
        context = copy_context()
        self._teller = threading.Thread(target=context.run, args=(self._tell,), name="live", daemon=True)
        self._teller.start()

    def end(self, *, seconds: float = 0.0, cached: bool = False) -> None:
        """Stop; all curves that were reported have been sent or refused when this returns."""
        self._stop.set()
        if self._teller is not None:
            self._teller.join()
        self._rows.wait()
        self._send_rows()
        self._place = Place(**{**asdict(self._place), "ended": True, "seconds": seconds, "cached": cached})
        self._write(self._place)
        if self._page is not None:
            self._progress.wait(_LAST_WORDS)
            self._progress.start()
            self._progress.wait(_LAST_WORDS)

    def unsent(self, history: Sequence[Row]) -> list[dict[str, float]]:
        """The points of a finished stage's curves that were not sent while it ran."""
        rest = []
        for row in history:
            if (point := _point(row)) not in self._sent:
                time_of_it = {"timestamp": self._times[point]} if point in self._times else {}
                rest.append({**row, **time_of_it})
        return rest

    def _tell(self) -> None:
        start = time.monotonic()
        line, rows = start + FIRST_LINE, 0.0
        while not self._stop.wait(_TICK):
            now, place = time.monotonic(), self.place()
            self._write(place)
            if now >= rows and self.board._rows:
                rows = now + _BETWEEN_ROWS
                self._rows.start()
            if now >= line:
                line = now + BETWEEN_LINES
                self._logger.info("%s: %s%s", place.title, place.text(), self.board.loss)
                if place.task:
                    self._progress.start()

    def _send_rows(self) -> None:
        rows = [] if self._refused else self.board.take_rows()
        if not rows:
            return
        points = [_point(row) for row in rows]
        self._times |= {point: row["timestamp"] for point, row in zip(points, rows, strict=True)}
        try:
            self._log_rows(rows)
        except Exception as error:  # the curves are sent again at the end, where the same error is raised
            self._refused = True
            self._logger.warning("%s: its curves cannot be shown while it runs: %s", self._place.title, error)
            return
        self._sent.update(points)

    def _show_progress(self) -> None:
        """Create or update Prefect's progress artifact; an unavailable server is left alone."""
        place = self.place()
        share = 100.0 if place.ended else round(100 * place.share, 1)
        text = f"{place.title}: {place.stage} has ended" if place.ended else f"{place.title}: {place.text()}"
        try:
            if self._page is None:
                key = re.sub(r"[^a-z0-9]+", "-", f"progress-{place.task}-{place.stage}".lower()).strip("-")
                found: Any = create_progress_artifact(share, key=key, description=text)
                self._page = found
            else:
                update_progress_artifact(self._page, share, description=text)
        except Exception as error:  # of Prefect's client or of the connection
            logging.getLogger(__name__).debug("no progress artifact of %s: %s", place.title, error)

    def _write(self, place: Place) -> None:
        if self._file is None:
            return
        with suppress(OSError):  # it only serves the estimate of what is left
            self._file.parent.mkdir(parents=True, exist_ok=True)
            new = self._file.with_suffix(".new")
            new.write_text(json.dumps(asdict(place)), encoding="utf-8")
            new.replace(self._file)


_Point = tuple[float, tuple[str, ...]]


def _point(row: Row) -> _Point:
    """What identifies a point of the curves: its step and the names of its metrics."""
    return row["step"], tuple(sorted(row.keys() - {"step", "timestamp"}))


@contextmanager
def shown_live(live: LiveStage) -> Iterator[LiveStage]:
    """Show a stage during the block, in which it reports."""
    live.start()
    try:
        with listening(live.board):
            yield live
    except BaseException:
        live.end()
        raise


def places(folder: Path) -> list[Place]:
    """Where the stages of a flow run are, read from the files that they write."""
    found = []
    for file in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, TypeError):  # it is just being replaced, or of another version
            content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            found.append(Place(**content))
    return found
