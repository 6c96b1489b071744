"""The report as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

import pandas as pd

from qadapter.report.answers import SideBySide
from qadapter.report.tables import Cell, Table

_LONGEST = 600  # characters of an answer; the whole ones are in the HTML report and in answers.jsonl


def plain(text: str) -> str:
    """Untrusted text on one line that Markdown, and HTML within it, shows as it is."""
    line = " ⏎ ".join(part.strip() for part in text.strip().splitlines())
    return re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", html.escape(line, quote=False))


def table(content: Table) -> str:
    """A table; the best of a column is bold, a difference larger than its noise has a star."""
    rows: list[list[str]] = []
    for heading, part in content.parts:
        rows += [[f"*{heading}*", *("" for _ in content.columns)]] if heading else []
        rows += [[label, *(_cell(cell) for cell in cells)] for label, cells in part]
    return frame(pd.DataFrame(rows, columns=[content.corner, *headings(content)]))


def headings(content: Table) -> list[str]:
    """The columns' names; those that are not unique with their group, for Markdown has one line of them."""
    groups = [name.partition(":")[0].lower() for name, span in content.groups for _ in range(span)]
    return [
        f"{group}: {name}" if content.columns.count(name) > 1 else name
        for group, name in zip(groups, content.columns, strict=True)
    ]


def _cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    star = r"\*" if cell.sure else ""
    return f"{text}{star} {cell.interval}".strip()


def frame(data: pd.DataFrame) -> str:
    """A table with its cells as they are: tabulate would read `0.900` as a number and write `0.9`."""
    return str(data.to_markdown(index=False, disable_numparse=True))


def answers(shown: Sequence[SideBySide]) -> str:
    """Answers side by side, a list for each prompt."""
    parts = []
    for number, entry in enumerate(shown, start=1):
        before = f" (after {len(entry.turns) - 1} earlier turns)" if len(entry.turns) > 1 else ""
        parts.append(f"**{number}. {plain(entry.domain)}**{before}: {_short(entry.turns[-1][1])}\n")
        for answer in entry.answers:
            verdict = f" [{plain(answer.verdict)}]" if answer.verdict else ""
            parts.append(f"- {plain(answer.method)}{verdict}: {_short(answer.text) or '(nothing)'}")
        parts.append("")
    return "\n".join(parts).strip()


def _short(text: str) -> str:
    return plain(text if len(text) <= _LONGEST else text[:_LONGEST] + " …")
