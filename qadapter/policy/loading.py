"""From folders to models: the frozen base, and a policy on top of it, of whatever method."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.policy.files import ADAPTER_FILE, SETTINGS_FILE
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.preferences.template_settings import configured


def load_base(
    model: str | Path, settings: ModelSettings, architecture: Any = AutoModelForCausalLM, **head: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, in evaluation mode, and its tokenizer (padding on the left, as generation needs it).

    Args:
        model: a folder or a hub id.
        settings: precision, quantization, whether remote code may run; thinking and the chat template's variables.
        architecture: transformers' `Auto…` class of another head on the same body, and that head's settings.

    Raises:
        QAdapterError: the model cannot be reached, or its quantization is not installed.
    """
    quantization = None
    if settings.quantization != "none":
        quantization = quantization_config(settings)
    options = {"trust_remote_code": settings.trust_remote_code, "revision": settings.revision}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", **options)
        network = architecture.from_pretrained(
            model,
            dtype=getattr(torch, settings.dtype),
            quantization_config=quantization,
            device_map=_place(),
            use_safetensors=True,
            **options,
            **head,
        )
    except OSError as error:
        raise QAdapterError(_not_loaded(model, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    thoughts = settings.thoughts if settings.thoughts != "score" else None
    variables = settings.chat_template_kwargs
    return network.eval(), configured(tokenizer, thinking=settings.thinking, thoughts=thoughts, template=variables)


def check_pretrained(settings: ModelSettings, templated_tasks: Sequence[str]) -> None:
    """Before anything is trained: the named model's config and tokenizer are there, and fit the evaluation.

    Args:
        settings: of a pretrained model; its weights are not looked at.
        templated_tasks: evaluation tasks that will be asked with the tokenizer's chat template.

    Raises:
        QAdapterError: the model cannot be reached, or its tokenizer has no chat template and tasks need one.
    """
    name = str(settings.pretrained)
    options = {"trust_remote_code": settings.trust_remote_code, "revision": settings.revision}
    try:
        AutoConfig.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise QAdapterError(f"model.pretrained: {_not_loaded(name, error)}") from error
    if templated_tasks and not getattr(tokenizer, "chat_template", None):
        raise QAdapterError(
            f"model.pretrained: the tokenizer of {name!r} has no chat template, and "
            f"{', '.join(templated_tasks)} would be asked with one. Name a model tuned for conversation, or ask "
            f"without: evaluation.retention.plain_tasks=[{','.join(templated_tasks)}]"
        )


def _not_loaded(model: object, error: Exception) -> str:
    return (
        f"the model {str(model)!r} could not be loaded ({str(error).splitlines()[0]}); give a folder with "
        "safetensors weights or a hub id, and for a gated model set HF_TOKEN"
    )


def _place() -> dict[str, int] | None:
    """Where to load a model: onto this process's GPU, or, to be split up or without a GPU, into main memory."""
    sharded = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    if sharded or not torch.cuda.is_available():
        return None
    return {"": int(os.environ.get("LOCAL_RANK", "0"))}


def quantization_config(settings: ModelSettings) -> object:
    """How transformers is told to hold a base in fewer bits: int8, or nf4 computed in the model's dtype.

    Raises:
        QAdapterError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401  # only asked whether it is there: transformers uses it
    except ImportError as error:
        raise QAdapterError(
            f"model.quantization is {settings.quantization}, which needs bitsandbytes; "
            "install it (pip install bitsandbytes) or set model.quantization to none"
        ) from error
    from transformers import BitsAndBytesConfig

    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, settings.dtype)
    )


def load_policy(base: PreTrainedModel, adapter: Path | None) -> PreTrainedModel | PeftModel:
    """A policy ready to score and to generate.

    Args:
        base: from `load_base`; the adapter is put onto it.
        adapter: folder that a training wrote; None for the base itself.

    Returns:
        The base, a `PeftModel` (SFT, DPO, replay), or a `QAdapterForCausalLM`, whichever the folder holds.

    Raises:
        QAdapterError: the folder has no safetensors weights.
    """
    if adapter is None:
        return base
    if not (adapter / ADAPTER_FILE).is_file():
        raise QAdapterError(
            f"{adapter} has no {ADAPTER_FILE}, and no other kind of weight file is loaded (a pickle can run code). "
            "Save the adapter as safetensors."
        )
    if (adapter / SETTINGS_FILE).is_file():
        return QAdapterForCausalLM.from_pretrained(adapter, base_model=base).eval()
    return PeftModel.from_pretrained(base, adapter).eval()
