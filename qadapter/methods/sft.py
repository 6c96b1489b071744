"""SFT: fine-tuning on the chosen replies; the rejected ones are not seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.methods.method import LEARNING_RATE, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class SFTSettings(MethodSettings):
    """SFT on the chosen replies."""


def train(job: Job, choice: SFTSettings) -> Trainer:  # noqa: ARG001 - its only setting is the learning rate
    """Train on each pair's chosen reply twice: two sequences per pair, as the pairwise methods see."""
    from qadapter.training.supervised import train_sft

    examples, arguments = job.on_conversations(job.chosen() + job.chosen())
    return train_sft(job.network, job.tokenizer, examples, arguments, job.lora, METHOD.name)


METHOD = Method(
    name="sft",
    settings=SFTSettings,
    train=train,
    passes=2.0,
    knobs=(LEARNING_RATE,),
    look=Look("#0072B2", "s"),
    group="baselines",
    by_default=True,
)
