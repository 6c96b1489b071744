"""Keep a LoRA's update orthogonal to the leading singular directions of the weights that it is added to.

For W = U S Vᵀ, the update ΔW = s·B·A becomes (I − U_k U_kᵀ) ΔW (I − V_k V_kᵀ): B loses what lies in the span of the k
leading left directions, A what lies in that of the right ones. So (W + ΔW) V_k = W V_k = U_k S_k, and U_kᵀ (W + ΔW) is
as before: the k strongest directions of each layer stay what they are.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D
from trl import SFTTrainer

from qadapter.errors import QAdapterError


class Projection:
    """The projections of one model's LoRA layers.

    Attributes:
        directions: for each layer, the leading left and right singular directions, [out, k] and [in, k].
    """

    def __init__(self, model: nn.Module, protected: int) -> None:
        """Decompose the base's weights.

        Args:
            model: with LoRA on linear layers.
            protected: k; at the full rank of a layer its update is 0.

        Raises:
            QAdapterError: the adapter is on a layer that has no matrix of its own, or is a variant of LoRA that does
                more than to add to it.
        """
        self.directions: list[tuple[LoraLayer, Tensor, Tensor]] = []
        if not protected:
            return
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                if layer.lora_variant:
                    raise QAdapterError(
                        "oplora protects directions of a weight that a plain LoRA is added to; a variant such as DoRA "
                        f"scales the weight itself ({name}). Leave lora.use_dora out, or set protected to 0."
                    )
                left, _, right = torch.linalg.svd(_weight(layer, name), full_matrices=False)
                self.directions.append((layer, left[:, :protected], right[:protected].T))

    @torch.no_grad()
    def apply(self, adapter: str = "default") -> None:
        """Project A and B of every layer, in place."""
        for layer, left, right in self.directions:
            a: Any = layer.lora_A[adapter].weight
            b: Any = layer.lora_B[adapter].weight
            b -= (left @ (left.T @ b.float())).to(b.dtype)
            a -= ((a.float() @ right) @ right.T).to(a.dtype)


def _weight(layer: Any, name: str) -> Tensor:
    """[out, in] float32, the base's weight below a LoRA layer."""
    base = layer.get_base_layer()
    if type(base).__module__.startswith("bitsandbytes"):
        return dequantize_module_weight(base).float()
    if not isinstance(base, nn.Linear | Conv1D):
        raise QAdapterError(
            f"oplora works on linear layers; {name} is a {type(base).__name__}. Name linear layers in "
            "lora.target_modules."
        )
    weight = base.weight.detach().float()
    return weight.T if isinstance(base, Conv1D) else weight


class _ProjectAfterSteps(TrainerCallback):
    """Projects a new adapter before the first step and after each one; a checkpoint's is projected already."""

    def __init__(self, protected: int) -> None:
        self._protected = protected
        self._projection: Projection | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Trainer's hook."""
        assert model is not None
        self._projection = Projection(model, self._protected)
        if state.global_step == 0:
            self._projection.apply()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook: after each optimiser step, before its checkpoint."""
        assert self._projection is not None
        self._projection.apply()


def projecting_trainer(protected: int) -> type[SFTTrainer]:
    """SFTTrainer whose adapter stays orthogonal to the base's `protected` leading directions."""

    class ProjectingTrainer(SFTTrainer):
        """Adds the callback that projects."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            trainer: Trainer = self
            trainer.add_callback(_ProjectAfterSteps(protected))

    return ProjectingTrainer
