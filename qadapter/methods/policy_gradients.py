"""What the methods that train on rewards of their own replies share (RLOO, GRPO)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qadapter.config.base import Count, Positive
from qadapter.methods.method import LEARNING_RATE, Knob, MethodSettings, Need
from qadapter.methods.needs.reward_model import RewardModelSettings, reward_model, rewards_of

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.config.training import OptimizerSettings
    from qadapter.training.adapt import Job
    from qadapter.training.own_replies import Algorithm

PASSES = 6.0
"""Sampling, the policy of the sampling, base and reward model; the adapted model's pass, one backward."""

KNOBS = (
    Knob("beta", "β", "β"),
    Knob("replies_per_prompt", "G", "replies per prompt"),
    Knob("temperature", "T", "temperature"),
    LEARNING_RATE,
)

REFUSES = {
    "eval_steps": "it has no loss on given pairs: it learns from rewards of replies that it samples itself",
    "group_by_length": "the replies to a prompt are a group, and how long they get is not known before",
    "include_num_input_tokens_seen": "it counts the tokens of its own replies itself",
}
"""Settings of `training` that they cannot follow (`Method.refuses`)."""


class PolicyGradientSettings(MethodSettings):
    """Policy gradients on replies of its own.

    Attributes:
        beta: the weight of the KL divergence from the base; above 0. Each method says where it stands.
        replies_per_prompt: in a group, whose rewards are compared with each other.
        temperature: of the sampling; above 0.
        max_new_tokens: of a reply; None: as many as the longest chosen reply has. Half of `training.max_length` is
            theirs at least; prompts that leave less lose their beginning.
        reward: how the reward model is trained.
    """

    beta: Positive = 0.05
    replies_per_prompt: Annotated[int, Field(ge=2)] = 4
    temperature: Positive = 1.0
    max_new_tokens: Count | None = None
    reward: RewardModelSettings = RewardModelSettings()

    def misfit(self, training: OptimizerSettings) -> str:
        """A micro-batch of whole groups is needed."""
        pairs, group = training.micro_batch, self.replies_per_prompt
        if 2 * pairs % group == 0:
            return ""
        return (
            f"replies_per_prompt: {2 * pairs} replies per micro-batch (two for each of its {pairs} pairs) are not a "
            f"multiple of {group}: change it or training.micro_batch_size"
        )


def needs_of(choice: PolicyGradientSettings) -> tuple[Need, ...]:
    """The reward model."""
    return (reward_model(choice.reward),)


def train_with(job: Job, choice: PolicyGradientSettings, name: Algorithm) -> Trainer:
    """Train on sampled replies to the pairs' prompts; the pairs themselves are only in the reward model."""
    from qadapter.training.own_replies import train_on_rewards

    return train_on_rewards(
        job,
        name,
        name,
        rewards_of(job),
        group=choice.replies_per_prompt,
        beta=choice.beta,
        temperature=choice.temperature,
        max_new_tokens=choice.max_new_tokens,
    )
