"""The Q-Adapter objective: the definition every other version of it is held against.

Notation of the paper. A prompt x, a response y = (a_0 … a_{T-1}), states s_t = (x, a_<t); π1 is the frozen base.

    V(s)  = α̃ · logsumexp_a((Q(s,a) + α0 · log π1(a|s)) / α̃)          value
    π̃     = softmax((Q + α0 · log π1) / α̃)                             the customised policy
    r̂_t   = Q(s_t,a_t) − γ · V(s_{t+1}),  V(terminal) = 0               implied reward of the new preference
    Δ     = Σ_t γ^t r̂_t(chosen) − Σ_t γ^t r̂_t(rejected)
    loss  = mean over pairs of −log σ(w · Δ) + β · mean over response tokens of r̂²

The published code and the residual reading of the paper differ in named choices; `Objective` holds them and
`docs/method.md` derives where they agree. This module is the only place where tokens are shifted by one
(`scored_positions`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Parametrization = Literal["absolute", "residual"]
Value = Literal["next-state", "current-state"]
Aggregation = Literal["discounted-sum", "padded-mean"]
PresetName = Literal["paper", "published-code", "residual"]


@dataclass(frozen=True, slots=True)
class Objective:
    """Every choice of the objective. Start from `Objective.preset`.

    Attributes:
        alpha_tilde: α̃ > 0, temperature of the customised policy.
        alpha_0: α0 ≥ 0, how much of the base's reward is kept.
        beta: β ≥ 0, weight of the squared rewards.
        gamma: γ in (0, 1], discount.
        preference_scale: w > 0, scale of the Bradley-Terry model.
        parametrization: what Q is. `absolute`: the adapted model's logits. `residual`: adapted minus base logits, so
            that Q is 0 before training.
        value: which V is subtracted at step t. `next-state`: V(s_{t+1}), 0 behind the last response token (the paper).
            `current-state`: V(s_t) (the published code).
        aggregation: a response's reward. `discounted-sum`: Σ γ^t r̂_t. `padded-mean`: Σ r̂_t over the padded length of
            the batch minus one, that is the number of shifted positions (the published code).
        shift_mask: which positions are scored. True: those that predict a response token. False: position t counts if
            token t is a response token although it predicts token t + 1, so the first response token is never scored
            and the position behind the last one is (the published code).

    Raises:
        ValueError: a number outside its range, or a choice that is none; the message says which.
    """

    alpha_tilde: float
    alpha_0: float
    beta: float
    gamma: float
    preference_scale: float
    parametrization: Parametrization
    value: Value
    aggregation: Aggregation
    shift_mask: bool

    def __post_init__(self) -> None:
        numbers = {
            "alpha_tilde": (self.alpha_tilde > 0, "above 0"),
            "alpha_0": (self.alpha_0 >= 0, "at least 0"),
            "beta": (self.beta >= 0, "at least 0"),
            "gamma": (0 < self.gamma <= 1, "above 0 and at most 1"),
            "preference_scale": (self.preference_scale > 0, "above 0"),
        }
        for name, (in_range, expected) in numbers.items():
            given = getattr(self, name)
            if not (in_range and math.isfinite(given)):
                raise ValueError(f"objective: {name} is {given}; expected a finite number {expected}.")
        choices = {
            "parametrization": ("absolute", "residual"),
            "value": ("next-state", "current-state"),
            "aggregation": ("discounted-sum", "padded-mean"),
            "shift_mask": (True, False),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"objective: {name} is {getattr(self, name)!r}; expected {' or '.join(map(repr, allowed))}."
                )

    @classmethod
    def preset(cls, name: PresetName, **overrides: Any) -> Objective:
        """A named objective, with any of its fields replaced.

        Args:
            name: `paper` (the paper's equations and its table of hyper-parameters), `published-code` (what the
                authors' repository computes) or `residual` (Q as the difference to the base; with `beta=0` the loss
                is DPO's with its β = `preference_scale`).
            overrides: fields of `Objective`.

        Raises:
            ValueError: no such preset or field, or a value out of range.
        """
        if name not in _PRESETS:
            raise ValueError(f"objective: no preset {name!r}; there are {', '.join(_PRESETS)}.")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(overrides.keys() - known):
            raise ValueError(
                f"objective: {', '.join(unknown)} is no part of it; its fields are {', '.join(sorted(known))}."
            )
        return replace(_PRESETS[name], **overrides)


_PAPER = Objective(
    # "α̃ = 1.0, α0 = 0.01, β = 0.1, γ = 1.0" (table of hyper-parameters)
    alpha_tilde=1.0,
    alpha_0=0.01,
    beta=0.1,
    gamma=1.0,
    preference_scale=1.0,
    parametrization="absolute",
    value="next-state",
    aggregation="discounted-sum",
    shift_mask=True,
)
_PRESETS: dict[str, Objective] = {
    "paper": _PAPER,
    "published-code": replace(_PAPER, value="current-state", aggregation="padded-mean", shift_mask=False),
    "residual": replace(_PAPER, alpha_0=1.0, parametrization="residual", value="current-state"),
}


class BatchTotals(NamedTuple):
    """What the loss divides by. Taken over a whole optimiser step, it makes partial losses of its parts add up.

    Attributes:
        pairs: number of pairs.
        tokens: number of scored positions, chosen and rejected.
        shifted_length: padded length minus one (only `padded-mean` uses it).
    """

    pairs: Tensor | float
    tokens: Tensor | float
    shifted_length: Tensor | float


class PairwiseLoss(NamedTuple):
    """The loss of a batch of B pairs and what it is made of. All float32 (float64 for float64 logits).

    Attributes:
        loss: [] preference_loss + regularization.
        preference_loss: [] mean over pairs of −log σ(w · Δ).
        regularization: [] β · mean over scored positions of r̂².
        chosen_rewards: [B] aggregated reward of each chosen response (before w).
        rejected_rewards: [B] the same of its rejected partner.
        kl: [] KL(π̃ ‖ π1), mean over scored positions, without gradient.
    """

    loss: Tensor
    preference_loss: Tensor
    regularization: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    kl: Tensor


def scored_positions(response_mask: Tensor, shift_mask: bool) -> Tensor:
    """Which positions' predictions are scored: bool [R, T-1]; entry j is the prediction of token j + 1.

    Args:
        response_mask: [R, T] bool, position t is a response token. Position 0 can never be scored: nothing predicts it.
        shift_mask: see `Objective.shift_mask`.
    """
    return response_mask[:, 1:] if shift_mask else response_mask[:, :-1]


def batch_totals(response_mask: Tensor, objective: Objective) -> BatchTotals:
    """The divisors of a batch by itself. The count of tokens stays a [] float32 tensor: nothing waits for the device.

    Args:
        response_mask: [2B, T] bool.
        objective: only `shift_mask` matters.
    """
    rows, length = response_mask.shape
    tokens = scored_positions(response_mask, objective.shift_mask).sum().to(torch.float32)
    return BatchTotals(pairs=rows // 2, tokens=tokens, shifted_length=length - 1)


def policy_logits(q: Tensor, base_logprobs: Tensor, alpha_0: float, alpha_tilde: float) -> Tensor:
    """(Q + α0 log π1)/α̃: unnormalised log-probabilities of π̃. Shapes [..., V], any matching dtype."""
    return (q + alpha_0 * base_logprobs) / alpha_tilde


def discounts(scored: Tensor, gamma: float, dtype: torch.dtype) -> Tensor:
    """γ^t with t counted over a row's scored positions from 0: [R, T-1], 0 where nothing is scored."""
    if gamma == 1.0:
        return scored.to(dtype)
    step = scored.long().cumsum(dim=1) - 1
    return torch.where(scored, torch.as_tensor(gamma, dtype=dtype, device=scored.device) ** step, 0.0)


def pair_loss(rewards: Tensor, scored: Tensor, kl: Tensor, objective: Objective, totals: BatchTotals) -> PairwiseLoss:
    """From each position's reward to the loss; shared by the readable and the fused version.

    Args:
        rewards: [2B, T-1] r̂ at scored positions, 0 elsewhere.
        scored: [2B, T-1] bool.
        kl: [] sum over the scored positions of KL(π̃ ‖ π1).
        objective: the choices.
        totals: what to divide by.
    """
    if objective.aggregation == "discounted-sum":
        responses = (rewards * discounts(scored, objective.gamma, rewards.dtype)).sum(dim=1)
    else:
        responses = rewards.sum(dim=1) / totals.shifted_length
    chosen, rejected = responses.chunk(2)
    preference = -F.logsigmoid(objective.preference_scale * (chosen - rejected)).sum() / totals.pairs
    regularization = objective.beta * rewards.square().sum() / totals.tokens
    return PairwiseLoss(
        preference + regularization, preference, regularization, chosen.detach(), rejected.detach(), kl / totals.tokens
    )


def next_state_values(values: Tensor, scored: Tensor) -> Tensor:
    """V(s_{t+1}) of the prediction at each position: V at the next position if that one is scored too, else 0.

    Args:
        values: [R, T-1] V at every position but the last, which predicts nothing.
        scored: [R, T-1] bool. A response that was cut off ends like any other, in the terminal state, and so does
            each part of a response mask with gaps.
    """
    following = torch.where(scored[:, 1:], values[:, 1:], 0.0)
    return F.pad(following, (0, 1))


def pairwise_loss(
    q_logits: Tensor,
    base_logits: Tensor,
    input_ids: Tensor,
    response_mask: Tensor,
    objective: Objective,
    totals: BatchTotals | None = None,
) -> PairwiseLoss:
    """The Q-Adapter loss of B pairs, written to be read: full logits, every step on its own line.

    Rows 0 … B-1 are chosen responses, rows B … 2B-1 their rejected partners. The logits at position t predict
    token t + 1. Half-precision logits are computed with in float32. A row without any scored position has reward 0
    (`encode_pair` refuses to make one).

    Args:
        q_logits: [2B, T, V] logits of the adapted model (also for `residual`; the base is subtracted here).
        base_logits: [2B, T, V] logits of the frozen base.
        input_ids: [2B, T] int64.
        response_mask: [2B, T] bool, position t is a response token.
        objective: the choices.
        totals: what to divide by; the batch's own sums without it. Given the totals of several batches, the losses
            of those batches add up to the loss of all of them together.

    Raises:
        ValueError: an odd number of rows, or shapes or types that do not fit.
    """
    _check_shapes(q_logits, base_logits, input_ids, response_mask)
    scored = scored_positions(response_mask, objective.shift_mask)
    totals = totals or batch_totals(response_mask, objective)
    q_logits, base_logits = _at_least_float32(q_logits[:, :-1]), _at_least_float32(base_logits[:, :-1])

    base_logprobs = base_logits.log_softmax(dim=-1)
    q = q_logits - base_logits if objective.parametrization == "residual" else q_logits
    logits = policy_logits(q, base_logprobs, objective.alpha_0, objective.alpha_tilde)
    log_normalizer = logits.logsumexp(dim=-1)
    values = objective.alpha_tilde * log_normalizer

    q_taken = q.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    subtracted = next_state_values(values, scored) if objective.value == "next-state" else values
    rewards = torch.where(scored, q_taken - objective.gamma * subtracted, 0.0)

    with torch.no_grad():
        policy_logprobs = logits - log_normalizer[..., None]
        divergence = (policy_logprobs.exp() * (policy_logprobs - base_logprobs)).sum(dim=-1)
        kl = torch.where(scored, divergence, 0.0).sum()
    return pair_loss(rewards, scored, kl, objective, totals)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def _check_shapes(q_logits: Tensor, base_logits: Tensor, input_ids: Tensor, response_mask: Tensor) -> None:
    rows, length = input_ids.shape
    if rows == 0 or rows % 2:
        raise ValueError(f"pairwise_loss: {rows} rows; expected chosen rows followed by as many rejected ones.")
    if q_logits.shape != base_logits.shape or q_logits.shape[:2] != (rows, length):
        raise ValueError(
            f"pairwise_loss: logits of shapes {tuple(q_logits.shape)} and {tuple(base_logits.shape)} for input_ids "
            f"{tuple(input_ids.shape)}; expected [rows, length, vocabulary] twice."
        )
    if response_mask.shape != input_ids.shape or response_mask.dtype != torch.bool:
        raise ValueError(
            f"pairwise_loss: response_mask is {response_mask.dtype} {tuple(response_mask.shape)}; "
            f"expected bool {tuple(input_ids.shape)}."
        )
