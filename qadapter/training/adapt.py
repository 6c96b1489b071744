"""Customise a base to preferences with one of the methods: the same adapter, data and token budget for each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from qadapter.config.methods import DPOSettings, Method, QAdapterSettings, ReplaySettings, SFTSettings
from qadapter.config.model import LoraSettings, ModelSettings
from qadapter.config.training import HelpfulSettings, OptimizerSettings
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import write_json
from qadapter.inference.generate import generate_replies
from qadapter.policy.loading import load_base
from qadapter.preferences.pair import Message, PreferencePair
from qadapter.preferences.prepare import load_pairs
from qadapter.preferences.tokenize import EncodedPair, UnusablePair, encode_pair, encode_reply
from qadapter.training.arguments import (
    measured_cost,
    save_weights,
    tokens_seen,
    train_to_end,
    trainer_arguments,
    write_training_record,
)
from qadapter.training.baselines import train_dpo, train_sft
from qadapter.training.config import QAdapterConfig
from qadapter.training.encoded_pairs import EncodedPairs
from qadapter.training.trainer import QAdapterTrainer

MethodChoice = QAdapterSettings | SFTSettings | DPOSettings | ReplaySettings


def _objective_fields(settings: QAdapterSettings) -> dict[str, Any]:
    """What a config's `methods.q-adapter` section changes of its preset."""
    return settings.model_dump(exclude={"preset", "learning_rate"}, exclude_none=True)


def lora_config(settings: LoraSettings) -> LoraConfig:
    """PEFT's configuration of the adapter."""
    modules = settings.target_modules
    return LoraConfig(
        r=settings.rank,
        lora_alpha=int(settings.alpha),
        lora_dropout=settings.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type="CAUSAL_LM",
    )


def train_adapter(
    method: Method,
    choice: MethodChoice,
    base: str | Path,
    pairs_file: Path,
    *,
    model: ModelSettings,
    lora: LoraSettings,
    training: OptimizerSettings,
    seed: int,
    answers_file: Path | None,
    out: Path,
    scratch: Path,
) -> None:
    """Train one adapter and write it.

    Args:
        method: which method.
        choice: its own settings.
        base: folder or hub id of the base model.
        pairs_file: prepared preference pairs, one a line.
        model, lora, training: what all methods share. A step takes `batch_size` pairs: as pairs (q-adapter, dpo), or as
            twice as many single conversations (sft, replay), so that every method sees the same number of sequences.
        seed: of weights, order and dropout.
        answers_file: the base's answers, JSON, `prompt_key(prompt)` to answer; for replay.
        out: gets `adapter/` (PEFT's files; for the Q-Adapter its objective too), for the Q-Adapter `params.json` (its
            objective, defaults filled in), `history.jsonl`, `metrics.json` and
            `unused.jsonl` (pairs without a response token after truncation, with the reason).
        scratch: checkpoints; training goes on from the newest whole one.

    Raises:
        QAdapterError: no pair is left after truncation.
    """
    network, tokenizer = load_base(base, model)
    pairs = load_pairs(pairs_file)
    kept, encoded = _encode(pairs, tokenizer, training.max_length, out / "unused.jsonl")
    settings = (
        training
        if choice.learning_rate is None
        else training.model_copy(update={"learning_rate": choice.learning_rate})
    )
    # An explicit number of steps gives every method the same budget, whatever it calls an epoch.
    steps = training.max_steps or math.ceil(len(encoded) / training.batch_size * training.epochs)
    settings = settings.model_copy(update={"max_steps": steps})
    pairwise = method in ("q-adapter", "dpo")
    arguments = trainer_arguments(settings, seed=seed, scratch=scratch, sequences_per_example=1 if pairwise else 2)
    set_seed(seed)
    examples = _single_conversations(kept, encoded, pairs, answers_file, tokenizer, training.max_length)
    with measured_cost() as cost:
        if isinstance(choice, QAdapterSettings):
            trainer: Trainer = _train_q_adapter(network, tokenizer, encoded, arguments, lora_config(lora), choice, out)
        elif isinstance(choice, DPOSettings):
            trainer = train_dpo(network, tokenizer, encoded, arguments, lora_config(lora), choice.beta, method)
        else:
            trainer = train_sft(network, tokenizer, examples, arguments, lora_config(lora), method)
    save_weights(trainer, out / "adapter")
    adapter_bytes = sum(file.stat().st_size for file in (out / "adapter").glob("*.safetensors"))
    if pairwise:
        lengths = [2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in encoded]
    else:
        lengths = [len(prompt) + len(reply) for prompt, reply in examples]
    tokens = tokens_seen(lengths, steps, training.batch_size if pairwise else 2 * training.batch_size)
    write_training_record(out, trainer, cost, tokens, **{"cost/adapter_bytes": adapter_bytes})


