"""Kill matrices: a run is killed at each of a list of moments, and goes on each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from qadapter.training.checkpoints import SEAL
from tests.support.real_runs import RealHome


def cut(file: Path) -> None:
    """What a power cut leaves of a file that the system had not written out."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file: Path) -> None:
    """The same on other file systems: the right size, and nothing in it."""
    file.write_bytes(bytes(file.stat().st_size))


def newest_checkpoint(home: RealHome, stage: str) -> Path:
    """The last whole checkpoint of a stage that was killed."""
    found = [folder for folder in home.store.glob(f"scratch/{stage}/*/checkpoint-*") if (folder / SEAL).exists()]
    return max(found, key=lambda folder: int(folder.name.split("-")[1]))


@dataclass
class Row:
    """One line of a kill matrix."""

    stage: str
    moment: str
    damage: str = ""
    outcome: str = ""
    finished_before: int = 0

    def ended(self, code: int) -> None:
        """Write down how the run ended."""
        self.outcome = f"signal {-code}" if code < 0 else f"exit code {code}"

    def __str__(self) -> str:
        where = f"{self.stage}, {self.moment}" + (f", then {self.damage}" if self.damage else "")
        return f"{where} → {self.outcome}"


Home = TypeVar("Home", bound=RealHome)


@dataclass
class Killed(Generic[Home]):
    """A workspace in which every run but the last was killed, and one without trouble; their last exit codes."""

    home: Home
    quiet: Home
    rows: Sequence[Row]
    codes: list[int]

    def every_kill_hit(self, record_property: Callable[[str, object], None]) -> None:
        """Assert it, and keep the lines of the table in docs/operations.md (`--junit-xml` keeps them, `-s` prints)."""
        for row in self.rows:
            record_property(f"{row.stage} {row.moment}", str(row))
            print(f"| {row.stage} | {row.moment} | {row.damage or '–'} | {row.outcome} |")
        assert self.codes == [0, 0], self.home.printed()[-4000:] + self.quiet.printed()[-4000:]
        assert [row.outcome.split(";")[0] for row in self.rows] == ["signal 9"] * len(self.rows)


def killed_at_each(home: Home, quiet: Home, rows: Sequence[Row], damage: Callable[[Home, Row], None]) -> Killed[Home]:
    """Kill the runs of `home` at each moment in turn, each going on where the one before it was; then run both."""
    before = 0
    for row in rows:
        row.ended(home.run((row.stage, row.moment)))
        finished = sum(home.finished().values())
        row.outcome += f"; {finished} ({finished - before}) stages finished"
        before = finished
        if row.damage:
            damage(home, row)
    return Killed(home, quiet, rows, [home.run(), quiet.run()])
