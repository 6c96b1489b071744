"""SimPO (Meng et al., 2024), through TRL: mean log-probabilities with a target margin, without a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qadapter.config.base import NonNegative, Positive
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class SimPOSettings(MethodSettings):
    """`beta`: β, which scales mean log-probabilities; `gamma_ratio`: the target margin as γ/β, in nats per token."""

    beta: Positive = 2.0
    gamma_ratio: NonNegative = 0.5


def loss_of(choice: SimPOSettings) -> dict[str, Any]:
    """TRL's settings: its `simpo_gamma` is γ, not γ/β, and without `cpo_alpha=0` CPO's likelihood term is added."""
    return {
        "loss_type": "simpo",
        "beta": choice.beta,
        "simpo_gamma": choice.gamma_ratio * choice.beta,
        "cpo_alpha": 0.0,
    }


def train(job: Job, choice: SimPOSettings) -> Trainer:
    """Train on pairs; the base is not consulted."""
    from qadapter.training.pairwise import train_without_reference

    return train_without_reference(job, METHOD.name, "cpo", **loss_of(choice))


METHOD = Method(
    name="simpo",
    settings=SimPOSettings,
    train=train,
    passes=2.0,  # the adapted model's forward pass and one backward; no reference
    knobs=(Knob("beta", "β", "β"), Knob("gamma_ratio", "γ/β", "γ/β"), LEARNING_RATE),
    look=Look("#88CCEE", (4, 1, 0)),
    group="preference losses",
    strength="beta",
)
