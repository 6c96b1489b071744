"""PITA (2025): decode with the probability that a continuation of each candidate token is preferred."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.config.base import Count, NonNegative
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings, Need
from qadapter.methods.needs.reward_model import RewardModelSettings
from qadapter.methods.needs.rollouts import BRANCHES, RolloutSettings, branches, read_rows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from qadapter.training.adapt import Job


class PITASettings(MethodSettings):
    """A classifier of the base's continuations, and how far it guides.

    Attributes:
        guidance: η of the published code, the paper's 1/η: a candidate's logit moves by at most so many nats; 0 is the
            base.
        top_k: the base's most likely tokens, which are the candidates at each position.
        branches: the continuations that it is learnt from; `per_prompt` is the number of cuts of a reply.
        reward: how the reward model, which labels them, is trained.
    """

    guidance: NonNegative = 1.0
    top_k: Count = 20
    branches: RolloutSettings = RolloutSettings()
    reward: RewardModelSettings = RewardModelSettings()


def needs(choice: PITASettings) -> tuple[Need, ...]:
    """Labelled continuations of the base, which need the reward model."""
    return (branches(choice.branches, choice.reward),)


def train(job: Job, choice: PITASettings) -> Trainer:
    """Train the classifier on every token behind the cuts; decoding is guided by it."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    from qadapter.policy.guided import Guide
    from qadapter.training.guide import Outcome, train_guide

    rows = read_rows(job.needs[BRANCHES], BRANCHES)
    outcomes = [Outcome(row["prompt"], row["reply"], float(row["preferred"])) for row in rows]

    def loss(values: Tensor, scored: Tensor, preferred: Tensor) -> Tensor:
        labels = preferred[:, None].expand(values.shape)
        return (binary_cross_entropy_with_logits(values, labels, reduction="none") * scored).sum()

    guide = Guide("preference", choice.guidance, choice.top_k)
    return train_guide(job, METHOD.name, outcomes, guide, loss, from_prompt=False)


METHOD = Method(
    name="pita",
    settings=PITASettings,
    train=train,
    passes=2.0,
    knobs=(Knob("guidance", "η", "guidance"), Knob("top_k", "top-k", "number of candidates"), LEARNING_RATE),
    look=Look("#225555", (6, 2, 0)),
    group="guided",
    strength="guidance",
    needs=needs,
    refuses={"eval_steps": "it is trained on continuations of the base, so no pair can be set aside"},
)
