"""Measure a policy on several preferences and on its base's abilities, and choose the weights of several adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qadapter.config.budget import Budget
from qadapter.config.evaluation import AdaptationSettings, RetentionSettings
from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.evaluation.curve.measure import kept_items
from qadapter.evaluation.curve.parts import FEWEST
from qadapter.evaluation.curve.points import Measure
from qadapter.evaluation.lm_eval.catalog import expand_suites
from qadapter.evaluation.lm_eval.harness import opened_tasks
from qadapter.evaluation.lm_eval.model import PolicyLM
from qadapter.evaluation.preference import distinct_prompts, score_pairs
from qadapter.evaluation.prompts import prompt_names
from qadapter.evaluation.sequence.outcome import Outcome
from qadapter.files.artifacts import write_json
from qadapter.inference.generate import generate_replies
from qadapter.inference.pair_scores import mean_margin, won
from qadapter.policy.loading import load_base, load_policy
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.preferences.pair import load_pairs
from qadapter.toyworld.rules import follows_rule
from qadapter.toyworld.world import ToyWorld

CHOICE = "choice.json"


@dataclass(frozen=True)
class HeldOut:
    """What a preference is measured on.

    Attributes:
        file: prepared pairs.
        style: in the toy world: the domain's style; None for harmless.
    """

    file: Path
    style: str | None = None


@dataclass(frozen=True)
class Ruler:
    """How a policy is measured.

    Attributes:
        heldout: domain → its held-out pairs, in the order in which the preferences arrived.
        adaptation, retention: of the experiment.
        max_length: tokens, as in training.
        world: folder of the toy world the data is from; None for real data.
        benchmarks: folder with `benchmarks/` for the project's own tasks.
        official_data, own: as in `qadapter.evaluation.measure.measure_retention`.
    """

    heldout: Mapping[str, HeldOut]
    adaptation: AdaptationSettings
    retention: RetentionSettings
    max_length: int
    world: Path | None
    benchmarks: Path | None
    official_data: Path | None = None
    own: Mapping[str, Path] | None = None


class Measuring:
    """Measures policies on one base; the benchmarks are loaded once."""

    def __init__(self, ruler: Ruler, tokenizer: PreTrainedTokenizerBase) -> None:
        self._ruler, self._tokenizer = ruler, tokenizer
        self._stack = ExitStack()
        named, _ = expand_suites(ruler.retention.tasks)
        self._tasks = [*named, *(ruler.own or {})]

    def __enter__(self) -> Measuring:
        ruler = self._ruler
        self._score = self._stack.enter_context(
            opened_tasks(
                self._tokenizer,
                ruler.retention.tasks,
                own=ruler.own,
                data=ruler.benchmarks,
                official_data=ruler.official_data,
                limit=ruler.retention.limit,
                limits=ruler.retention.limits,
                plain_tasks=ruler.retention.plain_tasks,
                max_gen_toks=ruler.retention.max_new_tokens,
            )
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def __call__(self, policy: Any) -> Outcome:
        """Measure one policy."""
        learnt = {name: self._learnt(policy, one) for name, one in self._ruler.heldout.items()}
        batch_size = self._ruler.retention.batch_size
        scores = self._score(
            lambda chat: PolicyLM(policy, tokenizer=self._tokenizer, batch_size=batch_size, apply_chat_template=chat)
        )
        return Outcome(learnt, kept_items(scores, self._tasks))

    def _learnt(self, policy: Any, heldout: HeldOut) -> Measure:
        """The toy world's rule on answers; elsewhere pairs won by the mean log-probability per token."""
        settings, pairs = self._ruler.adaptation, load_pairs(heldout.file)
        if self._ruler.world is None:
            scores = score_pairs(
                policy,
                self._tokenizer,
                pairs,
                max_length=self._ruler.max_length,
                batch_size=settings.batch_size,
            )
            margins = mean_margin(scores.chosen, scores.rejected, scores.chosen_tokens, scores.rejected_tokens)
            names = prompt_names([pair.prompt for pair in pairs])
            return Measure(tuple(names[place] for place in scores.indices), tuple(won(margins).tolist()))
        prompts = distinct_prompts(pairs)
        replies = generate_replies(
            policy,
            self._tokenizer,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
        )
        hits = follows_rule(ToyWorld.read(self._ruler.world), heldout.style, prompts, replies)
        return Measure(tuple(prompt_names(prompts)), tuple(map(float, hits)))


def measure_outcome(base: str | Path, adapter: Path | None, *, model: ModelSettings, ruler: Ruler, out: Path) -> None:
    """Measure one policy.

    Args:
        base: folder or hub id of the base model.
        adapter: the adapter's folder; None for the base itself.
        model: of the experiment.
        ruler: what is measured.
        out: gets `outcome.json` (`Outcome`) and `metrics.json` (`sequence/<domain>` and `sequence/retention`).
    """
    network, tokenizer = load_base(base, model)
    with Measuring(ruler, tokenizer) as measuring:
        found = measuring(load_policy(network, adapter))
    found.write(out)
    learnt = {f"sequence/{name}": measure.mean for name, measure in found.learnt.items()}
    write_json(out / "metrics.json", {**learnt, "sequence/retention": found.retention})


