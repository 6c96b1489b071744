"""Turn the values of a record's fields into turns, and turns into a pair; shared by all formats."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from qadapter.preferences.pair import Message, PreferencePair, Role
from qadapter.preferences.records import Reason

Candidates = list[PreferencePair | Reason]

MAX_CANDIDATES = 64
"""A record with more scored replies than this (2,016 candidate pairs) is refused as over-long."""

ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = frozenset({"tool", "function", "observation", "function_call", "tool_call", "tool_response", "ipython"})
END_TOKENS = ("<|im_end|>", "</s>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>")


class UnusableRecord(Exception):  # noqa: N818 - it is no programming error: the record goes to quarantine with this reason
    """A record that gives no pair at all."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


# ---- values ----


def text(value: Any) -> str:
    """A string without the white space around it, line ends as `\\n`.

    Raises:
        UnusableRecord: no string, or one that no file and no tokenizer takes (half a surrogate pair).
    """
    if not isinstance(value, str):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UnusableRecord(Reason.NOT_UNICODE) from None
    return (value.replace("\r\n", "\n") if "\r" in value else value).strip()


def content_text(value: Any) -> str:
    """The text of a turn's content: a string, or a list of text parts (OpenAI, Bedrock, Gemini), concatenated."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, dict):
        value = value["parts"] if isinstance(value.get("parts"), list) else [value]
    if not isinstance(value, list | tuple):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    return text("".join(map(_part, value)))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    kind, words = part.get("type"), part.get("text")
    if kind not in (None, "text", "input_text", "output_text") or not isinstance(words, str):
        raise UnusableRecord(Reason.NOT_TEXT if part else Reason.WRONG_FIELDS)
    if any(value for key, value in part.items() if key not in _HARMLESS_IN_PARTS):
        raise UnusableRecord(Reason.NOT_TEXT)  # an image beside the text
    return words


_HARMLESS_IN_PARTS = frozenset({"type", "text", "annotations", "cache_control", "logprobs", "mimeType"})


def is_turn(value: Any) -> bool:
    """Whether a value looks like one turn of a conversation."""
    return isinstance(value, Mapping) and (
        ("role" in value and ("content" in value or "parts" in value or "tool_calls" in value))
        or ("from" in value and "value" in value)
    )


def is_turns(value: Any) -> bool:
    """Whether a value looks like a list of turns (an empty list does)."""
    return isinstance(value, list | tuple) and all(map(is_turn, value))


_STRUCT_FIELDS = frozenset({"role", "from", "answer", "rank", "response", "score", "text", "completion"})


def listed(value: Any) -> Any:
    """A struct of lists (`{"role": [..], "content": [..]}`, as older Parquet exports have it) as a list of structs."""
    if not isinstance(value, dict) or len(value) < 2 or _STRUCT_FIELDS.isdisjoint(value):
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) for column in columns) or len({len(column) for column in columns}) != 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def messages(value: Any, roles: Mapping[str, Role] = ROLES) -> list[Message]:
    """Turns of `{role, content}` or `{from, value}` as messages; empty system turns are left out.

    Raises:
        UnusableRecord: WRONG_FIELDS for another shape or role, NOT_TEXT for tools, images and sounds.
    """
    value = listed(value)
    if not isinstance(value, list | tuple):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    turns: list[Message] = []
    for turn in value:
        if not isinstance(turn, dict):
            raise UnusableRecord(Reason.WRONG_FIELDS)
        name = turn.get("role")
        if name is None:
            name, content = turn.get("from"), turn.get("value")
        else:
            content = turn["content"] if "content" in turn else turn.get("parts")
        role = roles.get(name) if isinstance(name, str) else None
        if role is None:
            role = _other_role(name, roles)
        if (len(turn) > 2 or content is None) and (turn.get("tool_calls") or turn.get("function_call")):
            raise UnusableRecord(Reason.NOT_TEXT)
        if role == "system" and (content is None or content == []):
            continue
        words = text(content) if type(content) is str else content_text(content)
        if words or role != "system":
            turns.append({"role": role, "content": words})
    return turns


def _other_role(name: Any, roles: Mapping[str, Role]) -> Role:
    lower = name.strip().lower() if isinstance(name, str) else ""
    if lower in roles:
        return roles[lower]
    raise UnusableRecord(Reason.NOT_TEXT if lower in TOOL_ROLES else Reason.WRONG_FIELDS)


def score(value: Any) -> float:
    """A number, or a string that is one.

    Raises:
        UnusableRecord: NO_PREFERENCE for null, booleans, `N/A`, NaN and infinity; WRONG_FIELDS for lists and objects.
    """
    if isinstance(value, list | dict | tuple):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    if value is None or isinstance(value, bool):
        raise UnusableRecord(Reason.NO_PREFERENCE)
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UnusableRecord(Reason.NO_PREFERENCE)
    return number


# ---- conversations ----


def joined(turns: Sequence[Message]) -> list[Message]:
    """Neighbouring turns of the same speaker as one.

    In some HH records a reply continues in a second `Assistant:` turn. If joined, the pair has one prompt and two
    replies, as collected; otherwise its prompts would differ, and many chat templates refuse such turns.
    """
    result: list[Message] = []
    for turn in turns:
        if result and result[-1]["role"] == turn["role"]:
            parts = [part for part in (result[-1]["content"], turn["content"]) if part]
            result[-1] = Message(role=turn["role"], content="\n\n".join(parts))
        else:
            result.append(turn)
    return result


def _alternating(turns: list[Message], last: Role) -> list[Message]:
    """Turns in the order [system] user … `last`, neighbours joined.

    Raises:
        UnusableRecord: NOT_A_DIALOGUE.
    """
    roles = [turn["role"] for turn in turns]
    if any(map(operator.eq, roles, roles[1:])):
        turns = joined(turns)
        roles = [turn["role"] for turn in turns]
    start = 1 if roles[:1] == ["system"] else 0
    if len(roles) <= start or roles[start] != "user" or roles[-1] != last or "system" in roles[start:]:
        raise UnusableRecord(Reason.NOT_A_DIALOGUE)
    return turns


def whole_dialogue(turns: list[Message]) -> list[Message]:
    """The turns of a dialogue that ends with the assistant's reply."""
    return _alternating(turns, "assistant")


