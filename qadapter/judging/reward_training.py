"""A reward model out of preference pairs, through TRL: the judge of answers where there is no rule and no network.

It is the base with a LoRA and a head of one number, trained on pairs that no policy sees, and measured on the pairs the
policies are measured on, whose prompts it has not seen either: a judge at chance shows.
"""

from __future__ import annotations

import copy
from pathlib import Path

from datasets import Dataset
from torch.nn import Module
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from qadapter.config.model import LoraSettings, ModelSettings
from qadapter.config.training import OptimizerSettings
from qadapter.errors import QAdapterError
from qadapter.evaluation.preference import encode_usable
from qadapter.judging.rewards import ADAPTER, load_reward_base, pair_accuracy
from qadapter.policy.loading import lora_config
from qadapter.preferences.pair import load_pairs
from qadapter.training.arguments import (
    measured_cost,
    save_weights,
    tokens_seen,
    train_to_end,
    trainer_arguments,
    write_training_record,
)


def train_judge(
    base: str | Path,
    pairs_file: Path,
    heldout_file: Path,
    *,
    model: ModelSettings,
    lora: LoraSettings,
    settings: OptimizerSettings,
    seed: int,
    out: Path,
    scratch: Path,
) -> RewardTrainer:
    """Fit -log σ(reward of chosen - reward of rejected) and measure the result.

    Args:
        base: folder or hub id.
        pairs_file: prepared pairs to train on.
        heldout_file: prepared pairs with other prompts, to measure the judge on.
        model: the base's precision.
        lora: the adapter's shape.
        settings: steps, batch size and so on; a step takes `batch_size` pairs.
        seed: of the head, the adapter and the order.
        out: gets `reward_model/` (PEFT's files, the head among them), `history.jsonl` and `metrics.json`:
            `judge/accuracy` (share of held-out pairs it decides as people did; chance is one half), its interval
            `judge/accuracy_low`, `judge/accuracy_high` and pairs `judge/accuracy_n`, `judge/train_pairs`,
            `train/…`, `cost/…`.
        scratch: folder of checkpoints; training resumes from the newest complete one.

    Returns:
        The trainer, with the trained model. Of several processes only the first one writes it to `out`.

    Raises:
        QAdapterError: no pair can be used within `max_length`.
    """
    set_seed(seed)  # the head is drawn when the base is loaded
    network, tokenizer = load_reward_base(base, model)
    _, pairs = encode_usable(tokenizer, load_pairs(pairs_file), settings.max_length)
    if not pairs:
        raise QAdapterError(
            f"None of the judge's pairs can be used within {settings.max_length} tokens. Raise "
            "evaluation.adaptation.reward_model.max_length or give other data."
        )
    rows = Dataset.from_dict(
        {
            "chosen_ids": [pair.prompt_ids + pair.chosen_ids for pair in pairs],
            "rejected_ids": [pair.prompt_ids + pair.rejected_ids for pair in pairs],
        }
    )
    arguments = trainer_arguments(settings, seed=seed, scratch=scratch)
    # TRL 1.16 turns checkpointing on by default, and only under the name that transformers 5.23 deprecates.
    arguments["gradient_checkpointing"] = arguments["activation_checkpointing"]
    padded = copy.deepcopy(tokenizer)  # TRL pads with its padding token, and reads the reward in front of that
    padded.pad_token = tokenizer.convert_ids_to_tokens(network.config.get_text_config().pad_token_id)
    with measured_cost() as cost:
        trainer = RewardTrainer(
            model=network,
            args=RewardConfig(**arguments, max_length=None),
            train_dataset=rows,
            processing_class=padded,
            peft_config=lora_config(lora, "SEQ_CLS"),
        )
        train_to_end(trainer, "reward model")
    save_weights(trainer, out / ADAPTER)
    assert isinstance(trainer.model, Module)
    accuracy = pair_accuracy(
        trainer.model,
        tokenizer,
        load_pairs(heldout_file),
        max_length=settings.max_length,
        batch_size=settings.micro_batch,
    )
    lengths = [len(row) + len(other) for row, other in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
    write_training_record(
        out,
        trainer,
        cost,
        tokens_seen(lengths, trainer.state.global_step, settings.batch_size),
        **{
            "judge/accuracy": accuracy.estimate,
            "judge/accuracy_low": accuracy.low,
            "judge/accuracy_high": accuracy.high,
            "judge/accuracy_n": float(accuracy.items),
            "judge/train_pairs": len(pairs),
        },
    )
    return trainer
