"""Restore lists from structures that a file stores as text (CSV) or by columns (older Parquet exports).

Only columns that hold structures in some layout are ever parsed, and only to what that layout has there: a prompt that
is JSON stays text.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qadapter.preferences.records import Reason
from qadapter.preferences.turns import UnusableRecord, is_turn, is_turns, listed

MESSAGE_COLUMNS = (
    "prompt chosen rejected messages conversations context conversation_a conversation_b conv_A conv_B"
).split()
STRUCT_COLUMNS = (*MESSAGE_COLUMNS, "answers", "completions", "responses_and_scores", "summaries", "contents")
_TURNS = re.compile(r"""\A\s*\[?\s*\{\s*['"](?:role|from|content|value|messages)['"]\s*:""")
_OPEN = re.compile(r"\A\s*[\[{]")


def _are_turns(value: Any) -> bool:
    return is_turn(value) or (is_turns(value) and bool(value)) or _holds_turns(value)


def _holds_turns(value: Any) -> bool:
    return isinstance(value, dict) and is_turns(value.get("messages")) and bool(value["messages"])


def _are_roles(value: Any) -> bool:
    """Turns of which the last may have candidates in place of its content (Nova)."""
    return _are_turns(value) or (_are_objects(value) and all("role" in item for item in value))


def _is_tree(value: Any) -> bool:
    return isinstance(value, dict) and "text" in value and "replies" in value


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _are_scores(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not any(isinstance(item, list | dict) for item in value)


def _is_history(value: Any) -> bool:
    """Earlier turns, or a list of [user, assistant]; it may be empty."""
    return isinstance(value, list) and all(
        is_turn(item) or (isinstance(item, list) and len(item) == 2) for item in value
    )


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and any(name in value for name in names)


# What the cells of a column hold in the layouts that have it.
_HOLDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys((*MESSAGE_COLUMNS, "input", "preferred_output", "non_preferred_output"), _are_turns),
    **dict.fromkeys(("answers", "completions", "responses_and_scores", "summaries", "contents"), _are_objects),
    **dict.fromkeys(("generations", "text"), _are_texts),
    **dict.fromkeys(("ratings", "score"), _are_scores),
    "messages": _are_roles,
    "prompt": lambda value: _are_turns(value) or _is_tree(value),
    "history": _is_history,
    "question": _has("full_text"),
    "info": _has("post", "article"),
    "responses": lambda value: isinstance(value, dict) and bool(value),
}


def columns_of_cells(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The columns whose texts are structures written out, in most of a source's first records."""
    found = []
    for name, fits in _HOLDS.items():
        cells = [record[name] for record in records if isinstance(record.get(name), str) and record[name].strip()]
        spelt = name in MESSAGE_COLUMNS  # numpy's spelling is taken for turns too, and refused in one sentence
        alike = sum(
            (spelt and _TURNS.match(cell) is not None)
            or (_OPEN.match(cell) is not None and fits(listed(_parsed(cell))))
            for cell in cells
        )
        if cells and 2 * alike > len(cells):
            found.append(name)
    return tuple(found)


def are_lists_of_texts(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `chosen` and `rejected` are, in every record, a list of texts written out as text: several replies (as
    `reply-lists` has them) or a reply that is itself a list, which nothing tells apart."""
    cells = [record.get(side) for record in records for side in ("chosen", "rejected")]
    return bool(cells) and all(
        isinstance(cell, str) and cell.lstrip().startswith("[") and _are_texts(_parsed(cell)) for cell in cells
    )


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
        UnusableRecord: WRONG_FIELDS, a cell that breaks off or holds something else.
    """
    changed = dict(record)
    for name in structs:
        if name in changed:
            changed[name] = listed(changed[name])
    for name in cells:
        if isinstance(changed.get(name), str) and changed[name].strip():
            changed[name] = listed(_parsed(changed[name]))
            if not _HOLDS[name](changed[name]):
                raise UnusableRecord(Reason.WRONG_FIELDS)
    return changed


def _parsed(cell: str) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return _literal(cell)


def _literal(cell: str) -> Any:
    """A Python literal, as `str()` of a list writes it. numpy's has no commas and is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in other people's texts
            return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
