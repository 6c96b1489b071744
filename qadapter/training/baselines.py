"""The baselines, through TRL: supervised fine-tuning and DPO. Replay is SFT on a mixture, so it is `train_sft` too.

All methods read the same tokens: pairs are encoded by `qadapter.preferences.tokenize` and handed over as token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from qadapter.preferences.tokenize import EncodedPair
from qadapter.training.arguments import train_to_end


class _TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer on pairs that are token ids already: the difference is that nothing is tokenised again."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[list[int], list[int]]],
    arguments: dict[str, Any],
    lora: LoraConfig | None,
    name: str,
) -> SFTTrainer:
    """Fine-tune on replies; the prompt is read, not scored.

    Args:
        model: the base; a LoRA is put onto it, or, with `lora=None`, all its weights are trained.
        tokenizer: its tokenizer.
        examples: (prompt ids, reply ids).
        arguments: of `trainer_arguments`.
        lora: the adapter's shape.
        name: for progress messages.

    Returns:
        The trainer, trained; `trainer.model` is the adapted model.
    """
    rows = Dataset.from_dict(
        {
            "input_ids": [prompt + reply for prompt, reply in examples],
            "completion_mask": [[0] * len(prompt) + [1] * len(reply) for prompt, reply in examples],
        }
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**_for_trl(arguments), max_length=None, completion_only_loss=True),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )
    return train_to_end(trainer, name)


def train_dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    arguments: dict[str, Any],
    lora: LoraConfig,
    beta: float,
    name: str,
) -> DPOTrainer:
    """DPO (Rafailov et al., 2023) with the base, the adapter off, as reference policy.

    Args:
        pairs: encoded preference pairs.
        beta: DPO's own β, the strength of the pull back to the reference.

    Other arguments and the return value as in `train_sft`.
    """
    rows = Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt_ids for pair in pairs],
            "chosen_ids": [pair.chosen_ids for pair in pairs],
            "rejected_ids": [pair.rejected_ids for pair in pairs],
        }
    )
    trainer = _TokenizedDPOTrainer(
        model=model,
        args=DPOConfig(**_for_trl(arguments), max_length=None, beta=beta),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )
    return train_to_end(trainer, name)


def _for_trl(arguments: dict[str, Any]) -> dict[str, Any]:
    """TRL 1.16 turns checkpointing on by default, and only under the name that transformers 5.23 deprecates."""
    return {**arguments, "gradient_checkpointing": arguments["activation_checkpointing"]}
