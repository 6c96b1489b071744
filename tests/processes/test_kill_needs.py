"""`kill -9` in stages that only some experiments have: an unpacked GGUF base, what methods need, the dial's curve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.processes.test_kill_matrices import CHANGES, TRAINING
from tests.support.kills import Killed, Row, killed_at_each
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


@pytest.fixture(scope="module")
def killed(prefect_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Killed[NeedsHome]:
    home, quiet = (
        NeedsHome(tmp_path_factory.mktemp(f"{name}-needs"), prefect_server, "") for name in ("killed", "quiet")
    )
    return killed_at_each(home, quiet, MATRIX, lambda *_: None)


@pytest.mark.slow
def test_every_kill_hit(killed: Killed[NeedsHome], record_property: Callable[[str, object], None]) -> None:
    """The fourth table of docs/operations.md."""
    killed.every_kill_hit(record_property)


@pytest.mark.slow
def test_the_numbers_are_those_of_an_undisturbed_run(killed: Killed[NeedsHome]) -> None:
    assert killed.home.finished() == killed.quiet.finished()
    assert set(killed.home.finished()) >= {row.stage for row in MATRIX}
    assert killed.home.finished()["reward"] == 1, "both methods share it"
    assert killed.home.results() == killed.quiet.results()
    assert killed.home.measured() == killed.quiet.measured()
    assert not list(killed.home.store.glob("stages/*/.*"))
    assert not list(killed.home.store.glob("scratch/*/*"))
