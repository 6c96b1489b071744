"""Conversations written out as one text, with a mark before each turn, as turns.

A style is decided for a whole column, never for a single text: a reply that quotes another style's marks stays whole.
Several rows of the table may have one name; they are variants of a style.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qadapter.preferences.pair import Message, Role
from qadapter.preferences.records import Reason
from qadapter.preferences.turns import TOOL_ROLES, UnusableRecord

SPEAKERS: dict[str, Role] = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("assistant", "model", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}


@dataclass(frozen=True, slots=True)
class Style:
    """One way to write a conversation out.

    Attributes:
        name: as users read it.
        starts: matches the beginning of a text in this style.
        answers: found where a text has an assistant's turn.
        turns: the turns of a text; the last one is an empty assistant turn where the text waits for its reply.
        open_end: found at the end of a prompt that waits for its reply.
    """

    name: str
    starts: re.Pattern[str]
    answers: re.Pattern[str]
    turns: Callable[[str], list[Message]]
    open_end: re.Pattern[str]

    def fits(self, text: str) -> bool:
        """Whether a text begins like this style and has an assistant's turn."""
        if "\r" in text:
            text = text.replace("\r\n", "\n")
        return self.starts.match(text) is not None and self.answers.search(text) is not None


# The spellings of HH, the most frequent style, without a detour.
SPEAKERS |= {"Human": "user", "Assistant": "assistant"}


def _message(speaker: str, content: str) -> Message:
    if speaker in SPEAKERS:
        return {"role": SPEAKERS[speaker], "content": content.strip()}
    name = speaker.lower()
    if name not in SPEAKERS:
        raise UnusableRecord(Reason.NOT_TEXT if name in TOOL_ROLES else Reason.WRONG_FIELDS)
    return Message(role=SPEAKERS[name], content=content.strip())


def _strict(turns: list[Message]) -> list[Message]:
    """Turns without an empty system turn; two neighbouring ones of a speaker mean that the marks were misread."""
    if any(a["role"] == b["role"] for a, b in itertools.pairwise(turns)):
        raise UnusableRecord(Reason.NOT_A_DIALOGUE)
    return [turn for turn in turns if turn["role"] != "system" or turn["content"]]


def _marked(name: str, mark: str, user: str, assistant: str, *, between: str, strict: bool = True) -> Style:
    """`<mark> text <between> <mark> text`: each turn begins with the speaker's name.

    Args:
        name: of the style.
        mark: pattern of a mark, `{}` where the speaker stands.
        user, assistant: patterns of the speakers.
        between: pattern of what stands before a mark that is not the first.
        strict: two neighbouring turns of one speaker are refused, not joined.
    """
    split = re.compile(rf"(?:\A\s*|{between})" + mark.format(f"({user}|{assistant})"))
    answer = mark.format(assistant)

    def turns(text: str) -> list[Message]:
        before, *rest = split.split(text)
        if before.strip() or not rest:
            raise UnusableRecord(Reason.NOT_A_DIALOGUE)
        found = [_message(speaker, content) for speaker, content in zip(rest[::2], rest[1::2], strict=True)]
        return _strict(found) if strict else found

    return Style(
        name,
        re.compile(r"\s*" + mark.format(f"(?:{user})")),
        re.compile(between + answer),
        turns,
        re.compile(between + answer + r"\s*\Z"),
    )


def _tagged(name: str, opening: str, closing: str, *, first: str = "", roles: str = r"[A-Za-z_]+") -> Style:
    """`<opening tag with a role> text <closing tag>`: special tokens of a chat template.

    Args:
        name: of the style.
        opening: pattern of the tag that begins a turn; `{}` is the place of the role.
        closing: pattern of the token that ends a turn.
        first: pattern of a token that may stand before everything.
        roles: pattern of a role.
    """
    split = re.compile(opening.format(f"({roles})") + r"[ \t]*\n*")
    start, end = re.compile(rf"\s*(?:{first})?\s*"), re.compile(closing)

    def turns(text: str) -> list[Message]:
        begin = start.match(text)
        before, *rest = split.split(text[begin.end() if begin else 0 :])
        if before.strip() or not rest:
            raise UnusableRecord(Reason.NOT_A_DIALOGUE)
        found = []
        for speaker, content in zip(rest[::2], rest[1::2], strict=True):
            inside, *behind = end.split(content, maxsplit=1)
            if behind and behind[0].strip():
                raise UnusableRecord(Reason.NOT_A_DIALOGUE)
            found.append(_message(speaker, inside))
        return _strict(found)

    answer = opening.format("(?:assistant|model)")
    return Style(
        name,
        re.compile(rf"\s*(?:{first})?\s*" + opening.format("(?:user|system|developer|human|prompter)")),
        re.compile(answer),
        turns,
        re.compile(answer + r"\s*\Z"),
    )


