"""Log-probabilities of reply tokens under any policy, without a float32 copy of a whole batch of logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qadapter.errors import QAdapterError
from qadapter.policy.log_probs import token_terms
from qadapter.policy.objective import scored_positions
from qadapter.policy.scored_states import scored_states
from qadapter.progress.kept import computed

CHUNK_ELEMENTS = 2**24
"""Largest number of logits converted to float32 at a time (64 MiB)."""


class Predictions:
    """A policy's predictions of the N reply tokens of a batch, in row order.

    Attributes:
        rows: [N], the row of each token.
        targets: [N], the tokens.
        vocabulary: V.
    """

    def __init__(self, model: torch.nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Run one forward pass. Position t predicts token t + 1; `objective.scored_positions` selects the positions.

        The last token predicts nothing and is not read: a text may have one token more than the model's context.

        Args:
            model: any policy.
            batch: as `reply_log_probs` takes it.

        Raises:
            QAdapterError: the policy's numbers are NaN; so does `logits`.
        """
        device = device_of(model)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        scored = scored_positions(batch["response_mask"].to(device).bool(), shift_mask=True)
        self.rows, positions = scored.nonzero(as_tuple=True)
        self.targets = ids[:, 1:][self.rows, positions]
        ids, mask = ids[:, :-1], mask[:, :-1]
        states = scored_states(model, ids, mask, scored)
        self._states = states
        if states is not None:
            _refuse_nan(states[0])
            self.vocabulary = len(states[1].weight)
            return
        first = int(positions.min()) if len(positions) else 0
        # prompts that no row needs are not computed where the model can leave them out
        keep = {"logits_to_keep": ids.shape[1] - first} if _leaves_out_prompts(model) else {}
        self._logits: Tensor = model(input_ids=ids, attention_mask=mask, **keep).logits
        self._columns = positions - (ids.shape[1] - self._logits.shape[1])
        self.vocabulary = int(self._logits.shape[-1])

    def logits(self, part: slice) -> Tensor:
        """[n, V] float32, of some of the tokens, up to a constant for each."""
        if self._states is None:
            return _refuse_nan(self._logits[self.rows[part], self._columns[part]].float())
        hidden, head = self._states
        return head.logits(hidden[part]).float()

    def log_probs(self) -> Tensor:
        """[N], log π of each token."""
        if self._states is not None:
            hidden, head = self._states
            return token_terms(hidden, head, self.targets.to(hidden.device)).log_probs
        parts = [torch.zeros(0, device=self.targets.device)]
        for part in chunks(len(self.rows), self.vocabulary):
            scores = self.logits(part)
            parts.append(scores.gather(1, self.targets[part, None]).squeeze(1) - scores.logsumexp(dim=1))
        return torch.cat(parts)


def _refuse_nan(values: Tensor) -> Tensor:
    """The values. A comparison with NaN is false, so what is counted by comparisons would look like a bad score."""
    if bool(values.isnan().any()):
        raise QAdapterError(
            "The policy's numbers are NaN: its training diverged, or they do not fit into its dtype. Train it with a "
            "lower learning rate, or load it in float32 or bfloat16."
        )
    return values


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
    predictions = Predictions(model, batch)
    return sums.index_add_(0, predictions.rows.cpu(), predictions.log_probs().double().cpu())


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


def item_results(
    lengths: Sequence[int],
    batch_size: int,
    compute: Callable[[list[int]], Sequence[Any]],
    content: Callable[[int], Any],
    *,
    work: str,
    unit: str,
    sampled: bool = False,
) -> list[Any]:
    """The results of n items, computed in batches of similar length, reported and kept (`qadapter.progress`).

    Args:
        lengths: of the items, in tokens.
        batch_size: items per batch.
        compute: from the indices of a batch to its items' results, as JSON values.
        content: from the index of an item to JSON values that determine its result, in addition to the model.
        work, unit: what reports call the work and one item.
        sampled: whether the results depend on torch's random state.

    Returns:
        n results, in the items' order.
    """
    parts = list(by_length(lengths, batch_size))
    batches = computed(
        work,
        unit,
        [len(part) for part in parts],
        lambda place: list(compute(parts[place])),
        lambda place: [content(index) for index in parts[place]],
        sampled=sampled,
    )
    results: list[Any] = [None] * len(lengths)
    for part, found in zip(parts, batches, strict=True):
        for index, result in zip(part, found, strict=True):
            results[index] = result
    return results


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
    """The device of the model's inputs: that of its first parameter that is not left on the disk."""
    places = (parameter.device for parameter in model.parameters())
    return next((place for place in places if place.type != "meta"), torch.device("cpu"))


def _leaves_out_prompts(model: torch.nn.Module) -> bool:
    """Whether the policy's forward accepts `logits_to_keep` (PEFT passes arguments on to the wrapped model)."""
    wrapped: Callable[[], Any] | None = getattr(model, "get_base_model", None)
    inner = wrapped() if callable(wrapped) else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
