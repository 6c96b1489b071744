"""The layouts that a mapping describes, and the conditions by which all layouts are recognised.

`docs/data.md` lists them. Sources of the schemas: the data sets' cards and the loaders of the named projects.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.preferences.building import Context, Record, texts_of
from qadapter.preferences.mapping import FieldMapping, label_text
from qadapter.preferences.records import Reason
from qadapter.preferences.transcripts import EXTRA_ID, Style
from qadapter.preferences.turns import Candidates, UnusableRecord, is_turn, is_turns, listed

Parse = Callable[[Record, Context], Candidates]
Looks = Callable[[Record], bool]

INSTRUCTION = "join('\n', [instruction, input || ''])"


def preset(
    fields: Mapping[str, Any], *, prompt_style: Style | None = None, check: Callable[[Record], None] | None = None
) -> Parse:
    """A parser that reads the fields of a mapping; compiled when it is first used.

    Args:
        fields: see `mapping.FieldMapping`.
        prompt_style: how the layout's prompts are written out.
        check: raises `UnusableRecord` for a record that the layout leaves out.
    """

    @functools.cache
    def mapping() -> FieldMapping:
        return FieldMapping(fields, preset=True, prompt_style=prompt_style)

    def parse(record: Record, context: Context) -> Candidates:
        if check is not None:
            check(record)
        return mapping()(record, context)

    return parse


# ---- conditions ----


def has(*names: str) -> Looks:
    """All these fields are there (null counts: Arrow and CSV have all fields in every record)."""
    return lambda record: all(name in record for name in names)


def each(value: Any, *names: str) -> bool:
    """Whether a value is a list of objects, at least one, that all have these fields."""
    value = listed(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and all(name in item for name in names) for item in value)
    )


def undecided(record: Record) -> bool:
    """Whether a record names no chosen and rejected reply."""
    return record.get("chosen") is None and record.get("rejected") is None


def dialogue(value: Any) -> bool:
    """Whether a value is a list of turns with at least one in it."""
    value = listed(value)
    return bool(value) and is_turns(value)


def one_turn(value: Any) -> bool:
    """Whether a value is one turn, or a list of one that is the assistant's."""
    if isinstance(value, list | tuple):
        return (
            len(value) == 1
            and is_turn(value[0])
            and str(value[0].get("role", value[0].get("from")))
            not in (
                "user",
                "human",
                "system",
            )
        )
    return is_turn(value)


def texts(record: Record) -> bool:
    """Whether `chosen` and `rejected` are both text."""
    return isinstance(record.get("chosen"), str) and isinstance(record.get("rejected"), str)


# ---- layouts that leave a choice to the user ----


def pku_saferlhf(records: Sequence[Record], context: Context, where: str) -> Parse:
    """PKU-SafeRLHF judges each pair twice, by helpfulness and by safety, and the two often disagree."""
    criteria = ("better_response_id", "safer_response_id")
    there = [name for name in criteria if any(record.get(name) is not None for record in records)]
    preferred = context.choices.preferred
    if preferred is None and len(there) == 1:
        preferred = there[0]
    if preferred not in there:
        given = "`preferred` is not set" if preferred is None else f"there is no '{preferred}' in it"
        raise QAdapterError(
            f"{where} judges its pairs by two criteria that often disagree, and {given}. "
            f"Set `preferred` to {' or '.join(there)}."
        )
    return preset({"prompt": "prompt", "responses": {"0": "response_0", "1": "response_1"}, "preferred": preferred})


_ASPECT = "annotations.{}.Rating"


def ultrafeedback_raw(records: Sequence[Record], context: Context, where: str) -> Parse:
    """UltraFeedback rates each completion several times; which rating decides is the user's choice."""
    first = [reply for record in records for reply in listed(record["completions"]) or [] if isinstance(reply, dict)]
    overall = list(dict.fromkeys(key for reply in first for key in reply if key.endswith("score")))
    aspects = list(dict.fromkeys(key for reply in first for key in (reply.get("annotations") or {})))
    wanted = context.choices.score
    if wanted not in overall + aspects:
        given = "`score` is not set" if wanted is None else f"there is no score '{wanted}' in it"
        raise QAdapterError(
            f"{where} rates each completion several times, and {given}. Set `score` to one of "
            f"{', '.join(overall + aspects)} (the binarized sets used fine-grained_score or overall_score)."
        )
    path = f'"{wanted}"' if wanted in overall else _ASPECT.format(f'"{wanted}"')
    return preset({"prompt": "instruction", "candidates": f"completions[*].[response, {path}]"})