# ---- Llama 2 ----

_LLAMA2_TURN = re.compile(r"\s*(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?=(?:</s>)?\s*(?:<s>\s*)?\[INST\]|\Z)", re.DOTALL)
_LLAMA2_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)


def _llama2(text: str) -> list[Message]:
    turns: list[Message] = []
    position = 0
    while text[position:].strip() not in ("", "</s>"):
        match = _LLAMA2_TURN.match(text, position)
        if match is None:
            raise UnusableRecord(Reason.NOT_A_DIALOGUE)
        request, reply = match.group(1), match.group(2)
        system = _LLAMA2_SYSTEM.match(request)
        if system is not None:
            if turns:
                raise UnusableRecord(Reason.NOT_A_DIALOGUE)
            turns.append(_message("system", system.group(1)))
            request = request[system.end() :]
        turns += [_message("user", request), _message("assistant", reply.strip().removesuffix("</s>"))]
        position = match.end()
        if text.startswith("</s>", position):
            position += len("</s>")
    return _strict(turns)


# ---- Alpaca ----

_TASK = r"Below is an instruction that describes a task"
_STOCK = (
    rf"(?:{_TASK}\. |{_TASK}, paired with an input that provides further context\. )"
    r"Write a response that appropriately completes the request\.\s*"
)
_ALPACA_MARK = re.compile(r"(?:\A|\n\s*)###[ ]?(Instruction|Input|Response):")
_ALPACA_ROLES = {"Instruction": "user", "Input": "user", "Response": "assistant"}


def _alpaca(text: str) -> list[Message]:
    match = re.match(rf"\s*(?:{_STOCK})?", text)
    before, *rest = _ALPACA_MARK.split(text[match.end() if match else 0 :])
    if before.strip() or not rest:
        raise UnusableRecord(Reason.NOT_A_DIALOGUE)
    turns: list[Message] = []
    last = ""
    for part, content in zip(rest[::2], rest[1::2], strict=True):
        if part == "Input":
            if last != "Instruction":
                raise UnusableRecord(Reason.NOT_A_DIALOGUE)
            words = "\n".join(filter(None, (turns[-1]["content"], content.strip())))
            turns[-1] = _message("user", words)
        else:
            turns.append(_message(_ALPACA_ROLES[part], content))
        last = part
    return _strict(turns)


# ---- Vicuna ----

_VICUNA = re.compile(r"(?P<system>.*?)\bUSER:(?P<rest>.*)\Z", re.DOTALL)
_VICUNA_ANSWER = re.compile(r"\sASSISTANT:")


def _vicuna(system: str) -> Style:
    """The style with the text that its conversations begin with."""

    def turns(text: str) -> list[Message]:
        match = _VICUNA.match(text)
        if match is None or match.group("system").strip() != system:
            raise UnusableRecord(Reason.NOT_A_DIALOGUE)
        found = [_message("system", system)] if system else []
        # Where replies end with the token, a USER: inside one is text.
        rest = match.group("rest")
        parts = re.split(r"</s>\s*USER:" if "</s>" in rest else r"\sUSER:", rest)
        for part in parts:
            request, *answer = _VICUNA_ANSWER.split(part, maxsplit=1)
            found.append(_message("user", request))
            if answer:
                found.append(_message("assistant", answer[0].strip().removesuffix("</s>")))
        return _strict(found)

    beginning = re.compile(r"\s*" + re.escape(system) + r"\s*USER:")
    return Style("vicuna", beginning, _VICUNA_ANSWER, turns, re.compile(r"\sASSISTANT:\s*\Z"))


_EXTRA_ID = _marked("extra-id", r"<extra_id_1>{}\n", "User", "Assistant", between=r"\s*")


def _helpsteer(text: str) -> list[Message]:
    return _EXTRA_ID.turns(text if _EXTRA_ID.starts.match(text) else "<extra_id_1>User\n" + text)


# HelpSteer's prompts: the first user's turn has no mark.
EXTRA_ID = dataclasses.replace(_EXTRA_ID, turns=_helpsteer)
HH = _marked("hh", r"{}:", "Human", "Assistant", between=r"\n\n", strict=False)

