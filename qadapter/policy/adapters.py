"""The one way to load an adapter, and which adapters there may be: those that only add to a base's layers.

π1 is the base, so an adapter that changes the base's own weights, biases or layers is refused, with the way out. A
folder from elsewhere is checked before PEFT sees it: kind, fields, patterns; and afterwards that each of its tensors
found a place.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import regex
import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapter.errors import QAdapterError, did_you_mean, first_reason
from qadapter.policy.base import read_json_object
from qadapter.policy.fingerprint import refuse_mismatch

Config = TypeVar("Config", bound=PeftConfig)

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

ADDITIVE = (PeftType.LORA, PeftType.LOHA, PeftType.LOKR, PeftType.IA3, PeftType.VERA)
"""Kinds of PEFT's that leave the base as it is: what they add can be switched off."""

# Fields that may differ from their default; of LoRA's, all that do not touch the base.
_FREE = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "target_parameters", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "runtime_config"),
    *("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "init_lora_weights", "ensure_weight_tying"),
    *("alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "decompose_both", "decompose_factor"),
    *("feedforward_modules", "init_ia3_weights", "init_weights", "rank_dropout_scale", "full_matrix", "use_scalar"),
    *("projection_prng_key", "save_projection", "vera_dropout", "d_initial"),
}
# Fields whose values are names, layers and ranks
_SHAPES = {
    *("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_pattern"),
    *("layers_to_transform", "rank_pattern", "alpha_pattern", "r"),
}
_STARTS = (True, False, "gaussian")  # of `init_lora_weights`: the others take their start out of the base's weights
_WAY_OUT = {
    "bias": "set bias to 'none'",
    "layer_replication": "leave it out: the base would have other layers",
    "trainable_token_indices": "leave it out, or train the new tokens' embeddings into the base first",
}
_UNBOUNDED = re.compile(r"\)[*+{]|[*+}][*+{]")  # a repeated group: such patterns can take time without end
_LONGEST_PATTERN = 2_000
_SECONDS = 2.0  # that a pattern may take over all of a model's layers

# Layers that PEFT does not adapt in these architectures, and what it renames in mixtures of experts: their weights are
# one parameter for all experts, which `target_parameters` names.
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_MAMBA_KEEPS = ("out_proj", "conv1d")
_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


# ---- which adapters there may be ------------------------------------------------------------------------------------


def refuse_config(config: PeftConfig, where: str) -> None:
    """Refuse an adapter that is not only added to the base.

    Args:
        config: PEFT's description of it.
        where: whose it is, for the message.

    Raises:
        QAdapterError: a kind or a field that changes the base, or a pattern that could take too long.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        raise QAdapterError(
            f"{where} learns a prompt ({kind}), which moves every position. Use one that changes layers, such as LoRA."
        )
    if config.peft_type not in ADDITIVE:
        raise QAdapterError(
            f"{where} is of the kind {kind}, which is not supported. Use {', '.join(one.value for one in ADDITIVE)}."
        )
    default = type(config)()
    for field in fields(config):
        given = getattr(config, field.name)
        if field.name not in _FREE and given not in (getattr(default, field.name), None, {}, [], False):
            way = _WAY_OUT.get(field.name, "leave it out")
            raise QAdapterError(
                f"{where} has {field.name}={given!r}, which changes the base or its layers, so that the adapter "
                f"switched off would not be the base. To keep it, {way}."
            )
    start = getattr(config, "init_lora_weights", True)
    if start not in _STARTS:
        raise QAdapterError(
            f"{where} has init_lora_weights={start!r}, which takes the adapter's start out of the base's weights, so "
            "that the adapter switched off would not be the base. Use True or 'gaussian'; save a trained one with "
            "save_pretrained(path_initial_model_for_weight_conversion=…), which makes a plain LoRA of it."
        )
    for name in ("lora_alpha", "alpha", "lora_dropout"):
        value = getattr(config, name, 0)
        if not isinstance(value, (int, float)) or not abs(value) <= 1e6:  # NaN is refused too
            raise QAdapterError(f"{where} has {name}={value!r}; expected a number up to 1e6.")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name, None) or {}:
            _refuse_pattern(str(pattern), f"{where}: {name}")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, name, None)
        if isinstance(value, str) and len(value) > _LONGEST_PATTERN:
            raise QAdapterError(
                f"{where} has a {name} of {len(value)} characters; at most {_LONGEST_PATTERN} are read."
            )


def _refuse_pattern(pattern: str, where: str) -> None:
    if len(pattern) > _LONGEST_PATTERN or _UNBOUNDED.search(pattern) or pattern.count("*") + pattern.count("+") > 3:
        raise QAdapterError(
            f"{where} holds the pattern {pattern[:80]!r}, which could take too long. Name layers instead."
        )
    _compiled(pattern, where)


def _compiled(pattern: str, where: str) -> Any:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise QAdapterError(f"{where}: {pattern[:80]!r} is no regular expression ({error}).") from error


def fitted(config: Config, base: PreTrainedModel, where: str = "The adapter") -> Config:
    """An adapter's config for this base: its layers exist, and are those that PEFT can adapt there.

    `all-linear` leaves out layers that PEFT cannot adapt: of a state-space model the projections behind the scan, of a
    mixture of experts the experts, whose weights are no linear layers. A pattern becomes the names that it fits.

    Args:
        config: is not changed.
        base: without adapter.
        where: whose config it is, for messages.

    Raises:
        QAdapterError: as `refuse_config`, or it names layers that the base does not have.
    """
    refuse_config(config, where)
    config = _resolved(copy.deepcopy(config), base, where)
    names = [name for name, _ in base.named_modules() if name]
    given: Any = getattr(config, "target_modules", None)
    if isinstance(given, str):
        if (found := _adaptable(base)) is not None:
            config.target_modules = found  # type: ignore[attr-defined]
    elif given:
        _refuse_absent(given, names, base, where)
    if getattr(config, "target_parameters", None):
        parameters = [name for name, _ in base.named_parameters()]
        _refuse_absent(config.target_parameters, parameters, base, where, "parameters")  # type: ignore[attr-defined]
        if getattr(config, "lora_dropout", 0.0):
            raise QAdapterError(
                f"{where} adapts parameters ({', '.join(sorted(config.target_parameters))}), "  # type: ignore[attr-defined]
                "which LoRA does without dropout only. Set lora_dropout to 0, or adapt layers instead."
            )
    if getattr(config, "modules_to_save", None):
        _refuse_absent(config.modules_to_save, names, base, where, "modules to save")  # type: ignore[attr-defined]
    return config


def adapted(base: PreTrainedModel, config: PeftConfig, where: str = "The adapter") -> PeftModel:
    """A new adapter on a base, which is changed in place: its layers are wrapped.

    Raises:
        QAdapterError: as `fitted`, or PEFT cannot do it.
    """
    config = fitted(config, base, where)
    try:
        return get_peft_model(base, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise QAdapterError(f"{where} does not fit {type(base).__name__}: {first_reason(error)}") from error


def _named(pattern: str, names: Iterable[str], where: str, must: bool) -> list[str]:
    """The names that a pattern fits, found in bounded time."""
    compiled, left, found = _compiled(pattern, where), _SECONDS, []
    for name in names:
        begun = time.monotonic()
        try:
            if compiled.fullmatch(name, timeout=max(left, 1e-3)):
                found.append(name)
        except TimeoutError:
            raise QAdapterError(
                f"{where} is the pattern {pattern[:80]!r}, which takes longer than {_SECONDS:g} s. Name layers instead."
            ) from None
        left -= time.monotonic() - begun
    if must and not found:
        ends = sorted({name.rpartition(".")[2] for name in names} - {str(n) for n in range(1000)})
        if pattern in ends:
            hint = f": a text is a pattern of whole names. Give a list: [{pattern}]"
        else:
            hint = did_you_mean(pattern, ends)
        raise QAdapterError(f"{where} is {pattern[:80]!r}, which fits no layer{hint}")
    return found


def _refuse_absent(
    wanted: Iterable[str], names: Iterable[str], base: PreTrainedModel, where: str, what: str = "layers"
) -> None:
    names = list(names)
    absent = [one for one in wanted if not any(name == one or name.endswith(f".{one}") for name in names)]
    moved = getattr(base.config, "model_type", "")
    if what == "layers":  # PEFT knows the experts' layers by the names that they had
        experts = any("experts" in name for name, _ in base.named_parameters())
        absent = [one for one in absent if not (experts and one.rpartition(".")[2] in _OF_EXPERTS)]
    if absent:
        linear = (nn.Linear,) if what == "layers" else (nn.Module,)
        known = sorted({name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, linear)})
        hint = did_you_mean(absent[0], known if what != "parameters" else {name.rpartition(".")[2] for name in names})
        raise QAdapterError(f"{where} names {what} that {moved or 'the base'} does not have: {', '.join(absent)}{hint}")


def _adaptable(base: PreTrainedModel) -> list[str] | None:
    """The linear layers for `all-linear` where PEFT's own choice does not work; None where it does."""
    kind = getattr(base.config, "model_type", None)
    with_experts = any("experts" in name.split(".") for name, _ in base.named_parameters())
    linear = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    odd = [name for name, module in linear.items() if _routes(module)]
    if kind not in _MAMBA and not with_experts and not odd:
        return None
    head = base.get_output_embeddings()
    left_out = _MAMBA_KEEPS if kind in _MAMBA else _OF_EXPERTS if with_experts else ()
    found = [
        name
        for name, module in linear.items()
        if module is not head and name not in odd and name.rpartition(".")[2] not in left_out
    ]
    if not found:
        raise QAdapterError(f"all-linear finds no layer of {kind} that LoRA can adapt. Name layers in target_modules.")
    return found


def _routes(module: nn.Module) -> bool:
    """Whether it is a linear layer by its class and a router by what it does: Llama 4's returns two tensors."""
    return "router" in type(module).__name__.lower() and type(module).forward is not nn.Linear.forward


# ---- files ----------------------------------------------------------------------------------------------------------


def adapter_place(folder: Path) -> Path:
    """The folder of PEFT's files in what a training wrote: `default` lies in the folder itself, another name below it.

    Raises:
        QAdapterError: there is no adapter, or there are several and none is called `default`.
    """
    if (folder / CONFIG_FILE).is_file():
        return folder
    below = sorted(file.parent for file in folder.glob(f"*/{CONFIG_FILE}")) if folder.is_dir() else []
    if len(below) == 1:
        return below[0]
    if below:
        raise QAdapterError(
            f"{folder} holds several adapters ({', '.join(one.name for one in below)}). Name one of them."
        )
    raise QAdapterError(
        f"{folder} is no adapter: it has no {CONFIG_FILE}; give a folder that training wrote (--output of train)"
    )


def read_config(folder: Path) -> PeftConfig:
    """The config of the adapter in a folder, checked.

    Args:
        folder: with `adapter_config.json` in it.

    Raises:
        QAdapterError: it cannot be read, or describes an adapter that is refused (`refuse_config`).
    """
    file = folder / CONFIG_FILE
    content = read_json_object(file)
    given = str(content.get("peft_type"))
    known = {one.value: one for one in ADDITIVE}
    if given not in known:
        raise QAdapterError(f"{file}: peft_type is {given!r}, which is not supported; expected {', '.join(known)}.")
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[known[given]]
    names = {field.name for field in fields(kind)}
    foreign = sorted(
        name for name, value in content.items() if name not in names and value not in (None, False, [], {})
    )
    if foreign:
        raise QAdapterError(
            f"{file} has fields that the installed PEFT does not know ({', '.join(foreign)}), so that it would be "
            "another adapter. Update PEFT, or remove them if they mean nothing."
        )
    own = {name: value for name, value in content.items() if name in names and name != "peft_type"}
    _refuse_types(own, get_type_hints(kind), file)
    try:
        config = kind(**{name: value for name, value in own.items() if value is not None or name not in ("task_type",)})
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise QAdapterError(f"{file} cannot be read: {first_reason(error)}") from error
    refuse_config(config, f"The adapter in {folder}")
    return config


def _refuse_types(content: Mapping[str, Any], hints: Mapping[str, Any], file: Path) -> None:
    """Refuse lists, mappings and ranks that are something else; PEFT would fail on them somewhere."""
    for name in _SHAPES & content.keys() & hints.keys():
        if content[name] is None:
            continue
        try:
            TypeAdapter(hints[name]).validate_python(content[name], strict=True)
        except ValidationError as error:
            raise QAdapterError(
                f"{file}: {name} is {content[name]!r}: {error.errors()[0]['msg']}. Save the adapter again."
            ) from error


def base_of(folder: Path) -> str | None:
    """The base that an adapter's own files name; None where they name none."""
    place = read_json_object(adapter_place(folder) / CONFIG_FILE).get("base_model_name_or_path")
    return str(place) if place else None


def load_adapter(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    name: str = "default",
    *,
    is_trainable: bool = False,
    allow_base_mismatch: bool = False,
) -> PeftModel:
    """Put an adapter onto a base, or beside the adapters that are there.

    Args:
        model: is changed in place.
        folder: with `adapter_config.json` and safetensors weights.
        name: what to call it.
        is_trainable: whether it is to be trained on.
        allow_base_mismatch: whether the base may be another one than the adapter was trained on.

    Raises:
        QAdapterError: weights of another kind, an adapter that is refused, one that does not fit the base or was
            trained on another one, or one whose file lacks tensors, holds others, or holds NaN.
    """
    where = f"The adapter in {folder}"
    if not (folder / ADAPTER_FILE).is_file():
        raise QAdapterError(
            f"{folder} has no {ADAPTER_FILE}, and no other kind of weight file is loaded (a pickle can run code). "
            "Save the adapter as safetensors."
        )
    weights = _weights(folder / ADAPTER_FILE)
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = _resolved(read_config(folder), bare, where)
    if not allow_base_mismatch:
        refuse_mismatch(bare, folder)
    config.inference_mode = not is_trainable
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            if is_trainable:
                model.set_requires_grad(name)
        else:
            kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type), PeftModel)
            model = kind(model, config, name)
        outcome: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
    except QAdapterError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise QAdapterError(
            f"{where} does not fit this base ({first_reason(error)}). Use the base that it was trained on."
        ) from error
    _refuse_other_tensors(model, outcome, name, where)
    if not is_trainable:
        model.eval()
    return model


