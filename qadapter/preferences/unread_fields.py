"""The fields of a record that its layout does not read: which of them may change what the replies answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qadapter.preferences.building import texts_of
from qadapter.preferences.formats import Format
from qadapter.preferences.turns import ROLES

# Names as `_plain_name` writes them. The last word says what a field is: `prompt_id`, `source url`, `annotatorName`.
_METADATA = re.compile(
    r"(?:.*_)?(?:ids?|uu?id|guid|qid|idx|index|no|source|origin|subset|config|split|category|type|tags?|lang|language"
    r"|locale|country|region|license|licence|url|uri|link|href|date|time|timestamp|at|version|topic|domain|batch"
    r"|worker|annotators?|labell?ers?|raters?|reviewers?|evaluator|author|username|session|status|order|scores?"
    r"|ratings?|rewards?|ranks?|rationales?|metadata|meta|hash|sha1|sha256|md5|count|tokens|length|difficulty|confidence"
    r"|policy|provider|platform|filename|path|seed|round|epoch)"
    r"|.*(?:dataset|model|annotator|annotation).*|(?:.*_)?(?:file|user|author|task|worker|rater)_name|.*_by"
    r"|created|updated|modified|submitted|.*_(?:seconds|minutes|ms)|time_.*|.*duration.*|reasons?|explanation|justification|comments?"
    r"|rank_str|generations|margin|original_(?:chosen|rejected|responses?)|raw_.*|labell?ing_.*|unnamed_\d+|index_level_\d+|"
)
# A date, a time, a UUID or a digest is no text that a reply could answer, under any field name.
_DATA_VALUE = re.compile(
    r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}(?:[T ]+\d{1,2}:\d{2}[\d:.,+ ZUTC-]{0,24})?"
    r"|\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d+)?)?(?: ?[ap]\.?m\.?)?"
    r"|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|(?=.*\d)[0-9a-f]{16,128}",
    re.IGNORECASE,
)
_CONTEXT = frozenset(
    (
        "context contexts history conversation conversations messages dialog dialogue instruction instructions input "
        "inputs query question prompt scenario background passage document documents article persona knowledge "
        "trajectory few_shot few_shots system system_prompt system_message system_messages system_instruction "
        "system_text sys developer developer_message preamble"
    ).split()
)
# Beside two whole dialogues these only repeat them, or what they were made from.
_WHOLE = frozenset(
    "conversation conversations messages dialog dialogue instruction input inputs query question prompt".split()
)
_SYSTEM = frozenset({"system", "system_prompt"})
NOT_TEXT = frozenset("tools functions images image videos video audios audio".split())
_SHOWN = re.compile(r"(?:.*_)?(?:image|picture|photo|audio|video)s?(?:_.*)?")
_WEIGHTS = frozenset("weight weights sample_weight loss_weight".split())


def _plain_name(name: str) -> str:
    """A field's name in lower case with underscores between its words: `annotatorId`, `source-url`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[\W_]+", "_", words).strip("_").lower()


def suspects(keys: Iterable[Any], file_format: Format) -> Iterator[str]:
    """The fields of a record that its layout does not read and that may change its meaning, by their names."""
    for key in keys:
        name = _plain_name(str(key))
        if key in file_format.reads or key in _SYSTEM:
            continue
        unknown = file_format.only_texts and not _METADATA.fullmatch(name)
        if unknown or name in NOT_TEXT or name in _WEIGHTS or name in _CONTEXT or _SHOWN.fullmatch(name):
            yield key


def unexplained(record: Mapping[str, Any], file_format: Format, names: Iterable[str]) -> str | None:
    """The first of these fields whose content the layout would ignore."""
    for key in names:
        value, name = record[key], _plain_name(str(key))
        if _says_nothing(value):
            continue
        if name in _WEIGHTS:
            if not (isinstance(value, int | float) and value == 1) and str(value) not in ("1", "1.0"):
                return key
        elif name in NOT_TEXT:
            return name
        elif _SHOWN.fullmatch(name) and isinstance(value, str | list | dict) and not _is_data(value):
            return "image"
        elif name in _WHOLE and not file_format.only_texts and _is_whole(record.get("chosen")):
            continue
        elif (
            isinstance(value, str | list | dict | tuple)
            and not _is_data(value)
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


def _is_data(value: Any) -> bool:
    """Whether a text is a number or a truth, or another value that no reply can answer (`_DATA_VALUE`)."""
    if not isinstance(value, str) or len(value) > 140:
        return False
    if _DATA_VALUE.fullmatch(value.strip()):
        return True
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
