"""ORPO (Hong et al., 2024), through TRL: fine-tuning on the chosen reply and an odds ratio, without a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.config.base import Positive
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class ORPOSettings(MethodSettings):
    """`beta`: the weight of the odds ratio, the paper's λ."""

    beta: Positive = 0.1


def train(job: Job, choice: ORPOSettings) -> Trainer:
    """Train on pairs; the base is not consulted."""
    from qadapter.training.pairwise import train_without_reference

    return train_without_reference(job, METHOD.name, "orpo", beta=choice.beta)


METHOD = Method(
    name="orpo",
    settings=ORPOSettings,
    train=train,
    passes=2.0,  # the adapted model's forward pass and one backward; no reference
    knobs=(Knob("beta", "β", "β"), LEARNING_RATE),
    look=Look("#8C510A", "H"),
    group="preference losses",
    strength="beta",
)
