"""`watch-preferences` as a command, for the processes of `tests/support/real_runs.py`."""

from __future__ import annotations

from flows.watch_preferences import watch_preferences


def main(arguments: list[str]) -> int:
    """Look once at the source of the config that is named; 3 where it was announced, 0 where nothing is new."""
    state = watch_preferences(arguments[0], return_state=True)
    return {"NothingNew": 0, "Announced": 3}[str(state.name)]
