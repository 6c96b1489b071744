"""Which adapter each row of a batch goes through: several adapters and the bare base in one pass of the model.

PEFT's LoRA layers take `adapter_names`, one name per row ("__base__" for none). PEFT's own way to hand the names in
(`model(..., adapter_names=…)`) refuses train mode and leaves its hooks behind when the pass fails, which breaks every
later call; so the hooks are set here, always removed, and used only where they are known to work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel, PeftType
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

BASE = "__base__"
# Kinds of a module in `modules_to_save` that PEFT can choose by row
_CHOOSES_COPIES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class RowsLostError(Exception):
    """A layer was not given the rows of the batch: it flattens batch and time, or routes tokens to experts."""


class AdapterRows:
    """Sends rows of a batch through adapters by name.

    Attributes:
        supported: whether every adapter layer can select an adapter: plain LoRA, nothing merged (DoRA and the other
            variants cannot). Where it is False, take one pass for each adapter and `PeftModel.disable_adapter`.
        mixes: whether rows of one batch may go through different adapters. Set to False by `RowPasses` for a model
            that hands its layers something else than rows (OPT flattens batch and time, experts get single tokens).
    """

    def __init__(self, model: PeftModel) -> None:
        tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._layers: list[nn.Module] = [
            module for module in model.modules() if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))
        ]
        self.supported = bool(tuned) and all(
            isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper) and not layer.lora_variant
            for layer in tuned
        )
        self.supported &= all(config.peft_type == PeftType.LORA for config in model.peft_config.values())
        self.supported &= all(
            isinstance(layer, ModulesToSaveWrapper) and isinstance(layer.original_module, _CHOOSES_COPIES)
            for layer in self._layers
            if isinstance(layer, AuxiliaryTrainingWrapper)
        )
        self.mixes = self.supported

    @contextmanager
    def use(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block, row i of every batch goes through adapter `names[i]` (`BASE`: none).

        Args:
            names: one for each row of the batches passed in the block.

        Raises:
            RowsLostError: in the block, the names differ and a layer gets something else than the batch's rows.
        """
        given = list(names)
        same = len(set(given)) == 1  # then the shape in which a layer gets the tokens does not matter

        def name_rows(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            tokens: Tensor = args[0] if args else next(iter(kwargs.values()))
            if same:
                return args, {**kwargs, "adapter_names": given[:1] * len(tokens)}
            is_ids = not tokens.is_floating_point() and tokens.ndim == 2  # what embeddings get
            if len(tokens) != len(given) or (tokens.ndim < 3 and not is_ids):
                raise RowsLostError
            return args, {**kwargs, "adapter_names": given}

        handles = [layer.register_forward_pre_hook(name_rows, with_kwargs=True) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
