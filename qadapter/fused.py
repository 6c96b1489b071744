"""The objective computed from hidden states in chunks, so that [tokens, vocabulary] never exists for a whole batch.

The loss needs only two numbers of each scored position: Q of the token that was taken, and V. Their gradients by the
adapted hidden state h (logits W·h) are W[taken] and W·π̃, both of the size of h: they are computed in the forward,
chunk by chunk, while the chunk's probabilities are there, and nothing of vocabulary size is kept for the backward.
What follows from the two numbers (discounts, sums, the loss) is `objective.pair_loss`, the same code as the readable
version, which `tests/test_fused.py` holds this one against, loss and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from qadapter.objective import (
    BatchTotals,
    Objective,
    PairwiseLoss,
    batch_totals,
    next_state_values,
    pair_loss,
    scored_positions,
)

# Elements of one chunk of logits: large enough for the matrix products to be efficient, small enough to be cheap
_CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}


@dataclass(frozen=True)
class VocabularyHead:
    """From hidden states to logits: softcap · tanh(scale · (W h + b) / softcap), without the tanh where it is None.

    Attributes:
        weight: [V, H], frozen.
        bias: [V] or None.
        scale: a factor on the logits (Cohere, Granite).
        softcap: largest logit (Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> VocabularyHead | None:
        """The head of a causal language model; None if it is no frozen linear layer."""
        base: Any = model
        head = base.get_output_embeddings()
        if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
            return None
        config = base.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        divisor = float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(head.weight, head.bias, scale / divisor, getattr(config, "final_logit_softcapping", None))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[N, V] for hidden states [N, H] of the weight's type; float32 at least.

        Args:
            hidden: hidden states.
            out: [N, V] in the result's type, to write into.
        """
        if out is not None and out.dtype == hidden.dtype:
            logits = torch.mm(hidden, self.weight.t(), out=out)
        else:
            product = hidden @ self.weight.t()
            logits = (
                product.to(torch.promote_types(product.dtype, torch.float32)) if out is None else out.copy_(product)
            )
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def to(self, dtype: torch.dtype) -> VocabularyHead:
        """The same head with weights of another type."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return VocabularyHead(self.weight.to(dtype), bias, self.scale, self.softcap)


class _ScoredTerms(torch.autograd.Function):
    """Q of the taken token, V and KL(π̃ ‖ π1) at each position, with the gradient by the adapted hidden states."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        base_hidden: Tensor,
        head: VocabularyHead,
        targets: Tensor,
        objective: Objective,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        differentiate = hidden.requires_grad
        precise = torch.promote_types(hidden.dtype, torch.float32)
        q_taken, values, kl = (torch.empty(len(hidden), dtype=precise, device=hidden.device) for _ in range(3))
        by_value = torch.empty_like(hidden) if differentiate else None
        taken_slope = torch.ones_like(q_taken) if head.softcap is not None else None
        # α0 · log π1 − base, where Q is the difference to the base
        of_base = objective.alpha_0 - (1.0 if objective.parametrization == "residual" else 0.0)
        for rows, both, probabilities in _buffers(hidden, head, precise, chunk):
            # One product for both: the head's weights, far larger than the rows, are read once
            logits, base = head.logits(torch.cat([hidden[rows], base_hidden[rows]]), out=both).chunk(2)
            token = targets[rows, None]
            q_taken[rows] = logits.gather(1, token).squeeze(1)
            slope = None
            if head.softcap is not None and taken_slope is not None:
                slope = 1 - (logits / head.softcap) ** 2
                taken_slope[rows] = slope.gather(1, token).squeeze(1)
            if objective.parametrization == "residual":
                q_taken[rows] -= base.gather(1, token).squeeze(1)
            if of_base:
                logits.add_(base, alpha=of_base)
            if objective.alpha_tilde != 1.0:
                logits.div_(objective.alpha_tilde)
            torch.softmax(logits, dim=1, out=probabilities)
            log_normalizer = _log_normalizer(logits, probabilities)
            expected = torch.linalg.vecdot(probabilities, logits)
            expected_base = torch.linalg.vecdot(probabilities, base)
            if by_value is not None:
                weighted = probabilities if slope is None else probabilities.mul_(slope)
                by_value[rows] = weighted.to(hidden.dtype) @ head.weight
            torch.softmax(base, dim=1, out=probabilities)
            base_normalizer = _log_normalizer(base, probabilities)
            values[rows] = objective.alpha_tilde * log_normalizer - objective.alpha_0 * base_normalizer
            kl[rows] = (expected - log_normalizer) - (expected_base - base_normalizer)
        if by_value is not None:
            # All that the backward needs, so that the head's weights may be sharded away by then
            by_taken = head.weight[targets]
            if taken_slope is not None:
                by_taken = (by_taken * taken_slope[:, None]).to(by_taken.dtype)
            if head.scale != 1.0:
                by_taken, by_value = by_taken * head.scale, by_value * head.scale
            ctx.save_for_backward(by_taken, by_value)
        ctx.mark_non_differentiable(kl)
        return q_taken, values, kl

    @staticmethod
    def backward(ctx: Any, taken_gradient: Tensor, value_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        by_taken, by_value = ctx.saved_tensors
        gradient = taken_gradient[:, None] * by_taken + value_gradient[:, None] * by_value
        return gradient.to(by_value.dtype), None, None, None, None, None


def _buffers(
    hidden: Tensor, head: VocabularyHead, dtype: torch.dtype, chunk: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of at most `chunk` rows, with a [2 · rows, V] and a [rows, V] buffer: the same memory for every slice."""
    size = min(chunk, len(hidden))
    whole = torch.empty(3 * size, len(head.weight), dtype=dtype, device=hidden.device)
    for start in range(0, len(hidden), chunk):
        rows = min(chunk, len(hidden) - start)
        yield slice(start, start + rows), whole[: 2 * rows], whole[2 * size : 2 * size + rows]


def _log_normalizer(logits: Tensor, probabilities: Tensor) -> Tensor:
    """logsumexp of [N, V] logits whose softmax is at hand: logit − log probability of the likeliest token."""
    return logits.amax(dim=1) - probabilities.amax(dim=1).log()


def scored_terms(
    hidden: Tensor, base_hidden: Tensor, head: VocabularyHead, targets: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss needs of each position.

    Args:
        hidden: [N, H] last hidden states of the adapted model; gradients go here and nowhere else.
        base_hidden: [N, H] the base's.
        head: the base's own head, which both use.
        targets: [N] int64, the tokens that were taken.
        objective: α0, α̃ and the parametrisation.

    Returns:
        Q of the taken token, V, and KL(π̃ ‖ π1), each [N], float32 (float64 for float64 hidden states). Under autocast
        the products are taken in its type, as the readable version's are.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    chunk = max(_CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS["cuda"]) // len(head.weight), 1)
    with torch.autocast(device, enabled=False):
        return _ScoredTerms.apply(hidden.to(dtype), base_hidden.to(dtype), head.to(dtype), targets, objective, chunk)


def loss_from_scored(
    hidden: Tensor,
    base_hidden: Tensor,
    head: VocabularyHead,
    input_ids: Tensor,
    response_mask: Tensor,
    objective: Objective,
    totals: BatchTotals | None = None,
) -> PairwiseLoss:
    """`objective.pairwise_loss` from the hidden states at the scored positions alone.

    Args:
        hidden: [N, H] adapted hidden states at the N scored positions, row by row.
        base_hidden: [N, H] the base's.
        head: the base's head.
        input_ids, response_mask, objective, totals: as `objective.pairwise_loss` takes them.
    """
    scored = scored_positions(response_mask, objective.shift_mask)
    totals = totals or batch_totals(response_mask, objective)
    q_taken, values, kl = scored_terms(hidden, base_hidden, head, input_ids[:, 1:][scored], objective)
    blank = torch.zeros(scored.shape, dtype=values.dtype, device=values.device)
    dense = blank.masked_scatter(scored, values)
    subtracted = next_state_values(dense, scored) if objective.value == "next-state" else dense
    rewards = blank.masked_scatter(scored, q_taken) - objective.gamma * torch.where(scored, subtracted, 0.0)
    return pair_loss(rewards, scored, kl.sum(), objective, totals)


def fused_pairwise_loss(
    hidden: Tensor,
    base_hidden: Tensor,
    head: VocabularyHead,
    input_ids: Tensor,
    response_mask: Tensor,
    objective: Objective,
    totals: BatchTotals | None = None,
) -> PairwiseLoss:
    """`objective.pairwise_loss` from hidden states: equal to it with q_logits = head(hidden), and so on.

    Args:
        hidden: [2B, T, H] last hidden states of the adapted model.
        base_hidden: [2B, T, H] of the base; no gradient goes there.
        head: the base's head.
        input_ids, response_mask, objective, totals: as `objective.pairwise_loss` takes them.
    """
    scored = F.pad(scored_positions(response_mask, objective.shift_mask), (0, 1))
    return loss_from_scored(hidden[scored], base_hidden[scored], head, input_ids, response_mask, objective, totals)
