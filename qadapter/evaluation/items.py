"""Benchmark items: their identity, for two scores are comparable only on the same ones, and which score counts."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_KNOWN_BY = ("exact_match", "acc", "acc_norm", "prompt_level_strict_acc", "bits_per_byte")


def known_by(metrics: Iterable[str]) -> str | None:
    """The one metric that a task is known by, wherever one number or one item's score stands for it.

    A benchmark's file lists its metrics in any order: LAMBADA's has its perplexity before its accuracy.

    Args:
        metrics: a task's, `<metric>` or `<metric>.<filter>`.

    Returns:
        Exact match, accuracy and so on, in this order of preference; else the first one, None of none.
    """
    names = list(metrics)
    found = (name for wanted in _KNOWN_BY for name in names if name.split(".")[0] == wanted)
    return next(found, names[0] if names else None)


def owner(task: str, measured: Collection[str]) -> str:
    """The measured task or group with the longest name that a task's begins with; nothing if there is none."""
    return max((name for name in measured if task == name or task.startswith(f"{name}_")), key=len, default="")


def items_digests(items: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Each task's digest of its questions and right answers, independent of the given answers.

    Args:
        items: rows of `items.jsonl`, {task, doc_id, prompt, target, …}.
    """
    asked: dict[str, list[str]] = defaultdict(list)
    for item in items:
        known = [item.get("doc_id"), item.get("prompt"), item.get("target")]
        asked[item["task"]].append(json.dumps(known, default=str))
    return {task: hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest() for task, rows in asked.items()}
