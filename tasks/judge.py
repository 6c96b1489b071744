"""The judge of a domain's answers: trained where it is a reward model, made ready for the evaluation in any case."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.logging import get_run_logger

from qadapter.config.evaluation import Judge
from tasks.data import log_pairs
from tasks.stages.context import RunContext
from tasks.stages.launching import Launcher
from tasks.stages.logged import StageResult, logged_stage, task_result
from tasks.train import Base, keyed

if TYPE_CHECKING:
    from pathlib import Path

    from qadapter.judging.verdicts import AnswerJudge

JUDGING = {"judge", "reward_model", "endpoint", "criteria"}
"""Keys of `evaluation.adaptation` that say who judges; `judge_settings` says what of them a verdict depends on."""


@task(task_run_name="judge-{domain}", tags=["accelerator"])
def train_judge(context: RunContext, domain: str, base: Base, data: StageResult) -> Any:
    """Train a reward model on the domain's pairs that no policy sees, and measure how far it can be trusted."""
    context = base.within(context)
    experiment = context.experiment
    settings = experiment.evaluation.adaptation.reward_model or experiment.training
    source = experiment.domains[domain].source
    launch = Launcher(experiment.launch)

    def compute(out: Path, scratch: Path) -> None:
        from qadapter.judging.reward_training import train_reward_model

        launch(
            train_reward_model,
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

    result = logged_stage(
        context,
        "judge",
        label=domain,
        tags={"domain": domain},
        module="qadapter.judging.reward_training",
        config={
            **keyed(settings),
            "lora": experiment.lora.model_dump(),
            "model": experiment.model.numerics(),
            "seed": experiment.base_seed,
            **base.config(),
            **launch.keyed(),
        },
        params={"base": base.name},
        inputs={**base.inputs(), "data": data.output},
        compute=compute,
        log=lambda run_id, _: log_pairs(context, run_id, source, data.output, "judge"),
    )
    found = result.output.metrics()
    if found["judge/accuracy_low"] <= 0.5:
        get_run_logger().warning(
            "%s: the judge decides %.2f of held-out pairs as people did (95 %%: %.2f to %.2f), which may be chance: "
            "its verdicts say little. More judge_pairs, more steps or a larger base may help.",
            domain,
            found["judge/accuracy"],
            found["judge/accuracy_low"],
            found["judge/accuracy_high"],
        )
    return task_result(result, result)


def judge_settings(context: RunContext, kind: Judge, domain: str) -> dict[str, Any]:
    """What verdicts depend on, as part of a cache key; any change of an endpoint asks again what stayed undecided."""
    adaptation = context.experiment.evaluation.adaptation
    settings: dict[str, Any] = {"judge": kind}
    if kind == "endpoint" and adaptation.endpoint is not None:
        from qadapter.judging.plan import criterion_of

        settings["endpoint"] = adaptation.endpoint.model_dump(exclude={"api_key_variable", "parallel"})
        settings["criterion"] = criterion_of(context.experiment, domain)
    if kind == "reward-model" and adaptation.reward_model is not None:
        settings["max_length"] = adaptation.reward_model.max_length
    return settings


def answer_judge(
    context: RunContext, kind: Judge, domain: str, base: Base, trained: StageResult | None, world: StageResult | None
) -> AnswerJudge | None:
    """The judge that the evaluation of a row asks; None for nobody."""
    experiment = context.experiment
    adaptation = experiment.evaluation.adaptation
    if kind == "rule" and world is not None:
        from qadapter.judging.verdicts import RuleJudge
        from qadapter.toyworld.world import ToyWorld

        return RuleJudge(ToyWorld.read(world.path), experiment.sources[experiment.domains[domain].source].domain)
    if kind == "reward-model" and trained is not None:
        from qadapter.judging.reward_model import RewardJudge

        settings = adaptation.reward_model or experiment.training
        return RewardJudge(trained.path, base.location, experiment.model, settings.max_length, adaptation.batch_size)
    if kind == "endpoint":
        from qadapter.judging.endpoint import EndpointJudge
        from qadapter.judging.plan import criterion_of, endpoint_share, judged_rows

        # One file for all rows and runs: a question that was answered once is never paid for again.
        cache = context.store.root / "judge_answers.jsonl"
        row = endpoint_share(experiment, context.rows_to_judge or judged_rows(experiment))
        return EndpointJudge(row, criterion_of(experiment, domain), cache)
    return None
