"""Train what guides a base's decoding: an adapter with a head of one number, on the base's own replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from qadapter.errors import QAdapterError
from qadapter.policy.guided import Guide, GuidedForCausalLM
from qadapter.preferences.tokenize import padding_id
from qadapter.training.arguments import train_to_end
from qadapter.training.pair_trainer import without_dropout
from qadapter.training.sampling import MeasuredRows

if TYPE_CHECKING:
    from qadapter.training.adapt import Job


@dataclass(frozen=True)
class Outcome:
    """A reply to a prompt, as token ids, and what came of it: a reward, or 1 where it was preferred and 0 where not."""

    prompt: list[int]
    reply: list[int]
    value: float


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the head's numbers [B, T], the scored states [B, T] (bool) and the outcomes [B] to the summed loss, []."""


class GuideTrainer(Trainer):
    """Trains adapter and head; the loss is a mean over the scored states of a whole optimiser step."""

    loss_is_scaled_for_ga = True

    def __init__(self, *arguments: Any, loss: Loss, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.loss = loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        states = sum(int(batch["scored"].sum()) for batch in batch_samples)
        count = torch.tensor([states], dtype=torch.float32, device=device)
        return self.accelerator.gather(count).sum()

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
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        values = model(**given, only_numbers=True).numbers
        loss = self.loss(values, inputs["scored"], inputs["outcome"])
        return loss / num_items_in_batch * self.accelerator.num_processes  # DDP takes the mean

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load adapter and head; a checkpoint does not contain the base."""
        policy = self.accelerator.unwrap_model(self.model)
        assert isinstance(policy, GuidedForCausalLM)
        policy.load_weights(Path(resume_from_checkpoint))


def train_guide(
    job: Job, name: str, outcomes: Sequence[Outcome], guide: Guide, loss: Loss, *, from_prompt: bool
) -> GuideTrainer:
    """Train on outcomes, `2 · batch_size` of them per step. Dropout is off.

    Args:
        job: the training.
        name: of the method, for progress messages.
        outcomes: replies with what came of them.
        guide: what the numbers do in decoding; saved with the weights.
        loss: see `GuideTrainer`.
        from_prompt: whether the state before the first reply token is scored too; the state behind each reply token is.

    Raises:
        QAdapterError: there is no outcome.
    """
    if not outcomes:
        raise QAdapterError(
            f"{name} has nothing to learn from: all of the base's continuations of the training prompts are equal. "
            "Raise the temperature of its sampling."
        )
    rows, arguments = job.on_rollouts([(one.prompt, one.reply) for one in outcomes])
    values, pad = [one.value for one in outcomes], padding_id(job.tokenizer)

    def collated(some: Sequence[int]) -> dict[str, Tensor]:
        texts = [rows[i] for i in some]
        width = max(len(prompt) + len(reply) for prompt, reply in texts)
        ids = torch.full((len(texts), width), pad)
        mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, reply) in enumerate(texts):
            end = len(prompt) + len(reply)
            ids[row, :end], mask[row, :end] = torch.tensor(prompt + reply), 1
            scored[row, len(prompt) - from_prompt : end] = True
        outcome = torch.tensor([values[i] for i in some])
        return {"input_ids": ids, "attention_mask": mask, "scored": scored, "outcome": outcome}

    policy = GuidedForCausalLM.from_base(job.network, job.lora, guide)
    without_dropout(policy)
    if arguments["activation_checkpointing"]:
        policy.peft_model.enable_input_require_grads()
    trainer = GuideTrainer(
        model=policy,
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        data_collator=collated,
        train_dataset=MeasuredRows(range(len(rows)), [len(prompt) + len(reply) for prompt, reply in rows]),
        processing_class=job.tokenizer,
        loss=loss,
    )
    return train_to_end(trainer, name)
