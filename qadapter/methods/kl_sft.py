"""KL-regularised SFT: imitation of the chosen replies, held to the base by a KL divergence per reply token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.config.base import NonNegative
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from qadapter.training.adapt import Job


class KLSFTSettings(MethodSettings):
    """`kl_weight`: λ, the weight of the divergence from the base; 0 is SFT."""

    kl_weight: NonNegative = 1.0


def forward_kl(base_logits: Tensor, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001 - all tokens count
    """[N], KL(base ‖ adapted) of the next token, in nats.

    Args:
        base_logits, logits: [N, V] float32.
        targets: [N], the tokens that follow.
    """
    base, adapted = base_logits.log_softmax(-1), logits.log_softmax(-1)
    return (base.exp() * (base - adapted)).sum(-1)


def train(job: Job, choice: KLSFTSettings) -> Trainer:
    """Train on each pair's chosen reply twice, as SFT does."""
    from qadapter.training.regularised import train_regularised

    return train_regularised(job, METHOD.name, choice.kl_weight, forward_kl)


METHOD = Method(
    name="kl-sft",
    settings=KLSFTSettings,
    train=train,
    passes=3.0,  # the base's forward pass, the adapted model's, and one backward
    knobs=(Knob("kl_weight", "λ", "λ"), LEARNING_RATE),
    look=Look("#332288", "1"),
    group="regularised",
    strength="kl_weight",
)
