"""VAS, value augmented sampling (Han et al., 2024): decode with the base's own value of each candidate token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qadapter.config.base import Count, NonNegative
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings, Need
from qadapter.methods.needs.reward_model import RewardModelSettings
from qadapter.methods.needs.rollouts import ROLLOUTS, RolloutSettings, read_rows, rollouts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from qadapter.training.adapt import Job


class VASSettings(MethodSettings):
    """A value of the base's own replies, and how far it guides.

    Attributes:
        guidance: the paper's β: nats per unit of reward; 0 is the base.
        top_k: the base's most likely tokens, which are the candidates at each position.
        trace: λ of the returns; 1 takes each reply's reward alone as the target of all its states.
        rollouts: the base's replies that the value is learnt from.
        reward: how the reward model is trained.
    """

    guidance: NonNegative = 3.0
    top_k: Count = 20
    trace: Annotated[float, Field(ge=0, le=1)] = 0.95
    rollouts: RolloutSettings = RolloutSettings()
    reward: RewardModelSettings = RewardModelSettings()


def needs(choice: VASSettings) -> tuple[Need, ...]:
    """The base's scored replies, which need the reward model."""
    return (rollouts(choice.rollouts, choice.reward),)


def returns(values: Tensor, scored: Tensor, rewards: Tensor, trace: float) -> Tensor:
    """[B, T], the λ-return of each scored state, without discount; 0 elsewhere.

    With δ_t = V_{t+1} − V_t, and the reward in place of V_{t+1} at the last state, it is V_t + Σ_j λ^j δ_{t+j}.

    Args:
        values: [B, T], V of each state.
        scored: [B, T] bool; each row's states are consecutive, the last one is behind the reply's last token.
        rewards: [B].
        trace: λ.
    """
    import torch

    found, advantage, following = torch.zeros_like(values), torch.zeros_like(rewards), rewards
    for place in range(values.shape[1] - 1, -1, -1):
        at = scored[:, place]
        advantage = torch.where(at, following - values[:, place] + trace * advantage, 0.0)
        found[:, place] = torch.where(at, values[:, place] + advantage, 0.0)
        following = torch.where(at, values[:, place], rewards)
    return found


def train(job: Job, choice: VASSettings) -> Trainer:
    """Train the value on the base's scored replies; decoding is guided by it."""
    from qadapter.policy.guided import Guide
    from qadapter.training.guide import Outcome, train_guide

    rows = read_rows(job.needs[ROLLOUTS], ROLLOUTS)
    outcomes = [Outcome(row["prompt"], row["reply"], row["reward"]) for row in rows]

    def loss(values: Tensor, scored: Tensor, rewards: Tensor) -> Tensor:
        targets = returns(values.detach(), scored, rewards, choice.trace)
        return 0.5 * ((values - targets) * scored).square().sum()

    guide = Guide("value", choice.guidance, choice.top_k)
    return train_guide(job, METHOD.name, outcomes, guide, loss, from_prompt=True)


METHOD = Method(
    name="vas",
    settings=VASSettings,
    train=train,
    passes=2.0,
    knobs=(Knob("guidance", "η", "guidance"), Knob("top_k", "top-k", "number of candidates"), LEARNING_RATE),
    look=Look("#77AADD", (5, 2, 0)),
    group="guided",
    strength="guidance",
    needs=needs,
    refuses={"eval_steps": "it is trained on continuations of the base, so no pair can be set aside"},
)
