"""The fields of a record that its layout does not read: which of them may change what the replies answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qadapter.preferences.building import texts_of
from qadapter.preferences.formats import Format
from qadapter.preferences.turns import ROLES

_METADATA = re.compile(
    r"id|.*_id|uid|qid|idx|index|.*source|.*dataset.*|subset|config|split|category|type|tags|lang|language|.*model.*"
    r"|.*policy|license|url|link|date|version|topic|domain|batch|worker|annotator|timestamp|created_at|status|order"
    r"|.*scores?|.*ratings?|.*rewards?|.*rationales?|.*metadata|ranks|rank_str|generations|margin|.*(hash|sha256|md5)"
    r"|original_.*|raw_.*|labell?ing_.*",
    re.IGNORECASE,
)
_CONTEXT = frozenset(
    (
        "context contexts history conversation conversations messages dialog dialogue instruction input inputs query "
        "question prompt scenario background passage document documents article persona knowledge trajectory "
        "few_shot few_shots"
    ).split()
)
# Beside two whole dialogues these only repeat them, or what they were made from.
_WHOLE = frozenset(
    "conversation conversations messages dialog dialogue instruction input inputs query question prompt".split()
)
_SYSTEM = frozenset({"system", "system_prompt"})
NOT_TEXT = frozenset("tools functions images image videos video audios audio".split())
_WEIGHTS = frozenset("weight weights sample_weight loss_weight".split())


def suspects(keys: Iterable[Any], file_format: Format) -> Iterator[str]:
    """The fields of a record that its layout does not read and that may change its meaning, by their names."""
    for key in keys:
        name = str(key).lower()
        if key in file_format.reads or name in _SYSTEM:
            continue
        unknown = file_format.only_texts and not _METADATA.fullmatch(name)
        if unknown or name in NOT_TEXT or name in _WEIGHTS or name in _CONTEXT:
            yield key


def unexplained(record: Mapping[str, Any], file_format: Format, names: Iterable[str]) -> str | None:
    """The first of these fields whose content the layout would ignore."""
    for key in names:
        value, name = record[key], str(key).lower()
        if _says_nothing(value):
            continue
        if name in _WEIGHTS:
            if not (isinstance(value, int | float) and value == 1) and str(value) not in ("1", "1.0"):
                return key
        elif name in NOT_TEXT:
            return name
        elif name in _WHOLE and not file_format.only_texts and _is_whole(record.get("chosen")):
            continue
        elif (
            isinstance(value, str | list | dict | tuple)
            and not _is_number(value)
            and (file_format.only_texts or not _repeats(record, file_format, value))
        ):
            return key
    return None


def _is_whole(dialogue: Any) -> bool:
    """Whether a list of turns begins with the prompt, not with a reply."""
    first = dialogue[0] if isinstance(dialogue, list) and dialogue else None
    if not isinstance(first, dict):
        return False
    return ROLES.get(str(first.get("role", first.get("from"))).lower(), "assistant") != "assistant"


def _says_nothing(value: Any) -> bool:
    return (
        value is None or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null")) or value in ([], {}, ())
    )


def _is_number(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > 30:
        return False
    try:
        float(value)
    except ValueError:
        return value.strip().lower() in ("true", "false")
    return True


def _repeats(record: Mapping[str, Any], file_format: Format, value: Any) -> bool:
    """Whether a field only repeats texts that the layout reads (`messages` beside a chosen dialogue)."""
    if any(record.get(name) == value for name in file_format.reads):
        return True
    read = {words for name in file_format.reads if name in record for words in texts_of(record[name])}
    said = texts_of(value)
    return bool(said) and read.issuperset(said)
