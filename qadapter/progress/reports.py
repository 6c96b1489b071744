"""Where a long piece of work is, and the numbers that it has so far, for the process that shows them.

Training, generation, lm-eval and judges report here; `listening` sets the listener that receives the reports. Without a
listener a report only reads one variable. This module holds no texts and no intervals, so a change of what people see
changes no stage key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

Row = Mapping[str, float]
"""One point of every curve: {"step": n, metric name: value, ...}."""


class Listener(Protocol):
    """Receives reports, in the thread that works: it returns at once and raises nothing."""

    def begin(self, work: str, unit: str, total: int, done: int) -> None:
        """A piece of work began: `done` of `total` items were there before."""

    def at(self, done: int) -> None:
        """So many items of the work that began last are done."""

    def end(self) -> None:
        """The work that began last has ended."""

    def row(self, row: Row) -> None:
        """The next point of the training's curves."""


_listener: ContextVar[Listener | None] = ContextVar("who receives reports", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Send all reports of the block to `listener`; None discards them."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def listener() -> Listener | None:
    """The listener that receives reports now; None where reports are discarded."""
    return _listener.get()


class Work:
    """A piece of work that is counted."""

    def __init__(self, done: int) -> None:
        self.done = done

    def advance(self, count: int = 1) -> None:
        """`count` more items are done."""
        self.at(self.done + count)

    def at(self, done: int) -> None:
        """`done` items are done."""
        self.done = done
        if (found := _listener.get()) is not None:
            found.at(done)


@contextmanager
def counted(work: str, unit: str, total: int, done: int = 0) -> Iterator[Work]:
    """Report a piece of work, item by item.

    Args:
        work: its name, such as `training`.
        unit: what is counted, in the singular: `step`, `prompt`.
        total: number of items.
        done: items that an earlier run did.
    """
    found = _listener.get()
    if found is not None:
        found.begin(work, unit, total, done)
    try:
        yield Work(done)
    finally:
        if found is not None:
            found.end()


def report_row(row: Row) -> None:
    """Report the next point of the training's curves."""
    if (found := _listener.get()) is not None:
        found.row(row)
