"""CPO (Xu et al., 2024), through TRL: DPO without the reference, and the likelihood of the chosen reply."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.config.base import NonNegative, Positive
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class CPOSettings(MethodSettings):
    """`beta`: β, which scales the log-probabilities; `alpha`: the weight of the chosen reply's likelihood."""

    beta: Positive = 0.1
    alpha: NonNegative = 1.0


def train(job: Job, choice: CPOSettings) -> Trainer:
    """Train on pairs; the base is not consulted."""
    from qadapter.training.pairwise import train_without_reference

    return train_without_reference(
        job, METHOD.name, "cpo", loss_type="sigmoid", beta=choice.beta, cpo_alpha=choice.alpha
    )


METHOD = Method(
    name="cpo",
    settings=CPOSettings,
    train=train,
    passes=2.0,  # the adapted model's forward pass and one backward; no reference
    knobs=(Knob("beta", "β", "β"), Knob("alpha", "α", "α"), LEARNING_RATE),
    look=Look("#AA4499", "+"),
    group="preference losses",
    strength="beta",
)