def _train_q_adapter(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[EncodedPair],
    arguments: dict[str, Any],
    lora: LoraConfig,
    choice: QAdapterSettings,
    out: Path,
) -> Trainer:
    settings = QAdapterConfig(objective=choice.preset, **_objective_fields(choice), **arguments)
    write_json(out / "params.json", {"objective": asdict(settings.to_objective())})
    trainer = QAdapterTrainer(
        model=network,
        args=settings,
        train_dataset=EncodedPairs(encoded),
        processing_class=tokenizer,
        peft_config=lora,
    )
    return train_to_end(trainer, "q-adapter")


def _encode(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, max_length: int, unused: Path
) -> tuple[list[int], list[EncodedPair]]:
    """Token ids of the usable pairs and those pairs' indices; the others are written down with the reason."""
    kept, encoded, rows = [], [], []
    for index, pair in enumerate(pairs):
        try:
            encoded.append(encode_pair(pair, tokenizer, max_length))
            kept.append(index)
        except UnusablePair as error:
            rows.append({"pair": index, "reason": str(error)})
    unused.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not encoded:
        raise QAdapterError(
            f"none of {len(pairs)} training pairs has a response token left at max_length {max_length} "
            f"(first reason: {rows[0]['reason'] if rows else 'there are no pairs'}); raise training.max_length"
        )
    return kept, encoded


def prompt_key(prompt: Sequence[Message]) -> str:
    """A prompt as the key of a JSON object."""
    return json.dumps(list(prompt), sort_keys=True)


def answer_prompts(
    base: str | Path,
    pairs_file: Path,
    *,
    model: ModelSettings,
    settings: ReplaySettings,
    batch_size: int,
    seed: int,
    out: Path,
) -> None:
    """Write the base's own answer to every distinct prompt of a file of pairs, as `answers.json`, for replay."""
    network, tokenizer = load_base(base, model)
    prompts = {prompt_key(pair.prompt): pair.prompt for pair in load_pairs(pairs_file)}
    replies = generate_replies(
        network,
        tokenizer,
        list(prompts.values()),
        max_new_tokens=settings.max_new_tokens,
        batch_size=batch_size,
        temperature=settings.temperature,
        seed=seed,
    )
    write_json(out / "answers.json", dict(zip(prompts, replies, strict=True)))


def _single_conversations(
    kept: Sequence[int],
    encoded: Sequence[EncodedPair],
    pairs: Sequence[PreferencePair],
    answers_file: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[tuple[list[int], list[int]]]:
    """Two conversations for each pair: the chosen reply twice or, for replay, that one and the base's own answer.

    Two, so that batches and epochs are as large as those of the methods that see both replies of a pair.
    """
    chosen = [(pair.prompt_ids, pair.chosen_ids) for pair in encoded]
    if answers_file is None:
        return chosen + chosen
    answers = json.loads(answers_file.read_text(encoding="utf-8"))
    second = list(chosen)
    for place, index in enumerate(kept):
        answer = answers[prompt_key(pairs[index].prompt)]
        if answer.strip():  # a base that has nothing to say gives nothing to remember: the chosen reply stays
            second[place] = encode_reply(pairs[index].prompt, answer, tokenizer, max_length)
    return chosen + second


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
    _, encoded = _encode(load_pairs(pairs_file), tokenizer, settings.max_length, out / "unused.jsonl")
    arguments = trainer_arguments(settings, seed=seed, scratch=scratch)
    set_seed(seed)
    if not settings.lora:
        network.train()
    examples = [(pair.prompt_ids, pair.chosen_ids) for pair in encoded]
    with measured_cost() as cost:
        trainer = train_sft(
            network, tokenizer, examples, arguments, lora_config(lora) if settings.lora else None, "helpful SFT"
        )
    if settings.lora:
        # Merging into a quantised base would lose what was learnt to rounding: merge into the unquantised one.
        save_weights(trainer, out / "adapter")
        from peft import PeftModel

        if trainer.is_world_process_zero():  # of several processes, the one that has written the adapter
            whole, _ = load_base(base, model.model_copy(update={"quantization": "none"}))
            PeftModel.from_pretrained(whole, out / "adapter").merge_and_unload().save_pretrained(out / "model")
    else:
        save_weights(trainer, out / "model")
    tokenizer.save_pretrained(out / "model")
    lengths = [len(prompt) + len(reply) for prompt, reply in examples]
    write_training_record(out, trainer, cost, tokens_seen(lengths, trainer.state.global_step, settings.batch_size))
