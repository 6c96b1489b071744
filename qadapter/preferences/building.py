"""Build candidate pairs from what a format finds in a record (a prompt, replies, scores); shared by all formats."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from qadapter.preferences import transcripts
from qadapter.preferences.beginnings import prompt_end
from qadapter.preferences.pair import LabelledReply, Message, PreferencePair, Role
from qadapter.preferences.records import Reason
from qadapter.preferences.turns import (
    MAX_CANDIDATES,
    ROLES,
    Candidates,
    UnusableRecord,
    content_text,
    is_turn,
    listed,
    make_pair,
    messages,
    pair_of_dialogues,
    prompt_of,
    score,
    text,
    with_system,
)

Record = Mapping[str, Any]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Choices:
    """What a user must or may decide where the data leave it open; the keys of a source in the config.

    Attributes:
        fields: a mapping (`mapping.FieldMapping`) in place of the detection.
        preferred: which of several judgements counts, for PKU-SafeRLHF.
        score: which of several scores counts, for UltraFeedback.
        pairing: how unpaired rows (a reply and a label) with the same prompt are paired: every good reply with every
            bad one, the first of each, or not at all, for a method that takes them as they are.
        ranking: scored replies give all pairs, or only those of neighbours in the order of the scores.
        ties: pairs whose scores are equal or contradict the decision are kept or dropped.
        min_margin: pairs with a smaller margin are dropped.
    """

    fields: Mapping[str, Any] | None = None
    preferred: str | None = None
    score: str | None = None
    pairing: Literal["all", "first", "none"] | None = None
    ranking: Literal["all", "neighbours"] = "all"
    ties: Literal["keep", "drop"] = "keep"
    min_margin: float | None = None

    @classmethod
    def of(cls, settings: Any) -> Choices:
        """The choices among the fields of a source in a config, or of a command's options."""
        return cls(**{row.name: getattr(settings, row.name) for row in dataclasses.fields(cls)})


@dataclass(slots=True)
class Context:
    """What was decided for all records of a source before the first is read.

    Attributes:
        domain: the preferred style of DSP data.
        choices: see there.
        prompt_style, reply_style: how prompts and whole dialogues are written out, if they are.
        parse: the parser that a format made for these choices.
        labels: how often each label or side was preferred, or each label was given.
        single: gets each row of one reply and a label.
        repeats_prompt: whether bare replies begin with the text of the prompt that stands beside them.
        counts: what is counted beside the candidates (`equal scores`, `scores against the decision`).
    """

    domain: str | None = None
    choices: Choices = field(default_factory=Choices)
    prompt_style: transcripts.Style | None = None
    reply_style: transcripts.Style | None = None
    parse: Callable[[Record, Context], Candidates] | None = None
    repeats_prompt: bool = False
    labels: Counter[str] = field(default_factory=Counter)
    single: Callable[[LabelledReply], None] | None = None
    counts: dict[str, int] = field(default_factory=dict)


# ---- prompts ----


def prompt_messages(
    value: Any, context: Context, *, style: transcripts.Style | None = None, roles: Mapping[str, Role] = ROLES
) -> list[Message]:
    """A prompt as turns that end with the user's: text, a transcript that waits for its reply, or messages."""
    if isinstance(value, str):
        words = text(value)
        style = style or context.prompt_style or transcripts.style_of_prompt(words)
        if style is None or not words:
            if transcripts.is_unknown_transcript(words):
                raise UnusableRecord(Reason.NOT_A_DIALOGUE)
            return [Message(role="user", content=words)]
        return transcripts.prompt_turns(style.turns(words))
    value = listed(value)
    return messages([value] if is_turn(value) else value, roles)


def history_messages(value: Any, roles: Mapping[str, Role] = ROLES) -> list[Message]:
    """Earlier turns: messages, or a list of [user, assistant] pairs.

    Raises:
        UnusableRecord: WRONG_FIELDS for anything else.
    """
    if value is None or value == [] or value == "":
        return []
    if not isinstance(value, list | tuple):
        raise UnusableRecord(Reason.WRONG_FIELDS)
    if all(isinstance(turn, dict) for turn in value):
        return messages(value, roles)
    turns: list[Message] = []
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UnusableRecord(Reason.WRONG_FIELDS)
        turns += [Message(role="user", content=text(pair[0])), Message(role="assistant", content=text(pair[1]))]
    return turns


def system_of(record: Record) -> Any:
    """The system text of a prompt: `system` or `system_prompt`; None if both are empty.

    Raises:
        UnusableRecord: WRONG_FIELDS, they say different things.
    """
    given = record.get("system") or None
    other = record.get("system_prompt") or None
    if other is None or given is None or other == given:
        return other if given is None else given
    raise UnusableRecord(Reason.WRONG_FIELDS)


# ---- replies ----


