"""DPO (Rafailov et al., 2023), through TRL, with the base as the reference policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qadapter.config.base import Positive
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class DPOSettings(MethodSettings):
    """`beta`: DPO's own β, the strength of the pull back to the base."""

    beta: Positive = 0.1


def train(job: Job, choice: DPOSettings) -> Trainer:
    """Train on pairs; the reference is the base, which is the network with its adapter off."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from qadapter.training.arguments import for_trl, train_to_end

    class TokenizedDPOTrainer(DPOTrainer):
        """DPOTrainer on pairs that are token ids already: nothing is tokenised again."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

    pairs, arguments = job.on_pairs()
    rows = Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt_ids for pair in pairs],
            "chosen_ids": [pair.chosen_ids for pair in pairs],
            "rejected_ids": [pair.rejected_ids for pair in pairs],
        }
    )
    trainer = TokenizedDPOTrainer(
        model=job.network,
        args=DPOConfig(**for_trl(arguments), max_length=None, beta=choice.beta),
        train_dataset=rows,
        processing_class=job.tokenizer,
        peft_config=job.lora,
    )
    return train_to_end(trainer, METHOD.name)


METHOD = Method(
    name="dpo",
    settings=DPOSettings,
    train=train,
    passes=3.0,  # the base's forward pass, the adapted model's, and one backward
    knobs=(Knob("beta", "β", "β"), LEARNING_RATE),
    look=Look("#009E73", "^"),
    group="preference losses",
    strength="beta",
    by_default=True,
)
