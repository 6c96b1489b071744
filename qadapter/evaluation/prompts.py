"""A conversation as the token ids that a policy was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from qadapter.preferences.pair import Message
from qadapter.preferences.tokenize import plain_prompt


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """The prompt, up to where a reply begins: by the chat template, or as the plain transcript where there is none."""
    if tokenizer.chat_template is None:
        return _ids(tokenizer(plain_prompt(prompt)))
    return _ids(_templated(tokenizer, list(prompt), add_generation_prompt=True))


def reply_ids(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], reply: str) -> list[int]:
    """The prompt and the reply, up to the end of the reply's turn."""
    if tokenizer.chat_template is None:
        return _ids(tokenizer(f"{plain_prompt(prompt)} {reply}{tokenizer.eos_token or ''}"))
    messages = [*prompt, {"role": "assistant", "content": reply}]
    return _ids(_templated(tokenizer, messages, add_generation_prompt=False))


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[Any], *, add_generation_prompt: bool) -> Any:
    return tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
    )


def _ids(encoding: Any) -> list[int]:
    return list(encoding["input_ids"])
