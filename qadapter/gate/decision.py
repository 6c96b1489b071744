"""The promotion gate: decides whether a candidate replaces the champion. Each decision lists its reasons.

Both policies were measured on the same held-out pairs and the same items of each retention task, so every comparison is
paired (`qadapter.evaluation.statistics`): each interval is that of the difference, item by item. Pairs of one prompt
are one item. With few items an interval is meaningless (a single won pair has the interval [1, 1]), so each rule
requires a minimum number of items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qadapter.evaluation.drift import MOVED, TRAITS
from qadapter.evaluation.speech import BROKEN, BROKEN_SHARE, SPEAKS
from qadapter.evaluation.statistics import Interval, paired_difference, signed
from qadapter.gate.measured import Measured
from qadapter.gate.rules import SAME_ANSWERS, AdaptationRule, Gate

OVER_REFUSALS = "retention/over_refusals"
HELD_OUT = "prompts of held-out pairs"


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
    findings = [*speech(candidate), _adaptation(gate, candidate, champion, rival), *_same_answers(gate, candidate)]
    findings += _retention(gate, candidate, champion, "max_drop", gate.retention.max_drop, rival)
    if gate.retention.max_drop_from_base is not None:
        limit = gate.retention.max_drop_from_base
        findings += _retention(gate, candidate, base, "max_drop_from_base", limit, "base")
    if gate.max_over_refusals is not None:
        findings.append(over_refusals(gate.max_over_refusals, candidate))
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
    ours, theirs = candidate.by_prompt(rule.metric, champion), champion.by_prompt(rule.metric, candidate)
    if len(ours.items) < rule.min_items:
        return Finding(name, False, too_few(HELD_OUT, len(ours.items), "adaptation", rule.min_items))
    options: dict[str, Any] = {"weights": theirs.weights, "level": gate.level, "resamples": gate.resamples}
    interval = paired_difference(ours.values, theirs.values, **options)
    wanted = f"wanted at least {rule.min_gain:+.3f}" + (" and beyond noise" if rule.beyond_noise else "")
    passed = _gained(rule, interval)
    best = paired_difference(np.ones_like(theirs.values), theirs.values, **options)
    if not _gained(rule, best):
        passed = interval.high >= 0
        wanted = (
            f"wanted not worse beyond noise, because the {rival} is at the ceiling: winning every pair would be no "
            f"gain of {rule.min_gain:+.3f}" + (" beyond noise" if rule.beyond_noise else "")
        )
    text = f"{rule.metric} {ours.mean:.3f} after {theirs.mean:.3f} of the {rival}: {interval.as_difference()}, {wanted}"
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
            yield Finding(name, False, too_few(task, len(now.items), "retention", gate.retention.min_items))
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


def speech(candidate: Measured) -> Iterator[Finding]:
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
        text = f"{TRAITS[trait]} {signed(value)} [{signed(low)}, {signed(high)}] from the base, allowed ±{limit:.3f}"
        yield Finding(f"max_drift.{trait}", low <= limit and high >= -limit, text)


def _not_measured(what: str, metric: str, rule: str) -> str:
    return (
        f"{what} was not measured ({metric} is missing), but {rule}; measure it (evaluation.retention.answers with "
        "helpful_sft) or remove the rule"
    )


def over_refusals(limit: float, candidate: Measured) -> Finding:
    """Whether few enough harmless requests are refused; a limit, not a comparison."""
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


def too_few(what: str, items: int, rule: str, least: int) -> str:
    """A sentence that refuses to decide on so few items."""
    return (
        f"{what}: only {items}, too few to decide; at least {least} are required "
        f"(gate.{rule}.min_items). Measure more, or lower that number"
    )
