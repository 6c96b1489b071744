"""Adapters put into the base's weights: W + Σ share_i · ΔW_i, for every kind of adapter that this project loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from qadapter.errors import QAdapterError

_AFFINE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm)


@torch.no_grad()
def merge_into_base(peft_model: PeftModel, shares: Mapping[str, float]) -> PreTrainedModel:
    """Change the base's weights in place and take PEFT's layers away.

    One layer at a time is kept twice. PEFT computes each ΔW; it is then taken `share` times.

    Args:
        peft_model: is not usable afterwards.
        shares: adapter → how much of it; those not named are left out.

    Returns:
        The base, now with the adapters in it.

    Raises:
        QAdapterError: a trained copy of a module that cannot be interpolated, or an adapter's bias on a layer that has
            none.
    """
    layers: dict[int, list[BaseTunerLayer]] = {}
    _refuse_bias_without_place(peft_model, shares)
    for module in peft_model.modules():
        if isinstance(module, BaseTunerLayer):
            layers.setdefault(id(module.get_base_layer()), []).append(module)  # experts: several on one module
        elif isinstance(module, ModulesToSaveWrapper):
            _interpolate(module, shares)
    for group in layers.values():
        _add(group, shares)
    tuner: Any = peft_model.base_model
    merged: PreTrainedModel = tuner.unload()
    return merged.eval()


def _refuse_bias_without_place(peft_model: PeftModel, shares: Mapping[str, float]) -> None:
    for name in shares:
        for module in peft_model.modules():
            if not isinstance(module, LoraLayer) or not module.lora_bias.get(name):
                continue
            if getattr(module.get_base_layer(), "bias", None) is None:
                raise QAdapterError(
                    f"adapter {name} has lora_bias, and base layers without a bias have no place for it; use --format "
                    "lora"
                )


def _add(group: list[BaseTunerLayer], shares: Mapping[str, float]) -> None:
    parameters: list[nn.Parameter] = list(group[0].get_base_layer().parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    total = [start.clone() for start in before]
    for name, share in shares.items():
        for layer in group:
            layer.merge(safe_merge=False, adapter_names=[name])
        for parameter, start, so_far in zip(parameters, before, total, strict=True):
            if len(shares) == 1 and share == 1:
                so_far.copy_(parameter)  # PEFT's own sum, without a rounding more
            else:
                so_far.add_(parameter - start, alpha=share)
            parameter.data.copy_(start)
        for layer in group:
            layer.merged_adapters.clear()
    for parameter, new in zip(parameters, total, strict=True):
        parameter.data.copy_(new)


def _interpolate(module: ModulesToSaveWrapper, shares: Mapping[str, float]) -> None:
    """Put the trained copies into the original, and the same into the copies: PEFT keeps one of them."""
    original: nn.Module = module.original_module
    copies = dict(module.modules_to_save.items())
    used = {name: shares[name] for name in shares if name in copies}
    affine = isinstance(original, _AFFINE) or "norm" in type(original).__name__.lower()
    if used and not affine and list(used.values()) != [1.0]:
        raise QAdapterError(
            f"The adapter holds a trained copy of {type(original).__name__}, which is not linear in its weights. Only "
            "the policy as trained (dial 1) can be exported."
        )
    trained = {name: dict(copy.named_parameters()) for name, copy in copies.items()}
    for key, parameter in original.named_parameters():
        changes = [share * (trained[name][key] - parameter) for name, share in used.items()]
        if changes:
            parameter.data.add_(torch.stack(changes).sum(dim=0))
        for of_copy in trained.values():
            of_copy[key].data.copy_(parameter)
