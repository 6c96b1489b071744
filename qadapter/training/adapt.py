"""Customize a base to preferences with one method. All methods use the same adapter shape, data and token budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from qadapter.config.model import LoraSettings, ModelSettings
from qadapter.config.training import DEFAULT_EVAL_PAIRS, AdapterTraining, OptimizerSettings
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import write_json_lines
from qadapter.policy.adapters import fitted
from qadapter.policy.frozen import silence
from qadapter.policy.loading import load_base, lora_config
from qadapter.preferences.pair import LabelledReply, PreferencePair, load_pairs, load_single
from qadapter.preferences.tokenize import (
    EncodedPair,
    EncodedReply,
    Truncation,
    UnrenderablePair,
    UnusablePair,
    beside_replies,
    encode_pairs,
    encoded_reply,
    truncation_of,
)
from qadapter.training.arguments import (
    Cost,
    measured_cost,
    save_weights,
    tokens_seen,
    trainer_arguments,
    write_training_record,
)
from qadapter.training.encoded_pairs import refuse_unlearnable, report_truncation
from qadapter.training.evaluated import Aside, evaluating_while_training, set_aside

log = logging.getLogger(__name__)

Conversation = tuple[list[int], list[int]]
"""Token ids of a prompt and of one reply to it."""

Labelled = tuple[list[int], list[int], bool]
"""Token ids of a prompt and of one reply to it, and whether the reply is a good one."""


class Job:
    """One training of an adapter: what a method is given. Each method reads two sequences per pair.

    A method takes its examples from `on_pairs` or `on_conversations`. They also return the trainer's arguments, since
    the number of examples per step depends on their kind.

    Attributes:
        network, tokenizer: the frozen base.
        lora: the adapter's shape.
        pairs, encoded: the N usable pairs, as text and as token ids. Where the training evaluates, those that are set
            aside for it are at the end, and the trainer leaves them out (`qadapter.training.evaluated`).
        single: the rows of a source of single replies, each as token ids with its label; none where it has pairs.
        max_length: largest number of tokens per sequence.
        needs: name of a stage that the method needs → its folder.
        out: the folder of the results.
        steps: optimiser steps.
        base: folder or hub id of the base, for a method that needs another head on it.
        model: how the base is loaded.
        seed: of the training.
        scratch: folder of checkpoints.
        held: how many pairs, at the end, are set aside for evaluation.
        generated: tokens that the method generated itself, prompts not counted.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        lora: LoraConfig,
        pairs: Sequence[PreferencePair],
        encoded: Sequence[EncodedPair],
        settings: OptimizerSettings,
        *,
        seed: int,
        needs: Mapping[str, Path],
        out: Path,
        scratch: Path,
        single: Sequence[Labelled] = (),
        base: str | Path = "",
        model: ModelSettings | None = None,
        held: int = 0,
    ) -> None:
        self.single = list(single)
        self.network, self.tokenizer, self.lora = network, tokenizer, lora
        self.base, self.model, self.seed, self.scratch = base, model, seed, scratch
        self.pairs, self.encoded = list(pairs), list(encoded)
        self.max_length, self.needs, self.out = settings.max_length, dict(needs), out
        self.steps = settings.max_steps or 0
        self._settings = settings
        self.held = held
        self._lengths: list[int] = []
        self._per_step = 0
        self._trained: int | None = None
        self.generated = 0

    def on_pairs(self) -> tuple[list[EncodedPair], dict[str, Any]]:
        """The N pairs, and a trainer's arguments for steps of `batch_size` pairs."""
        return self.encoded, self._arguments(lengths_of_pairs(self.encoded), sequences_per_example=1)

    def on_conversations(self, examples: Sequence[Conversation]) -> tuple[list[Conversation], dict[str, Any]]:
        """Single conversations, and a trainer's arguments for steps of `2 · batch_size` of them.

        Args:
            examples: two for each pair, so that epochs and batches are as large as those of methods that see pairs.

        Raises:
            ValueError: there are not two per pair.
        """
        if len(examples) != 2 * len(self.encoded):
            raise ValueError(f"{len(examples)} conversations for {len(self.encoded)} pairs; expected two for each pair")
        lengths = [len(prompt) + len(reply) for prompt, reply in examples]
        return list(examples), self._arguments(lengths, sequences_per_example=2)

    def on_labelled(self) -> tuple[list[Labelled], dict[str, Any]]:
        """Every reply with its label, and a trainer's arguments for steps of `2 · batch_size` replies.

        A pair gives a good and a bad row. Rows of a source that has single replies are taken as they are, those without
        a partner too.

        Raises:
            QAdapterError: pairs are set aside for evaluation, whose prompts the single replies have as well.
        """
        if self.single and self.held:
            raise QAdapterError(
                "training.eval_steps sets pairs aside, and the source has single replies to the same prompts that are "
                "trained on; leave it out"
            )
        rows = [(*one, True) for one in self.chosen()] + [(*one, False) for one in self.rejected()]
        rows = self.single or rows
        lengths = [len(prompt) + len(reply) for prompt, reply, _ in rows]
        return rows, self._arguments(lengths, sequences_per_example=2)

    def on_rollouts(self, examples: Sequence[Conversation]) -> tuple[list[Conversation], dict[str, Any]]:
        """Replies of the base, however many, and a trainer's arguments for steps of `2 · batch_size` of them."""
        lengths = [len(prompt) + len(reply) for prompt, reply in examples]
        return list(examples), self._arguments(lengths, sequences_per_example=2)

    def on_prompts(self, group: int, wanted: int | None) -> tuple[list[list[int]], int, dict[str, Any]]:
        """As `prompts_for_replies`, and a trainer's arguments for steps of `2 · batch_size` replies of its own.

        Args:
            group: replies per prompt. The method reports what it read (`spent`), which is known only afterwards.
            wanted: as `prompts_for_replies` takes it.

        Raises:
            QAdapterError: a micro-batch cannot be divided into such groups.
        """
        replies = 2 * self._settings.micro_batch
        if replies % group:
            raise QAdapterError(
                f"{replies} replies per micro-batch (two for each of its {self._settings.micro_batch} pairs) are not a "
                f"multiple of {group} replies per prompt; change training.batch_size or the number of replies"
            )
        prompts, room = self.prompts_for_replies(wanted)
        return prompts, room, self._arguments([len(prompt) for prompt in prompts], sequences_per_example=2)

    def spent(self, *, trained: int, generated: int) -> None:
        """Report the tokens of a method that makes its own replies.

        Args:
            trained: tokens that the training read, prompts with replies.
            generated: tokens of replies that the method generated.
        """
        self._trained, self.generated = trained, generated

    def prompts_for_replies(self, wanted: int | None) -> tuple[list[list[int]], int]:
        """The N prompts for replies that a method generates, and the tokens that these may have (`beside_replies`).

        Args:
            wanted: tokens of a reply; None: as many as the longest chosen reply has.
        """
        longest = wanted or max(len(pair.chosen_ids) for pair in self.encoded)
        return beside_replies([pair.prompt_ids for pair in self.encoded], longest, self.max_length)

    def chosen(self) -> list[Conversation]:
        """The N chosen replies with their prompts."""
        return [(pair.prompt_ids, pair.chosen_ids) for pair in self.encoded]

    def rejected(self) -> list[Conversation]:
        """The N rejected replies with their prompts."""
        return [(pair.prompt_ids, pair.rejected_ids) for pair in self.encoded]

    def tokens(self) -> int:
        """Tokens that the training reads, without padding.

        Raises:
            ValueError: the method took its examples from elsewhere, so that its budget is unknown.
        """
        if not self._per_step:
            raise ValueError("a method has to take its examples from Job.on_pairs or Job.on_conversations")
        if self._trained is not None:
            return self._trained
        return tokens_seen(self._lengths, self.steps, self._per_step)

    def _arguments(self, lengths: list[int], *, sequences_per_example: int) -> dict[str, Any]:
        if self.held:  # row i belongs to pair i modulo their number; those at the end are not trained on
            trained = len(self.encoded) - self.held
            lengths = [length for i, length in enumerate(lengths) if i % len(self.encoded) < trained]
        self._lengths = lengths
        self._per_step = self._settings.batch_size * sequences_per_example
        return trainer_arguments(
            self._settings, seed=self.seed, scratch=self.scratch, sequences_per_example=sequences_per_example
        )


