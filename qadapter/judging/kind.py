"""The record that describes a judge to the rest of the project; each judge's file creates one.

This module and the judges' files import neither the table nor the whole schema, so that adding a judge changes no stage
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
    """One domain of an experiment whose answers are compared, as a judge sees it.

    Attributes:
        domain, source: names of the domain and of its source of preferences.
        asked: whether the config selects this judge (and not only has its section).
        settings: the judge's validated section of `evaluation.adaptation`; None if the config has none.
        toy_world: whether the data come from the toy world.
        style: the domain's style in the toy world; None for harmless.
        judge_pairs: number of preference pairs that the source sets aside for training a judge.
        generate: number of compared answers per policy.
        max_new_tokens: longest answer in tokens.
        batch_size: sequences per forward pass.
        training: training settings of the domain's adapters.
        context: context of a model from scratch in tokens; None for a pretrained model.
        criterion: the config's criterion for this domain, as the end of "Decide …".
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
    """The outputs of earlier stages for a judge.

    Attributes:
        world: folder of the toy world; None for other data.
        trained: folder that the judge's training wrote; None for a judge without training.
        base: folder or hub id of the domain's base model.
        model: the base's precision.
        cache: folder for files that all rows and runs share.
        rows: number of policies whose answers the whole run judges; they share a budget.
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
    """A judge.

    Attributes:
        name: the value of `evaluation.adaptation.judge`.
        open: creates the judge, ready to compare answers.
        section: name of the judge's settings in `evaluation.adaptation`; None for a judge without settings.
        settings: the schema of that section.
        training: dotted name of a module whose `train_judge` trains the judge before the evaluation; None for a judge
            without training.
        is_default: whether the judge is used if the config selects none; the first such judge of the table is taken.
        contradictions: problems in the config that prevent this judge from judging, one sentence each.
        plan: lines on the price for all cases and rows together. It makes no call, and raises `QAdapterError` if the
            judge cannot work (no key, over budget).
        cache_key: the settings that a verdict depends on.
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
    """The contradiction of a judge that is selected although no answers are generated."""
    if case.asked and not case.generate:
        yield f"evaluation.adaptation.generate: 0 leaves evaluation.adaptation.judge {name!r} no answers to judge"
