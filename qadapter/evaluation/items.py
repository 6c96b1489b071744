"""The identity of benchmark items: two scores are comparable only on the same items."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any


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
