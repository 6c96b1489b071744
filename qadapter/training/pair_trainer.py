"""Training of an adapter on pairs with a loss of our own, where TRL's trainers have none or hide what it needs.

A loss sees every reply token's logit and log-normaliser, of the adapted model and of a frozen reference; the trainer
makes a mean over the pairs or the reply tokens of a whole optimiser step out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from qadapter.inference.score import evaluating
from qadapter.policy.adapters import adapted
from qadapter.policy.objective import scored_positions
from qadapter.preferences.tokenize import PreferenceCollator, padding_id
from qadapter.training.encoded_pairs import EncodedPairs
from qadapter.training.reply_rows import ReplyRows
from qadapter.training.sampling import MeasuredRows

if TYPE_CHECKING:
    from qadapter.training.adapt import Job


@dataclass(frozen=True)
class Scores:
    """A batch of B pairs as a loss sees it. Each is [2B, T-1]: rows 0 … B-1 are the chosen replies, the others the
    rejected ones; column j is the prediction of token j + 1. Where nothing is scored all are 0.

    Attributes:
        scored: bool, the token belongs to the reply.
        logits, log_normalizers: of the adapted model: the token's logit, and log Σ exp over the vocabulary.
        base_logits, base_log_normalizers: the same of the reference, without gradient.
    """

    scored: Tensor
    logits: Tensor
    log_normalizers: Tensor
    base_logits: Tensor
    base_log_normalizers: Tensor

    @property
    def log_ratios(self) -> Tensor:
        """[2B, T-1], log π_θ/π1 of each reply token."""
        return (self.logits - self.log_normalizers) - (self.base_logits - self.base_log_normalizers)


Loss = Callable[[Scores, Mapping[str, Tensor]], Tensor]
"""From the scores and the batch (with what a method's own collator added to it) to the batch's summed loss, []."""

Divisor = Literal["pairs", "tokens"]


class PairTrainer(Trainer):
    """Trains the adapter of a PEFT model on batches of pairs; the reference is the model with its adapter off.

    Logged beside Trainer's own: `rewards/margins`, the mean difference of the two log-ratios in nats, and
    `rewards/accuracies`, the share of pairs where it is positive.

    Attributes:
        loss: summed over a batch.
        divisor: what of a step the sum is divided by: its pairs or its reply tokens.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *arguments: Any, loss: Loss, divisor: Divisor, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.loss, self.divisor = loss, divisor
        self._margins: dict[bool, list[Tensor]] = {True: [], False: []}  # while training, and in an evaluation

    def _inner_training_loop(self, *arguments: Any, **options: Any) -> Any:
        """Trainer's loop; what an earlier one had not logged yet is no part of this one's means."""
        self._margins[True] = []
        return super()._inner_training_loop(*arguments, **options)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """What the step's loss divides by, over its micro-batches and all processes."""
        if not batch_samples:
            return None
        masks = [batch["response_mask"] for batch in batch_samples]
        own = sum(len(mask) // 2 if self.divisor == "pairs" else int(mask[:, 1:].sum()) for mask in masks)
        count = torch.tensor([own], dtype=torch.float32, device=device)
        return self.accelerator.gather(count).sum()

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Within it, the model is the reference."""
        unwrapped: Any = self.accelerator.unwrap_model(model)
        context: AbstractContextManager[Any] = unwrapped.disable_adapter()
        return context

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This batch's part of the step's loss."""
        assert not return_outputs
        assert num_items_in_batch is not None
        scores = self.scores(model, inputs)
        with torch.no_grad():
            chosen, rejected = scores.log_ratios.sum(dim=1).chunk(2)
            self._margins[model.training].append(chosen - rejected)
        return self.loss(scores, inputs) / num_items_in_batch * self.accelerator.num_processes  # DDP takes the mean

    def scores(self, model: nn.Module, inputs: Mapping[str, Any]) -> Scores:
        """Scores of a batch of `collate_pairs`."""
        ids = inputs["input_ids"]
        scored = scored_positions(inputs["response_mask"], shift_mask=True)
        targets = ids[:, 1:][scored]
        with evaluating(model), self.reference(model):
            base = _gathered(ReplyRows.of(model, inputs, scored), targets)
        own = _gathered(ReplyRows.of(model, inputs, scored), targets)
        filled = (torch.zeros(scored.shape, device=ids.device).masked_scatter(scored, part) for part in (*own, *base))
        return Scores(scored, *filled)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of a batch that is evaluated."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            count = self._get_num_items_in_batch([inputs], self.args.device)
            loss = self.compute_loss(model, inputs, num_items_in_batch=count)
        self._margins[False][-1] = self.accelerator.gather_for_metrics(self._margins[False][-1])
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop, with the margins over the whole set."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        found = self._taken(training=False)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})  # type: ignore[union-attr]
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the margins since the last time beside the training loss."""
        super().log({**logs, **(self._taken(training=True) if "loss" in logs else {})}, start_time)

    def _taken(self, *, training: bool) -> dict[str, float]:
        """The mean margin and the share of positive ones since the last time; nothing where there was no batch."""
        if not self._margins[training]:
            return {}
        margins = torch.cat(self._margins[training])
        self._margins[training] = []
        sums = torch.stack([margins.sum(), (margins > 0).sum().to(margins), torch.ones_like(margins).sum()])
        if training:  # an evaluation's are gathered already, without the pairs that fill up the last batch
            sums = self.accelerator.reduce(sums, reduction="sum")  # processes may have seen unequal numbers of pairs
        total, positive, count = sums.tolist()
        return {"rewards/margins": total / count, "rewards/accuracies": positive / count}


def _gathered(rows: ReplyRows, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[N] logits of the targets, and [N] log-normalisers, in float32; at no time is there a float32 copy of all."""
    parts = [checkpoint(_gather, rows, targets[part], part, use_reentrant=False) for part in rows.parts()]
    taken, normalizers = (torch.cat(column) for column in zip(*parts, strict=True))
    return taken, normalizers


def _gather(rows: ReplyRows, targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    logits = rows.logits(part)
    return logits.gather(1, targets[:, None])[:, 0], logits.logsumexp(dim=-1)


def without_dropout(model: nn.Module) -> None:
    """Switch dropout off for good, so that a policy and its reference differ by the adapter alone."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def pair_trainer(
    job: Job,
    loss: Loss,
    divisor: Divisor,
    *,
    trainer_of: type[PairTrainer] = PairTrainer,
    dataset: Sequence[Any] | None = None,
    lengths: Sequence[int] | None = None,
    collator: Callable[[Sequence[Any]], dict[str, Tensor]] | None = None,
    further: Mapping[str, Any] | None = None,
) -> PairTrainer:
    """A trainer of a new adapter on the job's pairs. Dropout is off.

    Args:
        job: the training.
        loss, divisor: see `PairTrainer`.
        trainer_of: a subclass.
        dataset: rows in place of the pairs themselves, one for each, with a `collator` of their own.
        lengths: tokens of each row, where they are not those of the pairs.
        collator: from rows of the dataset to a batch, which has the keys of `collate_pairs`.
        further: arguments of the subclass.
    """
    pairs, arguments = job.on_pairs()
    rows = EncodedPairs(pairs)
    model: Any = adapted(job.network, job.lora)
    without_dropout(model)
    if arguments["activation_checkpointing"]:
        model.enable_input_require_grads()
    return trainer_of(
        model=model,
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        data_collator=collator or PreferenceCollator(padding_id(job.tokenizer)),
        train_dataset=rows if dataset is None else MeasuredRows(dataset, lengths or rows.lengths),
        processing_class=job.tokenizer,
        loss=loss,
        divisor=divisor,
        **(further or {}),
    )
