"""Records that are no pairs and are often taken for some: what they are, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qadapter.preferences.text_records import ASKS
from qadapter.preferences.turns import is_turn, is_turns

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NoPairs:
    """One kind of them.

    Attributes:
        looks_like: whether a record is of this kind.
        sentence: what is missing and what to set, after the file's name.
    """

    looks_like: Callable[[Record], bool]
    sentence: str


def _has(*names: str) -> Callable[[Record], bool]:
    return lambda record: all(name in record for name in names)


def _label_studio(record: Record) -> bool:
    return isinstance(record.get("data"), dict) and isinstance(record.get("annotations"), list)


def _argilla(record: Record) -> bool:
    preference = record.get("preference")
    votes = [preference] if isinstance(preference, dict) else preference  # older Parquet exports: by columns
    ranked = isinstance(votes, list) and any(isinstance(vote, dict) and "status" in vote for vote in votes)
    return ranked or any(str(name).endswith((".responses", ".responses.status")) for name in record)


def _one_list_inside(record: Record) -> bool:
    lists = [value for value in record.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return len(lists) == 1 and ASKS.isdisjoint(record) and not any(is_turns(value) for value in lists)


def _column_wise(record: Record) -> bool:
    columns = [value for value in record.values() if isinstance(value, dict)]
    return bool(columns) and len(columns) == len(record) and all("0" in column for column in columns)


NO_PAIRS: tuple[NoPairs, ...] = (
    NoPairs(
        _column_wise,
        "is written by columns (pandas' `to_json()`). Write it again with `to_json(orient='records', lines=True)`.",
    ),
    NoPairs(
        _has("message_id", "parent_id"),
        "has OpenAssistant's messages one by one, a tree spread over many records. Use its *.trees.jsonl.gz.",
    ),
    NoPairs(
        lambda record: (
            _has("prompt", "response")(record)
            and any(name in record for name in ("helpfulness", "correctness", "rating", "score"))
        ),
        "has ratings of single replies, no pairs. Give pairs; for HelpSteer set `path` to its `preference` folder.",
    ),
    NoPairs(
        _has("transcript", "rating"),
        "has single dialogues with a rating, no pairs. Give a file that names two replies to each prompt.",
    ),
    NoPairs(
        lambda record: isinstance(record.get("completions"), list) and isinstance(record.get("labels"), list),
        "has the steps of single replies with a label each (stepwise supervision), no pairs. Give pairs.",
    ),
    NoPairs(
        lambda record: isinstance(record.get("info"), dict) and "summary" in record,
        "has single summaries with ratings (`axis`), no pairs. Use the `comparisons` of the same data.",
    ),
    NoPairs(
        lambda record: _has("query", "response", "rejected_response")(record),
        "has ms-swift's query form. Set `fields: {prompt: query, chosen: response, rejected: rejected_response, "
        "history: history}`.",
    ),
    NoPairs(
        lambda record: (
            "instruction" in record
            and isinstance(record.get("output"), list)
            and len(record["output"]) == 2
            and all(isinstance(reply, str) for reply in record["output"])
        ),
        "has the old Alpaca ranking. Set `fields: {prompt: \"join('\\n', [instruction, input || ''])\", "
        "chosen: 'output[0]', rejected: 'output[1]'}`.",
    ),
    NoPairs(
        _label_studio,
        "is an export of Label Studio, whose fields have the project's own names. For a pairwise project set `fields: "
        "{prompt: data.prompt, responses: {left: data.answer1, right: data.answer2}, preferred: "
        "\"annotations[?was_cancelled!=`true`].result[] | [?type=='pairwise'].value.selected\"}`.",
    ),
    NoPairs(
        _argilla,
        "is an export of Argilla, whose fields carry the project's own names. Set, for a ranking question, `fields: "
        "{prompt: prompt, responses: {response1: response1, response2: response2}, preferred: "
        "\"preference[?status=='submitted'].value[] | [?rank==`1`].value\"}`.",
    ),
    NoPairs(
        lambda record: isinstance(record.get("chosen"), str) and "rejected" not in record,
        "names a `chosen` label or reply and no rejected one. Set `fields` with `responses` (each label's reply) and "
        "`preferred: chosen`.",
    ),
    NoPairs(
        lambda record: (
            isinstance(record.get("chosen"), dict)
            and not is_turn(record["chosen"])
            and "messages" not in record["chosen"]
            and isinstance(record.get("rejected"), dict)
        ),
        "has objects of unknown fields as `chosen` and `rejected`. Set `fields` with the paths of both texts, such as "
        "`{prompt: prompt, chosen: chosen.answer, rejected: rejected.answer}`.",
    ),
    NoPairs(
        lambda record: is_turns(record.get("messages")) and bool(record.get("messages")) and "chosen" not in record,
        "has single conversations (data for supervised fine-tuning), no pairs. Give two replies to each prompt.",
    ),
    NoPairs(
        _one_list_inside,
        "is an object with a list inside, no list of records. Set `fields` with `records: {list}` and the paths in it.",
    ),
)


def sentence_of(record: Any) -> str | None:
    """Why a record of no known layout gives no pairs; None where its kind is not known."""
    if not isinstance(record, dict):
        return None
    for kind in NO_PAIRS:
        if kind.looks_like(record):
            lists = [str(name) for name, value in record.items() if isinstance(value, list) and value]
            return kind.sentence.replace("{list}", lists[0] if lists else "data")
    return None
