"""Answers side by side, as examples for the numbers. Their text comes from models and is never trusted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qadapter.files.shown import visible
from qadapter.report.items import read_lines
from qadapter.report.rows import Row, kind, methods_of, ordered

SHOWN = 20


@dataclass(frozen=True)
class Answer:
    """One method's answer.

    Attributes:
        method: the method's name; `base` comes first.
        text: the answer.
        verdict: `win`, `tie`, `loss` or `undecided` against the base; empty for the base and without a judge.
    """

    method: str
    text: str
    verdict: str = ""


@dataclass(frozen=True)
class SideBySide:
    """One held-out prompt and each method's answer to it.

    Attributes:
        domain: the domain of the comparison.
        turns: (role, text) of the prompt's messages.
        answers: one per method.
    """

    domain: str
    turns: tuple[tuple[str, str], ...]
    answers: tuple[Answer, ...]


def side_by_side(rows: Sequence[Row], count: int = SHOWN) -> list[SideBySide]:
    """Select at most `count` prompts, equally many per domain if possible, with answers of each method's first seed.

    They are evenly spaced among the held-out prompts that every method answered, in file order, independent of the
    answers.
    """
    domains = ordered(row.domain for row in rows)
    shown = []
    for place, domain in enumerate(domains):
        answers = _answers_of(rows, domain)
        if not answers:
            continue
        common = [prompt for prompt in next(iter(answers.values())) if all(prompt in a for a in answers.values())]
        quota = count // len(domains) + (place < count % len(domains))
        taken = min(quota, len(common))
        for prompt in (common[i * len(common) // taken] for i in range(taken)):
            shown.append(_one(domain, {method: found[prompt] for method, found in answers.items()}))
    return shown


def answers_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Every held-out prompt with each method's answer (first seed) and its verdict against the base."""
    table = []
    for domain in ordered(row.domain for row in rows):
        answers = _answers_of(rows, domain)
        for prompt in dict.fromkeys(prompt for found in answers.values() for prompt in found):
            entry = _one(domain, {method: found[prompt] for method, found in answers.items() if prompt in found})
            line = {"domain": domain, "prompt": "\n\n".join(f"{role}: {text}" for role, text in entry.turns)}
            for answer in entry.answers:
                line[answer.method] = answer.text
                if kind(answer.method) != "base":
                    line[f"{answer.method}: verdict"] = answer.verdict
            table.append(line)
    return pd.DataFrame(table)


def _answers_of(rows: Sequence[Row], domain: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Method to its answers by prompt, of its first seed in a domain; methods without answers are left out."""
    here = [row for row in rows if row.domain == domain]
    first = {method: next(row for row in here if row.method == method) for method in methods_of(here)}
    found = {method: _answers(row) for method, row in first.items()}
    return {method: answers for method, answers in found.items() if answers}


def _answers(row: Row) -> dict[str, dict[str, Any]]:
    """The rows of `answers.jsonl` by prompt."""
    return {json.dumps(a["prompt"], sort_keys=True): a for a in read_lines(row.adaptation, "answers.jsonl")}


def _one(domain: str, answers: dict[str, dict[str, Any]]) -> SideBySide:
    some = next(iter(answers.values()))
    replies = [Answer(m, visible(a["reply"]), "" if kind(m) == "base" else _verdict(a)) for m, a in answers.items()]
    if "base" in some and not any(kind(method) == "base" for method in answers):
        replies.insert(0, Answer("base", visible(some["base"])))
    turns = tuple((visible(str(turn["role"])), visible(str(turn["content"]))) for turn in some["prompt"])
    return SideBySide(domain, turns, tuple(replies))


def _verdict(answer: dict[str, Any]) -> str:
    """The judge's verdict; empty if there was no judge."""
    return str(answer.get("verdict") or "") if answer.get("judge") != "none" else ""
