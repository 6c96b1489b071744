"""The objective from hidden states, block by block: [tokens, vocabulary] never exists for a whole batch.

The loss needs only two numbers of each scored position: Q of the token that was taken, and V. Their gradients by the
adapted hidden state h (logits W·h) are W[taken] and W·π̃, both of the size of h: they are computed in the forward, and
nothing of vocabulary size is kept for the backward. The vocabulary goes by in blocks, each of them read once for all
positions; sums over it are kept relative to the largest logit so far and rescaled when a larger one comes, as in
"Online normalizer calculation for softmax" (Milakov and Gimelshein, 2018).
What follows from the two numbers (discounts, sums, the loss) is `objective.pair_loss`, the same code as the readable
version, which `tests/qadapter/policy/test_fused.py` holds this one against, loss and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from qadapter.policy.objective import (
    BatchTotals,
    Objective,
    PairwiseLoss,
    batch_totals,
    next_state_values,
    pair_loss,
    scored_positions,
)

# Logits of one block: enough for efficient matrix products, on a CPU few enough to stay in its cache
BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
# Of a large vocabulary a CPU's block stays in a core's own cache: 90 rows of 262,144 logits took 1.31 s instead of 1.60
_CPU_BLOCK_OF_LARGE_VOCABULARY = 2**18
LARGE_VOCABULARY = 2**15
"""From so many tokens on the head costs as much as the layers; below, trainers' and models' own ways are as fast."""
NARROWEST_BLOCK = 1024  # tokens of the vocabulary; positions that do not fit beside so many wait for their turn


@dataclass(frozen=True)
class VocabularyHead:
    """From hidden states to logits: softcap · tanh(scale · (W h + b) / softcap), without the tanh where it is None.

    Attributes:
        weight: [V, H], frozen.
        bias: [V] or None.
        scale: a factor on the logits (Cohere, Granite).
        softcap: largest logit (Gemma 2, RecurrentGemma).
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
        return cls.linear(head, base.config)

    @classmethod
    def linear(cls, head: nn.Linear, config: Any) -> VocabularyHead:
        """A linear layer as the head of a model of this config."""
        config = config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        divisor = float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        return cls(head.weight, head.bias, scale / divisor, softcap)

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
            logits = logits.div_(self.softcap).tanh_()
            # a gradient needs the tanh as it is
            logits = logits * self.softcap if logits.requires_grad else logits.mul_(self.softcap)
        return logits

    def block(self, start: int, stop: int) -> VocabularyHead:
        """The head of a slice of the vocabulary."""
        bias = None if self.bias is None else self.bias[start:stop]
        return VocabularyHead(self.weight[start:stop], bias, self.scale, self.softcap)

    def to(self, dtype: torch.dtype) -> VocabularyHead:
        """The same head with weights of another type."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return VocabularyHead(self.weight.to(dtype), bias, self.scale, self.softcap)


def block_elements(device: str, vocabulary: int) -> int:
    """Logits of one block, for rows on this type of device."""
    elements = BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cuda"])
    if device == "cpu" and vocabulary >= LARGE_VOCABULARY:
        return min(elements, _CPU_BLOCK_OF_LARGE_VOCABULARY)
    return elements


class RunningSums:
    """Sums over the vocabulary of exp(x) and of exp(x) · y, where x comes in blocks: relative to the largest x so far.

    Attributes:
        largest: [N], the largest x so far.
        total: [N], Σ_a exp(x_a - largest).
        weighted: the sums of exp(x - largest) · y, [N] or [N, H] each; added to where the exponentials are taken.
    """

    def __init__(self, like: Tensor, *widths: int) -> None:
        """`like`: an [N] tensor of the wanted type and device; `widths`: of the weighted sums, 0 for [N]."""
        count = len(like)
        self.largest = like.new_full((count,), -torch.inf)
        self.total = like.new_zeros(count)
        self.weighted = [like.new_zeros((count, width) if width else (count,)) for width in widths]

    def exponentials(self, block: Tensor, out: Tensor) -> Tensor:
        """exp(x - largest) of a block [N, W], in `out`; earlier sums are rescaled to the new `largest`."""
        before, self.largest = self.largest, torch.maximum(self.largest, block.amax(dim=1))
        torch.sub(block, self.largest[:, None], out=out).exp_()
        rescale = (before - self.largest).exp_()
        self.total.mul_(rescale).add_(out.sum(dim=1))
        for sums in self.weighted:
            sums.mul_(rescale if sums.ndim == 1 else rescale[:, None])
        return out

    def log_normalizer(self) -> Tensor:
        """[N], logsumexp of x."""
        return self.largest + self.total.log()


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
        elements: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        terms = torch.empty((4, len(hidden)), dtype=precise, device=hidden.device)
        by_value = torch.empty_like(hidden) if hidden.requires_grad else None
        at_once = max(elements // NARROWEST_BLOCK, 1)
        for start in range(0, len(hidden), at_once):
            rows = slice(start, start + at_once)
            gradient = None if by_value is None else by_value[rows]
            of_rows = _terms(hidden[rows], base_hidden[rows], head, targets[rows], objective, elements, gradient)
            terms[:, rows] = torch.stack(of_rows)
        q_taken, values, kl, slope_taken = terms.unbind()
        if by_value is not None:
            # All that the backward needs, so that the head's weights may be sharded away by then
            by_taken = head.weight[targets]
            if head.softcap is not None:
                by_taken = (by_taken * slope_taken[:, None]).to(by_taken.dtype)
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


def _terms(
    hidden: Tensor,
    base_hidden: Tensor,
    head: VocabularyHead,
    targets: Tensor,
    objective: Objective,
    elements: int,
    by_value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q of the taken token, V, KL(π̃ ‖ π1) and the slope of the taken token's soft cap, each [N], float32 at least.

    `by_value`, if given, is [N, H] and gets the gradient of V by `hidden`.
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    count, size = len(hidden), len(head.weight)
    width = min(max(elements // count, NARROWEST_BLOCK), size)
    buffer = torch.empty(3 * count * width, dtype=precise, device=hidden.device)
    like = buffer[:count]
    q_taken, slope_taken = torch.zeros_like(like), torch.ones_like(like)
    policy = RunningSums(like, 0, 0, *([] if by_value is None else [hidden.shape[1]]))
    base_policy = RunningSums(like)
    residual = objective.parametrization == "residual"
    of_base = objective.alpha_0 - (
        1.0 if residual else 0.0
    )  # α0 · log π1 − base, where Q is the difference to the base
    both_hidden = torch.cat([hidden, base_hidden])
    for start in range(0, size, width):
        block = head.block(start, min(start + width, size))
        columns = len(block.weight)
        both, out = buffer[: 3 * count * columns].view(3 * count, columns).split([2 * count, count])
        # One product for both: the head's weights, far larger than the hidden states, are read once
        logits, base = block.logits(both_hidden, out=both).chunk(2)
        place = (targets - start).clamp(0, columns - 1)[:, None]
        here = (targets >= start) & (targets < start + columns)
        q = logits.gather(1, place) - base.gather(1, place) if residual else logits.gather(1, place)
        q_taken = torch.where(here, q.squeeze(1), q_taken)
        slope = None
        if head.softcap is not None:
            slope = 1 - (logits / head.softcap) ** 2
            slope_taken = torch.where(here, slope.gather(1, place).squeeze(1), slope_taken)
        if of_base:
            logits.add_(base, alpha=of_base)
        if objective.alpha_tilde != 1.0:
            logits.div_(objective.alpha_tilde)
        weights = policy.exponentials(logits, out)
        policy.weighted[0].add_(torch.linalg.vecdot(weights, logits))
        policy.weighted[1].add_(torch.linalg.vecdot(weights, base))
        if by_value is not None:
            weights = weights if slope is None else weights.mul_(slope)
            policy.weighted[2].add_(weights.to(hidden.dtype) @ block.weight)
        base_policy.exponentials(base, out)
    if by_value is not None:
        by_value.copy_(policy.weighted[2] / policy.total[:, None])
    log_normalizer, base_normalizer = policy.log_normalizer(), base_policy.log_normalizer()
    values = objective.alpha_tilde * log_normalizer - objective.alpha_0 * base_normalizer
    expected, expected_base = policy.weighted[0] / policy.total, policy.weighted[1] / policy.total
    return q_taken, values, (expected - log_normalizer) - (expected_base - base_normalizer), slope_taken


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
    elements = block_elements(device, len(head.weight))
    with torch.autocast(device, enabled=False):
        return _ScoredTerms.apply(hidden.to(dtype), base_hidden.to(dtype), head.to(dtype), targets, objective, elements)


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
