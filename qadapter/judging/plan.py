"""Who will judge an experiment's answers, what that will cost, and whether it can work: known before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.config.evaluation import JudgeSettings
from qadapter.errors import QAdapterError

if TYPE_CHECKING:  # an evaluation calls this module, and the schema reads the table of methods
    from qadapter.config.experiment import Experiment

_INSTRUCTION_TOKENS = 120  # of a question, besides the conversation and the two replies


def criterion_of(experiment: Experiment, domain: str) -> str:
    """What an endpoint judge is to decide in a domain.

    Raises:
        QAdapterError: nobody said.
    """
    from qadapter.judging.endpoint import CRITERIA

    found = experiment.evaluation.adaptation.criteria.get(domain) or CRITERIA.get(domain)
    if found is None:
        raise QAdapterError(
            f"evaluation.adaptation.criteria.{domain}: is missing; the judge has to know what to decide in this "
            "domain, for example 'which reply is more polite'"
        )
    return found


def judged_rows(experiment: Experiment) -> int:
    """Policies whose answers an experiment judges; a base against itself needs no judge."""
    return len(experiment.domains) * len(experiment.methods.run) * len(experiment.seeds)


def endpoint_share(experiment: Experiment, rows: int) -> JudgeSettings:
    """The endpoint judge of one row: with its part of the budget, so that all rows together cannot exceed it.

    Args:
        experiment: the config.
        rows: policies whose answers the whole run judges.
    """
    settings = experiment.evaluation.adaptation.endpoint
    assert settings is not None
    if settings.budget is None:
        return settings
    return settings.model_copy(update={"budget": settings.budget / rows})


def plan_judges(experiment: Experiment, rows: int) -> list[str]:
    """Lines on who judges and what that costs.

    Args:
        experiment: the config.
        rows: policies whose answers the whole run judges.

    Raises:
        QAdapterError: an endpoint judge that cannot work: no address, no key in the environment, no criterion for a
            domain, or an estimate above the budget.
    """
    kinds = {domain: experiment.judge_of(domain) for domain in experiment.domains}
    lines = [f"{kind}: {', '.join(d for d in kinds if kinds[d] == kind)}" for kind in dict.fromkeys(kinds.values())]
    settings = experiment.evaluation.adaptation.endpoint
    if "endpoint" in kinds.values() and settings is not None:
        lines.append(_endpoint(experiment, settings, rows))
    return lines


def _endpoint(experiment: Experiment, settings: JudgeSettings, rows: int) -> str:
    from qadapter.judging.endpoint_client import check_endpoint, price

    try:
        check_endpoint(settings)
    except QAdapterError as error:
        raise QAdapterError(f"evaluation.adaptation.endpoint: {error}") from error
    for domain in experiment.domains:
        criterion_of(experiment, domain)
    adaptation = experiment.evaluation.adaptation
    calls = 2 * adaptation.generate * rows
    asked = _INSTRUCTION_TOKENS + experiment.training.max_length + 2 * adaptation.max_new_tokens
    estimated = price(settings, calls * asked, calls * settings.max_output_tokens)
    cost = "price unknown (set input_price and output_price)" if estimated is None else f"about {estimated:.2f}"
    if settings.budget is not None and estimated is not None and estimated > settings.budget:
        raise QAdapterError(
            f"evaluation.adaptation.endpoint.budget: {settings.budget:.2f}, but judging would cost {cost} ({calls} "
            f"calls of up to {asked} tokens). Raise the budget, lower evaluation.adaptation.generate or take a cheaper "
            "model."
        )
    limit = "no budget" if settings.budget is None else f"budget {settings.budget:.2f}"
    return (
        f"endpoint {settings.model}: {calls:,} calls (two orders of {adaptation.generate} answers in "
        f"{rows:,} rows; one more for each answer that is nonsense), up to {asked} tokens each, {cost}, {limit}"
    )
