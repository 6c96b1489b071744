"""How a recurring run ends: name and type of its state, and an exit code that cron and CI can act on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from prefect.logging import disable_run_logger
from prefect.states import Cancelled, Completed, Crashed, Failed

from flows.commands import recurring
from flows.customize import _trained_on
from flows.running.outcomes import OUTCOMES, ended, exit_code
from qadapter.preferences.ledger import Changes
from tests.support.paths import PROJECT_ROOT


@pytest.mark.parametrize(
    ("name", "code", "failed"),
    [
        ("Promoted", 0, False),
        ("NothingNew", 0, False),
        ("Steady", 0, False),
        ("NoChampion", 0, False),
        ("Rejected", 3, False),
        ("Quarantined", 4, True),
        ("Fell", 5, True),
        ("Superseded", 6, False),
        ("TurnedDown", 7, False),
    ],
)
def test_each_outcome_has_a_state_and_an_exit_code(name: str, code: int, failed: bool) -> None:
    with disable_run_logger():
        state = ended(name, "because")
    assert (state.name, state.is_failed(), state.is_completed()) == (name, failed, not failed)
    assert exit_code(state) == code
    assert state.message == "because"
    assert f"| `{name}` | {code} |" in (PROJECT_ROOT / "docs" / "recurring.md").read_text(encoding="utf-8")


def test_no_delivery_is_said_and_not_counted() -> None:
    """`Promoted: 0 new …` would read as if nothing had been trained on."""
    nothing = Changes(0, 0, 80, 0, validated=0, fresh_pairs=0, quarantined={}, fresh_quarantined={})
    assert _trained_on(nothing, 12) == (
        "no delivery since the last run; 12 pairs of earlier ones that the champion has not learnt"
    )
    assert _trained_on(nothing, 0) == "no delivery since the last run; trained on all known pairs once more"
    assert _trained_on(replace(nothing, new=3, fresh_pairs=3), 15).startswith("3 new, 0 changed, 0 removed and 80 unch")


def test_the_table_has_no_other_outcome() -> None:
    assert len(OUTCOMES) == 9


@pytest.mark.parametrize(
    ("state", "code"),
    [(Failed(), 1), (Crashed(name="Rejected"), 1), (Cancelled(), 1), (Completed(name="Joined"), 0)],
)
def test_other_ends_are_failures_unless_completed(state: Any, code: int) -> None:
    assert exit_code(state) == code


def test_the_command_exits_with_the_outcomes_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import flows.check_champion
    import flows.running.run_request

    def fell(config: str, *, return_state: bool) -> Any:
        return Failed(name="Fell", message=f"version 2 of {config}: retention fell")

    monkeypatch.setattr(recurring, "prefect_server", nullcontext)
    monkeypatch.setattr(flows.check_champion, "check_champion", fell)
    monkeypatch.setattr(flows.running.run_request, "check_workspace", lambda folder: None)
    assert recurring.check("smoke") == 5
    assert capsys.readouterr().err.endswith("Fell: version 2 of smoke: retention fell\n")
