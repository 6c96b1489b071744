"""TMKL (Mask the Target): SFT held to the base by a KL divergence over all tokens but the target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.config.base import NonNegative
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from qadapter.training.adapt import Job


class TMKLSettings(MethodSettings):
    """`kl_weight`: λ, the weight of the divergence from the base; 0 is SFT."""

    kl_weight: NonNegative = 1.0


def masked_forward_kl(base_logits: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """[N], KL(base ‖ adapted) in nats, both without the target token and normalised anew.

    Args:
        base_logits, logits: [N, V] float32.
        targets: [N], the tokens that follow.
    """
    target = targets[:, None]
    base = base_logits.scatter(1, target, -float("inf")).log_softmax(-1)
    adapted = logits.scatter(1, target, -float("inf")).log_softmax(-1)
    return (base.exp() * (base - adapted)).scatter(1, target, 0.0).sum(-1)  # at the target it is 0 · (inf - inf)


def train(job: Job, choice: TMKLSettings) -> Trainer:
    """Train on each pair's chosen reply twice, as SFT does."""
    from qadapter.training.regularised import train_regularised

    return train_regularised(job, METHOD.name, choice.kl_weight, masked_forward_kl)


METHOD = Method(
    name="tmkl",
    settings=TMKLSettings,
    train=train,
    passes=3.0,  # the base's forward pass, the adapted model's, and one backward
    knobs=(Knob("kl_weight", "λ", "λ"), LEARNING_RATE),
    look=Look("#6699CC", "2"),
    group="regularised",
    strength="kl_weight",
)
