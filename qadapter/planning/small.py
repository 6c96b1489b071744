"""Runs that are too small to show anything: how they are recognised, and what to set."""

from __future__ import annotations

import math
from dataclasses import dataclass

ENOUGH_STEPS, FEW_STEPS = 30, 10
FEW_HELDOUT = 20


@dataclass(frozen=True)
class Knobs:
    """What a user sets, as it is written where the run is described; `{}` stands for the number.

    Attributes:
        longer: for more steps.
        batch_size: pairs per step.
        heldout: for more held-out prompts.
        heldout_data: held-out data of their own.
    """

    longer: str
    batch_size: str
    heldout: str
    heldout_data: str


def too_small(knobs: Knobs, *, pairs: int, steps: int, batch_size: int, heldout: int | None) -> list[str]:
    """A sentence for each thing that is too small, with what to set.

    Args:
        knobs: what the user sets.
        pairs: to train on.
        steps, batch_size: of the training.
        heldout: pairs; None where their number is not known.
    """
    found = []
    if steps < FEW_STEPS:
        longer = knobs.longer.format(ENOUGH_STEPS if "steps" in knobs.longer else passes(pairs, batch_size))
        found.append(
            f"{steps} steps of {batch_size} pairs hardly change a model; give {longer}, or a smaller {knobs.batch_size}"
        )
    if heldout is not None and heldout < FEW_HELDOUT:
        found.append(
            f"{heldout} held-out pairs tell nothing (an accuracy is a multiple of 1/{max(heldout, 1)}); hold out at "
            f"least {FEW_HELDOUT} prompts with {knobs.heldout.format(FEW_HELDOUT)}, or give {knobs.heldout_data}"
        )
    return found


def passes(pairs: int, batch_size: int) -> int:
    """Passes over so many pairs that make `ENOUGH_STEPS` steps."""
    return math.ceil(ENOUGH_STEPS * batch_size / pairs)