def train_adapter(
    train: Callable[[Job, Any], Trainer],
    choice: Any,
    base: str | Path,
    pairs_file: Path,
    *,
    model: ModelSettings,
    lora: LoraSettings,
    training: OptimizerSettings,
    seed: int,
    needs: Mapping[str, Path],
    out: Path,
    scratch: Path,
) -> None:
    """Train one adapter and write it.

    Args:
        train: the method's training function (`Method.train`).
        choice: the method's settings.
        base: folder or hub id of the base model.
        pairs_file: prepared preference pairs, one per line.
        model, lora, training: settings that all methods share. A step takes `batch_size` pairs, or twice as many single
            conversations, so that every method reads the same number of sequences.
        seed: seed of weights, data order and dropout.
        needs: name of a stage that the method needs → its folder.
        out: gets `adapter/` (PEFT's files; for the Q-Adapter its objective too), for the Q-Adapter `params.json` (its
            objective, defaults filled in), `history.jsonl`, `metrics.json` and
            `unused.jsonl` (pairs without a response token after truncation, with the reason).
        scratch: folder of checkpoints; training resumes from the newest complete one.

    Raises:
        QAdapterError: no pair is left after truncation.
    """
    network, tokenizer = load_base(base, model)
    silence(network)  # also for the trainers that put the base into train mode
    pairs, replies = load_pairs(pairs_file), load_single(pairs_file)
    kept: list[int] = []
    encoded: list[EncodedPair] = []
    if pairs or not replies:
        kept, encoded = encode_usable(
            pairs, tokenizer, training.max_length, out / "unused.jsonl", training.allow_truncation
        )
    single, cuts = encode_single(
        replies, tokenizer, training.max_length, out / "unused.jsonl", training.allow_truncation
    )
    # Two rows cost what a pair costs, and no last micro-batch has a single row, which no other row is compared with.
    single = single[: len(single) // 2 * 2]
    usable, encoded, aside = some_aside([pairs[index] for index in kept], encoded, training)
    left = len(encoded) - (aside.held if aside else 0)
    settings = with_steps(training, left or len(single) // 2, choice.learning_rate)
    job = Job(
        network,
        tokenizer,
        fitted(lora_config(lora), network),
        usable,
        encoded,
        settings,
        seed=seed,
        needs=needs,
        out=out,
        scratch=scratch,
        single=single,
        base=base,
        model=model,
        held=aside.held if aside else 0,
    )
    set_seed(seed)
    with measured_cost() as cost, evaluating_while_training(aside):
        trainer = train(job, choice)
    if aside:
        job.steps = trainer.state.global_step  # fewer than planned after an early stop
    own = {"cost/generated_tokens": float(job.generated)} if job.generated else {}
    if single:
        own |= cuts.metrics()
    write_adapter(out, trainer, cost, job.tokens(), encoded, **own)


def some_aside(
    pairs: Sequence[PreferencePair], encoded: Sequence[EncodedPair], training: OptimizerSettings
) -> tuple[list[PreferencePair], list[EncodedPair], Aside | None]:
    """The pairs of a training, those at their end that it evaluates while it runs, and how; None where it does not.

    Args:
        pairs, encoded: the usable pairs, as text and as token ids.
        training: the settings.

    Raises:
        QAdapterError: there is no pair, or none would be left to train on.
    """
    if not (isinstance(training, AdapterTraining) and training.eval_steps):
        return list(pairs), list(encoded), None
    if not pairs:
        raise QAdapterError("training.eval_steps needs pairs, and the source has single replies; leave it out")
    order, held = set_aside(pairs, training.eval_pairs or DEFAULT_EVAL_PAIRS)
    aside = Aside(len(pairs), held, training)
    return [pairs[place] for place in order], [encoded[place] for place in order], aside


def encode_single(
    replies: Sequence[LabelledReply],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    unused: Path,
    allow_truncation: bool,
) -> tuple[list[Labelled], Truncation]:
    """Token ids of single replies with their labels, and what `max_length` took of them; the others are recorded.

    Raises:
        QAdapterError: none is left of some, or the data are not fit for training (`refuse_unlearnable`).
    """
    rows: list[Labelled] = []
    encoded: list[EncodedReply] = []
    left: list[tuple[int, str]] = []
    unrenderable = 0
    for index, reply in enumerate(replies):
        try:
            found = encoded_reply(reply.prompt, reply.reply, tokenizer, max_length)
        except UnusablePair as error:
            left.append((index, str(error)))
            unrenderable += isinstance(error, UnrenderablePair)
            continue
        encoded.append(found)
        rows.append((found.prompt_ids, found.reply_ids, reply.good))
    cuts = truncation_of(encoded)
    if not replies:
        return rows, cuts
    write_json_lines(unused, ({"reply": index, "reason": reason} for index, reason in left))
    if not rows:
        raise QAdapterError(
            f"none of {len(replies)} single replies has a token at max_length {max_length} (first reason: "
            f"{left[0][1]}); raise it"
        )
    if left:
        log.warning(
            "%d of %d single replies are unusable and left out, the first at index %d: %s",
            len(left),
            len(replies),
            *left[0],
        )
    report_truncation("training", cuts, max_length, "replies")
    refuse_unlearnable("training", left, unrenderable, cuts, max_length, allow_truncation, "replies")
    return rows, cuts


def with_steps(training: OptimizerSettings, examples: int, learning_rate: float | None) -> OptimizerSettings:
    """The settings with an explicit number of steps, and with the method's own learning rate if it has one.

    An explicit number of steps gives every method the same budget, however its trainer defines an epoch.
    """
    steps = training.max_steps or math.ceil(examples / training.batch_size * training.epochs)
    return training.model_copy(update={"max_steps": steps, "learning_rate": learning_rate or training.learning_rate})


def lengths_of_pairs(encoded: Sequence[EncodedPair]) -> list[int]:
    """Tokens of each pair: the prompt twice, and both replies."""
    return [2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in encoded]


def write_adapter(
    out: Path, trainer: Trainer, cost: Cost, tokens: int, encoded: Sequence[EncodedPair], **further: float
) -> None:
    """Write a trained adapter to `out/adapter`, with the records of every training and `further` metrics."""
    save_weights(trainer, out / "adapter")
    adapter_bytes = sum(file.stat().st_size for file in (out / "adapter").glob("*.safetensors"))
    extra = {"cost/adapter_bytes": adapter_bytes, **truncation_of(encoded).metrics(), **further}
    write_training_record(out, trainer, cost, tokens, **extra)


def encode_usable(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    unused: Path,
    allow_truncation: bool,
) -> tuple[list[int], list[EncodedPair]]:
    """Token ids and indices of the usable pairs; the others are recorded with the reason.

    Raises:
        QAdapterError: no pair is usable, or the data are not fit for training (`refuse_unlearnable`).
    """
    found = encode_pairs(pairs, tokenizer, max_length)
    rows = [{"pair": index, "reason": reason} for index, reason in found.unusable]
    write_json_lines(unused, rows)
    if not found.pairs:
        raise QAdapterError(
            f"none of {len(pairs)} training pairs has a response token left at max_length {max_length} "
            f"(first reason: {rows[0]['reason'] if rows else 'there are no pairs'}); raise training.max_length"
        )
    truncation = truncation_of(found.pairs)
    report_truncation("training", truncation, max_length)
    refuse_unlearnable("training", found.unusable, found.unrenderable, truncation, max_length, allow_truncation)
    return found.indices, found.pairs
