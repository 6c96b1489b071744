"""A frozen base in training: nothing in it may draw at random, since log π1 is no sample.

Modules in eval mode do not draw. The one exception is gradient checkpointing: transformers' layers recompute in train
mode only, and some of them (OPT, XGLM, BioGPT, Falcon …) call dropout as a function, with a probability that they keep
as an attribute or read in their config. Only such a layer is put into train mode, alone, with those probabilities at 0.

Trainers that put the whole model into train mode (TRL's) get a base whose probabilities are all 0 (`silence`).
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

_RANDOM = ("drop", "jitter")  # in the names of such probabilities: attention_dropout, resid_pdrop, layerdrop …


def silence(base: nn.Module) -> None:
    """Set every probability with which a base draws at random to 0, for good; an adapter put on later keeps its own."""
    quiet: dict[int, PretrainedConfig] = {}
    for module in base.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, PretrainedConfig):
                setattr(module, name, quiet.setdefault(id(value), _without_randomness(value)))
            elif _is_probability(name, value):
                setattr(module, name, 0.0)


class SilencedLayers:
    """Recomputing layers of a base that were put into train mode, and what they had before."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, str, Any]] = []

    def train(self, model: nn.Module, mode: bool) -> None:
        """Put the layers that recompute into train or eval mode; nothing in them draws at random in either.

        Args:
            model: base with adapters; other modules' modes are not touched.
            mode: as in `nn.Module.train`.
        """
        self._restore()
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = mode and module.gradient_checkpointing
                if module.training:
                    self._silence(module)

    def _silence(self, layer: nn.Module) -> None:
        for name, value in list(vars(layer).items()):
            if isinstance(value, PretrainedConfig):
                self._set(layer, name, _without_randomness(value))
            elif _is_probability(name, value):
                self._set(layer, name, 0.0)

    def _set(self, layer: nn.Module, name: str, value: Any) -> None:
        self._before.append((layer, name, getattr(layer, name)))
        setattr(layer, name, value)

    def _restore(self) -> None:
        for layer, name, value in self._before:
            setattr(layer, name, value)
        self._before = []


def _is_probability(name: str, value: Any) -> bool:
    return isinstance(value, float) and value > 0 and any(part in name for part in _RANDOM)


def _without_randomness(config: PretrainedConfig) -> PretrainedConfig:
    quiet = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):  # that of the text model in one for several kinds of input
            setattr(quiet, name, _without_randomness(value))
        elif _is_probability(name, value):
            setattr(quiet, name, 0.0)
    return quiet
