"""DPOP (Pal et al., 2024): DPO with a penalty where the chosen reply becomes less likely than under the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.config.base import NonNegative, Positive
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from qadapter.training.adapt import Job


class DPOPSettings(MethodSettings):
    """`beta`: DPO's β; `penalty`: the paper's λ, the weight of a chosen reply's lost log-probability."""

    beta: Positive = 0.1
    penalty: NonNegative = 50.0


def pair_losses(chosen: Tensor, rejected: Tensor, beta: float, penalty: float) -> Tensor:
    """[B], −log σ(β · (LR(chosen) − LR(rejected) − λ · max(0, −LR(chosen)))).

    Args:
        chosen, rejected: [B], log π_θ/π1 of the replies.
        beta, penalty: β and λ.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * (chosen - rejected - penalty * (-chosen).clamp(min=0)))


def train(job: Job, choice: DPOPSettings) -> Trainer:
    """Train on pairs; the reference is the base, which is the network with its adapter off."""
    from qadapter.training.arguments import train_to_end
    from qadapter.training.pair_trainer import Scores, pair_trainer

    def loss(scores: Scores, _: object) -> Tensor:
        chosen, rejected = scores.log_ratios.sum(dim=1).chunk(2)
        return pair_losses(chosen, rejected, choice.beta, choice.penalty).sum()

    return train_to_end(pair_trainer(job, loss, "pairs"), METHOD.name)


METHOD = Method(
    name="dpop",
    settings=DPOPSettings,
    train=train,
    passes=3.0,  # the base's forward pass, the adapted model's, and one backward
    knobs=(Knob("beta", "β", "β"), Knob("penalty", "p", "weight of the penalty"), LEARNING_RATE),
    look=Look("#661100", "3"),
    group="preference losses",
    strength="beta",
)
