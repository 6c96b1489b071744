"""The judges of an experiment's answers, their cost, and the checks before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.judging.kind import Case, JudgeKind
from qadapter.judging.table import JUDGES, NO_JUDGE, find_judge

if TYPE_CHECKING:
    from qadapter.config.experiment import Experiment
    from qadapter.config.training import OptimizerSettings


def case_of(experiment: Experiment, domain: str, kind: JudgeKind) -> Case:
    """The case of one of an experiment's domains, whose source exists."""
    name = experiment.domains[domain].source
    source = experiment.sources[name]
    adaptation = experiment.evaluation.adaptation
    return Case(
        domain=domain,
        source=name,
        asked=adaptation.judge == kind.name,
        settings=getattr(adaptation, kind.section) if kind.section else None,
        toy_world=experiment.toy_world is not None,
        style=source.domain,
        judge_pairs=source.judge_pairs,
        generate=adaptation.generate,
        max_new_tokens=adaptation.max_new_tokens,
        batch_size=adaptation.batch_size,
        training=experiment.training,
        context=experiment.model.from_scratch.context if experiment.model.from_scratch else None,
        criterion=adaptation.criteria.get(domain),
    )


def judge_of(experiment: Experiment, domain: str) -> JudgeKind | None:
    """The judge of a domain's answers: the one that the config selects, otherwise the first default that applies."""
    if named := experiment.evaluation.adaptation.judge:
        return find_judge(named)
    return next((kind for kind in JUDGES if kind.is_default(case_of(experiment, domain, kind))), None)


def contradictions(experiment: Experiment, domains: list[str]) -> list[str]:
    """The problems that prevent judges from judging, one sentence each.

    Args:
        experiment: the config.
        domains: the domains whose source exists.
    """
    by_source = sorted(domains, key=lambda domain: experiment.domains[domain].source)
    found = [
        problem
        for kind in JUDGES
        for domain in by_source
        for problem in kind.contradictions(case_of(experiment, domain, kind))
    ]
    return list(dict.fromkeys(found))


def judge_training(experiment: Experiment, domain: str) -> OptimizerSettings:
    """The training settings of a domain's judge: its own section, otherwise those of the adapters.

    Raises:
        ValueError: the domain's judge needs no training.
    """
    kind = judge_of(experiment, domain)
    if kind is None or kind.training is None:
        raise ValueError(f"The judge of {domain} needs no training.")
    settings: OptimizerSettings | None = case_of(experiment, domain, kind).settings
    return settings or experiment.training


def judged_rows(experiment: Experiment) -> int:
    """Number of policies whose answers an experiment judges; the base is not compared with itself."""
    return len(experiment.domains) * len(experiment.methods.run) * len(experiment.seeds)


def plan_judges(experiment: Experiment, rows: int) -> list[str]:
    """Lines on the judge of each domain's answers, and its cost.

    Args:
        experiment: the config.
        rows: policies whose answers the whole run judges.

    Raises:
        QAdapterError: a judge that cannot work: no address, no key in the environment, no criterion for a domain, or
            an estimate above the budget.
    """
    kinds = {domain: judge_of(experiment, domain) for domain in experiment.domains}
    lines, prices = [], []
    for kind in dict.fromkeys(kinds.values()):
        domains = [domain for domain in kinds if kinds[domain] is kind]
        lines.append(f"{kind.name if kind else NO_JUDGE}: {', '.join(domains)}")
        if kind is None:
            lines[-1] += " (the report shows the answers; nothing compares them)"
        else:
            prices += kind.plan([case_of(experiment, domain, kind) for domain in domains], rows)
    return lines + prices
