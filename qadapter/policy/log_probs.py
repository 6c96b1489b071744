"""Log-probabilities of given tokens from hidden states, block by block: [tokens, vocabulary] never exists.

The sums over the vocabulary are those of `fused.py`. The gradient of log π(token) by the hidden state h, with logits
W·h, is W[token] - W·π, of the size of h: the forward computes it, and the backward only scales it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qadapter.policy.fused import NARROWEST_BLOCK, RunningSums, VocabularyHead, block_elements


class TokenTerms(NamedTuple):
    """What the vocabulary says at each of N positions, float32 at least. Only `log_probs` carries a gradient.

    Attributes:
        log_probs: [N], of the given token.
        entropy: [N], of the distribution, in nats.
        mean_logits: [N], over the vocabulary.
        is_top: [N] bool, whether no token is likelier than the given one.
    """

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top: Tensor


def token_terms(hidden: Tensor, head: VocabularyHead, targets: Tensor) -> TokenTerms:
    """Log-probabilities of tokens, and what trainers log beside them.

    Args:
        hidden: [N, H] last hidden states; gradients go here and nowhere else.
        head: a frozen head.
        targets: [N] int64.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    elements = block_elements(device, len(head.weight))
    with torch.autocast(device, enabled=False):
        return TokenTerms(*_TokenTerms.apply(hidden.to(dtype), head.to(dtype), targets, elements))


class _TokenTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, head: VocabularyHead, targets: Tensor, elements: int
    ) -> tuple[Tensor, ...]:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        terms = torch.empty((4, len(hidden)), dtype=precise, device=hidden.device)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        at_once = max(elements // NARROWEST_BLOCK, 1)
        for start in range(0, len(hidden), at_once):
            rows = slice(start, start + at_once)
            by_hidden = None if gradient is None else gradient[rows]
            terms[:, rows] = torch.stack(_terms(hidden[rows], head, targets[rows], elements, by_hidden))
        log_probs, entropy, mean_logits, is_top = terms.unbind()
        is_top = is_top.bool()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy, mean_logits, is_top)
        return log_probs, entropy, mean_logits, is_top

    @staticmethod
    def backward(ctx: Any, by_log_probs: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (by_log_probs[:, None] * gradient).to(gradient.dtype), None, None, None


def _terms(
    hidden: Tensor, head: VocabularyHead, targets: Tensor, elements: int, gradient: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, entropy, mean logit and whether the token is the likeliest, each [N].

    `gradient`, if given, is [N, H] and gets the log-probability's gradient by `hidden`.
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    count, size = len(hidden), len(head.weight)
    width = min(max(elements // max(count, 1), NARROWEST_BLOCK), size)
    buffer = torch.empty(2 * count * width, dtype=precise, device=hidden.device)
    like = buffer[:count]
    taken, slope_taken, total = torch.zeros_like(like), torch.ones_like(like), torch.zeros_like(like)
    sums = RunningSums(like, 0, *([] if gradient is None else [hidden.shape[1]]))
    for start in range(0, size, width):
        block = head.block(start, min(start + width, size))
        columns = len(block.weight)
        logits, out = buffer[: 2 * count * columns].view(2 * count, columns).chunk(2)
        logits = block.logits(hidden, out=logits)
        place = (targets - start).clamp(0, columns - 1)[:, None]
        here = (targets >= start) & (targets < start + columns)
        taken = torch.where(here, logits.gather(1, place).squeeze(1), taken)
        total += logits.sum(dim=1)
        slope = None
        if head.softcap is not None and gradient is not None:
            slope = 1 - (logits / head.softcap) ** 2
            slope_taken = torch.where(here, slope.gather(1, place).squeeze(1), slope_taken)
        weights = sums.exponentials(logits, out)
        sums.weighted[0].add_(torch.linalg.vecdot(weights, logits))
        if gradient is not None:
            weights = weights if slope is None else weights.mul_(slope)
            sums.weighted[1].add_(weights.to(hidden.dtype) @ block.weight)
    if gradient is not None:
        by_taken = head.weight[targets].to(precise) * slope_taken[:, None]
        gradient.copy_((by_taken - sums.weighted[1] / sums.total[:, None]) * head.scale)
    log_normalizer = sums.log_normalizer()
    entropy = log_normalizer - sums.weighted[0] / sums.total
    return taken - log_normalizer, entropy, total / size, (taken >= sums.largest).to(precise)
