"""What a registered champion does worse than it did, or worse than its budget allows."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from qadapter.config.budget import Budget
from qadapter.evaluation.items import owner
from qadapter.evaluation.statistics import mean_interval, mean_of_tasks_interval, paired_difference
from qadapter.gate.decision import HELD_OUT, OVER_REFUSALS, over_refusals, speech, too_few
from qadapter.gate.measured import Floats, Measured, TaskItems
from qadapter.gate.rules import Gate


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
    prompts = now.by_prompt(metric, then)
    if len(prompts.items) < gate.adaptation.min_items:
        found.append(too_few(HELD_OUT, len(prompts.items), "adaptation", gate.adaptation.min_items))
    else:
        compared[metric] = (then.by_prompt(metric, now), prompts, now.on_the_pairs_of(then))
    for task, before in then.tasks.items():
        after = now.tasks.get(task)
        if after is None:
            found.append(f"{task} was measured at registration but is not measured now; add it to the profile again")
        elif len(after.items) < gate.retention.min_items:
            found.append(too_few(task, len(after.items), "retention", gate.retention.min_items))
        else:
            compared[task] = (before, after, before.items == after.items)
    for name, (before, after, paired) in compared.items():
        sign = 1 if before.higher_is_better else -1
        if paired:
            drop = paired_difference(sign * before.values, sign * after.values, weights=before.weights, **options)
            fell, shown = drop.low > 0, drop.as_difference()
        else:
            old = mean_interval(sign * before.values, weights=before.weights, **options)
            new = mean_interval(sign * after.values, weights=after.weights, **options)
            fell, shown = new.high < old.low, f"{old.estimate - new.estimate:+.3f} on other items"
        if fell:
            found.append(f"{name} fell by {shown}")
    found += [finding.text for finding in speech(now) if not finding.passed]
    if gate.max_over_refusals is not None and not (finding := over_refusals(gate.max_over_refusals, now)).passed:
        found.append(finding.text)
    return found


def beyond_budget(now: Measured, base: Measured, budget: Budget, gate: Gate) -> list[str]:
    """List by how much a policy forgot more than a budget allows, beyond noise: one sentence per limit.

    A group of benchmarks is one task, as where a dial is chosen within the budget. Over-refusals are a share that is
    measured, not compared: any excess counts.

    Args:
        now, base: measured on the same retention items.
        budget: how much may be forgotten.
        gate: level and draws of the intervals.
    """
    options: dict[str, Any] = {"level": gate.level, "resamples": gate.resamples}
    headlines = {name.split("/")[1] for name in base.metrics if name.startswith("forgetting/") and name.count("/") == 2}
    parts: dict[str, list[Floats]] = defaultdict(list)
    for task, before in base.tasks.items():
        after = now.tasks.get(task)
        if before.higher_is_better and after is not None and after.items == before.items and len(before.items):
            parts[owner(task, headlines) or task].append(before.values - after.values)
    lost = {task: np.concatenate(values) for task, values in parts.items()}
    found = []
    if lost:
        mean = mean_of_tasks_interval(list(lost.values()), **options)
        if mean.low > budget.max_forgetting:
            found.append(f"forgetting {mean.as_difference()} is beyond the budget of {budget.max_forgetting:g}")
    for task, values in lost.items():
        drop = mean_interval(values, **options)
        if budget.per_task is not None and drop.low > budget.per_task:
            found.append(
                f"{task} fell below the base by {drop.as_difference()}, "
                f"beyond the budget of {budget.per_task:g} per task"
            )
    refused = now.metrics.get(OVER_REFUSALS)
    if budget.max_over_refusals is not None and refused is not None and refused > budget.max_over_refusals:
        found.append(f"over-refusals {refused:.3f} are beyond the budget of {budget.max_over_refusals:g}")
    return found