def set_adapter_tensors(model: PeftModel, file: Path, name: str) -> None:
    """Put saved weights into an adapter that is there already.

    Raises:
        QAdapterError: the file is missing, damaged, or holds weights of another adapter.
    """
    if not file.is_file():
        raise QAdapterError(f"{file} is missing. Give a checkpoint folder that the trainer wrote.")
    outcome: Any = set_peft_model_state_dict(model, _weights(file), adapter_name=name)
    if outcome.unexpected_keys:
        raise QAdapterError(
            f"{file} holds weights for layers that this adapter does not have, such as {outcome.unexpected_keys[0]}. "
            "Use the adapter config and the base it was trained with."
        )


def _weights(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(file), framework="pt"):
            pass
        weights: dict[str, Tensor] = load_file(str(file))
    except Exception as error:  # safetensors' own error is no subclass of another
        raise QAdapterError(f"{file} is damaged ({first_reason(error)}). Save the adapter again.") from error
    for key, value in weights.items():
        if not value.is_floating_point():
            raise QAdapterError(
                f"{file} holds integers ({key}), which are packed weights without their scales. Save the adapter again."
            )
        if not bool(torch.isfinite(value.float()).all()):
            raise QAdapterError(f"{file} holds NaN or infinite weights ({key}). Train the adapter again.")
    return weights


