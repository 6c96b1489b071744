"""What a checkpoint must not be: packed without a name for it, short of tensors, or more than a base.

Called by `qadapter.policy.base.load_network`, before and after transformers reads the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from qadapter.errors import QAdapterError

# Buffers that old checkpoints hold and that are computed anew: nothing is lost with them
_DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
_NAMED = 3  # tensors that an error names
_LOOKED_AT, _ENOUGH = 256, 8  # weights of a matrix that show whether it holds whole numbers


def refuse_unknown_quantization(config: PretrainedConfig, model: str | Path, asked: object | None) -> None:
    """Refuse what transformers would load as if it were not quantised, and two quantisations at once."""
    own = getattr(config, "quantization_config", None)
    if own is None:
        return
    if not isinstance(own, dict):
        own = own.to_dict() if hasattr(own, "to_dict") else {}
    if not own.get("quant_method") and not own.get("load_in_8bit") and not own.get("load_in_4bit"):
        raise QAdapterError(
            f"the config of the model {str(model)!r} has a quantization_config that names no quant_method. Correct it, "
            "or remove it if the weights are not quantised."
        )
    method = str(getattr(own.get("quant_method"), "value", own.get("quant_method")))
    if own.get("load_in_8bit") or own.get("load_in_4bit"):  # configs of before there was a name for it
        method = "bitsandbytes"
    known = [*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"]
    if method not in known:
        raise QAdapterError(
            f"the model {str(model)!r} is quantised by {method!r}, which transformers does not know; it reads "
            f"{', '.join(sorted(known))}"
        )
    if asked is not None:
        raise QAdapterError(
            f"the model {str(model)!r} is quantised already (by {method}), so it cannot be quantised again. Leave "
            "quantization at none, or give the model in full precision."
        )


def refuse_token_ids(content: Mapping[str, Any], file: Path) -> None:
    """Refuse end, padding and first tokens that are no token ids."""
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = content.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
            raise QAdapterError(f"{file}: {name} is {value!r}; expected a token id, or a list of them.")


def with_adapter(model: str | Path) -> QAdapterError:
    """The refusal of a base that holds an adapter of its own: π1 would not be what the base's weights say."""
    return QAdapterError(
        f"the model {str(model)!r} holds an adapter too (adapter_config.json), which transformers would put onto it. "
        "Give a folder with the model alone, or one into which the adapter was merged."
    )


def refuse_own_adapter(network: PreTrainedModel, model: str | Path) -> None:
    """Refuse a base that came with an adapter of its own."""
    if getattr(network, "_hf_peft_config_loaded", False):
        raise with_adapter(model)


def refuse_whole_numbers(network: PreTrainedModel, model: str | Path) -> None:
    """Refuse matrices of whole numbers: packed weights that were read without their scales."""
    if getattr(network, "quantization_method", None) is not None:
        return
    odd = []
    for name, weight in network.named_parameters():
        if weight.ndim < 2 or weight.is_meta or not weight.is_floating_point():
            continue
        some = weight.detach()[len(weight) // 2].flatten()[:_LOOKED_AT].float()
        if len(some) >= _ENOUGH and bool((some == some.round()).all()) and float(some.abs().max()) > 1:
            odd.append(name)
    if odd:
        raise QAdapterError(
            f"the checkpoint {str(model)!r} has {len(odd)} matrices of whole numbers ({_some(odd)}), which are packed "
            "weights without their scales. Give the model in full precision, or with the quantization_config that it "
            "was packed with."
        )


def refuse_idle_options(network: PreTrainedModel, options: Mapping[str, Any], model: str | Path) -> None:
    """Refuse options of `from_pretrained` that this model has no use for.

    Raises:
        QAdapterError: an implementation of experts for a model without experts.
    """
    given = options.get("experts_implementation")
    if given is not None and not any("experts" in name for name, _ in network.named_modules()):
        raise QAdapterError(
            f"experts_implementation is {given!r}, but the model {str(model)!r} has no experts. Leave it out."
        )


def refuse_other_tensors(network: PreTrainedModel, report: Any, model: str | Path, causal: bool) -> None:
    """Refuse a checkpoint that is not what the architecture holds: the rest would be random.

    Args:
        network: as loaded.
        report: transformers' loading report. It counts tied weights as there.
        model: for the message.
        causal: whether the head is the checkpoint's own; another one is new, and the checkpoint's is left over.
    """
    body = "" if causal else f"{network.base_model_prefix}."
    missing = sorted(name for name in report["missing_keys"] if name.startswith(body))
    unexpected = sorted(name for name in report["unexpected_keys"] if not name.endswith(_DERIVED))
    if not causal:
        head = {f"{name.partition('.')[0]}." for name in ("lm_head.weight", "embed_out.weight", "output.weight")}
        unexpected = [name for name in unexpected if not name.startswith(tuple(head))]
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    problems = [
        f"{len(names)} tensors {fault} ({_some(names)})"
        for names, fault in ((missing, "are missing"), (unexpected, "fit nowhere"), (mismatched, "have another shape"))
        if names
    ]
    problems += [str(message) for message in report.get("error_msgs") or []]
    if problems:
        raise QAdapterError(
            f"the checkpoint {str(model)!r} does not fit {type(network).__name__}: {'; '.join(problems)}. Layers "
            "without their weights would be random, so nothing was done. Save the model again with save_pretrained."
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")
