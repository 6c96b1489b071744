"""A prompt as the token ids that a policy was trained on."""

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
    templated: Any = tokenizer.apply_chat_template(
        list(prompt),  # type: ignore[arg-type]
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
    )
    return _ids(templated)


def _ids(encoding: Any) -> list[int]:
    return list(encoding["input_ids"])
