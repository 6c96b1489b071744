"""One parser a record format: a decoded record in, its candidate pairs out.

Each parser takes the record and the wanted domain (only DSP has any) and returns at least one candidate, a pair or the
reason why it is none; a record that gives no pair at all raises `UnusableError`. White space around a turn is dropped.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

from qadapter.preferences.pair import Message, PreferencePair, Role
from qadapter.preferences.records import Reason

Candidates = list[PreferencePair | Reason]

MAX_DIALOGUES = 64
"""A text-score record with more dialogues than this (2,016 candidate pairs) is refused as over-long."""


class UnusableError(Exception):
    """A record that gives no pair at all."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def _text(value: Any) -> str:
    """A string field without the white space around it."""
    if not isinstance(value, str):
        raise UnusableError(Reason.WRONG_FIELDS)
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates: no file and no tokenizer takes them
        raise UnusableError(Reason.NOT_UNICODE) from None
    return value.strip()


def _pair(prompt: list[Message], chosen: str, rejected: str) -> PreferencePair:
    """The last checks, the same for every format."""
    if not prompt or not all(turn["content"] for turn in prompt):
        raise UnusableError(Reason.EMPTY_PROMPT)
    if not chosen or not rejected:
        raise UnusableError(Reason.EMPTY_REPLY)
    if chosen == rejected:
        raise UnusableError(Reason.IDENTICAL_REPLIES)
    return PreferencePair(tuple(prompt), chosen, rejected)


def _pair_of_dialogues(chosen: list[Message], rejected: list[Message]) -> PreferencePair:
    """A pair from two whole dialogues whose prompts, all turns but the last, must be equal."""
    chosen, rejected = _join_turns(chosen), _join_turns(rejected)
    if chosen[:-1] != rejected[:-1]:
        raise UnusableError(Reason.DIFFERENT_PROMPTS)
    return _pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _join_turns(turns: list[Message]) -> list[Message]:
    """Joins neighbouring turns of the same speaker and checks the order: [system] user assistant … user assistant.

    In some HH records a reply goes on in a second `Assistant:` turn. Joined, such a pair has one prompt and two replies
    as it was collected; unjoined, its prompts would differ, and many chat templates refuse such turns.
    """
    joined: list[Message] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            parts = [part for part in (joined[-1]["content"], turn["content"]) if part]
            joined[-1] = Message(role=turn["role"], content="\n\n".join(parts))
        else:
            joined.append(turn)
    speakers = [turn["role"] for turn in joined]
    spoken = speakers[1:] if speakers[:1] == ["system"] else speakers
    if len(spoken) < 2 or spoken[0] != "user" or spoken[-1] != "assistant" or "system" in spoken:
        raise UnusableError(Reason.NOT_A_DIALOGUE)
    return joined


def _pair_of_replies(prompt: list[Message], chosen: str, rejected: str) -> PreferencePair:
    """A pair from a prompt and two replies to it."""
    ends = ([Message(role="assistant", content=reply)] for reply in (chosen, rejected))
    return _pair_of_dialogues(*(prompt + end for end in ends))


TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(text: str) -> bool:
    """Whether a string looks like an HH raw dialogue: begins with a Human turn and has an Assistant turn."""
    start = TURN.match(text)
    return start is not None and start.group(1) == "Human" and "\n\nAssistant:" in text.replace("\r\n", "\n")


def _dialogue(value: Any) -> list[Message]:
    """The turns of an HH raw dialogue: `\\n\\nHuman: …\\n\\nAssistant: …`."""
    before, *rest = TURN.split(_text(value).replace("\r\n", "\n"))
    if before.strip() or not rest:
        raise UnusableError(Reason.NOT_A_DIALOGUE)
    turns = zip(rest[::2], rest[1::2], strict=True)
    return [Message(role=SPEAKERS[speaker], content=content.strip()) for speaker, content in turns]


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise UnusableError(Reason.WRONG_FIELDS)
    messages = []
    for turn in value:
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            raise UnusableError(Reason.WRONG_FIELDS)
        messages.append(Message(role=turn["role"], content=_text(turn.get("content"))))
    return messages


def parse_hh(record: dict[str, Any], _: str | None) -> Candidates:
    """HH raw: `chosen` and `rejected` are whole dialogues. One candidate."""
    return [_pair_of_dialogues(_dialogue(record.get("chosen")), _dialogue(record.get("rejected")))]


