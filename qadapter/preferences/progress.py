"""How far a long reading is: as log lines, and reported as megabytes of how many (`qadapter.progress.reports`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qadapter.preferences.containers import Position
from qadapter.progress.reports import Work, counted

logger = logging.getLogger(__name__)

EVERY_SECONDS = 20.0
_BYTES = 1_000_000  # that are reported as one


class Progress:
    """Counts rows and says every 20 seconds how many there were, how many per second, and how long the rest takes.

    Attributes:
        rows: how many were counted.
        position: of the file that is read now; its reader keeps it up to date.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Begin to count.

        Args:
            files: what will be read, in this order; their sizes tell how much is left.
        """
        self._sizes = {file: max(1, file.stat().st_size) for file in files if file.exists()}
        self._total, self._done, self._size = sum(self._sizes.values()), 0, 0
        self.rows, self.position = 0, Position()
        self._start = self._told = time.monotonic()
        self._work: Work | None = None

    @contextmanager
    def reported(self, work: str) -> Iterator[None]:
        """Report the reading while the block reads, as a piece of work of this name."""
        with counted(work, "megabyte", -(-self._total // _BYTES)) as self._work:
            yield
        self._work = None

    def next_file(self, file: Path) -> Position:
        """The position for the reader of the next file."""
        self._done += self._size
        self._size, self.position = self._sizes.get(file, 0), Position()
        return self.position

    def count(self) -> None:
        """Count a row, and log the progress if it is due."""
        self.rows += 1
        if self.rows % 256:
            return
        if self._work is not None:
            self._work.at(round(self._read / _BYTES))
        if time.monotonic() - self._told >= EVERY_SECONDS:
            self._told = time.monotonic()
            logger.info("%s", self.text())

    @property
    def _read(self) -> float:
        """Bytes that were read."""
        return self._done + self._size * self.position.share

    def text(self) -> str:
        """For people: `120,000 rows (12 %), 8,100 rows/s, about 110 s left`."""
        seconds = max(1e-9, time.monotonic() - self._start)
        share = self._read / max(1, self._total)
        left = f", about {seconds * (1 - share) / share:,.0f} s left" if share > 0 else ""
        return f"{self.rows:,} rows ({share:.0%}), {self.rows / seconds:,.0f} rows/s{left}"
