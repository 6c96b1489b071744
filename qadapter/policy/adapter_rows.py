"""Which adapter each row of a batch goes through: several adapters and the bare base in one pass of the model.

PEFT's LoRA layers take `adapter_names`, one name per row ("__base__" for none). PEFT's own way to hand the names in
(`model(..., adapter_names=…)`) refuses train mode and leaves its hooks behind when the pass fails, which breaks every
later call; so the hooks are set here, removed whatever happens, and only where they are known to work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel, PeftType
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

BASE = "__base__"


class AdapterRows:
    """Sends rows of a batch through adapters by name.

    Attributes:
        supported: whether every adapter layer can tell rows apart: plain LoRA, nothing merged (DoRA and the other
            variants cannot). Where it is False, take one pass for each adapter and `PeftModel.disable_adapter`.
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

    @contextmanager
    def use(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block, row i of every batch goes through adapter `names[i]` (`BASE`: none).

        Args:
            names: one for each row of the batches passed in the block.
        """
        given = list(names)

        def name_rows(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "adapter_names": given}

        handles = [layer.register_forward_pre_hook(name_rows, with_kwargs=True) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
