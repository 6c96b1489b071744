"""Several adapters in one policy: weighing, attaching and switching them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from qadapter.errors import QAdapterError
from qadapter.policy import files as policy_files
from qadapter.policy.adapters import load_adapter, refuse_config
from qadapter.policy.objective import Objective
from qadapter.policy.pair_passes import PairPasses
from qadapter.policy.passes import RowPasses
from qadapter.policy.ranges import check_weights
from qadapter.policy.scaling import AdapterScale


class ComposedAdapters(nn.Module):
    """The part of `QAdapterForCausalLM` that says which adapters make up Q, and how much of each.

    Attributes:
        peft_model: the base with its adapters.
        objective: what the adapters were (or are to be) trained with.
    """

    peft_model: PeftModel
    objective: Objective
    config: Any
    _passes: RowPasses
    _scale: AdapterScale
    _pair_passes: PairPasses | None
    _adapter_weights: dict[str, float]
    _base_only: bool

    @property
    def adapter_weights(self) -> dict[str, float]:
        """Weight of each adapter in Q, a copy; adapters of weight 0 are not computed."""
        return dict(self._adapter_weights)

    def set_adapter_weights(self, weights: Mapping[str, float]) -> None:
        """Say how much of each adapter's Q goes into the policy; adapters not named are switched off.

        With `residual`, every combination is valid: Q_i is the contribution of preference i, zero weights give
        π1^(α0/α̃), which is the base at α0 = α̃. With `absolute` each Q_i is a full row of logits, so that the weights
        must sum to 1; `as_residual` turns such a policy into the same one in the other form.

        Raises:
            QAdapterError: an unknown adapter, or weights that are invalid in this parametrisation.
        """
        self._adapter_weights = self._checked(weights, list(self.peft_model.peft_config))

    def _checked(self, weights: Mapping[str, float], known: Sequence[str]) -> dict[str, float]:
        """The weight of every known adapter; `set_adapter_weights` says what is refused."""
        if unknown := [name for name in weights if name not in known]:
            raise QAdapterError(
                f"No adapter is named {', '.join(unknown)}; there are {', '.join(known)}. Attach it first."
            )
        complete = {name: float(weights.get(name, 0.0)) for name in known}
        check_weights(complete)
        active = [name for name, weight in complete.items() if weight]
        if self.objective.parametrization == "absolute" and abs(sum(complete.values()) - 1) > 1e-6:
            raise QAdapterError(
                f"The adapter weights sum to {sum(complete.values()):g}. With parametrisation 'absolute' each Q is a "
                "full row of logits, so that they must sum to 1. Rescale them, or call as_residual() first; "
                "disable_adapter() gives the base."
            )
        if len(active) > 1 and not self._passes.rows.supported:
            raise QAdapterError(
                "Several adapters at once need plain LoRA layers (no DoRA or other variant, no other PEFT method). "
                "Use one adapter."
            )
        return complete

    def attach(
        self, path: str | Path, name: str, weight: float | None = None, *, allow_base_mismatch: bool = False
    ) -> None:
        """Load another trained adapter of the same base beside the ones that are there.

        A plain PEFT adapter counts as one of the residual form. The dial of this policy holds for all; one that was
        saved with the other adapter is not read.

        Args:
            path: folder that `save_pretrained` or another training wrote.
            name: what to call it.
            weight: its weight in Q from now on; not given, it is loaded and switched off.
            allow_base_mismatch: whether it may have been trained on another base.

        Raises:
            QAdapterError: the name is taken, the folder is no adapter, it was trained in the other parametrisation or
                on another base, or the weights are then invalid in this one.
        """
        if name in self.peft_model.peft_config:
            raise QAdapterError(f"There is an adapter named {name!r} already. Choose another name.")
        policy_files.refuse_guide(Path(path))
        settings = policy_files.read_policy(Path(path))
        place = policy_files.only_adapter(Path(path), settings)
        mine, other = self.objective.parametrization, settings.objective.parametrization
        if mine != other:
            raise QAdapterError(
                f"The adapter in {path} has parametrisation {other!r}, this policy {mine!r}: their Q do not add up. "
                "Turn the absolute one into the residual form with as_residual() and save it again."
            )
        weights = {**self._adapter_weights, name: weight or 0.0}
        self._checked(weights, list(weights))  # before anything is loaded
        load_adapter(self.peft_model, place, name, allow_base_mismatch=allow_base_mismatch)
        self._passes, self._scale = RowPasses(self.peft_model), AdapterScale(self.peft_model)
        self._pair_passes = None
        self.train(self.training)
        self.set_adapter_weights(weights)

    def as_residual(self) -> None:
        """Turn an `absolute` policy into the `residual` form of the same policy: Q − log π1, with α0 + 1.

        Adapters of the residual form can be composed with any weights. The adapters themselves do not change.
        """
        if self.objective.parametrization == "residual":
            return
        self.objective = replace(self.objective, parametrization="residual", alpha_0=self.objective.alpha_0 + 1)
        self.config.alpha_0 += 1

    @contextmanager
    def scaled(self, scale: float | Mapping[str, float]) -> Iterator[None]:
        """Within the block, multiply what the adapters add to the layers by `scale`; the dial has no effect on that."""
        with self._scale.at(scale):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block this model is the base: its logits are the base's, independent of the dials."""
        before = self._base_only
        self._base_only = True
        try:
            yield
        finally:
            self._base_only = before

    def trained_adapter(self) -> str:
        """Name of the one adapter that training moves.

        Raises:
            QAdapterError: several have a weight, or the one that has is not PEFT's active one or has not weight 1.
        """
        active = {name: weight for name, weight in self._adapter_weights.items() if weight}
        if active != dict.fromkeys(self.peft_model.active_adapters, 1.0) or len(active) != 1:
            raise QAdapterError(
                f"Training moves one adapter, with weight 1; the weights are {self._adapter_weights}, and PEFT's "
                f"active adapter is {', '.join(self.peft_model.active_adapters)}. Set both to the one to train."
            )
        return next(iter(active))


def refuse_unworkable(peft_model: PeftModel) -> None:
    """Check that a model can be the base and adapter of a policy.

    Raises:
        QAdapterError: it carries no adapter, one that changes positions or tied embeddings, or one that is merged.
    """
    if not isinstance(peft_model, PeftModel):
        raise QAdapterError(
            f"{type(peft_model).__name__} carries no adapter. Give a PEFT model, or a base model together with an "
            "adapter config (QAdapterForCausalLM.from_base, or peft_config of the trainer)."
        )
    for name, config in peft_model.peft_config.items():
        refuse_config(config, f"Adapter {name}")
    base: Any = peft_model.get_base_model()
    if base.config.is_encoder_decoder:
        raise QAdapterError(f"{type(base).__name__} is an encoder-decoder model; expected a causal language model.")
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    adapted = any(isinstance(end, BaseTunerLayer) or hasattr(end, "modules_to_save") for end in ends)
    if base.config.get_text_config().tie_word_embeddings and adapted:
        raise QAdapterError(
            "The base ties its input and output embeddings and the adapter changes one of them, so that base and "
            "adapted model cannot be separated. Leave embeddings and head out of target_modules and modules_to_save."
        )
    if any(getattr(module, "merged_adapters", None) for module in peft_model.modules()):
        raise QAdapterError(
            "An adapter is merged into the base's weights, so there is no base left to compare with. "
            "Call unmerge_adapter() on the PEFT model, or load the base anew."
        )
