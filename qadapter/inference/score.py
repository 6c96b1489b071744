"""Log-probabilities of reply tokens under any policy, without a float32 copy of a whole batch of logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qadapter.policy.objective import scored_positions

CHUNK_ELEMENTS = 2**24
"""Largest number of logits converted to float32 at a time (64 MiB)."""


def reply_log_probs(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Σ log π(token | tokens before it) over the reply of each row.

    Args:
        model: any policy.
        batch: `input_ids`, `attention_mask`, `response_mask`, each [R, T], padded on the right; the mask is true where
            a *token* belongs to the reply.

    Returns:
        [R], float64, on the CPU.
    """
    sums = torch.zeros(batch["input_ids"].shape[0], dtype=torch.float64)
    logits, rows, columns, targets = predictions(model, batch)
    for part in chunks(len(rows), logits.shape[-1]):
        scores = logits[rows[part], columns[part]].float()
        log_probs = scores.gather(1, targets[part, None]).squeeze(1) - scores.logsumexp(dim=1)
        sums.index_add_(0, rows[part].cpu(), log_probs.double().cpu())
    return sums


def predictions(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one forward pass, and locate the predictions of the reply tokens in it.

    Position t predicts token t + 1; `objective.scored_positions` selects the positions, as in training.

    Returns:
        logits [R, K, V] in the model's own dtype, K ≤ T (prompts that no row needs are not computed where the model
        can leave them out); rows [N], columns [N] into the logits and the predicted tokens [N], for the N reply
        tokens of the batch in row order.
    """
    device = device_of(model)
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    scored = scored_positions(batch["response_mask"].to(device).bool(), shift_mask=True)
    rows, positions = scored.nonzero(as_tuple=True)
    first = int(positions.min()) if len(positions) else 0
    keep = {"logits_to_keep": ids.shape[1] - first} if _leaves_out_prompts(model) else {}
    logits = model(input_ids=ids, attention_mask=mask, **keep).logits
    return logits, rows, positions - (ids.shape[1] - logits.shape[1]), ids[:, 1:][rows, positions]


def chunks(n: int, vocabulary: int) -> Iterator[slice]:
    """Slices of 0…n such that each times the vocabulary stays within `CHUNK_ELEMENTS`."""
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, n, size):
        yield slice(start, start + size)


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices, longest items first: little padding, and a lack of memory shows in the first batch."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Disable gradients and set evaluation mode within the block; restore each model's mode afterwards."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of the model's inputs."""
    return next(model.parameters()).device


def _leaves_out_prompts(model: torch.nn.Module) -> bool:
    """Whether the policy's forward accepts `logits_to_keep` (PEFT passes arguments on to the wrapped model)."""
    wrapped: Callable[[], Any] | None = getattr(model, "get_base_model", None)
    inner = wrapped() if callable(wrapped) else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
