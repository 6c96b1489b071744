"""From settings to models: the frozen base, and on top of it the policy of any method."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qadapter.config.model import LoraSettings, ModelSettings
from qadapter.errors import QAdapterError
from qadapter.policy.adapters import fitted, load_adapter, refuse_config
from qadapter.policy.architectures import refuse_architecture
from qadapter.policy.base import fit_tokenizer, load_config, load_network, load_tokenizer
from qadapter.policy.checkpoint import refuse_idle_options
from qadapter.policy.dial import Dial
from qadapter.policy.files import SETTINGS_FILE, plain_place, saved_dial
from qadapter.policy.guided import GUIDE_FILE, GuidedForCausalLM
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.preferences.template_settings import configured


def load_base(
    model: str | Path, settings: ModelSettings, architecture: Any = AutoModelForCausalLM, **head: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, in evaluation mode, and its tokenizer (padding on the left, as generation needs it).

    Args:
        model: a folder, a GGUF file or a hub id.
        settings: precision, quantization, whether remote code may run; thinking and the chat template's variables. The
            precision of products holds for this process, until another base is loaded.
        architecture: transformers' `Auto…` class of another head on the same body, and that head's settings.

    Raises:
        QAdapterError: the model cannot be reached, is not what its config says, or needs what is not installed.
    """
    torch.set_float32_matmul_precision(settings.matmul_precision)
    where = {"trust_remote_code": settings.trust_remote_code, "revision": settings.revision}
    tokenizer = load_tokenizer(model, **where)  # type: ignore[arg-type]
    network = load_network(
        model,
        architecture=architecture,
        dtype=settings.dtype,
        quantization=quantization_config(settings) if settings.quantization != "none" else None,
        device_map=_place(settings),
        **where,  # type: ignore[arg-type]
        **settings.loading(),
        **head,
    )
    tokenizer = fit_tokenizer(tokenizer, network)
    thoughts = settings.thoughts if settings.thoughts != "score" else None
    variables = settings.chat_template_kwargs
    return network, configured(tokenizer, thinking=settings.thinking, thoughts=thoughts, template=variables)


def check_pretrained(
    settings: ModelSettings, templated_tasks: Sequence[str], adapter: PeftConfig | None = None
) -> None:
    """Before anything is trained: the named model's config and tokenizer are there, and fit evaluation and adapter.

    Args:
        settings: of a pretrained model; its weights are not looked at.
        templated_tasks: evaluation tasks that will be asked with the tokenizer's chat template.
        adapter: what will be put onto it.

    Raises:
        QAdapterError: the model cannot be reached or customised, or its tokenizer has no chat template and tasks need
            one.
    """
    name = str(settings.pretrained)
    try:
        config = load_config(name, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
        refuse_architecture(config, name)
        if adapter is not None:
            skeleton = _skeleton(config, settings)
            refuse_idle_options(skeleton, settings.loading(), name)
            fitted(adapter, skeleton, "lora")
        tokenizer = load_tokenizer(name, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    except QAdapterError as error:
        raise QAdapterError(f"model.pretrained: {error}") from error
    if templated_tasks and not getattr(tokenizer, "chat_template", None):
        raise QAdapterError(
            f"model.pretrained: the tokenizer of {name!r} has no chat template, and "
            f"{', '.join(templated_tasks)} would be asked with one. Name a model tuned for conversation, or ask "
            f"without: evaluation.retention.plain_tasks=[{','.join(templated_tasks)}]"
        )


def _skeleton(config: PretrainedConfig, settings: ModelSettings) -> PreTrainedModel:
    """The model's layers by name, without a number in them.

    Raises:
        QAdapterError: the architecture cannot be made of this config, or in the way that is asked for.
    """
    options = {"trust_remote_code": settings.trust_remote_code, **settings.loading()}
    try:
        with torch.device("meta"):
            network: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    except Exception as error:  # the libraries raise almost every kind here, and all of them are about this config
        raise QAdapterError(
            f"no {config.model_type} model can be made of the config of {settings.pretrained!r} "
            f"({' '.join(str(error).split())[:300]})"
        ) from error
    return network


def lora_config(settings: LoraSettings, task_type: str = "CAUSAL_LM") -> LoraConfig:
    """PEFT's configuration of the adapter.

    Raises:
        QAdapterError: a field changes the base (`adapters.refuse_config`).
    """
    config = LoraConfig(**settings.fields(), task_type=task_type)
    refuse_config(config, "lora")
    return config


def _place(settings: ModelSettings) -> dict[str, int] | str | None:
    """Where to load a model: onto this process's GPU, or, to be split up or without a GPU, into main memory.

    With `device_map: auto`, accelerate spreads it over all devices, unless a launcher has started several processes.
    """
    if settings.device_map is not None and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return settings.device_map
    sharded = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    if sharded or not torch.cuda.is_available():
        return None
    return {"": int(os.environ.get("LOCAL_RANK", "0"))}


def quantization_config(settings: ModelSettings) -> object:
    """The quantization config for transformers: int8, or nf4 with computation in the model's dtype.

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


def load_policy(
    base: PreTrainedModel,
    adapter: str | Path | None,
    dial: Dial | str | None = None,
    *,
    allow_base_mismatch: bool = False,
) -> PreTrainedModel | PeftModel | QAdapterForCausalLM | GuidedForCausalLM:
    """A policy ready to score and to generate.

    Args:
        base: from `load_base`; the adapter is put onto it.
        adapter: folder that a training wrote; None for the base itself.
        dial: where its dial stands, also as its text (`scale=0.5`); as saved with the adapter without it.
        allow_base_mismatch: whether the base may be another one than the adapter was trained on.

    Returns:
        The base, a `PeftModel` (SFT, DPO, replay: as trained), a `GuidedForCausalLM` (VAS, PITA), or a
        `QAdapterForCausalLM` (a Q-Adapter, and every adapter whose dial was moved).

    Raises:
        QAdapterError: the folder holds no adapter, or one that is refused (`adapters.load_adapter`).
    """
    if adapter is None:
        return base
    adapter, dial = Path(adapter), Dial.of(dial)
    allowed = {"allow_base_mismatch": allow_base_mismatch}
    if (adapter / SETTINGS_FILE).is_file():
        policy = QAdapterForCausalLM.from_pretrained(adapter, base_model=base, **allowed).eval()
        policy.dial = dial or policy.dial
        return policy
    if (adapter / GUIDE_FILE).is_file():
        guided = GuidedForCausalLM.from_pretrained(adapter, base, **allowed)
        return guided if dial is None else guided.moved(dial)
    dial = dial or saved_dial(adapter)
    plain = load_adapter(base, plain_place(adapter), allow_base_mismatch=allow_base_mismatch).eval()
    return plain if dial.as_trained else QAdapterForCausalLM.around(plain, dial).eval()
