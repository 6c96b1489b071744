"""Supervised fine-tuning through TRL: of an adapter on given replies, and of the base itself on helpful ones.

All trainings read the same tokens: pairs are encoded by `qadapter.preferences.tokenize` and handed over as token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from qadapter.config.model import LoraSettings, ModelSettings
from qadapter.config.training import HelpfulSettings
from qadapter.policy.adapters import fitted, load_adapter
from qadapter.policy.frozen import silence
from qadapter.policy.loading import load_base, lora_config
from qadapter.preferences.pair import load_pairs
from qadapter.preferences.tokenize import truncation_of
from qadapter.training.adapt import encode_usable
from qadapter.training.arguments import (
    for_trl,
    measured_cost,
    save_weights,
    tokens_seen,
    train_to_end,
    trainer_arguments,
    write_training_record,
)


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[list[int], list[int]]],
    arguments: dict[str, Any],
    lora: LoraConfig | None,
    name: str,
    trainer_of: type[SFTTrainer] = SFTTrainer,
) -> SFTTrainer:
    """Fine-tune on replies; prompts are not scored.

    Args:
        model: the base; a LoRA is added to it, or, with `lora=None`, all its weights are trained.
        tokenizer: its tokenizer.
        examples: (prompt ids, reply ids).
        arguments: of `trainer_arguments`.
        lora: the adapter's shape.
        name: for progress messages.
        trainer_of: the class, for a method that changes the loss.

    Returns:
        The trainer, trained; `trainer.model` is the adapted model.
    """
    rows = Dataset.from_dict(
        {
            "input_ids": [prompt + reply for prompt, reply in examples],
            "completion_mask": [[0] * len(prompt) + [1] * len(reply) for prompt, reply in examples],
        }
    )
    trainer = trainer_of(
        model=model,
        args=SFTConfig(**for_trl(arguments), max_length=None, completion_only_loss=True),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )
    return train_to_end(trainer, name)


def fine_tune_base(
    base: str | Path,
    pairs_file: Path,
    *,
    model: ModelSettings,
    lora: LoraSettings,
    settings: HelpfulSettings,
    seed: int,
    out: Path,
    scratch: Path,
) -> None:
    """SFT on the chosen replies, all weights or (for a pretrained model) a LoRA that is merged in the end.

    Writes `model/` (a whole model, so that everything after it treats every base alike), `history.jsonl`,
    `metrics.json`, `unused.jsonl`.
    """
    network, tokenizer = load_base(base, model)
    _, encoded = encode_usable(
        load_pairs(pairs_file), tokenizer, settings.max_length, out / "unused.jsonl", settings.allow_truncation
    )
    arguments = trainer_arguments(settings, seed=seed, scratch=scratch)
    set_seed(seed)
    if settings.lora:
        silence(network)
    else:
        network.train()
    examples = [(pair.prompt_ids, pair.chosen_ids) for pair in encoded]
    with measured_cost() as cost:
        trainer = train_sft(
            network,
            tokenizer,
            examples,
            arguments,
            fitted(lora_config(lora), network) if settings.lora else None,
            "helpful SFT",
        )
    if settings.lora:
        # Merging into a quantized base would lose the training to rounding, so merge into the unquantized one.
        save_weights(trainer, out / "adapter")
        if trainer.is_world_process_zero():  # of several processes, the one that has written the adapter
            whole, _ = load_base(base, model.model_copy(update={"quantization": "none"}))
            load_adapter(whole, out / "adapter").merge_and_unload().save_pretrained(out / "model")
    else:
        save_weights(trainer, out / "model")
    tokenizer.save_pretrained(out / "model")
    lengths = [len(prompt) + len(reply) for prompt, reply in examples]
    tokens = tokens_seen(lengths, trainer.state.global_step, settings.batch_size)
    write_training_record(out, trainer, cost, tokens, **truncation_of(encoded).metrics())
