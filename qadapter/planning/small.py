"""Runs that are too small to show anything: how they are recognised, and what to set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qadapter.planning.estimate import steps as steps_of
from qadapter.preferences.split import ENOUGH_HELDOUT

if TYPE_CHECKING:
    from qadapter.config.experiment import Experiment

ENOUGH_STEPS, FEW_STEPS = 30, 10
MOST_PASSES = 10
"""Over the same pairs; more teach a model their wording."""


@dataclass(frozen=True)
class Knobs:
    """What a user sets, as it is written where the run is described; `{}` stands for the number.

    Attributes:
        steps: number of steps, where that is what decides; None where passes over the data do.
        passes: over the data.
        batch_size: pairs per step.
        heldout: for more held-out prompts.
        heldout_data: held-out data of their own.
    """

    steps: str | None
    passes: str
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
        few = f"1 step of {batch_size} pairs hardly changes a model"
        if steps != 1:
            few = f"{steps} steps of {batch_size} pairs hardly change a model"
        found.append(f"{few}; give {_longer(knobs, pairs, steps, batch_size)}")
    if heldout is not None and heldout < ENOUGH_HELDOUT:
        held = "no held-out pairs: what was learnt is not measured"
        if heldout:
            held = f"only {heldout} held-out pairs: what was learnt shows in steps of 1/{heldout}"
        found.append(
            f"{held}; hold out at least {ENOUGH_HELDOUT} prompts with {knobs.heldout.format(ENOUGH_HELDOUT)}, or give "
            f"{knobs.heldout_data}"
        )
    return found


def _longer(knobs: Knobs, pairs: int, steps: int, batch_size: int) -> str:
    """What makes about `ENOUGH_STEPS` steps."""
    if knobs.steps is not None:
        return knobs.steps.format(ENOUGH_STEPS)
    more = passes(pairs, batch_size)
    if more <= MOST_PASSES:
        smaller = max(1, steps * batch_size // ENOUGH_STEPS)
        return f"{knobs.passes.format(more)}, or {knobs.batch_size.format(smaller)}"
    smaller = max(1, pairs * MOST_PASSES // ENOUGH_STEPS)
    return f"{knobs.passes.format(MOST_PASSES)} and {knobs.batch_size.format(smaller)}"


def small_domains(experiment: Experiment, pairs: Mapping[str, tuple[int, int | None]]) -> list[str]:
    """What is too small to show anything in an experiment: a sentence for each domain and fault.

    Args:
        experiment: the settings.
        pairs: source → its pairs to train on and its held-out pairs (None: not known). Sources that are not in it are
            left out, and those without pairs to train on.
    """
    found = []
    for name, domain in experiment.domains.items():
        training = experiment.training_of(name)
        train, heldout = pairs.get(domain.source, (0, None))
        if not train:
            continue
        where = f"sources.{domain.source}.heldout"
        knobs = Knobs(
            "training.max_steps={}" if training.max_steps else None,
            "training.epochs={}",
            "training.batch_size={}",
            where + "={}",
            f"{where}_path",
        )
        sentences = too_small(
            knobs,
            pairs=train,
            steps=steps_of(train, training),
            batch_size=training.batch_size,
            heldout=heldout,
        )
        found += [f"{name}: {sentence}" for sentence in sentences]
    return found


def passes(pairs: int, batch_size: int) -> int:
    """Passes over so many pairs that make `ENOUGH_STEPS` steps; may be more than `MOST_PASSES`."""
    return math.ceil(ENOUGH_STEPS * batch_size / pairs)
