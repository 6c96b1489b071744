"""The key-value caches of several passes, for adapters that cannot share one pass, as one cache."""

from __future__ import annotations

import copy

import torch
from transformers.cache_utils import Cache


class PassCaches(Cache):
    """One cache a pass; asked for its length or layers it answers as the first, since all are of the same shape."""

    def __init__(self, parts: list[Cache]) -> None:
        self.parts = parts
        super().__init__(layers=parts[0].layers)

    @classmethod
    def around(cls, cache: Cache | None, passes: int) -> PassCaches:
        """This cache if it is one already, else new caches like the given, empty one.

        Raises:
            ValueError: a cache of another kind that holds something.
        """
        if isinstance(cache, cls):
            return cache
        from transformers import DynamicCache

        first = cache if cache is not None else DynamicCache()
        if first.get_seq_length():
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
