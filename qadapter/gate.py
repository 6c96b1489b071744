"""The promotion gate: decides whether a candidate replaces the champion. Each decision lists its reasons.

Both policies were measured on the same held-out pairs and the same items of each retention task, so every comparison is
paired (`qadapter.evaluation.statistics`): each interval is that of the difference, item by item. With few items an
interval is meaningless (a single won pair has the interval [1, 1]), so each rule requires a minimum number of items.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from qadapter.config.base import NonNegative, Settings
from qadapter.config.budget import Budget
from qadapter.evaluation.curve.parts import selects
from qadapter.evaluation.curve.points import content_digest
from qadapter.evaluation.drift import MOVED, TRAITS, Trait
from qadapter.evaluation.speech import BROKEN, BROKEN_SHARE, SPEAKS, faults_of
from qadapter.evaluation.statistics import (
    LEVEL,
    RESAMPLES,
    Interval,
    mean_interval,
    mean_of_tasks_interval,
    paired_difference,
)
from qadapter.files.artifacts import Manifest, read_json, read_json_lines
from qadapter.inference.pair_scores import implied_margin, mean_margin, won

Floats = NDArray[np.float64]
MIN_ITEMS = 30
SAME_ANSWERS = 10
OVER_REFUSALS = "retention/over_refusals"


class _Rules(Settings):
    """Strict types: a string that looks like a number is refused."""

    model_config = ConfigDict(strict=True)


class AdaptationRule(_Rules):
    """The candidate must have learnt something.

    Attributes:
        metric: which accuracy on held-out pairs: by the log-ratio to the base (the base has one half), by the policy's
            own log-probability, or by that per token.
        min_gain: smallest accepted difference to the champion.
        beyond_noise: the interval of the difference must also lie above 0.
        min_items: minimum number of scored held-out pairs.
        allow_same_answers: whether a candidate may pass whose generated replies are all the base's, word for word
            (`SAME_ANSWERS` of them or more): it wins pairs, and its users would notice nothing.

    Where the champion is at the ceiling (a candidate that won every pair would not pass), the rule is instead that the
    candidate is not worse beyond noise.
    """

    metric: Literal["implied_reward_accuracy", "preference_accuracy", "preference_accuracy_length_normalised"] = (
        "implied_reward_accuracy"
    )
    min_gain: float = 0.0
    beyond_noise: bool = True
    min_items: Annotated[int, Field(ge=1)] = MIN_ITEMS
    allow_same_answers: Annotated[bool, Field(exclude_if=lambda allowed: not allowed)] = False


class RetentionRule(_Rules):
    """No retention task may drop; each task is tested separately.

    Attributes:
        max_drop: largest accepted drop below the champion. A task fails if the whole interval of its drop is above
            this: a drop that noise could explain does not count.
        max_drop_from_base: the same against the base, so that many small steps do not add up unseen; None: no rule.
        min_items: minimum number of items per task.
    """

    max_drop: NonNegative = 0.02
    max_drop_from_base: NonNegative | None = None
    min_items: Annotated[int, Field(ge=1)] = MIN_ITEMS


class Gate(_Rules):
    """All rules; a candidate must pass each.

    Attributes:
        adaptation, retention: see there.
        max_over_refusals: largest accepted share of refused harmless requests (`retention/over_refusals`); None: no
            rule.
        max_moved: largest accepted number of traits of the answers that moved from the base beyond noise
            (`drift/moved`); None: no rule.
        max_drift: trait → largest accepted drift from the base, in either direction and in the trait's own unit. A
            trait fails if the whole interval of its drift is beyond this.
        flipped_labels: what a delivery leads to whose labels look reversed to base and champion: the candidate is
            rejected, or the verdict only reports it.
        level: coverage of the intervals.
        resamples: bootstrap draws.
    """

    adaptation: AdaptationRule = AdaptationRule()
    retention: RetentionRule = RetentionRule()
    max_over_refusals: Annotated[float, Field(ge=0, le=1)] | None = None
    max_moved: Annotated[int, Field(ge=0)] | None = None
    max_drift: dict[Trait, NonNegative] = Field(default_factory=dict)
    flipped_labels: Annotated[Literal["reject", "report"], Field(exclude_if=lambda what: what == "reject")] = "reject"
    level: Annotated[float, Field(gt=0, lt=1)] = LEVEL
    resamples: Annotated[int, Field(ge=100)] = RESAMPLES


@dataclass(frozen=True)
class TaskItems:
    """A policy's items of one retention task.

    Attributes:
        items: [n] identities: position, prompt and right answer. Items of different benchmarks therefore differ.
        values: [n] scores.
        weights: [n], or None for a plain mean.
        higher_is_better: the score's direction.
    """

    items: tuple[Any, ...]
    values: Floats
    weights: Floats | None
    higher_is_better: bool

    @property
    def mean(self) -> float:
        """Weighted mean of the scores."""
        return float(np.average(self.values, weights=self.weights))


_NUMBERS_OF_A_PAIR = (
    *("chosen_log_prob", "rejected_log_prob", "base_chosen_log_prob", "base_rejected_log_prob"),
    *("chosen_tokens", "rejected_tokens"),
)


@dataclass(frozen=True)
class Measured:
    """The evaluation's results for one policy.

    Attributes:
        heldout: digest of the held-out pairs.
        pairs: [n] positions of the scored pairs in the held-out file.
        won: metric → [n], 1 where the chosen reply wins, one half for a tie, else 0.
        tasks: retention task → its items.
        metrics: every measured number by its full name.
        faults: what is wrong with the generated replies, with an example; empty where nothing is.
        changed: how many of the generated replies differ from the base's, and how many there are.
    """

    heldout: str
    pairs: tuple[int, ...]
    won: dict[str, Floats]
    tasks: dict[str, TaskItems]
    metrics: dict[str, float]
    faults: str = ""
    changed: tuple[int, int] = (0, 0)

    @classmethod
    def read(cls, adaptation: Path, retention: Path) -> Measured:
        """Read the folders that `measure_adaptation` and `measure_retention` wrote."""
        rows = read_json_lines(adaptation / "pairs.jsonl")
        column = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in _NUMBERS_OF_A_PAIR}
        chosen, rejected = column["chosen_log_prob"], column["rejected_log_prob"]
        per_token = mean_margin(chosen, rejected, column["chosen_tokens"], column["rejected_tokens"])
        margins = {
            "implied_reward_accuracy": implied_margin(
                chosen, rejected, column["base_chosen_log_prob"], column["base_rejected_log_prob"]
            ),
            "preference_accuracy": chosen - rejected,
            "preference_accuracy_length_normalised": per_token,
        }
        directions = read_json(retention / "directions.json")
        answers = adaptation / "answers.jsonl"
        replies = read_json_lines(answers) if answers.is_file() else []
        by_task: dict[str, list[dict[str, Any]]] = {}
        for item in read_json_lines(retention / "items.jsonl"):
            by_task.setdefault(item["task"], []).append(item)
        return cls(
            heldout=Manifest.read(adaptation).inputs["data"],
            pairs=tuple(int(row["pair"]) for row in rows),
            won={name: won(margin) for name, margin in margins.items()},
            tasks={task: _task_items(task, items, directions) for task, items in by_task.items()},
            metrics={**read_json(adaptation / "metrics.json"), **read_json(retention / "metrics.json")},
            faults=faults_of(adaptation),
            changed=(sum(row.get("reply") != row.get("base") for row in replies), len(replies)),
        )

    def reported(self, prompts: Sequence[str]) -> Measured:
        """Only the items that a dial was not chosen on (`qadapter.evaluation.curve.parts`).

        Args:
            prompts: digest of the prompt of each held-out pair, by its position in the held-out file.
        """
        pairs = np.array([not selects(prompts[pair]) for pair in self.pairs], dtype=bool)
        tasks = {}
        for name, task in self.tasks.items():
            kept = np.array([not selects(content_digest(name, *item)) for item in task.items], dtype=bool)
            tasks[name] = TaskItems(
                tuple(item for item, keep in zip(task.items, kept, strict=True) if keep),
                task.values[kept],
                None if task.weights is None else task.weights[kept],
                task.higher_is_better,
            )
        return replace(
            self,
            pairs=tuple(pair for pair, keep in zip(self.pairs, pairs, strict=True) if keep),
            won={metric: values[pairs] for metric, values in self.won.items()},
            tasks=tasks,
        )

    def on_the_pairs_of(self, other: Measured) -> bool:
        """Whether both scored the same pairs. Positions alone are not enough: any set of this size has the same."""
        return (self.heldout, self.pairs) == (other.heldout, other.pairs)


def _task_items(task: str, items: Sequence[dict[str, Any]], directions: dict[str, bool]) -> TaskItems:
    metric = next(iter(items[0]["scores"]))
    places = tuple((item["doc_id"], item.get("prompt"), item.get("target")) for item in items)
    higher = directions.get(f"retention/{task}/{metric}", True)
    if isinstance(items[0]["score"], list):  # lm-eval's (log-likelihood, bytes): bits per byte, weighted by bytes
        likelihood, size = np.array([item["score"] for item in items], dtype=np.float64).T
        return TaskItems(places, -likelihood / size / math.log(2), size, higher)
    return TaskItems(places, np.array([item["score"] for item in items], dtype=np.float64), None, higher)


@dataclass(frozen=True)
class Finding:
    """The result of one rule.

    Attributes:
        rule: its key in the config, with the task where it is about one.
        passed: whether the candidate satisfies the rule.
        text: a readable sentence with the numbers.
        interval: interval of the difference; None where nothing was compared.
    """

    rule: str
    passed: bool
    text: str
    interval: Interval | None = None


@dataclass(frozen=True)
class Decision:
    """Whether the candidate passed, and why (not).

    Attributes:
        findings: of each rule.
        notes: what else was measured that a reader of the verdict should know.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the candidate satisfies every rule."""
        return all(finding.passed for finding in self.findings)

    @property
    def reasons(self) -> list[str]:
        """The sentences of the failed rules (those of all rules where none failed), then the notes."""
        return [*(f.text for f in self.findings if self.passed or not f.passed), *self.notes]

    def metrics(self) -> dict[str, float]:
        """MLflow metrics: `gate/passed`, and the difference with its interval for each rule that compares."""
        values = {"gate/passed": float(self.passed)}
        for finding in self.findings:
            if finding.interval:
                interval = finding.interval
                values |= {
                    f"gate/{finding.rule}": interval.estimate,
                    f"gate/{finding.rule}/low": interval.low,
                    f"gate/{finding.rule}/high": interval.high,
                }
        return values


def decide(gate: Gate, candidate: Measured, champion: Measured, base: Measured, rival: str = "champion") -> Decision:
    """Apply every rule to a candidate, and refuse one that does not speak.

    Args:
        gate: the rules.
        candidate, champion, base: measured on the same pairs and items. For a first candidate the base is the champion.
        rival: what to call the champion in sentences.
    """
    findings = [*_speech(candidate), _adaptation(gate, candidate, champion, rival), *_same_answers(gate, candidate)]
    findings += _retention(gate, candidate, champion, "max_drop", gate.retention.max_drop, rival)
    if gate.retention.max_drop_from_base is not None:
        limit = gate.retention.max_drop_from_base
        findings += _retention(gate, candidate, base, "max_drop_from_base", limit, "base")
    if gate.max_over_refusals is not None:
        findings.append(_over_refusals(gate.max_over_refusals, candidate))
    findings += _drift(gate, candidate)
    return Decision(tuple(findings))


def what_the_dial_changes(as_trained: Decision, dialled: Decision) -> list[str]:
    """A sentence where the gate decides otherwise on a candidate at its dial than it would on the policy as trained."""
    if as_trained.passed == dialled.passed:
        return []
    what = "the dial saves it" if dialled.passed else "the dial costs it"
    verdict = "promoted" if as_trained.passed else "rejected"
    reasons = "; ".join(found.text for found in as_trained.findings if as_trained.passed or not found.passed)
    return [f"{what}: as trained (dial 1) it would have been {verdict}: {reasons}"]


def _adaptation(gate: Gate, candidate: Measured, champion: Measured, rival: str) -> Finding:
    rule, name = gate.adaptation, "adaptation.min_gain"
    if not candidate.on_the_pairs_of(champion):
        return Finding(name, False, f"adaptation: candidate and {rival} were scored on different held-out pairs")
    if len(candidate.pairs) < rule.min_items:
        return Finding(name, False, _too_few("held-out pairs", len(candidate.pairs), "adaptation", rule.min_items))
    interval = paired_difference(
        candidate.won[rule.metric], champion.won[rule.metric], level=gate.level, resamples=gate.resamples
    )
    wanted = f"wanted at least {rule.min_gain:+.3f}" + (" and beyond noise" if rule.beyond_noise else "")
    passed = _gained(rule, interval)
    before_all = champion.won[rule.metric]
    best = paired_difference(np.ones_like(before_all), before_all, level=gate.level, resamples=gate.resamples)
    if not _gained(rule, best):
        passed = interval.high >= 0
        wanted = (
            f"wanted not worse beyond noise, because the {rival} is at the ceiling: winning every pair would be no "
            f"gain of {rule.min_gain:+.3f}" + (" beyond noise" if rule.beyond_noise else "")
        )
    now, before = candidate.won[rule.metric].mean(), champion.won[rule.metric].mean()
    text = f"{rule.metric} {now:.3f} after {before:.3f} of the {rival}: {_shown(interval)}, {wanted}"
    return Finding(name, bool(passed), text, interval)


def _gained(rule: AdaptationRule, interval: Interval) -> bool:
    return interval.estimate >= rule.min_gain and (interval.low > 0 or not rule.beyond_noise)


def _retention(
    gate: Gate, candidate: Measured, reference: Measured, key: str, limit: float, rival: str
) -> Iterator[Finding]:
    if not reference.tasks:
        text = (
            f"no retention task was measured for the {rival}, so forgetting cannot be tested; list tasks in "
            "evaluation.retention.tasks, or benchmarks of your own in evaluation.retention.own"
        )
        yield Finding(f"retention.{key}", False, text)
    for task, before in reference.tasks.items():
        name = f"retention.{key}.{task}"
        now = candidate.tasks.get(task)
        if now is None or now.items != before.items:
            yield Finding(name, False, f"{task}: candidate and {rival} were not measured on the same items")
            continue
        if len(now.items) < gate.retention.min_items:
            yield Finding(name, False, _too_few(task, len(now.items), "retention", gate.retention.min_items))
            continue
        worse, better = (before, now) if before.higher_is_better else (now, before)
        drop = paired_difference(
            worse.values, better.values, weights=before.weights, level=gate.level, resamples=gate.resamples
        )
        values = f"{now.mean:.3f} after {before.mean:.3f} of the {rival}"
        text = f"{task} {values}: {_change(drop)}, {_against(limit, drop)}"
        yield Finding(name, drop.low <= limit, text, drop)


def _change(drop: Interval) -> str:
    """A drop in words, so that no sign has to be read: `worse by 0.050 [0.020, 0.080]`, `better by 0.010 [0, 0.03]`."""
    word, ends = "the same,", (drop.estimate, drop.low, drop.high)
    if drop.estimate:
        word = "worse by" if drop.estimate > 0 else "better by"
    if drop.estimate < 0:
        ends = (-drop.estimate, -drop.high, -drop.low)
    size, low, high = (round(value, 3) + 0.0 for value in ends)  # + 0.0: never -0.000
    return f"{word} {size:.3f} [{low:.3f}, {high:.3f}]"


def _against(limit: float, drop: Interval) -> str:
    """How a drop compares with what is allowed, so that a drop that passed reads as one."""
    if drop.low > limit:
        return f"allowed {limit:.3f}: all of the interval is above it"
    if drop.estimate > limit:
        return f"allowed {limit:.3f}: passed, because the interval reaches down to what is allowed; it may be noise"
    return f"allowed {limit:.3f}"


def _speech(candidate: Measured) -> Iterator[Finding]:
    """Reject a policy whose replies are broken, at any accuracy on pairs; yields nothing where none were generated."""
    if SPEAKS not in candidate.metrics:
        return
    if candidate.metrics[SPEAKS] > 0:
        share = candidate.metrics.get(BROKEN, 0.0)
        text = f"answers in language: {100 * share:.0f} % of its replies are broken"
        if share >= BROKEN_SHARE:
            text = f"answers no worse than its base: {100 * share:.0f} % of its replies are broken, as are its base's"
        changed, count = candidate.changed
        if count:
            text += f"; {changed} of {count} differ from its base's"
        yield Finding("speech", True, text)
    else:
        yield Finding("speech", False, f"does not speak: {candidate.faults or 'most of its replies are broken'}")


def _same_answers(gate: Gate, candidate: Measured) -> Iterator[Finding]:
    """Reject a policy that answers as its base does; yields nothing where it does not, or too few replies say so."""
    changed, count = candidate.changed
    if count >= SAME_ANSWERS and not changed:
        allowed = gate.adaptation.allow_same_answers
        text = f"its {count} answers are all the base's, word for word, so that its users would notice nothing" + (
            ", which gate.adaptation.allow_same_answers accepts"
            if allowed
            else "; train longer, or set gate.adaptation.allow_same_answers"
        )
        yield Finding("adaptation.allow_same_answers", allowed, text)


def _drift(gate: Gate, candidate: Measured) -> Iterator[Finding]:
    if gate.max_moved is not None:
        moved = candidate.metrics.get(MOVED)
        if moved is None:
            yield Finding("max_moved", False, _not_measured("drift", MOVED, f"gate.max_moved is {gate.max_moved}"))
        else:
            text = f"{moved:.0f} traits of the answers moved from the base beyond noise, allowed {gate.max_moved}"
            yield Finding("max_moved", moved <= gate.max_moved, text)
    for trait, limit in gate.max_drift.items():
        name = f"drift/{trait}"
        if name not in candidate.metrics:
            text = _not_measured("drift", name, f"gate.max_drift.{trait} is {limit}")
            yield Finding(f"max_drift.{trait}", False, text)
            continue
        value, low, high = (candidate.metrics[key] for key in (name, f"{name}/low", f"{name}/high"))
        text = f"{TRAITS[trait]} {value:+.3f} [{low:+.3f}, {high:+.3f}] from the base, allowed ±{limit:.3f}"
        yield Finding(f"max_drift.{trait}", low <= limit and high >= -limit, text)


def _not_measured(what: str, metric: str, rule: str) -> str:
    return (
        f"{what} was not measured ({metric} is missing), but {rule}; measure it (evaluation.retention.answers with "
        "helpful_sft) or remove the rule"
    )


def _over_refusals(limit: float, candidate: Measured) -> Finding:
    name = "max_over_refusals"
    value = candidate.metrics.get(OVER_REFUSALS)
    if value is None:
        return Finding(
            name,
            False,
            f"over-refusal was not measured ({OVER_REFUSALS} is missing), but gate.max_over_refusals is {limit}; "
            "measure it (evaluation.retention.answers with helpful_sft, or a toy world) or set the rule to null",
        )
    return Finding(name, value <= limit, f"over-refusals {value:.3f}, allowed {limit:.3f}")


def fallen(then: Measured, now: Measured, gate: Gate) -> list[str]:
    """List what a policy does worse than at its registration, beyond noise: one sentence per metric.

    Paired where the pairs or items are still the same ones; otherwise (new held-out data) the two intervals must not
    overlap. A metric that is no longer measured, or has too few items, is listed as well: a drop would go unnoticed.
    `max_over_refusals` is a limit, not a comparison: it holds for what is measured now.
    """
    metric = gate.adaptation.metric
    options: dict[str, Any] = {"level": gate.level, "resamples": gate.resamples}
    found = []
    compared: dict[str, tuple[TaskItems, TaskItems, bool]] = {}
    if len(now.pairs) < gate.adaptation.min_items:
        found.append(_too_few("held-out pairs", len(now.pairs), "adaptation", gate.adaptation.min_items))
    else:
        pairs = [TaskItems(policy.pairs, policy.won[metric], None, True) for policy in (then, now)]
        compared[metric] = (pairs[0], pairs[1], now.on_the_pairs_of(then))
    for task, before in then.tasks.items():
        after = now.tasks.get(task)
        if after is None:
            found.append(f"{task} was measured at registration but is not measured now; add it to the profile again")
        elif len(after.items) < gate.retention.min_items:
            found.append(_too_few(task, len(after.items), "retention", gate.retention.min_items))
        else:
            compared[task] = (before, after, before.items == after.items)
    for name, (before, after, paired) in compared.items():
        sign = 1 if before.higher_is_better else -1
        if paired:
            drop = paired_difference(sign * before.values, sign * after.values, weights=before.weights, **options)
            fell, shown = drop.low > 0, _shown(drop)
        else:
            old = mean_interval(sign * before.values, weights=before.weights, **options)
            new = mean_interval(sign * after.values, weights=after.weights, **options)
            fell, shown = new.high < old.low, f"{old.estimate - new.estimate:+.3f} on other items"
        if fell:
            found.append(f"{name} fell by {shown}")
    found += [finding.text for finding in _speech(now) if not finding.passed]
    if gate.max_over_refusals is not None and not (finding := _over_refusals(gate.max_over_refusals, now)).passed:
        found.append(finding.text)
    return found


def beyond_budget(now: Measured, base: Measured, budget: Budget, gate: Gate) -> list[str]:
    """List by how much a policy forgot more than a budget allows, beyond noise: one sentence per limit.

    Over-refusals are a share that is measured, not compared: any excess counts.

    Args:
        now, base: measured on the same retention items.
        budget: how much may be forgotten.
        gate: level and draws of the intervals.
    """
    options: dict[str, Any] = {"level": gate.level, "resamples": gate.resamples}
    lost: dict[str, Floats] = {}
    for task, before in base.tasks.items():
        after = now.tasks.get(task)
        if before.higher_is_better and after is not None and after.items == before.items and len(before.items):
            lost[task] = before.values - after.values
    found = []
    if lost:
        mean = mean_of_tasks_interval(list(lost.values()), **options)
        if mean.low > budget.max_forgetting:
            found.append(f"forgetting {_shown(mean)} is beyond the budget of {budget.max_forgetting:g}")
    for task, values in lost.items():
        drop = mean_interval(values, **options)
        if budget.per_task is not None and drop.low > budget.per_task:
            found.append(
                f"{task} fell below the base by {_shown(drop)}, beyond the budget of {budget.per_task:g} per task"
            )
    refused = now.metrics.get(OVER_REFUSALS)
    if budget.max_over_refusals is not None and refused is not None and refused > budget.max_over_refusals:
        found.append(f"over-refusals {refused:.3f} are beyond the budget of {budget.max_over_refusals:g}")
    return found


def _too_few(what: str, items: int, rule: str, least: int) -> str:
    return (
        f"{what}: only {items}, too few to decide; at least {least} are required "
        f"(gate.{rule}.min_items). Measure more, or lower that number"
    )


def _shown(interval: Interval) -> str:
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
