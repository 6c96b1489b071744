"""Train a Q-Adapter further: the same frozen base, and the adapter of an earlier training as the starting point."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from transformers import set_seed

from qadapter.config.methods import QAdapterSettings
from qadapter.config.model import ModelSettings
from qadapter.config.training import OptimizerSettings
from qadapter.files.artifacts import write_json
from qadapter.policy.loading import load_base
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.preferences.prepare import load_pairs
from qadapter.training.arguments import (
    measured_cost,
    save_weights,
    tokens_seen,
    train_to_end,
    trainer_arguments,
    write_training_record,
)
from qadapter.training.config import QAdapterConfig
from qadapter.training.encoded_pairs import encode_dataset
from qadapter.training.trainer import QAdapterTrainer


def continue_adapter(
    choice: QAdapterSettings,
    base: str | Path,
    adapter: Path,
    pairs_file: Path,
    *,
    model: ModelSettings,
    training: OptimizerSettings,
    seed: int,
    out: Path,
    scratch: Path,
) -> None:
    """Train an adapter further and write it.

    The objective stays what it was: the reward is relative to the base, not to the adapter that training starts from.
    Optimiser and schedule start anew. The adapter keeps its own rank and layers.

    Args:
        choice: the method's settings.
        base: folder or hub id of the base that the adapter was trained on.
        adapter: folder of a Q-Adapter.
        pairs_file: prepared preference pairs, one a line.
        model, training: of the experiment.
        seed: of order and dropout.
        out: gets `adapter/`, `params.json`, `history.jsonl` and `metrics.json`, as from `train_adapter`.
        scratch: checkpoints; training goes on from the newest whole one.

    Raises:
        QAdapterError: the folder holds no Q-Adapter, or no pair is left after truncation.
    """
    network, tokenizer = load_base(base, model)
    policy = QAdapterForCausalLM.from_pretrained(adapter, base_model=network, is_trainable=True)
    encoded = encode_dataset(load_pairs(pairs_file), tokenizer, training.max_length, "training")
    steps = training.max_steps or math.ceil(len(encoded) / training.batch_size * training.epochs)
    settings = training.model_copy(
        update={"max_steps": steps, "learning_rate": choice.learning_rate or training.learning_rate}
    )
    objective = choice.model_dump(exclude={"preset", "learning_rate"}, exclude_none=True)
    arguments = QAdapterConfig(
        objective=choice.preset, **objective, **trainer_arguments(settings, seed=seed, scratch=scratch)
    )
    write_json(out / "params.json", {"objective": asdict(arguments.to_objective())})
    set_seed(seed)
    with measured_cost() as cost:
        trainer = train_to_end(
            QAdapterTrainer(model=policy, args=arguments, train_dataset=encoded, processing_class=tokenizer),
            "q-adapter, continued",
        )
    save_weights(trainer, out / "adapter")
    pairs = [encoded[index] for index in range(len(encoded))]
    lengths = [2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs]
    adapter_bytes = sum(file.stat().st_size for file in (out / "adapter").glob("*.safetensors"))
    tokens = tokens_seen(lengths, steps, training.batch_size)
    write_training_record(out, trainer, cost, tokens, **{"cost/adapter_bytes": adapter_bytes})
