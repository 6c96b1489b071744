"""A training that is killed behind one of its steps, within the test's own process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qadapter.training.arguments import ReportProgress


class Killed(Exception):  # noqa: N818 - a kill, not an error
    """Stands for `kill -9`: no code catches it."""


def killed_at(step: int, patch: pytest.MonkeyPatch, train: Callable[[], object]) -> None:
    """Train until an optimiser step is done, and no further."""

    def kill(callback: ReportProgress, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step:
            raise Killed

    with patch.context() as during:
        during.setattr(ReportProgress, "on_step_end", kill)
        with pytest.raises(Killed):
            train()
