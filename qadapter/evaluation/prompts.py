"""Which held-out pairs have one prompt, and how such pairs count: together, wherever items are drawn or divided.

Pairs of a prompt are no independent items, and often have the chosen reply in common: DSP has four for each query.
Drawn one by one, they give intervals up to twice too narrow; divided one by one into a half that something is chosen on
and a half that is reported, they let the choice see what is reported. So an item is a prompt with all its pairs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qadapter.evaluation.curve.points import content_digest
from qadapter.preferences.pair import prompt_digest

Floats = NDArray[np.float64]


def prompt_names(prompts: Sequence[Sequence[Any]]) -> list[str]:
    """The name of each pair's prompt, by which a pair is on one or the other side of a split.

    It is the digest of the prompt as written first among those that look alike but for case and white space, which are
    the same prompt everywhere else (`qadapter.preferences.pair.prompt_digest`).

    Args:
        prompts: of all pairs of a held-out file, in its order.
    """
    first: dict[str, str] = {}
    return [first.setdefault(prompt_digest(prompt), _as_written(prompt)) for prompt in prompts]


def _as_written(prompt: Sequence[Any]) -> str:
    return content_digest("prompt", [[turn["role"], turn["content"]] for turn in prompt])


@dataclass(frozen=True)
class Prompts:
    """How n pairs belong to m prompts.

    Attributes:
        keys: [m], in the order of their first pairs.
        of: [n], the place of each pair's prompt.
        pairs: [m], pairs of each: what the mean over its pairs weighs in a mean over all pairs.
    """

    keys: tuple[Hashable, ...]
    of: NDArray[np.int64]
    pairs: Floats

    def means(self, values: ArrayLike) -> Floats:
        """[…, m] means over each prompt's pairs, of values [..., n]."""
        table = np.asarray(values, dtype=np.float64)
        others = table.shape[:-1]
        rows = table.reshape(math.prod(others), len(self.of))
        sums = np.array([np.bincount(self.of, weights=row, minlength=len(self.keys)) for row in rows])
        found: Floats = sums.reshape(*others, len(self.keys)) / self.pairs
        return found


def by_prompt(keys: Sequence[Hashable | None], pairs: Sequence[Hashable]) -> Prompts:
    """How pairs belong to prompts.

    Args:
        keys: the prompt of each pair. Where some have none (older files) each pair is an item of its own.
        pairs: what each pair itself is known by.
    """
    whole = len(keys) == len(pairs) and None not in keys
    known = keys if whole else pairs
    places = {key: place for place, key in enumerate(dict.fromkeys(known))}
    of = np.array([places[key] for key in known], dtype=np.int64)
    return Prompts(tuple(places), of, np.bincount(of, minlength=len(places)).astype(np.float64))


def effective_number(weights: Floats) -> float:
    """Of items with weights: how many of equal weight tell as much, (Σw)²/Σw² (Kish, "Survey Sampling", 1965)."""
    return float(weights.sum() ** 2 / (weights**2).sum())
