"""From messages to text: the one place that writes prompts and replies, for training, generation, server and lm-eval.

What a policy is asked with is the truth: a reply is trained and scored behind exactly the text that generation starts
from (the chat template with `add_generation_prompt`). Many templates write a finished conversation otherwise than they
open a turn; `rendered` finds the reply's form behind the generation prompt, or says why there is none:

- the finished conversation begins with the generation prompt: the reply is what follows (the usual case);
- the template writes the prompt differently once a reply follows (a system text before the last user turn only,
  thoughts dropped from turns): the generation prompt, then what the template writes for the reply and its end;
- the generation prompt opens a thought (`<think>\\n`): a reply with a thought continues it; one without has no form;
- the template drops the thought of a finished reply: the reply is written whole, as a model writes it.

A reply ends with the first special token that the template puts behind an assistant's turn. What follows is never
scored, and generation ends at that token. A template that puts no special token there gets the tokenizer's
end-of-sequence token, because generation has to end somewhere.

Without a chat template, a conversation is rendered as the plain transcript that HH-RLHF uses ("\\n\\nHuman: …\\n\\n
Assistant:"), a space and the reply follow, and the end-of-sequence token closes it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.preferences import thoughts
from qadapter.preferences.pair import Message

_SPEAKERS = {"system": "System", "developer": "System", "user": "Human", "assistant": "Assistant"}
_MARK = "Rendered reply"
_ends: weakref.WeakKeyDictionary[Any, tuple[Any, TurnEnd]] = weakref.WeakKeyDictionary()


class RenderError(QAdapterError):
    """These messages have no rendering with this tokenizer; the text is the reason."""


@dataclass(frozen=True)
class TurnEnd:
    """What closes an assistant's turn.

    Attributes:
        text: as it is written; empty for a tokenizer without an end-of-sequence token.
        token: its id; None where the template closes turns with ordinary text.
    """

    text: str
    token: int | None


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **template: Any) -> str:
    """The text that generation starts from.

    Args:
        tokenizer: its chat template is used if it has one.
        messages: the conversation so far.
        template: variables for the chat template, such as `enable_thinking`.

    Raises:
        RenderError: the template refuses the messages, or they hold half a surrogate pair.
    """
    if tokenizer.chat_template is None:
        return _encodable(plain_prompt(messages))
    return _templated(tokenizer, messages, True, template)


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], reply: str, **template: Any
) -> tuple[str, str]:
    """Prompt and reply as text: what generation starts from, and what a policy should write behind it.

    Args:
        tokenizer, messages, template: as in `prompt_text`.
        reply: the assistant's answer, without its end.

    Returns:
        The prompt, the same text that `prompt_text` gives; and the reply up to the end of the turn.

    Raises:
        RenderError: as `prompt_text`, or the template has no form for this reply behind its generation prompt.
    """
    prompt = prompt_text(tokenizer, messages, **template)
    reply = _encodable(reply)
    if thoughts.left_out(tokenizer):
        reply = thoughts.without(reply)
    if not reply.strip():
        raise RenderError("the reply is empty")
    end = turn_end(tokenizer)
    if tokenizer.chat_template is None:
        return prompt, _closed(f" {reply}", end)
    whole = _templated(tokenizer, [*messages, _assistant(reply)], False, template)
    behind = whole[len(prompt) :] if whole.startswith(prompt) else None
    if behind is not None and (stop := _end_of(reply, behind)) is not None:
        return prompt, _cut(behind, stop, end)
    return prompt, _otherwise(tokenizer, messages, reply, prompt, whole, end, template)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """What closes an assistant's turn in this tokenizer's chat template; the end-of-sequence token without one."""
    template = tokenizer.chat_template
    eos = TurnEnd(str(tokenizer.eos_token or ""), getattr(tokenizer, "eos_token_id", None))
    if template is None:
        return eos
    known = _ends.get(tokenizer)
    if known is None or known[0] != template:
        known = (template, _find_end(tokenizer) or eos)
        _ends[tokenizer] = known
    return known[1]


def end_ids(tokenizer: PreTrainedTokenizerBase, *further: int | Iterable[int] | None) -> list[int]:
    """Token ids that end a reply: the template's end of a turn, the tokenizer's end of sequence, and further ones.

    Args:
        tokenizer: the policy's.
        further: ids or lists of them, such as those of the model's generation config.
    """
    found: set[int] = set()
    for value in (turn_end(tokenizer).token, tokenizer.eos_token_id, *further):
        if value is not None:
            found |= {int(value)} if isinstance(value, int) else {int(one) for one in value}
    return sorted(found)


def plain_prompt(messages: Sequence[Message]) -> str:
    """The transcript a conversation is rendered as where there is no chat template; it ends with "Assistant:"."""
    turns = [f"\n\n{_SPEAKERS[turn['role']]}: {turn['content']}" for turn in messages]
    return "".join(turns) + "\n\nAssistant:"


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the tokens that stand outside the ordinary vocabulary, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {str(token) for token in added.values()} | {str(t) for t in getattr(tokenizer, "all_special_tokens", [])}
    return sorted((text for text in found if text.strip()), key=len, reverse=True)


# ---- behind the generation prompt


def _otherwise(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    reply: str,
    prompt: str,
    whole: str,
    end: TurnEnd,
    template: Mapping[str, Any],
) -> str:
    """The reply's form if a finished conversation does not simply continue after the generation prompt."""
    mark = _MARK
    while any(mark in text for text in (prompt, whole)):
        mark += "."
    marked = _templated(tokenizer, [*messages, _assistant(mark)], False, template)
    head, found, tail = marked.partition(mark)
    if not found:
        raise RenderError("the chat template rewrites or drops what the assistant says")
    opening = _opening(tokenizer, messages, prompt, template)
    header, thought = thoughts.opened_in(opening)
    own = thoughts.split(reply)
    if own is not None and thought is not None and thought.closed:
        raise RenderError(
            "the generation prompt closes the thought (thinking is off) and the reply brings one: set "
            "`thoughts: leave-out`, or turn thinking on"
        )
    if not head.rstrip().endswith(header.rstrip()) and not thoughts.without(head).rstrip().endswith(header.rstrip()):
        raise RenderError(
            f"the chat template opens an answer with {_shown(opening)} and writes a finished one behind "
            f"{_shown(head[-len(opening) - 20 :])}"
        )
    if thought is not None and not thought.closed:
        if own is None:
            raise RenderError(
                f"the generation prompt opens a thought ({_shown(opening)}) and the reply has none: set "
                "`thinking: false`, or give replies with their thoughts"
            )
        body = thought.continued_by(reply)
        return _cut(body + tail, len(body), end)
    written = whole[len(head) : len(whole) - len(tail)] if whole.startswith(head) and whole.endswith(tail) else None
    if own is not None:
        written = reply.strip()  # the template drops the thought, the model writes it
    if written is None or _squeezed(written) != _squeezed(reply):
        raise RenderError("the chat template rewrites what the assistant says: it would be trained on something else")
    return _cut(written + tail, len(written), end)


