"""Valid ranges of a policy's dials: α0, α̃ and the adapters' weights."""

from __future__ import annotations

from collections.abc import Mapping

from qadapter.config.base import LARGEST_ALPHA, SMALLEST_ALPHA_TILDE
from qadapter.errors import QAdapterError

LARGEST_WEIGHT = 1e6


def check_dials(alpha_0: float, alpha_tilde: float) -> None:
    """Refuse dials that are out of range.

    Raises:
        QAdapterError: NaN, or out of range; the message names the range.
    """
    valid = 0 <= alpha_0 <= LARGEST_ALPHA and SMALLEST_ALPHA_TILDE <= alpha_tilde <= LARGEST_ALPHA
    if not valid:  # NaN is in no range
        raise QAdapterError(
            f"alpha_0 is {alpha_0} and alpha_tilde {alpha_tilde}; expected at least 0 and above 0: alpha_0 from 0 to "
            f"{LARGEST_ALPHA:g}, alpha_tilde from {SMALLEST_ALPHA_TILDE:g} to {LARGEST_ALPHA:g}."
        )


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights of adapters that are out of range.

    Raises:
        QAdapterError: NaN, or out of range; the message names the range.
    """
    for name, weight in weights.items():
        if not abs(weight) <= LARGEST_WEIGHT:  # NaN is in no range
            raise QAdapterError(
                f"The weight of adapter {name} is {weight}; expected a number from {-LARGEST_WEIGHT:g} to "
                f"{LARGEST_WEIGHT:g}."
            )
