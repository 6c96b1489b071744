"""ShiQ (2025): multi-step consistency of the logits, read as a Q-function, with a reward model's scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qadapter.config.base import Positive
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings, Need
from qadapter.methods.needs.reward_model import RewardModelSettings, reward_model, rewards_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from qadapter.training.adapt import Job
    from qadapter.training.pair_trainer import Scores


class ShiQSettings(MethodSettings):
    """`beta`: β, the temperature of the regularised reward; `reward`: how the reward model is trained."""

    beta: Positive = 0.1
    reward: RewardModelSettings = RewardModelSettings()


def needs(choice: ShiQSettings) -> tuple[Need, ...]:
    """The reward model."""
    return (reward_model(choice.reward),)


def residuals(scores: Scores, rewards: Tensor, beta: float) -> Tensor:
    """[R, T-1], what is missing at each reply token; 0 everywhere for the optimal policy.

    At token t it is Σ_{k≥t} ( r_k − β log π/π1(y_k) ) − β (v − v1)(s_t), with v the log-normaliser of the logits and
    the reply's whole reward at its last token.

    Args:
        scores: R replies.
        rewards: [R].
        beta: β.
    """
    ahead = scores.log_ratios.flip(1).cumsum(1).flip(1)
    moved = scores.log_normalizers - scores.base_log_normalizers
    return (rewards[:, None] - beta * (ahead + moved)) * scores.scored


def train(job: Job, choice: ShiQSettings) -> Trainer:
    """Train on both replies of each pair with their rewards; that one was chosen is only in the reward model."""
    import torch

    from qadapter.preferences.tokenize import collate_pairs, padding_id
    from qadapter.training.arguments import train_to_end
    from qadapter.training.pair_trainer import pair_trainer

    pad, pairs = padding_id(job.tokenizer), job.encoded
    found = rewards_of(job)([pair.prompt_ids + ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)])
    rows = list(zip(pairs, found[::2], found[1::2], strict=True))

    def collated(some: Sequence[Any]) -> dict[str, Tensor]:
        batch = collate_pairs([pair for pair, _, _ in some], pad)
        return {**batch, "rewards": torch.tensor([w for _, w, _ in some] + [r for _, _, r in some])}

    def loss(scores: Scores, batch: Any) -> Tensor:
        return residuals(scores, batch["rewards"], choice.beta).square().sum()

    return train_to_end(pair_trainer(job, loss, "tokens", dataset=rows, collator=collated), METHOD.name)


METHOD = Method(
    name="shiq",
    settings=ShiQSettings,
    train=train,
    passes=3.0,  # the base's forward pass, the adapted model's, and one backward; the reward model's counts with it
    knobs=(Knob("beta", "β", "β"), LEARNING_RATE),
    look=Look("#AA3377", (4, 1, 45)),
    group="RL",
    strength="beta",
    needs=needs,
)