STYLES: tuple[Style, ...] = (
    HH,
    _marked("dsp", r"## {}:", "Human", "Assistant", between=r"\n\n"),
    _marked("hash", r"### {}:", "Human|User|System", "Assistant", between=r"\n\s*"),
    _marked("hash", r"### {}:", "Human", "Assistant", between=r"\s*"),  # Guanaco: no line end before the mark
    _tagged("chatml", r"<\|im_start\|>{}", r"<\|im_end\|>", first=r"<\|startoftext\|>|<s>|<\|endoftext\|>"),
    Style(
        "llama2",
        re.compile(r"\s*(?:<s>)?\s*\[INST\]"),
        re.compile(r"\[/INST\]"),
        _llama2,
        re.compile(r"\[/INST\]\s*\Z"),
    ),
    _tagged("llama3", r"<\|start_header_id\|>{}<\|end_header_id\|>", r"<\|eot_id\|>", first=r"<\|begin_of_text\|>"),
    _tagged("gemma", r"<start_of_turn>{}", "<end_of_turn>", first="<bos>"),
    _tagged(
        "zephyr",
        r"<\|{}\|>",
        r"</s>|<\|end\|>|<\|endoftext\|>",  # Zephyr, Phi-3, OpenAssistant
        first="<s>",
        roles="system|user|prompter|assistant|tool",
    ),
    Style(
        "alpaca",
        re.compile(rf"\s*(?:{_STOCK})?###[ ]?Instruction:"),
        re.compile(r"\n###[ ]?Response:"),
        _alpaca,
        re.compile(r"\n###[ ]?Response:\s*\Z"),
    ),
    *(
        _marked("user-assistant", r"{}:", f"{user}|{system}", assistant, between=between)
        for between in (r"\n\n", r"\n")
        for user, assistant, system in (
            ("User", "Assistant", "System"),
            ("prompter", "assistant", "system"),
            ("user", "assistant", "system"),
            ("Human", "Assistant", "System"),
            ("Human", "AI", "System"),
            ("USER", "ASSISTANT", "SYSTEM"),
            ("HUMAN", "ASSISTANT", "SYSTEM"),
        )
    ),
)

_ANY_MARK = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(?:user|prompter|assistant)\|>"
    r"|(?:\A|\n)\s*(?:#+ ?)?(?:Human|Assistant|User|Response|HUMAN|USER|AI):|\bASSISTANT:"
)
_FIRST_MARK = re.compile(r"\s*(?:#+ ?)?(?:human|user|prompter|system|instruction) ?:|\s*<[|\w]", re.IGNORECASE)
_OPEN_MARK = re.compile(
    r"(?:\n\s*(?:#+ ?)?(?:assistant|ai|bot|response) ?:|<\|(?:assistant|bot|model)\|>)\s*\Z", re.IGNORECASE
)


def style_of(texts: Sequence[str], *, every: bool = False) -> Style | None:
    """The style of a column's texts (its first ones; blank ones have no say).

    Most texts must begin with the style's first mark and hold the assistant's; in all styles but HH, whose marks are
    unusual enough, every text must begin with it.

    Args:
        texts: of the column.
        every: so it must be for HH too.
    """
    spoken = [text.replace("\r\n", "\n") for text in texts if text.strip()]
    if not spoken:
        return None
    for style in (*STYLES, *_vicuna_of(spoken)):
        most = 2 * sum(map(style.fits, spoken)) > len(spoken)
        if most and ((style is HH and not every) or all(style.starts.match(text) for text in spoken)):
            return style
    return None


def _vicuna_of(texts: Sequence[str]) -> list[Style]:
    beginnings = {match.group("system").strip() if (match := _VICUNA.match(text)) else None for text in texts}
    (first, *others) = beginnings
    return [] if others or first is None else [_vicuna(first)]


def style_of_prompt(text: str) -> Style | None:
    """The style of a single prompt that begins with a first mark and ends with an open assistant's mark."""
    if not text.endswith((":", "]", ">")) and not text.endswith(("assistant", "model")):
        return None
    return next((style for style in STYLES if style.starts.match(text) and style.open_end.search(text)), None)


def has_marks(text: str) -> bool:
    """Whether a text contains a turn mark of any style at the start of a line, or a token of a chat template."""
    return _ANY_MARK.search(text) is not None


def is_unknown_transcript(text: str) -> bool:
    """Whether a prompt that has no known style begins with a speaker's mark and ends with an open assistant's mark."""
    return _FIRST_MARK.match(text) is not None and _OPEN_MARK.search(text) is not None


def prompt_turns(turns: list[Message]) -> list[Message]:
    """The turns of a prompt's transcript without the open assistant's turn at its end."""
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns
