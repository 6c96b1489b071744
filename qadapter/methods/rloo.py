"""RLOO (Ahmadian et al., 2024), through TRL: REINFORCE with a leave-one-out baseline, on a reward model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.methods.method import Look, Method
from qadapter.methods.policy_gradients import KNOBS, PASSES, REFUSES, PolicyGradientSettings, needs_of, train_with

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class RLOOSettings(PolicyGradientSettings):
    """`beta` weighs the KL divergence inside the reward."""


def train(job: Job, choice: RLOOSettings) -> Trainer:
    """Train on rewards of sampled replies."""
    return train_with(job, choice, "rloo")


METHOD = Method(
    name="rloo",
    settings=RLOOSettings,
    train=train,
    passes=PASSES,
    knobs=KNOBS,
    look=Look("#CC6677", (6, 1, 0)),
    group="RL",
    strength="beta",
    needs=needs_of,
    refuses=REFUSES,
)