def _resolved(config: Config, base: PreTrainedModel, where: str) -> Config:
    """`config` with its patterns replaced by the names that they fit, in bounded time."""
    names = [name for name, _ in base.named_modules() if name]
    for field in ("target_modules", "exclude_modules"):
        value = getattr(config, field, None)
        if isinstance(value, str) and value.lower() != "all-linear":
            setattr(config, field, _named(value, names, f"{where}: {field}", field == "target_modules"))
    return config


def _refuse_other_tensors(model: PeftModel, outcome: Any, name: str, where: str) -> None:
    """Refuse a file that does not hold just this adapter's weights: layers without theirs would be random."""
    part, own = f".{name}", PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(model.peft_config[name].peft_type)]
    missing = [
        key
        for key in outcome.missing_keys
        if (key.endswith(part) or f"{part}." in key) and (own in key or "modules_to_save" in key)
    ]
    found = [
        f"{len(keys)} tensors {fault} ({', '.join(sorted(keys)[:3])}{' …' if len(keys) > 3 else ''})"
        for keys, fault in ((missing, "are missing"), (outcome.unexpected_keys, "fit nowhere"))
        if keys
    ]
    if found:
        raise QAdapterError(
            f"{where} does not fit: {'; '.join(found)}. Layers without their weights would be random. Use the adapter "
            "with the base and the config that it was trained with."
        )
