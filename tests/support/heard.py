"""A listener of `qadapter.progress.reports` that writes down what it is told."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from qadapter.progress.reports import listening


class Heard:
    """A listener that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def begin(self, work: str, unit: str, total: int, done: int) -> None:
        self.told.append(f"{work}: {unit} {done} of {total}")

    def at(self, done: int) -> None:
        self.told.append(done)

    def end(self) -> None:
        self.told.append("end")

    def row(self, row: Any) -> None:
        self.told.append(dict(row))

    def listening(self) -> AbstractContextManager[None]:
        """Receive all reports of the block."""
        return listening(self)
