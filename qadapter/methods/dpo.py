"""DPO (Rafailov et al., 2023), through TRL, with the base as the reference policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.config.base import Positive
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class DPOSettings(MethodSettings):
    """`beta`: DPO's own β, the strength of the pull back to the base."""

    beta: Positive = 0.1


def train(job: Job, choice: DPOSettings) -> Trainer:
    """Train on pairs; the reference is the base, which is the network with its adapter off."""
    from qadapter.training.pairwise import train_dpo

    return train_dpo(job, METHOD.name, beta=choice.beta)


METHOD = Method(
    name="dpo",
    settings=DPOSettings,
    train=train,
    passes=3.0,  # the base's forward pass, the adapted model's, and one backward
    knobs=(Knob("beta", "β", "β"), LEARNING_RATE),
    look=Look("#009E73", "^"),
    group="preference losses",
    strength="beta",
    by_default=True,
)
