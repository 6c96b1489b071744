"""The judge of a domain's answers: its training, if it needs one, and its inputs from earlier stages."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.logging import get_run_logger

from qadapter.judging.kind import Material
from qadapter.judging.plan import judge_of, judge_training, judged_rows
from tasks.data import log_pairs
from tasks.stages.context import RunContext
from tasks.stages.process_launcher import ProcessLauncher
from tasks.stages.stage_run import StageResult, run_stage, task_result
from tasks.train import Base, keyed

if TYPE_CHECKING:
    from pathlib import Path


@task(task_run_name="judge-{domain}", tags=["accelerator"])
def train_judge(context: RunContext, domain: str, base: Base, data: StageResult) -> Any:
    """Train the domain's judge on pairs that no policy sees, and measure its agreement with people."""
    context = base.within(context)
    experiment = context.experiment
    kind = judge_of(experiment, domain)
    settings = judge_training(experiment, domain)
    assert kind is not None
    assert kind.training is not None
    train = import_module(kind.training).train_judge
    source = experiment.domains[domain].source
    launcher = ProcessLauncher(experiment.launch)

    def compute(out: Path, scratch: Path) -> None:
        launcher(
            train,
            base.location,
            data.path / "judge.jsonl",
            data.path / "heldout.jsonl",
            model=experiment.model,
            lora=experiment.lora,
            settings=settings,
            seed=experiment.base_seed,
            out=out,
            scratch=scratch,
        )

    result = run_stage(
        context,
        "judge",
        label=domain,
        tags={"domain": domain},
        module=kind.training,
        config={
            **keyed(settings),
            "lora": experiment.lora.model_dump(),
            "model": experiment.model.key(),
            "seed": experiment.base_seed,
            **base.config(),
            **launcher.keyed(),
        },
        params={"base": base.name},
        inputs={**base.inputs(), "data": data.output},
        compute=compute,
        log=lambda run_id, _: log_pairs(context, run_id, source, data.output, "judge"),
    )
    found = result.output.metrics()
    if found["judge/accuracy_low"] <= 0.5:
        get_run_logger().warning(
            "%s: the judge agrees with people on %.2f of held-out pairs (95 %%: %.2f to %.2f), which may be chance: "
            "its verdicts are unreliable. More judge_pairs, more steps or a larger base may help.",
            domain,
            found["judge/accuracy"],
            found["judge/accuracy_low"],
            found["judge/accuracy_high"],
        )
    return task_result(result, result)


def judge_material(context: RunContext, base: Base, trained: StageResult | None, world: StageResult | None) -> Material:
    """Collect what earlier stages made for the judge of a row.

    Args:
        context: the flow run's context.
        base: the domain's base.
        trained: the judge's training, where it has one.
        world: the toy world.
    """
    return Material(
        world=world.path if world else None,
        trained=trained.path if trained else None,
        base=base.location,
        model=context.experiment.model,
        cache=context.store.root,
        rows=context.rows_to_judge or judged_rows(context.experiment),
    )