def side(value: Any, roles: Mapping[str, Role] = ROLES) -> str | list[Message]:
    """The value of one of the two replies: its text, or the whole dialogue that it ends."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, dict):
        value = value["messages"] if "messages" in value else [value] if is_turn(value) else listed(value)
    turns = messages(value, roles)
    if turns and all(turn["role"] == "assistant" for turn in turns):
        return turns[0]["content"] if len(turns) == 1 else "\n\n".join(t["content"] for t in turns if t["content"])
    return turns


def decision(
    context: Context,
    prompt: Any,
    chosen: Any,
    rejected: Any,
    *,
    system: Any = None,
    history: Any = None,
    margin: float | None = None,
    style: transcripts.Style | None = None,
    roles: Mapping[str, Role] = ROLES,
) -> PreferencePair:
    """The pair of a decision.

    Args:
        context: of the source.
        prompt: text, a transcript, messages, or None where both replies hold it.
        chosen, rejected: text, a turn, a list of one, or a whole dialogue.
        system, history: what stands before the prompt.
        margin: of the pair.
        style: how the prompt is written, if its format defines it.
        roles: names of speakers.

    Raises:
        UnusableRecord: with the reason.
    """
    better, worse = side(chosen, roles), side(rejected, roles)
    if prompt is None and not history:
        return _pair_with_prompt_inside(context, better, worse, system, margin)
    if not isinstance(better, str) and not isinstance(worse, str) and not history:
        if not _repeats(prompt, better, context, roles):
            raise UnusableRecord(Reason.WRONG_FIELDS)
        return pair_of_dialogues(better, worse, system, margin)
    return pair_of_sides(opening(context, prompt, system, history, style, roles), better, worse, margin)


def opening(
    context: Context,
    prompt: Any,
    system: Any = None,
    history: Any = None,
    style: transcripts.Style | None = None,
    roles: Mapping[str, Role] = ROLES,
) -> list[Message]:
    """System, history and prompt as the turns that a reply answers."""
    if prompt is None:
        raise UnusableRecord(Reason.WRONG_FIELDS)
    turns = prompt_messages(prompt, context, style=style, roles=roles)
    if history:
        turns = history_messages(history, roles) + turns
    if system is not None:
        turns = with_system(turns, system)
    if len(turns) == 1 and turns[0]["role"] == "user":
        return turns
    if turns and not turns[-1]["content"] and turns[-1]["role"] == "user":
        raise UnusableRecord(Reason.EMPTY_PROMPT)
    return prompt_of(turns)


def pair_of_sides(
    prompt: list[Message], better: str | list[Message], worse: str | list[Message], margin: float | None = None
) -> PreferencePair:
    """A pair from an opening and two sides, each a reply to it or a dialogue that repeats it."""
    if isinstance(better, str) and isinstance(worse, str):
        return make_pair(prompt, better, worse, margin)
    whole = [
        [*prompt, Message(role="assistant", content=end)] if isinstance(end, str) else end for end in (better, worse)
    ]
    return pair_of_dialogues(whole[0], whole[1], None, margin)


def _pair_with_prompt_inside(
    context: Context, better: str | list[Message], worse: str | list[Message], system: Any, margin: float | None
) -> PreferencePair:
    if isinstance(better, str) and isinstance(worse, str):
        if context.reply_style is None:
            return _implicit(context, better, worse, system, margin)
        better, worse = context.reply_style.turns(better), context.reply_style.turns(worse)
    if isinstance(better, str) or isinstance(worse, str):
        raise UnusableRecord(Reason.NOT_A_DIALOGUE)
    return pair_of_dialogues(better, worse, system, margin)


def _implicit(context: Context, better: str, worse: str, system: Any, margin: float | None) -> PreferencePair:
    if not better or not worse:
        raise UnusableRecord(Reason.EMPTY_REPLY)
    if better == worse:
        raise UnusableRecord(Reason.IDENTICAL_REPLIES)
    end, certain = prompt_end(better, worse)
    if end == 0:
        raise UnusableRecord(Reason.DIFFERENT_PROMPTS)
    turns = opening(context, better[:end], system)
    if any(transcripts.has_marks(turn["content"]) for turn in turns):
        raise UnusableRecord(Reason.NOT_A_DIALOGUE)  # a transcript in a style that is not known
    if not certain and len(turns) == 1:
        raise UnusableRecord(Reason.UNCLEAR_PROMPT)
    return make_pair(turns, better[end:].strip(), worse[end:].strip(), margin)


def _repeats(prompt: Any, dialogue: list[Message], context: Context, roles: Mapping[str, Role]) -> bool:
    """Whether a dialogue holds the prompt that stands beside it."""
    if isinstance(prompt, str):
        words = text(prompt)
        if any(turn["content"] == words for turn in reversed(dialogue)):
            return True
    held = {" ".join(turn["content"].split()) for turn in dialogue}
    return all(" ".join(turn["content"].split()) in held for turn in prompt_messages(prompt, context, roles=roles))


# ---- scored replies ----


def scored(
    context: Context,
    prompt: Any,
    replies: Sequence[tuple[Any, Any]],
    *,
    best: Literal["highest", "lowest"] = "highest",
    system: Any = None,
    history: Any = None,
    margins: bool = True,
    roles: Mapping[str, Role] = ROLES,
) -> Candidates:
    """The candidate pairs of replies that have scores or ranks: n·(n-1)/2, or n-1 of neighbours.

    Args:
        context: of the source.
        prompt, system, history, roles: as in `decision`.
        replies: each reply with its score.
        best: which score is the best.
        margins: whether the difference of two scores is a margin; never of ranks.
    """
    if len(replies) < 2:
        raise UnusableRecord(Reason.WRONG_FIELDS)
    if len(replies) > MAX_CANDIDATES:
        raise UnusableRecord(Reason.TOO_LONG)
    sides = [_caught(side, reply, roles) for reply, _ in replies]
    scores = [_caught(score, value) for _, value in replies]
    start = None if prompt is None and not history else _caught(opening, context, prompt, system, history, None, roles)
    sign = 1 if best == "highest" else -1
    candidates: Candidates = []
    for one, other in _compared(scores, context.choices.ranking):
        first, second = scores[one], scores[other]
        if isinstance(first, Reason) or isinstance(second, Reason):
            candidates.append(first if isinstance(first, Reason) else second)  # type: ignore[arg-type]
            continue
        order = (first - second) * sign
        if order == 0:
            candidates.append(Reason.NO_PREFERENCE)
            continue
        better, worse = (sides[one], sides[other]) if order > 0 else (sides[other], sides[one])
        if isinstance(start, Reason):
            candidates.append(start)
            continue
        if isinstance(better, Reason) or isinstance(worse, Reason):
            candidates.append(better if isinstance(better, Reason) else worse)  # type: ignore[arg-type]
            continue
        margin = abs(order) if margins and best == "highest" else None
        try:
            if start is None:
                candidates.append(_pair_with_prompt_inside(context, better, worse, system, margin))
            else:
                candidates.append(pair_of_sides(start, better, worse, margin))
        except UnusableRecord as unusable:
            candidates.append(unusable.reason)
    return candidates


def _compared(scores: Sequence[Any], ranking: Literal["all", "neighbours"]) -> Iterable[tuple[int, int]]:
    if ranking == "all":
        return itertools.combinations(range(len(scores)), 2)
    known = [place for place, value in enumerate(scores) if not isinstance(value, Reason)]
    order = sorted(known, key=lambda place: scores[place])
    missing = [place for place, value in enumerate(scores) if isinstance(value, Reason)]
    return itertools.pairwise([*order, *missing])


def _caught(function: Callable[..., Value], *arguments: Any) -> Value | Reason:
    try:
        return function(*arguments)
    except UnusableRecord as unusable:
        return unusable.reason


# ---- margins ----

_SCORES = tuple(
    names
    for word in ("score", "rating", "reward")
    for join in ("_", "-")
    for names in ((f"{word}{join}chosen", f"{word}{join}rejected"), (f"chosen{join}{word}", f"rejected{join}{word}"))
)


@functools.lru_cache(maxsize=1000)
def _score_fields(keys: tuple[Any, ...]) -> tuple[str, str] | None:
    return next((names for names in _SCORES if names[0] in keys and names[1] in keys), None)


def margin_of(record: Record) -> float | None:
    """The margin beside `chosen` and `rejected`: given as such, or as the difference of their two scores."""
    if "margin" in record and (given := _number(record["margin"])) is not None:
        return given
    names = _score_fields(tuple(record))
    if names is None:
        return None
    first, second = record[names[0]], record[names[1]]
    if type(first) is not float or type(second) is not float:
        first, second = _number(first), _number(second)
    if first is None or second is None or not math.isfinite(first - second):
        return None
    return first - second


def _number(value: Any) -> float | None:
    number = _caught(score, value)
    return None if isinstance(number, Reason) else number


def texts_of(value: Any) -> list[str]:
    """All texts of turns in a value, to see whether a field repeats a dialogue."""
    if isinstance(value, str):
        return [" ".join(value.split())]
    if isinstance(value, dict):
        inner = next((value[key] for key in ("content", "value", "parts", "text") if value.get(key) is not None), None)
        if inner is not None and not isinstance(inner, list | dict):
            return texts_of(inner)
        if inner is not None:
            found = _caught(content_text, inner)
            return texts_of(found) if not isinstance(found, Reason) else ["\0"]
        return list(itertools.chain.from_iterable(map(texts_of, value.values())))
    if isinstance(value, list | tuple):
        return list(itertools.chain.from_iterable(map(texts_of, value)))
    return []
