"""GRPO (Shao et al., 2024), through TRL: policy gradients on rewards relative to their group, on a reward model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.methods.method import Look, Method
from qadapter.methods.policy_gradients import KNOBS, PASSES, REFUSES, PolicyGradientSettings, needs_of, train_with

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class GRPOSettings(PolicyGradientSettings):
    """`beta` weighs the KL divergence inside the loss."""


def train(job: Job, choice: GRPOSettings) -> Trainer:
    """Train on rewards of sampled replies."""
    return train_with(job, choice, "grpo")


METHOD = Method(
    name="grpo",
    settings=GRPOSettings,
    train=train,
    passes=PASSES,
    knobs=KNOBS,
    look=Look("#EE8866", (8, 1, 0)),
    group="RL",
    strength="beta",
    needs=needs_of,
    refuses=REFUSES,
)
