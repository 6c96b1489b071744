"""How the runs of a recurring customisation end: the state's name and type, and the command's exit code."""

from __future__ import annotations

from typing import Any, NamedTuple

from prefect.logging import get_run_logger
from prefect.states import Completed, Failed, State


class Outcome(NamedTuple):
    """One way for a run to end.

    Attributes:
        exit_code: of `qadapter customize` and `qadapter check`; 0: nothing to do for the operator.
        failed: whether the flow run's state is of the type FAILED: its work could not be done, or found a fault.
    """

    exit_code: int
    failed: bool = False


OUTCOMES: dict[str, Outcome] = {
    "Promoted": Outcome(0),
    "NothingNew": Outcome(0),
    "Steady": Outcome(0),
    "NoChampion": Outcome(0),
    "Rejected": Outcome(3),
    "Quarantined": Outcome(4, failed=True),
    "Fell": Outcome(5, failed=True),
    "Superseded": Outcome(6),
    "TurnedDown": Outcome(7),
}
"""By the state's name, which is also the last part of Prefect's event (`prefect.flow-run.Rejected`).

1 and 2 are those of every command: a stage failed, the user's input was refused.
"""


def ended(name: str, message: str) -> State[Any]:
    """The state that a flow returns, and its line in the log."""
    outcome = OUTCOMES[name]
    if outcome.failed:
        get_run_logger().error("%s: %s", name, message)
        return Failed(name=name, message=message)
    (get_run_logger().warning if outcome.exit_code else get_run_logger().info)("%s: %s", name, message)
    return Completed(name=name, message=message, data={"outcome": name, "message": message})


def exit_code(state: State[Any]) -> int:
    """Of the command that ran the flow; 1 where the run did not end in one of the ways above."""
    if not (state.is_completed() or state.is_failed()):  # it crashed or was cancelled
        return 1
    outcome = OUTCOMES.get(str(state.name))
    return outcome.exit_code if outcome is not None else 0 if state.is_completed() else 1
