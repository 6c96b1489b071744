"""Margins of a pair, and when a pair is won: the definitions for evaluation, judges, reports and the gate."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def implied_margin(chosen: Floats, rejected: Floats, base_chosen: Floats, base_rejected: Floats) -> Floats:
    """[n], log π/π1(chosen) - log π/π1(rejected) in nats: the reward margin that a policy implies.

    Args:
        chosen, rejected: [n], the policy's summed log-probability of each reply.
        base_chosen, base_rejected: [n], the same of the base.
    """
    return (chosen - base_chosen) - (rejected - base_rejected)


def mean_margin(chosen: Floats, rejected: Floats, chosen_tokens: ArrayLike, rejected_tokens: ArrayLike) -> Floats:
    """[n], the difference of the mean log-probabilities per reply token, in nats; no token counts as one."""
    return chosen / np.maximum(chosen_tokens, 1) - rejected / np.maximum(rejected_tokens, 1)


def won(difference: ArrayLike) -> Floats:
    """1 where a difference is positive, ½ where it is zero, else 0."""
    share: Floats = (np.sign(np.asarray(difference, dtype=np.float64)) + 1) / 2
    return share
