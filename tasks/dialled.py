"""A candidate's dial, chosen under the forgetting budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.logging import get_run_logger

from qadapter.config.budget import Budget
from qadapter.files.artifacts import read_json, read_json_lines
from tasks.curve import MeasuredCurve
from tasks.stages.context import RunContext
from tasks.stages.stage_run import StageResult, run_stage, task_result

CHOICE = "choice.json"


@dataclass(frozen=True)
class Dialled:
    """An adapter with its dial set, and how it was chosen.

    Attributes:
        stage: holds `adapter/` and `choice.json` (`qadapter.evaluation.curve.budget.facts_of`).
        heldout: prepared pairs of which half was chosen on.
    """

    stage: StageResult
    heldout: Path

    @property
    def choice(self) -> dict[str, Any]:
        """What was chosen."""
        found: dict[str, Any] = read_json(self.stage.path / CHOICE)
        return found

    def prompts(self) -> list[str]:
        """The name of the prompt of each held-out pair, in order."""
        from qadapter.evaluation.prompts import prompt_names

        return prompt_names([row["prompt"] for row in read_json_lines(self.heldout)])


@task(task_run_name="dial-candidate")
def dial_candidate(
    context: RunContext,
    curve: MeasuredCurve,
    adapter: StageResult,
    heldout: StageResult,
    budget: Budget,
    below: float | None = None,
) -> Any:
    """The same adapter with the dial that learnt most within the budget, at a value below `below` where it is given."""

    def compute(out: Path, _: Path) -> None:
        from qadapter.evaluation.curve.budget import choose_among, facts_of
        from qadapter.evaluation.curve.points import read_curves
        from qadapter.files.artifacts import write_json
        from qadapter.policy.files import copy_turned

        curves = read_curves(curve.stage.path)
        choice = choose_among(curves if below is None else [one.below(below) for one in curves], budget)
        copy_turned(adapter.path / "adapter", out / "adapter", dial=choice.dial)
        write_json(out / CHOICE, facts_of(choice))

    result = run_stage(
        context,
        "dial",
        run_id=adapter.run_id,
        run_name="dial",
        module="qadapter.evaluation.curve.budget",
        config={"budget": budget.model_dump(), **({} if below is None else {"below": below})},
        inputs={"adapter": adapter.output, "curve": curve.stage.output},
        compute=compute,
    )
    dialled = Dialled(result, heldout.path / "heldout.jsonl")
    get_run_logger().info("dial: %s", dialled.choice["sentence"])
    return task_result(dialled, result)
