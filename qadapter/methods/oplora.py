"""OPLoRA: fine-tuning on the chosen replies with updates orthogonal to the base's leading singular directions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class OPLoRASettings(MethodSettings):
    """`protected`: k, the leading singular directions of each adapted layer that the update leaves alone; 0 is SFT."""

    protected: Annotated[int, Field(ge=0)] = 16


def train(job: Job, choice: OPLoRASettings) -> Trainer:
    """Train on each pair's chosen reply twice, as SFT does; the adapter is projected after each optimiser step."""
    from qadapter.training.orthogonal import projecting_trainer
    from qadapter.training.supervised import train_sft

    examples, arguments = job.on_conversations(job.chosen() + job.chosen())
    trainer_of = projecting_trainer(choice.protected)
    return train_sft(job.network, job.tokenizer, examples, arguments, job.lora, METHOD.name, trainer_of)


METHOD = Method(
    name="oplora",
    settings=OPLoRASettings,
    train=train,
    passes=2.0,
    knobs=(Knob("protected", "k", "number of protected directions"), LEARNING_RATE),
    look=Look("#DDCC77", "4"),
    group="regularised",
    strength="protected",
)