# ---- records that a layout leaves out ----


def one_round(record: Record) -> None:
    """Arena and MT-bench: the judgement is about the whole conversation only if `turn` is its number of rounds."""
    turn, conversation = label_text(record.get("turn")), record.get("conversation_a")
    if turn.isdecimal() and len(turn) < 9 and isinstance(conversation, list):
        asked = sum(
            isinstance(t, dict) and str(t.get("role", t.get("from"))) in ("user", "human") for t in conversation
        )
        if asked and int(turn) != asked:
            raise UnusableRecord(Reason.NO_PREFERENCE)


def no_tie(record: Record) -> None:
    """distilabel's Orca pairs say in `status` that two replies are equally good."""
    if str(record.get("status")).strip().lower() == "tie":
        raise UnusableRecord(Reason.NO_PREFERENCE)


def one_of(first: str, second: str) -> Callable[[Record], None]:
    """Of two fields that may hold the prompt, one does, or both say the same."""

    def check(record: Record) -> None:
        both = [texts_of(record.get(name)) for name in (first, second)]
        if all(both) and both[0] != both[1]:
            raise UnusableRecord(Reason.WRONG_FIELDS)

    return check


_HELPSTEER2 = {str(n): f"response_{1 if n < 0 else 2}" for n in (-3, -2, -1, 1, 2, 3)}
_HELPSTEER3 = {str(n): f"response{1 if n < 0 else 2}" for n in (-3, -2, -1, 1, 2, 3)}

nemo_ranked = preset({"prompt": "context", "candidates": "completions[*].[completion, rank]", "best": "lowest"})
helpsteer3 = preset(
    {
        "prompt": "context",
        "responses": _HELPSTEER3,
        "preferred": "overall_preference",
        "margin": "abs(to_number(overall_preference))",
    }
)
helpsteer2 = preset(
    {
        "prompt": "prompt",
        "responses": _HELPSTEER2,
        "preferred": "preference_strength",
        "margin": "abs(to_number(preference_strength))",
    },
    prompt_style=EXTRA_ID,
)
chatbot_arena = preset(
    {"responses": {"model_a": "conversation_a", "model_b": "conversation_b"}, "preferred": "winner"}, check=one_round
)
shp = preset({"prompt": "history", "responses": {"1": "human_ref_A", "0": "human_ref_B"}, "preferred": "labels"})
webgpt = preset(
    {"prompt": "question.full_text || question", "candidates": "[[answer_0, score_0], [answer_1, score_1]]"}
)
prometheus = preset(
    {
        "prompt": "orig_instruction",
        "responses": {"A": "orig_response_A", "B": "orig_response_B"},
        "preferred": "orig_preference",
    }
)
unified_feedback = preset({"candidates": "[[conv_A, conv_A_rating], [conv_B, conv_B_rating]]"})
alpaca_farm = preset(
    {"prompt": INSTRUCTION, "responses": {"1": "output_1", "2": "output_2"}, "preferred": "preference"}
)
stack_exchange = preset({"prompt": "question", "chosen": "response_j", "rejected": "response_k"})
cvalues = preset({"prompt": "prompt", "chosen": "pos_resp", "rejected": "neg_resp"})
gpt4llm = preset({"prompt": "user_input", "candidates": "responses_and_scores[*].[response, score]"})
messages_objects = preset({"chosen": "chosen.messages", "rejected": "rejected.messages"})
argilla_responses = preset({"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"})
sharegpt_ranking = preset(
    {"prompt": "conversations || messages", "chosen": "chosen", "rejected": "rejected"},
    check=one_of("conversations", "messages"),
)
alpaca_ranking = preset({"prompt": INSTRUCTION, "history": "history", "chosen": "chosen", "rejected": "rejected"})
orca = preset({"prompt": "question", "chosen": "chosen", "rejected": "rejected"}, check=no_tie)
icr = preset({"prompt": "input", "chosen": "chosen", "rejected": "rejected"}, check=no_tie)
nectar = preset({"prompt": "prompt", "candidates": "answers[*].[answer, rank]", "best": "lowest"})
distilabel_generations = preset(
    {"prompt": "instruction || messages", "texts": "generations", "scores": "ratings"},
    check=one_of("instruction", "messages"),
)
