"""RPO: DPO with the likelihood of the chosen reply (Pang et al., 2024), through TRL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.config.base import NonNegative, Positive
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class RPOSettings(MethodSettings):
    """`beta`: DPO's β; `alpha`: the weight of the chosen reply's negative log-likelihood per token."""

    beta: Positive = 0.1
    alpha: NonNegative = 1.0


def train(job: Job, choice: RPOSettings) -> Trainer:
    """Train on pairs; the reference is the base, which is the network with its adapter off."""
    from qadapter.training.pairwise import train_dpo

    return train_dpo(job, METHOD.name, beta=choice.beta, loss_type=["sigmoid", "sft"], loss_weights=[1.0, choice.alpha])


METHOD = Method(
    name="rpo",
    settings=RPOSettings,
    train=train,
    passes=3.0,  # the base's forward pass, the adapted model's, and one backward
    knobs=(Knob("beta", "β", "β"), Knob("alpha", "α", "α"), LEARNING_RATE),
    look=Look("#44AA99", ">"),
    group="preference losses",
    strength="beta",
)