def parse_text_score(record: dict[str, Any], _: str | None) -> Candidates:
    """Text-score: n whole dialogues in `text`, n numbers in `score`. n·(n-1)/2 candidates."""
    texts, scores = record.get("text"), record.get("score")
    if not isinstance(texts, list) or len(texts) < 2:
        raise UnusableError(Reason.WRONG_FIELDS)
    if len(texts) > MAX_DIALOGUES:
        raise UnusableError(Reason.TOO_LONG)
    if scores is None:
        raise UnusableError(Reason.NO_PREFERENCE)
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise UnusableError(Reason.WRONG_FIELDS)
    candidates: Candidates = []
    for (text_a, score_a), (text_b, score_b) in itertools.combinations(zip(texts, scores, strict=True), 2):
        try:
            order = _score(score_a) - _score(score_b)
            if order == 0:
                raise UnusableError(Reason.NO_PREFERENCE)
            better, worse = (text_a, text_b) if order > 0 else (text_b, text_a)
            candidates.append(_pair_of_dialogues(_dialogue(better), _dialogue(worse)))
        except UnusableError as error:
            candidates.append(error.reason)
    return candidates


def _score(value: Any) -> float:
    if value is None:
        raise UnusableError(Reason.NO_PREFERENCE)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnusableError(Reason.WRONG_FIELDS)
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise UnusableError(Reason.NO_PREFERENCE)
    return score


def parse_dsp(record: dict[str, Any], domain: str | None) -> Candidates:
    """DSP: one candidate for every style but the domain: the domain's response chosen, the other style's rejected.

    The definition is its authors' (Cheng et al., 2023).
    """
    responses = record.get("responses")
    if not isinstance(responses, dict):
        raise UnusableError(Reason.WRONG_FIELDS)
    # Arrow gives every record all styles of the file, null where it has none.
    styles = [style for style, response in responses.items() if response is not None]
    if domain not in styles or len(styles) < 2:
        raise UnusableError(Reason.NO_DOMAIN_RESPONSE)
    candidates: Candidates = []
    for style in styles:
        if style == domain:
            continue
        try:
            prompt = [Message(role="user", content=_text(record.get("query")))]
            candidates.append(_pair(prompt, _text(responses[domain]), _text(responses[style])))
        except UnusableError as error:
            candidates.append(error.reason)
    return candidates


def parse_conversation(record: dict[str, Any], _: str | None) -> Candidates:
    """TRL conversational: `chosen` and `rejected` are messages, the prompt given (messages or a string) or implicit."""
    chosen, rejected = _messages(record.get("chosen")), _messages(record.get("rejected"))
    prompt = record.get("prompt")
    if prompt is not None:
        turns = _plain_prompt(prompt) if isinstance(prompt, str) else _messages(prompt)
        # Some sets give the prompt and repeat it in both dialogues (UltraFeedback binarized): then it is implicit.
        if not (chosen and rejected and chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant"):
            chosen, rejected = turns + chosen, turns + rejected
    return [_pair_of_dialogues(chosen, rejected)]


def _plain_prompt(value: Any) -> list[Message]:
    """A prompt string as turns: one of the user's, or those of an HH dialogue that waits for its reply."""
    text = _text(value)
    if is_dialogue(text) and text.endswith("\n\nAssistant:"):
        return _dialogue(text)[:-1]
    return [Message(role="user", content=text)]


def parse_plain(record: dict[str, Any], _: str | None) -> Candidates:
    """TRL plain strings: `prompt`, `chosen`, `rejected`. One candidate."""
    prompt = _plain_prompt(record.get("prompt"))
    return [_pair_of_replies(prompt, _text(record.get("chosen")), _text(record.get("rejected")))]


def parse_plain_implicit(record: dict[str, Any], _: str | None) -> Candidates:
    """TRL plain strings without `prompt`. One candidate.

    The prompt is what both strings begin with, cut back to the end of a word so that each reply keeps a word at least.
    TRL's `extract_prompt` cuts between letters ("bl|ue", "bl|ack"), which no chat template can put together again.
    """
    chosen, rejected = _text(record.get("chosen")), _text(record.get("rejected"))
    if not chosen or not rejected:
        raise UnusableError(Reason.EMPTY_REPLY)
    if chosen == rejected:
        raise UnusableError(Reason.IDENTICAL_REPLIES)
    ends = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    common = chosen[: next(ends, min(len(chosen), len(rejected)))]
    words_end_here = common[-1:].isspace() or all(text[len(common) :][:1].isspace() for text in (chosen, rejected))
    if not words_end_here:
        words = common.rsplit(maxsplit=1)
        common = words[0] if len(words) == 2 else ""
    if not common.strip():
        raise UnusableError(Reason.DIFFERENT_PROMPTS)
    return [_pair_of_replies(_plain_prompt(common), chosen[len(common) :].strip(), rejected[len(common) :].strip())]
