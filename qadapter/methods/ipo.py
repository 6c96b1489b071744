"""IPO (Azar et al., 2023), through TRL: the log-ratio's difference is fitted to a fixed margin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.config.base import Positive
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class IPOSettings(MethodSettings):
    """`beta`: the paper's τ; the margin that the replies' mean log-ratios are fitted to is 1/(2τ) nats per token."""

    beta: Positive = 0.1


def train(job: Job, choice: IPOSettings) -> Trainer:
    """Train on pairs; the reference is the base, which is the network with its adapter off."""
    from qadapter.training.pairwise import train_dpo

    return train_dpo(job, METHOD.name, beta=choice.beta, loss_type=["ipo"])


METHOD = Method(
    name="ipo",
    settings=IPOSettings,
    train=train,
    passes=3.0,  # the base's forward pass, the adapted model's, and one backward
    knobs=(Knob("beta", "β", "β"), LEARNING_RATE),
    look=Look("#117733", "<"),
    group="preference losses",
    strength="beta",
)
