"""A mapping for records in no known layout, guessed from the names of their fields: to show, never to use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from qadapter.preferences.mapping import field_paths

_PROMPTS = ("prompt", "question", "instruction", "query", "input", "user_input", "context", "scenario", "title", "text")
_BETTER = re.compile(r"(^|_)(chosen|better|preferred|best|winner|pos|positive|good|accepted|win)(_|$)")
_WORSE = re.compile(r"(^|_)(rejected|worse|dispreferred|worst|loser|neg|negative|bad|lose)(_|$)")
_LABELS = re.compile(r"(^|_)(label|labels|winner|preference|preferred|choice|vote|better|selected|answer_id|rank)(_|$)")
_NUMBERED = re.compile(r"(.*?)[_ -]?([01234]|[abAB]|left|right)")


def proposal(records: Sequence[Any]) -> str | None:
    """Propose the `fields` of a config, as YAML on one line; None if the names do not suggest any.

    Args:
        records: the first ones of a source.
    """
    paths = [path for record in records[:20] for path in field_paths(record).items()]
    kinds: dict[str, Any] = {}
    for name, value in paths:
        if kinds.get(name) is None:
            kinds[name] = value
    texts = [name for name, value in kinds.items() if isinstance(value, str | list)]
    prompt = next((name for wanted in _PROMPTS for name in texts if _last(name) == wanted), None)
    start = [f"prompt: {_quoted(prompt)}"] if prompt else []
    others = [name for name in texts if name != prompt]
    better = next((name for name in others if _BETTER.search(_last(name))), None)
    worse = next((name for name in others if _WORSE.search(_last(name))), None)
    if better and worse:
        return "{" + ", ".join([*start, f"chosen: {_quoted(better)}", f"rejected: {_quoted(worse)}"]) + "}"
    for names, labels in _numbered(others):
        judge = next((name for name in kinds if _LABELS.search(_last(name)) and name not in names), None)
        if judge is not None:
            pairs = ", ".join(f"{label!r}: {_quoted(name)}" for label, name in zip(labels, names, strict=True))
            return "{" + ", ".join([*start, f"responses: {{{pairs}}}", f"preferred: {_quoted(judge)}"]) + "}"
    for name, value in kinds.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = value[0]
            reply = next((key for key in ("response", "completion", "answer", "text", "content") if key in inner), None)
            rank = next((key for key in inner if re.search("score|rating|rank|reward", str(key))), None)
            if reply and rank:
                best = ", best: lowest" if "rank" in rank else ""
                path = f"{name}[*].[{_inner(reply)}, {_inner(rank)}]"
                return "{" + ", ".join([*start, f"candidates: '{path}'"]) + best + "}"
    return None


def _numbered(names: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Groups of fields whose names differ in a number or letter: response_a, response_b."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            groups.setdefault(match.group(1), []).append((name, match.group(2)))
    for found in groups.values():
        if len(found) > 1:
            yield [name for name, _ in found], [label for _, label in found]


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1].strip('"').lower()


def _inner(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_]\w*", name) else f'"{name}"'


def _quoted(path: str) -> str:
    return path if re.fullmatch(r"[A-Za-z_][\w.]*", path) else f"'{path}'"
