"""Caches of a model: what it calls them, their rows and what these are of, and those of several passes as one cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from qadapter.errors import QAdapterError

CacheName = Literal["past_key_values", "cache_params"]
_STATES_OF = "_qadapter_states_of"  # attribute of a cache


def cache_name(base: PreTrainedModel) -> CacheName | None:
    """How the base's forward calls its cache; None where it has none of transformers' own kind.

    Mamba's is called `cache_params`. RWKV, xLSTM, MiniMax and RecurrentGemma keep their state in a form of their own,
    and the first GPT keeps none: they generate by reading the whole sequence for each token.
    """
    takes = inspect.signature(type(base).forward).parameters
    kept_inside = base.config.model_type == "recurrent_gemma"
    generates: Any = base
    if generates._supports_default_dynamic_cache() and not kept_inside:
        if "past_key_values" in takes:
            return "past_key_values"
        if "cache_params" in takes:
            return "cache_params"
    return None


def rows_of(cache: Cache) -> int:
    """Rows that a filled cache holds.

    Raises:
        ValueError: it is empty.
    """
    for layer in cache.layers:
        found: Any = layer
        states = [getattr(found, "keys", None), getattr(found, "values", None)]
        for name in ("conv_states", "recurrent_states"):
            states += getattr(found, name, {}).values()
        for state in states:
            if isinstance(state, Tensor) and state.ndim:
                return len(state)
    raise ValueError("This cache is empty.")


def repeated_rows(value: Any, times: int, count: int) -> Any:
    """Tensors of `count` rows `times` times over; anything else as it is."""
    if isinstance(value, dict):
        return {name: repeated_rows(part, times, count) for name, part in value.items()}
    if times > 1 and isinstance(value, Tensor) and value.ndim > 1 and len(value) == count:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value


def _holds_something(cache: Cache) -> bool:
    """Whether a cache has states of any token."""
    try:
        return bool(rows_of(cache)) and any(_length(layer) for layer in cache.layers)
    except ValueError:
        return False


class PassCaches(Cache):
    """One cache a pass; asked for its length or layers it answers as the first, since all are of the same shape."""

    def __init__(self, parts: list[Cache]) -> None:
        self.parts = parts
        super().__init__(layers=parts[0].layers)

    @classmethod
    def around(cls, cache: Cache | None, passes: int, config: PretrainedConfig) -> PassCaches:
        """This cache if it is one already, else new caches like the given, empty one.

        Args:
            cache: what a caller has.
            passes: how many caches.
            config: of the model, which says what its layers keep.

        Raises:
            ValueError: a cache of another kind that holds something.
        """
        if isinstance(cache, cls):
            return cache
        first = cache if cache is not None else DynamicCache(config=config)
        if _holds_something(first):
            raise ValueError("This cache was filled by one pass of another model; start with an empty one.")
        return cls([copy.deepcopy(first) for _ in range(passes)])

    def part(self, index: int) -> Cache:
        """The cache of one pass."""
        return self.parts[index]

    def put(self, index: int, cache: Cache) -> None:
        """Keep what a pass returned."""
        self.parts[index] = cache
        self.layers = self.parts[0].layers

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search: sequence i continues `beam_idx[i]`."""
        for cache in self.parts:
            cache.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        for cache in self.parts:
            cache.crop(tokens_to_remove)


def note_states(cache: Cache, names: Sequence[str], scale: float) -> None:
    """Note in a cache what its rows are of, and at which scale of the adapters."""
    setattr(cache, _STATES_OF, (tuple(names), scale))


def refuse_states_of_others(cache: Cache | None, names: Sequence[str], scale: float) -> None:
    """Refuse a cache that was filled for other adapters, or for adapters at another scale (`note_states`).

    Raises:
        QAdapterError: it was.
    """
    here = (tuple(names), scale)
    held, at = getattr(cache, _STATES_OF, here)
    # of one cache for each name those at the end can be left out
    needed = held[: len(names)] if isinstance(cache, PassCaches) else held
    if (needed, at) == here or cache is None or not _holds_something(cache):
        return
    raise QAdapterError(
        f"The cache holds the states of {', '.join(held)} at scale {at:g}, and this call needs those of "
        f"{', '.join(names)} at scale {scale:g}. Start with an empty one; fill one for `generate` with "
        "up_to_constant=True and the dial, α0 and weights that it will have."
    )


def _length(layer: Any) -> int:
    """Tokens that a layer of a cache has seen, or 1 where it keeps a state of them all."""
    return (
        int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else int(any(layer.has_previous_state.values()))
    )
