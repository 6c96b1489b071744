"""Training on preference pairs through TRL: DPO and its relatives, and the losses without a reference.

All trainings read the same tokens: pairs are encoded by `qadapter.preferences.tokenize` and handed over as token ids.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from qadapter.training.arguments import for_trl, train_to_end

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer on pairs that are token ids already: nothing is tokenised again."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


def train_dpo(job: Job, name: str, **loss: Any) -> Trainer:
    """Train with a loss of TRL's DPO trainer; the reference is the base, which is the network with its adapter off.

    Args:
        job: the training.
        name: of the method, for progress messages.
        loss: what the method sets of `DPOConfig`: `beta`, `loss_type`, `loss_weights` …
    """
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
        args=DPOConfig(
            **for_trl(arguments),
            max_length=None,
            disable_dropout=False,  # TRL's default would switch the adapter's dropout off in these methods alone
            **loss,
        ),
        train_dataset=rows,
        processing_class=job.tokenizer,
        peft_config=job.lora,
    )
    return train_to_end(trainer, name)


def train_without_reference(job: Job, name: str, trainer: str, **loss: Any) -> Trainer:
    """Train with one of TRL's experimental trainers; the base is not consulted.

    Args:
        job: the training.
        name: of the method, for progress messages.
        trainer: `trl.experimental.<trainer>`: `orpo`, `cpo`, or another that takes the same rows.
        loss: what the method sets of the trainer's config: `beta`, `loss_type` …
    """
    with warnings.catch_warnings():  # TRL says that it may change without notice; constraints.txt pins it
        warnings.filterwarnings("ignore", message=".*trl.experimental")
        module: Any = import_module(f"trl.experimental.{trainer}")
    config_of, trainer_of = getattr(module, f"{trainer.upper()}Config"), getattr(module, f"{trainer.upper()}Trainer")

    class TokenizedTrainer(trainer_of):  # type: ignore[misc, valid-type]
        """The trainer on pairs that are token ids already: nothing is tokenised again, and so nothing is cut again."""

        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return feature

    pairs, arguments = job.on_pairs()
    rows: dict[str, list[list[int]]] = {}
    for side in ("chosen", "rejected"):
        replies = [pair.chosen_ids if side == "chosen" else pair.rejected_ids for pair in pairs]
        both = [(pair.prompt_ids, reply) for pair, reply in zip(pairs, replies, strict=True)]
        rows[f"{side}_input_ids"] = [prompt + reply for prompt, reply in both]
        rows[f"{side}_attention_mask"] = [[1] * (len(prompt) + len(reply)) for prompt, reply in both]
        rows[f"{side}_labels"] = [[-100] * len(prompt) + reply for prompt, reply in both]
    made = TokenizedTrainer(
        model=job.network,
        args=config_of(
            **for_trl(arguments),
            max_length=job.max_length,
            disable_dropout=False,  # TRL's default would switch the adapter's dropout off in these methods alone
            remove_unused_columns=False,
            **loss,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=job.tokenizer,
        peft_config=job.lora,
    )
    return train_to_end(made, name)
