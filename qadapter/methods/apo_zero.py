"""APO-zero (D'Oosterlinck et al., 2024), through TRL: the chosen reply up, the rejected one down, each by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.config.base import Positive
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class APOZeroSettings(MethodSettings):
    """`beta`: β, which scales both log-ratios to the base."""

    beta: Positive = 0.1


def train(job: Job, choice: APOZeroSettings) -> Trainer:
    """Train on pairs; the reference is the base, which is the network with its adapter off."""
    from qadapter.training.pairwise import train_dpo

    return train_dpo(job, METHOD.name, beta=choice.beta, loss_type=["apo_zero"])


METHOD = Method(
    name="apo-zero",
    settings=APOZeroSettings,
    train=train,
    passes=3.0,  # the base's forward pass, the adapted model's, and one backward
    knobs=(Knob("beta", "β", "β"), LEARNING_RATE),
    look=Look("#999933", "p"),
    group="preference losses",
    strength="beta",
)
