"""`kill -9` in stages that only some experiments have: an unpacked GGUF base, what methods need, the dial's curve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.processes.test_kill_matrices import CHANGES, TRAINING
from tests.processes.test_killed import Row
from tests.support.real_runs import RealHome, Server
from tests.support.tiny_gguf import write_gguf

ROLLOUTS = {"max_new_tokens": 3}
SMALL: dict[str, Any] = {
    **CHANGES,
    "pretraining": None,
    "training": TRAINING | {"max_steps": 3},
    "methods.run": ["q-adapter", "vas", "pita"],
    "methods.vas": {"rollouts": ROLLOUTS},
    "methods.pita": {"branches": ROLLOUTS},
    "evaluation.curve": {"points": 3},
    "evaluation.retention": CHANGES["evaluation.retention"] | {"plain_tasks": ["helpful_word_order"]},
    "evaluation.adaptation": {"batch_size": 64, "max_new_tokens": 3, "generate": 4},
}
"""One domain on a base from a GGUF file, with two methods that share a reward model."""

MATRIX = [
    Row("unpack", "written"),
    Row("reward", "written"),
    Row("rollouts", "written"),
    Row("branches", "renamed"),
    Row("curve", "written"),
]


@dataclass
class NeedsHome(RealHome):
    """A workspace in which real processes run the experiment on a GGUF file."""

    def command(self, **changes: Any) -> tuple[str, list[str]]:
        file = self.folder / "base.gguf"
        if not file.exists():
            write_gguf(file)
        module, arguments = super().command(**SMALL, model={"pretrained": str(file)}, **changes)
        return module, [text for text in arguments if not text.startswith("model.from_scratch")]


@dataclass
class Killed:
    """A workspace in which every run but the last was killed, and one without trouble."""

    home: NeedsHome
    quiet: NeedsHome
    codes: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def killed(prefect_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    home = NeedsHome(tmp_path_factory.mktemp("killed-needs"), prefect_server, "")
    before = 0
    for row in MATRIX:
        row.ended(home.run((row.stage, row.moment)))
        finished = sum(home.finished().values())
        row.outcome += f"; {finished} ({finished - before}) stages finished"
        before = finished
    quiet = NeedsHome(tmp_path_factory.mktemp("quiet-needs"), prefect_server, "")
    return Killed(home, quiet, [home.run(), quiet.run()])


@pytest.mark.slow
def test_every_kill_hit(killed: Killed, record_property: Callable[[str, object], None]) -> None:
    """The fourth table of docs/operations.md."""
    for row in MATRIX:
        record_property(f"{row.stage} {row.moment}", str(row))
        print(f"| {row.stage} | {row.moment} | {row.damage or '–'} | {row.outcome} |")
    assert killed.codes == [0, 0], killed.home.printed()[-4000:] + killed.quiet.printed()[-4000:]
    assert [row.outcome.split(";")[0] for row in MATRIX] == ["signal 9"] * len(MATRIX)


@pytest.mark.slow
def test_the_numbers_are_those_of_an_undisturbed_run(killed: Killed) -> None:
    assert killed.home.finished() == killed.quiet.finished()
    assert set(killed.home.finished()) >= {row.stage for row in MATRIX}
    assert killed.home.finished()["reward"] == 1, "both methods share it"
    assert killed.home.results() == killed.quiet.results()
    assert killed.home.measured() == killed.quiet.measured()
    assert not list(killed.home.store.glob("stages/*/.*"))
    assert not list(killed.home.store.glob("scratch/*/*"))
