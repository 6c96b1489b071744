"""SFT with a further loss per reply token: a divergence of the adapted model from the base, which needs no old data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from trl import SFTTrainer

from qadapter.inference.score import evaluating
from qadapter.training.reply_rows import ReplyRows
from qadapter.training.supervised import train_sft

if TYPE_CHECKING:
    from torch import nn

    from qadapter.training.adapt import Job

Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the base's logits [N, V], the adapted model's [N, V] and the target tokens [N] to a divergence per token [N]."""


class RegularisedTrainer(SFTTrainer):
    """SFTTrainer with the loss: cross entropy plus `weight` times a divergence from the base, mean over reply tokens.

    TRL's own loss never has the logits at hand (it multiplies hidden states by the head in pieces), so both terms are
    computed here from the logits at the reply tokens, of one pass of the adapted model and of one of the base without
    gradient.
    The mean is over the reply tokens of a whole optimiser step, as in SFT.

    Attributes:
        weight, divergence: of the further term.
    """

    weight: float
    divergence: Divergence

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This batch's part of the step's loss."""
        assert not return_outputs
        targets = inputs["labels"][:, 1:]
        scored = targets != -100
        adapted: Any = self.accelerator.unwrap_model(model)
        with evaluating(adapted), adapted.disable_adapter():
            base = ReplyRows.of(model, inputs, scored)
        own = ReplyRows.of(model, inputs, scored)
        sums = [
            checkpoint(self._sums, base, own, targets[scored][part], part, use_reentrant=False)
            for part in own.parts()  # at no time is there a float32 copy of all logits
        ]
        likelihood, divergence = (torch.stack(column).sum() for column in zip(*sums, strict=True))
        tokens = torch.as_tensor(scored.sum() if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        here = torch.stack([divergence.detach(), scored.sum().to(divergence.dtype)])
        total, count = self.accelerator.reduce(here, reduction="sum").tolist()  # of all processes
        self._metrics["train" if model.training else "eval"]["kl/base"].append(total / max(1.0, count))
        loss = (likelihood + self.weight * divergence) / tokens
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients over the processes
        return loss

    def _sums(self, base: ReplyRows, own: ReplyRows, targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        base_logits, logits = base.logits(part), own.logits(part)
        cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
        return cross_entropy, self.divergence(base_logits, logits, targets).sum()


def train_regularised(job: Job, name: str, weight: float, divergence: Divergence) -> SFTTrainer:
    """Train on each pair's chosen reply twice, as SFT does.

    Args:
        job: the training.
        name: of the method, for progress messages.
        weight: of the divergence, at least 0; 0 is SFT.
        divergence: from base and adapted logits to a divergence for each token.
    """

    class Trainer(RegularisedTrainer):
        pass

    Trainer.weight, Trainer.divergence = weight, staticmethod(divergence)
    examples, arguments = job.on_conversations(job.chosen() + job.chosen())
    return train_sft(job.network, job.tokenizer, examples, arguments, job.lora, name, Trainer)
