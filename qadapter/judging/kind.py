"""What a judge is to the rest of the project: one record, which each judge's own file fills in.

This module and the judges' files know neither the table nor the whole schema, so that adding a judge changes no stage
key of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadapter.config.base import Settings
from qadapter.config.model import ModelSettings
from qadapter.config.training import OptimizerSettings
from qadapter.judging.verdicts import AnswerJudge


@dataclass(frozen=True)
class Case:
    """What a judge may know of an experiment: one domain whose answers are compared.

    Attributes:
        domain, source: names of the domain and of its source of preferences.
        asked: whether the config names this judge (and not only its section).
        settings: the judge's own section of `evaluation.adaptation`, validated; None where the config has none.
        toy_world: whether the data come from the toy world.
        style: the domain's style in the toy world; None for harmless.
        judge_pairs: preference pairs that the source sets apart for training a judge.
        generate: answers that are compared for each policy.
        max_new_tokens: the longest answer.
        batch_size: sequences per forward pass.
        training: how the domain's adapters are trained.
        context: tokens that a model from scratch holds; None for a pretrained model.
        criterion: what the config says is to be decided in this domain, as the end of "Decide …".
    """

    domain: str
    source: str
    asked: bool
    settings: Any
    toy_world: bool
    style: str | None
    judge_pairs: int
    generate: int
    max_new_tokens: int
    batch_size: int
    training: OptimizerSettings
    context: int | None
    criterion: str | None


@dataclass(frozen=True)
class Material:
    """What the stages before the evaluation made, for a judge that compares answers now.

    Attributes:
        world: folder of the toy world; None for other data.
        trained: folder that the judge's training wrote; None for a judge without training.
        base: folder or hub id of the domain's base model.
        model: the base's precision.
        cache: folder for files that all rows and runs share.
        rows: policies whose answers the whole run judges; they share a budget.
    """

    world: Path | None
    trained: Path | None
    base: str | Path
    model: ModelSettings
    cache: Path
    rows: int


def _never(_: Case) -> bool:
    return False


def _no_problem(_: Case) -> Iterable[str]:
    return ()


def _nothing(_: Case) -> dict[str, Any]:
    return {}


def _free_of_charge(_cases: Sequence[Case], _rows: int) -> list[str]:
    return []


@dataclass(frozen=True)
class JudgeKind:
    """One judge.

    Attributes:
        name: the word for `evaluation.adaptation.judge`.
        open: the judge itself, ready to compare answers.
        section: name of the judge's settings in `evaluation.adaptation`; None for a judge without settings.
        settings: the schema of that section.
        training: dotted name of a module whose `train_judge` trains the judge before the evaluation; None for a judge
            without training.
        is_default: whether the judge is taken where the config names none; the table's order decides between several.
        contradictions: what in the config keeps this judge from judging the case, one sentence per problem.
        plan: lines on the price for all cases and rows together; raises `QAdapterError` where the judge cannot work
            (no key, over budget). Nothing is called.
        cache_key: what of the settings a verdict depends on.
    """

    name: str
    open: Callable[[Case, Material], AnswerJudge]
    section: str | None = None
    settings: type[Settings] | None = None
    training: str | None = None
    is_default: Callable[[Case], bool] = _never
    contradictions: Callable[[Case], Iterable[str]] = _no_problem
    plan: Callable[[Sequence[Case], int], list[str]] = _free_of_charge
    cache_key: Callable[[Case], dict[str, Any]] = _nothing


def no_answers(case: Case, name: str) -> Iterable[str]:
    """The contradiction of a judge that is asked for where no answer is generated."""
    if case.asked and not case.generate:
        yield f"evaluation.adaptation.generate: 0 leaves evaluation.adaptation.judge {name!r} no answers to judge"