@dataclass(frozen=True)
class Tried:
    """One combination of weights, measured on the items that it may be chosen on.

    Attributes:
        weights: of each adapter, in the order in which the preferences arrived.
        adaptation: mean over the domains.
        forgetting: the base's retention minus this one's, mean over the tasks.
        worst: largest forgetting of a single task.
    """

    weights: tuple[float, ...]
    adaptation: float
    forgetting: float
    worst: float

    def within(self, budget: Budget) -> bool:
        """Whether it satisfies a budget."""
        rounded = 1e-12
        return self.forgetting <= budget.max_forgetting + rounded and (
            budget.per_task is None or self.worst <= budget.per_task + rounded
        )


def candidates(before: Sequence[float], weights: Sequence[float], factors: Sequence[float]) -> list[tuple[float, ...]]:
    """What is tried for the weights of all adapters once one more has come.

    Args:
        before: weights of the earlier adapters, as they were chosen.
        weights: of the new adapter.
        factors: on all earlier ones.

    Returns:
        Distinct combinations, the one first that leaves the policy as it was: the new adapter's weight 0.
    """
    earlier = [tuple(factor * weight for weight in before) for factor in (factors if any(before) else (1.0,))]
    found = [(*before, 0.0), *((*one, weight) for one, weight in product(earlier, weights))]
    return list(dict.fromkeys(found))


def best_of(tried: Sequence[Tried], budget: Budget) -> Tried:
    """The combination that has learnt most within a budget.

    Among equals the one that forgot less is taken, then the one with the smaller weights. The policy as it was is
    always allowed: it satisfied the budget before.
    """
    within = [one for one in tried if one.within(budget)] or [tried[0]]
    return max(within, key=lambda one: (round(one.adaptation, 12), -round(one.forgetting, 12), -sum(one.weights)))


def choose_weights(
    base: str | Path,
    adapters: Sequence[Path],
    *,
    model: ModelSettings,
    ruler: Ruler,
    before: Sequence[float],
    budget: Budget,
    weights: Sequence[float],
    factors: Sequence[float],
    of_base: Outcome,
    out: Path,
) -> None:
    """Compose adapters with the weights that learn most within a budget, and write the policy.

    Args:
        base: folder or hub id of the base model.
        adapters: of each preference, in the order in which they arrived.
        model: of the experiment.
        ruler: what is measured.
        before: weights of all but the last, as they were chosen one step earlier.
        budget: how much may be forgotten, on the selection part of the items.
        weights, factors: as in `candidates`.
        of_base: the base's own measurement.
        out: gets `adapter/` (all adapters and their weights) and `choice.json`.

    Raises:
        QAdapterError: adapters that cannot be composed, or too few items to choose on.
    """
    network, tokenizer = load_base(base, model)
    policy = QAdapterForCausalLM.from_pretrained(adapters[0], base_model=network).eval()
    names = [next(iter(policy.adapter_weights)), *(f"step-{step}" for step in range(2, len(adapters) + 1))]
    for folder, name in zip(adapters[1:], names[1:], strict=True):
        policy.attach(folder, name)
    start, tried = of_base.part(selection=True), []
    _refuse_few(start)
    with Measuring(ruler, tokenizer) as measuring:
        for combination in candidates(before, weights, factors):
            policy.set_adapter_weights(dict(zip(names, combination, strict=True)))
            tried.append(_tried(combination, measuring(policy).part(selection=True), start))
    chosen = best_of(tried, budget)
    policy.set_adapter_weights(dict(zip(names, chosen.weights, strict=True)))
    policy.save_pretrained(out / "adapter")
    write_json(out / CHOICE, {"weights": chosen.weights, "tried": [vars(one) for one in tried]})
    write_json(
        out / "metrics.json",
        {
            **{f"compose/weight_{step}": weight for step, weight in enumerate(chosen.weights, start=1)},
            "compose/adaptation": chosen.adaptation,
            "compose/forgetting": chosen.forgetting,
            "compose/tried": float(len(tried)),
        },
    )


def _refuse_few(part: Outcome) -> None:
    for name, measure in {**part.learnt, **part.kept}.items():
        if (items := len(set(measure.ids))) < FEWEST:  # pairs of one prompt are one item
            raise QAdapterError(
                f"Only {items} items of {name} are in the half that weights are chosen on, and at least "
                f"{FEWEST} are needed. Hold out more pairs, give benchmarks with more items, or leave out `composed`."
            )


def _tried(weights: tuple[float, ...], found: Outcome, start: Outcome) -> Tried:
    lost = [start.kept[name].mean - found.kept[name].mean for name in start.averaged]
    return Tried(weights, found.adaptation, sum(lost) / len(lost), max(lost))
