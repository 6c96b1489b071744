"""Adapters multiplied by a number for the passes of a block: W + s · ΔW in place of W + ΔW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn


class AdapterScale:
    """Multiplies what a PEFT model's adapters add to each layer.

    A LoRA layer has a factor of its own. Every other layer (DoRA, LoHa, LoKr, IA3, VeRA, a trained copy of a module)
    is interpolated at its output: base + s · (adapted − base). That is the same as interpolating the weights wherever
    the output is linear in them, which is so for linear layers, embeddings, convolutions and norms.
    """

    def __init__(self, model: PeftModel) -> None:
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        adapted: list[Any] = [module for module in model.modules() if isinstance(module, kinds)]
        self._factors: list[LoraLayer] = [one for one in adapted if _has_factor(one)]
        self._others: list[nn.Module] = [one for one in adapted if not _has_factor(one)]

    @contextmanager
    def at(self, scale: float | Mapping[str, float]) -> Iterator[None]:
        """Within the block, multiply what every adapter adds by `scale`.

        Args:
            scale: s, for every adapter or one for each; at 1 nothing is changed.

        Raises:
            ValueError: the adapters have different scales, and some layers have one factor for all of them.
        """
        if scale == 1.0:
            yield
            return
        shares = None if isinstance(scale, float | int) else scale
        common = _only({scale} if isinstance(scale, float | int) else set(scale.values()) if self._others else {1.0})
        before = [(layer, dict(layer.scaling)) for layer in self._factors]
        handles = []
        try:
            for layer, factors in before:
                own = dict.fromkeys(factors, common) if shares is None else shares
                layer.scaling.update({name: factor * own.get(name, 1.0) for name, factor in factors.items()})
            handles = [
                module.register_forward_hook(_interpolation(common), with_kwargs=True) for module in self._others
            ]
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer, factors in before:
                layer.scaling.update(factors)


def _only(values: set[float]) -> float:
    if len(values) != 1:
        raise ValueError("These layers have one factor for all adapters.")
    return values.pop()


def _has_factor(module: Any) -> bool:
    """Whether what the layer adds is proportional to its own factor: plain LoRA."""
    return isinstance(module, LoraLayer) and not module.lora_variant


def base_layer_of(module: Any) -> nn.Module:
    """The module that one of PEFT's layers replaces."""
    found: nn.Module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.base_layer
    return found


def _interpolation(scale: float) -> Any:
    """A forward hook: base + scale · (adapted − base)."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        plain = {name: value for name, value in kwargs.items() if name != "adapter_names"}
        base: Tensor = base_layer_of(module)(*args, **plain)
        return base + scale * (output - base)

    return hook
