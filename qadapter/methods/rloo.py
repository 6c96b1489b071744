"""RLOO (Ahmadian et al., 2024), through TRL: REINFORCE with a leave-one-out baseline, on a reward model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qadapter.config.base import Count, Positive
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings, Need
from qadapter.methods.needs.reward_model import RewardModelSettings, reward_model, rewards_of

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class RLOOSettings(MethodSettings):
    """Policy gradients on replies of its own.

    Attributes:
        beta: the weight of the KL divergence from the base, inside the reward; above 0.
        replies_per_prompt: in a group, whose rewards are compared with each other.
        temperature: of the sampling; above 0.
        max_new_tokens: of a reply; None: as many as the longest chosen reply has.
        reward: how the reward model is trained.
    """

    beta: Positive = 0.05
    replies_per_prompt: Annotated[int, Field(ge=2)] = 4
    temperature: Positive = 1.0
    max_new_tokens: Count | None = None
    reward: RewardModelSettings = RewardModelSettings()


def needs(choice: RLOOSettings) -> tuple[Need, ...]:
    """The reward model."""
    return (reward_model(choice.reward),)


def train(job: Job, choice: RLOOSettings) -> Trainer:
    """Train on sampled replies to the pairs' prompts; the pairs themselves are only in the reward model."""
    from qadapter.training.own_replies import train_on_rewards

    return train_on_rewards(
        job,
        METHOD.name,
        "rloo",
        rewards_of(job),
        group=choice.replies_per_prompt,
        beta=choice.beta,
        temperature=choice.temperature,
        max_new_tokens=job.reply_room(choice.max_new_tokens),
    )


METHOD = Method(
    name="rloo",
    settings=RLOOSettings,
    train=train,
    passes=6.0,  # sampling, the policy of the sampling, base and reward model; the adapted model's pass, one backward
    knobs=(
        Knob("beta", "β", "β"),
        Knob("replies_per_prompt", "G", "replies per prompt"),
        Knob("temperature", "T", "temperature"),
        LEARNING_RATE,
    ),
    look=Look("#CC6677", (6, 1, 0)),
    group="RL",
    strength="beta",
    needs=needs,
)