def prompt_of(turns: list[Message]) -> list[Message]:
    """The turns of a prompt: it ends with the user's turn."""
    return _alternating(turns, "user")


def with_system(prompt: list[Message], value: Any) -> list[Message]:
    """A prompt with the text of a `system` field as its first turn; empty or null: as it is.

    Raises:
        UnusableRecord: WRONG_FIELDS, also if there is a different system turn.
    """
    if value is None:
        return prompt
    words = content_text(value)
    if not words:
        return prompt
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"] != words:
            raise UnusableRecord(Reason.WRONG_FIELDS)
        return prompt
    return [Message(role="system", content=words), *prompt]


def make_pair(prompt: list[Message], chosen: str, rejected: str, margin: float | None = None) -> PreferencePair:
    """The last checks, the same for every format."""
    if not prompt:
        raise UnusableRecord(Reason.EMPTY_PROMPT)
    for turn in prompt:
        if not turn["content"]:
            raise UnusableRecord(Reason.EMPTY_PROMPT)
    chosen, rejected = without_end(chosen), without_end(rejected)
    if not chosen or not rejected:
        raise UnusableRecord(Reason.EMPTY_REPLY)
    if chosen == rejected:
        raise UnusableRecord(Reason.IDENTICAL_REPLIES)
    return PreferencePair(tuple(prompt), chosen, rejected, margin)


def without_end(reply: str) -> str:
    """A reply without the token that ends a turn, since the tokenizer adds its own."""
    if reply.endswith(END_TOKENS):
        token = next(token for token in END_TOKENS if reply.endswith(token))
        return reply[: -len(token)].rstrip()
    return reply


def pair_of_dialogues(
    chosen: list[Message], rejected: list[Message], system: Any = None, margin: float | None = None
) -> PreferencePair:
    """A pair from two whole dialogues whose prompts, all turns but the last, must be equal."""
    chosen, rejected = whole_dialogue(chosen), whole_dialogue(rejected)
    prompt = chosen[:-1]
    if prompt != rejected[:-1]:
        raise UnusableRecord(Reason.DIFFERENT_PROMPTS)
    if system is not None:
        prompt = with_system(prompt, system)
    return make_pair(prompt, chosen[-1]["content"], rejected[-1]["content"], margin)
