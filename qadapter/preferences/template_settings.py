"""Settings of a chat template: thinking on or off, thoughts scored or left out, further variables.

The settings live in the tokenizer, so that everything that renders with it agrees, here and in other programs, and
so that they are saved with an adapter: `configured` writes the values into the chat template as defaults (a request can
still name others), and notes in the tokenizer's own config whether thoughts of replies are left out.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.preferences.render import RenderError, prompt_text
from qadapter.preferences.thoughts import NOTE, opened_in

ThoughtsChoice = Literal["score", "leave-out"]

SWITCHES = ("enable_thinking", "thinking")
"""Variables with which chat templates turn thinking on and off."""

_OURS = ("messages", "add_generation_prompt", "tools", "documents", "chat_template", "tokenize", "conversation")


def configured(
    tokenizer: PreTrainedTokenizerBase,
    *,
    thinking: bool | None = None,
    thoughts: ThoughtsChoice | None = None,
    template: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """A tokenizer with these settings: the one given if nothing is set, else a copy.

    Args:
        tokenizer: with a chat template, unless nothing is set.
        thinking: on or off; None leaves it to the template. Off closes a thought that the generation prompt opens.
        thoughts: `leave-out` drops the thoughts of replies before they are trained on or scored; None as it was.
        template: further variables of the chat template (`chat_template_kwargs`).

    Raises:
        QAdapterError: there is no chat template, it does not know a variable, or another choice for `thoughts`.
    """
    if thoughts not in (None, "score", "leave-out"):
        raise QAdapterError(f"thoughts is {thoughts!r}; expected 'score' or 'leave-out'")
    values = {**(template or {}), **switches(tokenizer, thinking, template or {})}
    refuse_unknown(tokenizer, values)
    if thoughts is None and not values and thinking is not False:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if thoughts is not None:
        tokenizer.init_kwargs[NOTE] = thoughts
    if tokenizer.chat_template is not None:
        if values:
            _change(tokenizer, lambda text: _defaults(values) + text)
        if thinking is False:
            _close_opened(tokenizer)
    return tokenizer


def switches(
    tokenizer: PreTrainedTokenizerBase, thinking: bool | None, given: Mapping[str, Any] = {}
) -> dict[str, bool]:
    """The template's own variable for thinking on or off, with its value.

    Raises:
        QAdapterError: thinking is to be on or off, and the template has no such variable; off is fine then where it
            opens no thought anyway, and where it does, the thought is closed. Or `given` says the opposite.
    """
    if thinking is None:
        return {}
    if named := [name for name in SWITCHES if name in given]:
        if bool(given[named[0]]) != thinking:
            raise QAdapterError(
                f"thinking is turned {'on' if thinking else 'off'}, but {named[0]} of the template's variables is "
                f"{given[named[0]]!r}; give one of them"
            )
        return {}
    known = [name for name in SWITCHES if name in variables(tokenizer)]
    if not known and thinking:
        raise QAdapterError(
            "thinking is turned on, but the chat template has no switch for it (enable_thinking or thinking); leave "
            "the setting out"
        )
    return dict.fromkeys(known, thinking)


def refuse_unknown(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> None:
    """Refuse variables that the chat template would ignore.

    `enable_thinking: false` is taken by every template: a template without the switch does not think.

    Raises:
        QAdapterError: a name that the template does not have, or a value that it cannot be given.
    """
    known = variables(tokenizer)
    for name, value in values.items():
        if name in _OURS:
            raise QAdapterError(f"chat_template_kwargs: {name} is set by the renderer; leave it out")
        if name not in known and not (name in SWITCHES and value is False):
            raise QAdapterError(
                f"chat_template_kwargs: the chat template has no variable {name!r}, so it would make no difference; "
                "leave it out"
                if known
                else f"chat_template_kwargs: there is no chat template to give {name!r} to; leave it out"
            )
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise QAdapterError(f"chat_template_kwargs: {name} is not a JSON value ({error})") from error


def variables(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Every name in the chat template; what a template does not name it cannot use."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return frozenset(re.findall(r"[A-Za-z_]\w*", " ".join(texts)))


def _change(tokenizer: PreTrainedTokenizerBase, change: Callable[[str], str]) -> None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: change(text) for name, text in template.items()}
    else:
        tokenizer.chat_template = change(template)


def _defaults(values: Mapping[str, Any]) -> str:
    """Jinja that gives variables a value where the caller gives none; trim_blocks eats the newline at its end."""
    parts = [f"{{% if {n} is undefined %}}{{% set {n} = {_literal(v)} %}}{{% endif %}}" for n, v in values.items()]
    return "".join(parts) + "\n"


def _literal(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _close_opened(tokenizer: PreTrainedTokenizerBase) -> None:
    """Close the thought that the template opens for generation although thinking is off."""
    try:
        _, thought = opened_in(prompt_text(tokenizer, [{"role": "user", "content": "Some question"}]))
    except RenderError:  # said for each row
        return
    if thought is None or thought.closed:
        return
    off = " and ".join(f"not ({name} is defined and {name})" for name in SWITCHES)
    tail = f"{{% if add_generation_prompt and {off} %}}{{{{ {_literal(thought.ended)} }}}}{{% endif %}}"
    _change(tokenizer, lambda text: text.removesuffix("\n") + tail)
