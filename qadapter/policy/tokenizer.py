"""What lies beside an adapter and says how to ask it: the tokenizer of its training, and the training's record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.files.yaml_text import read_yaml
from qadapter.policy.base import TOKENIZER_FILES, load_tokenizer

RECORD = "train.yaml"  # what the command `train` was asked for; its own --config


def training_record(adapter: Path) -> dict[str, Any]:
    """What `train` wrote down beside an adapter; empty for one that was trained otherwise.

    Raises:
        QAdapterError: it is no YAML.
    """
    file = adapter / RECORD
    try:
        content = read_yaml(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise unreadable_record(adapter, error) from error
    return content if isinstance(content, dict) else {}


def unreadable_record(adapter: Path, error: Exception) -> QAdapterError:
    """The refusal of a record whose settings of the base are none."""
    return QAdapterError(
        f"{adapter / RECORD} does not say how to load the base ({' '.join(str(error).split())[:200]}); correct it, or "
        "delete it and give --base and --dtype"
    )


def policy_tokenizer(adapter: Path, of_base: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer to ask a policy with: that of its training, where it lies in the adapter's folder.

    Args:
        adapter: folder that a training wrote. Code that comes with it is never run.
        of_base: what the base has; used where the adapter brings none.

    Raises:
        QAdapterError: the adapter's files are no tokenizer.
    """
    if not any((adapter / name).is_file() for name in TOKENIZER_FILES):
        return of_base
    try:
        own = load_tokenizer(adapter)
    except QAdapterError as error:
        raise QAdapterError(
            f"The tokenizer in {adapter} cannot be loaded ({error}). Delete its files to use the base's, or save the "
            "adapter again."
        ) from error
    if own.pad_token_id is None:
        own.pad_token = own.eos_token or of_base.pad_token
    return own


def difference(own: PreTrainedTokenizerBase, of_base: PreTrainedTokenizerBase) -> str | None:
    """In which way a policy's tokenizer is not its base's, as the end of a sentence; None where it is the same."""
    if own is of_base:
        return None
    parts = []
    if own.chat_template != of_base.chat_template:
        which = (own.chat_template is None, of_base.chat_template is None)
        kinds = {(False, True): "a chat template (the base has none)", (True, False): "no chat template"}
        parts.append(kinds.get(which, "another chat template"))
    if _vocabulary(own) != _vocabulary(of_base):
        parts.append("other tokens")
    elif own.special_tokens_map != of_base.special_tokens_map:
        parts.append("other special tokens")
    return " and ".join(parts) or None


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[Any, Any]:
    return dict(tokenizer.get_vocab())
