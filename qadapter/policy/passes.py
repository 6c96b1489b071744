"""Logits of the base and of adapters for the same inputs, in one batched pass where the layers can do that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers.cache_utils import Cache

from qadapter.errors import QAdapterError
from qadapter.policy.adapter_rows import BASE, AdapterRows
from qadapter.policy.caches import PassCaches


class RowPasses:
    """Passes of a PEFT model through several adapters and the bare base.

    One pass of R · B rows, ordered [first name × B, …], where `AdapterRows.supported` and no gradient is wanted: with
    autograd it would keep the activations of the base's rows too, and recomputing them for gradient checkpointing
    would happen after the rows' names are gone. Otherwise one pass for each name, the base's without autograd.

    Attributes:
        rows: the layers' own ability to tell rows apart.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self.rows = AdapterRows(model)

    def logits(
        self, names: Sequence[str], inputs: dict[str, Any], cache: Cache | None, use_cache: bool
    ) -> tuple[list[Tensor], Cache | None]:
        """Logits [B, T, V] for each name, and the cache that holds them all.

        Args:
            names: adapters, or `BASE`.
            inputs: arguments of the model's forward; tensors have B rows.
            cache: what an earlier call for the same names returned, an empty cache, or None.
            use_cache: whether to return a cache.

        Raises:
            ValueError: a cache that another model filled.
        """
        count = len(next(inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs))
        if self.rows.supported and not torch.is_grad_enabled() and not isinstance(cache, PassCaches):
            with self.rows.use([name for name in names for _ in range(count)]):
                output = self._model(
                    **{name: _repeat_rows(value, len(names), count) for name, value in inputs.items()},
                    past_key_values=cache,
                    use_cache=use_cache,
                )
            return list(output.logits.chunk(len(names))), output.past_key_values if use_cache else None

        caches = PassCaches.around(cache, len(names)) if use_cache else None
        logits = []
        for index, name in enumerate(names):
            past = caches.part(index) if caches else None
            with self.bare(count) if name == BASE else self.through(name, count):
                output = self._model(**inputs, past_key_values=past, use_cache=use_cache)
            if caches:
                caches.put(index, output.past_key_values)
            logits.append(output.logits)
        return logits, caches

    @contextmanager
    def bare(self, count: int) -> Iterator[None]:
        """Within the block every one of `count` rows goes through the base alone, without autograd."""
        with torch.no_grad():
            if self.rows.supported:
                with self.rows.use([BASE] * count):
                    yield
                return
            # PEFT makes the active adapter's parameters trainable when it switches it on again
            trainable = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
            try:
                with self._model.disable_adapter():
                    yield
            finally:
                for parameter, required in trainable:
                    parameter.requires_grad_(required)

    @contextmanager
    def through(self, name: str, count: int) -> Iterator[None]:
        """Within the block every one of `count` rows goes through this adapter.

        Raises:
            QAdapterError: it is not PEFT's active one, and these layers cannot choose by row.
        """
        if self._model.active_adapters == [name]:
            yield
        elif self.rows.supported:
            with self.rows.use([name] * count):
                yield
        else:
            raise QAdapterError(
                f"Adapter {name} is not PEFT's active one, and these adapter layers cannot choose by row. "
                f"Call peft_model.set_adapter({name!r}) first."
            )


def reorder_rows(cache: Cache, beam_idx: Tensor) -> None:
    """Beam search over B sequences: sequence i continues `beam_idx[i]`, in every group of rows of the cache.

    Args:
        cache: of one pass of R · B rows, or of several passes.
        beam_idx: [B] int64.
    """
    if not isinstance(cache, PassCaches):
        first: Any = cache.layers[0]
        beam_idx = torch.cat([beam_idx + start for start in range(0, len(first.keys), len(beam_idx))])
    cache.reorder_cache(beam_idx)  # type: ignore[arg-type]


def _repeat_rows(value: Any, times: int, count: int) -> Any:
    """Tensors of `count` rows `times` times over; anything else as it is."""
    if isinstance(value, dict):
        return {name: _repeat_rows(part, times, count) for name, part in value.items()}
    if times > 1 and isinstance(value, Tensor) and value.ndim > 1 and len(value) == count:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value