def _opening(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: str, template: Mapping[str, Any]
) -> str:
    """What the generation prompt adds to the conversation: the header of an answer, perhaps an opened thought."""
    closed = _templated(tokenizer, messages, False, template)
    return prompt[len(closed) :] if prompt.startswith(closed) else ""


def _cut(text: str, stop: int, end: TurnEnd) -> str:
    """`text` up to the end of the turn, which is looked for behind `stop`."""
    at = text.find(end.text, stop) if end.text else -1
    return text[: at + len(end.text)] if at >= 0 else _closed(text[:stop], end)


def _closed(text: str, end: TurnEnd) -> str:
    return text if text.endswith(end.text) else text + end.text


def _end_of(reply: str, text: str) -> int | None:
    """Where the reply ends in a text, blind to white space; None if it is not there."""
    bare = reply.strip()
    if (at := text.find(bare)) >= 0:
        return at + len(bare)
    places = [place for place, character in enumerate(text) if not character.isspace()]
    wanted = _squeezed(reply)
    at = "".join(text[place] for place in places).find(wanted)
    return places[at + len(wanted) - 1] + 1 if at >= 0 and wanted else None


def _squeezed(text: str) -> str:
    return "".join(text.split())


# ---- ends of turns


def _find_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd | None:
    """The end of a turn that the chat template writes; None if it writes none."""
    asked: list[Message] = [{"role": "user", "content": "Some question"}]
    answered = [*asked, _assistant(_MARK)]
    try:
        tail = _templated(tokenizer, answered, False, {}).partition(_MARK)[2]
        if (found := _first_special(tokenizer, tail)) is not None:
            return found
        if tail.strip():
            return TurnEnd(tail.rstrip(), None)
        further: list[Message] = [*answered, {"role": "user", "content": "Another"}]
        between = _templated(tokenizer, further, False, {}).partition(_MARK)[2]
        found = _first_special(tokenizer, between)
        opener = _templated(tokenizer, asked, False, {}).partition(asked[0]["content"])[0]
    except RenderError:
        return None
    if found is None or between[: between.index(found.text)].strip() or found.text in opener:
        return None  # nothing there, or what opens the next turn
    return found


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> TurnEnd | None:
    places = [(at, -len(token), token) for token in special_texts(tokenizer) if (at := text.find(token)) >= 0]
    if not places:
        return None
    token = min(places)[2]
    found: Any = tokenizer.convert_tokens_to_ids(token)
    return TurnEnd(token, int(found))


# ---- the template itself


def _templated(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], open_turn: bool, template: Mapping[str, Any]
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=open_turn, **dict(template)
        )
    except Exception as error:  # a template is a program, and may refuse a conversation by any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RenderError(f"the chat template refuses these messages: {reason[:300]}") from error
    return _encodable(str(text))


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RenderError("the text holds half a surrogate pair, which no tokenizer can read") from error
    return text


def _assistant(reply: str) -> Message:
    return {"role": "assistant", "content": reply}


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"…{text[-60:]}")
