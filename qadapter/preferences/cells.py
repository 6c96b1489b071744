"""Restore lists from structures that a file stores as text (CSV) or by columns (older Parquet exports)."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from qadapter.preferences.records import Reason
from qadapter.preferences.turns import UnusableRecord, is_turn, is_turns, listed

# The columns that carry messages in some layout: only these are ever parsed.
MESSAGE_COLUMNS = (
    "prompt chosen rejected messages conversations context conversation_a conversation_b conv_A conv_B"
).split()
STRUCT_COLUMNS = (*MESSAGE_COLUMNS, "answers", "completions", "responses_and_scores", "summaries", "contents")
_TURNS = re.compile(r"""\A\s*\[?\s*\{\s*['"](?:role|from|content|value)['"]\s*:""")


def columns_of_cells(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The columns whose texts are turns written out, in most of a source's first records."""
    found = []
    for name in MESSAGE_COLUMNS:
        cells = [record[name] for record in records if isinstance(record.get(name), str) and record[name].strip()]
        if cells and 2 * sum(_TURNS.match(cell) is not None for cell in cells) > len(cells):
            found.append(name)
    return tuple(found)


def columns_of_structs(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The columns that hold a struct of lists in place of a list of structs."""
    return tuple(
        name
        for name in STRUCT_COLUMNS
        if any(isinstance(record.get(name), dict) and listed(record[name]) is not record[name] for record in records)
    )


def opened(record: dict[str, Any], cells: Sequence[str], structs: Sequence[str]) -> dict[str, Any]:
    """A record with the structures of these columns as lists.

    Raises:
        UnusableRecord: WRONG_FIELDS, a cell that breaks off or is no list of turns.
    """
    changed = dict(record)
    for name in structs:
        if name in changed:
            changed[name] = listed(changed[name])
    for name in cells:
        if isinstance(changed.get(name), str) and changed[name].strip():
            changed[name] = _turns(changed[name])
    return changed


def _turns(cell: str) -> Any:
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        value = _literal(cell)
    value = listed(value)
    if is_turn(value) or (is_turns(value) and value):
        return value
    raise UnusableRecord(Reason.WRONG_FIELDS)


def _literal(cell: str) -> Any:
    """A Python literal, as `str()` of a list writes it. numpy's has no commas and is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in other people's texts
            return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
