"""Logits of the base and of adapters for the same inputs, in one batched pass where the layers can do that."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers.cache_utils import Cache

from qadapter.errors import QAdapterError
from qadapter.policy.adapter_rows import BASE, AdapterRows, RowsLostError
from qadapter.policy.caches import CacheName, PassCaches, cache_name, repeated_rows, rows_of


class RowPasses:
    """Passes of a PEFT model through several adapters and the bare base.

    One pass of R · B rows, ordered [first name × B, …], where `AdapterRows.mixes` and no gradient is wanted: with
    autograd it would keep the activations of the base's rows too, and recomputing them for gradient checkpointing
    would happen after the rows' names are gone. Otherwise one pass for each name, the base's without autograd.

    Attributes:
        rows: the layers' own ability to tell rows apart.
        cache_name: how the model's forward calls its cache; None for a model without one of transformers' caches.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self.rows = AdapterRows(model)
        self.cache_name: CacheName | None = cache_name(model.get_base_model())  # type: ignore[arg-type]
        base: Any = model.get_base_model()
        self._config = base.config.get_text_config(decoder=True)
        self._base_class = type(base)
        arguments = inspect.signature(self._base_class.forward).parameters
        self._takes_use_cache = "use_cache" in arguments
        self._mixed_before = False

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
        if use_cache and self.cache_name is None:
            raise QAdapterError(
                f"{self._base_class.__name__} keeps its state in a form of its own, which cannot hold a row for the "
                "base and one for each adapter. Call with use_cache=False."
            )
        if self.rows.mixes and not torch.is_grad_enabled() and not isinstance(cache, PassCaches):
            untouched = copy.deepcopy(cache) if len(names) > 1 and not self._mixed_before else cache
            try:
                return self._in_one_pass(names, count, inputs, cache, use_cache)
            except RowsLostError:
                if self._mixed_before:
                    raise
                self.rows.mixes, cache = False, untouched

        caches = PassCaches.around(cache, len(names), self._config) if use_cache else None
        logits = []
        for index, name in enumerate(names):
            past = {} if caches is None else {str(self.cache_name): caches.part(index)}
            with self.bare(count) if name == BASE else self.through(name, count):
                output = self._model(**inputs, **past, **self._whether(use_cache))
            if caches:
                caches.put(index, output[str(self.cache_name)])
            logits.append(output.logits)
        return logits, caches

    def _in_one_pass(
        self, names: Sequence[str], count: int, inputs: dict[str, Any], cache: Cache | None, use_cache: bool
    ) -> tuple[list[Tensor], Cache | None]:
        past = {} if cache is None else {str(self.cache_name): cache}
        with self.rows.use([name for name in names for _ in range(count)]):
            output = self._model(
                **{name: repeated_rows(value, len(names), count) for name, value in inputs.items()},
                **past,
                **self._whether(use_cache),
            )
        self._mixed_before |= len(names) > 1
        return list(output.logits.chunk(len(names))), output[str(self.cache_name)] if use_cache else None

    def _whether(self, use_cache: bool) -> dict[str, bool]:
        """`use_cache`, for a model that takes it."""
        return {"use_cache": use_cache} if self._takes_use_cache else {}

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


def refuse_outputs(options: Mapping[str, Any]) -> None:
    """Refuse what a policy's forward pass cannot return: its logits are made of several passes.

    Args:
        options: further arguments of a call.

    Raises:
        QAdapterError: hidden states, attentions or router logits are asked for, or a tuple.
    """
    asked = [name for name, value in options.items() if name.startswith("output_") and value]
    if asked:
        raise QAdapterError(
            f"{', '.join(asked)}: a policy's logits are made of several passes, so there is none to return. Ask the "
            "model below it (policy.peft_model), with or without its adapter."
        )
    if options.get("return_dict") is False:
        raise QAdapterError("return_dict is False; a policy returns an output with names: call to_tuple() on it.")


def reorder_rows(cache: Cache, beam_idx: Tensor) -> None:
    """Beam search over B sequences: sequence i continues `beam_idx[i]`, in every group of rows of the cache.

    Args:
        cache: of one pass of R · B rows, or of several passes.
        beam_idx: [B] int64.
    """
    if not isinstance(cache, PassCaches):
        beam_idx = torch.cat([beam_idx + start for start in range(0, rows_of(cache), len(beam_idx))])
    cache.reorder_cache(beam_idx)  # type: ignore[arg-type]
