"""The weights nearest to a policy that no weights are: the scale whose KL to the policy is smallest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.evaluation.divergence import right_padded
from qadapter.export.exactness import Shares
from qadapter.inference.score import Predictions, by_length, evaluating
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.preferences.pair import Message
from qadapter.preferences.tokenize import UnusablePair, encode_reply, padding_id

MOST_NUMBERS = 2**27
"""Log-probabilities of the policy that are kept, one for each token and word of the vocabulary (512 MiB)."""

_COARSE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
_GOLDEN = 0.6180339887498949
_STEPS = 10


@dataclass(frozen=True)
class Nearest:
    """The outcome of the search.

    Attributes:
        scale: factor on the shares that were given.
        kl: KL(policy ‖ exported) per token at that scale, in nats, exact over the vocabulary.
        tokens: reply tokens that it was measured on.
    """

    scale: float
    kl: float
    tokens: int


def nearest_scale(
    policy: QAdapterForCausalLM,
    shares: Shares,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[tuple[Sequence[Message], str]],
    *,
    max_length: int,
    batch_size: int = 8,
) -> Nearest:
    """Search the factor on all adapters for which W + factor · Σ shares · ΔW is nearest to the policy.

    A coarse grid finds the valley, golden-section search its lowest point.

    Args:
        policy: is left as it is.
        shares: of the weights.
        conversations: a prompt and a reply each; KL is taken at the replies' tokens.
        max_length: tokens of prompt and reply together.
        batch_size: conversations per forward pass.

    Raises:
        QAdapterError: no conversation can be tokenised.
    """
    rows = []
    for prompt, reply in conversations:
        try:
            before, after = encode_reply(prompt, reply, tokenizer, max_length)
        except UnusablePair:
            continue
        rows.append((before + after, len(after)))
    most = max(1, MOST_NUMBERS // _vocabulary(policy))
    kept: list[tuple[list[int], int]] = []
    tokens = 0
    for row in rows:
        if kept and tokens + row[1] > most:
            break
        kept.append(row)
        tokens += row[1]
    if not kept:
        raise QAdapterError("no reply of the data can be scored, so no distance to the policy can be measured")
    batches = [
        right_padded([kept[i] for i in some], padding_id(tokenizer))
        for some in by_length([len(ids) for ids, _ in kept], batch_size)
    ]
    plain = _AsWeights(policy)
    with evaluating(policy):
        wanted = [_log_probs(policy, batch) for batch in batches]

        def distance(scale: float) -> float:
            """KL(policy ‖ weights at this scale), mean over the tokens."""
            total = 0.0
            with plain.at(shares.times(scale)):
                for batch, of_policy in zip(batches, wanted, strict=True):
                    found = _log_probs(plain, batch)
                    total += float((of_policy.exp() * (of_policy - found)).sum(dtype=torch.float64))
            return total / tokens

        return _minimum(distance, tokens)


def _minimum(distance: Callable[[float], float], tokens: int) -> Nearest:
    found = {scale: distance(scale) for scale in _COARSE}
    best = min(found, key=found.__getitem__)
    place = _COARSE.index(best)
    low, high = _COARSE[max(0, place - 1)], _COARSE[min(len(_COARSE) - 1, place + 1)]
    for _ in range(_STEPS):
        inner, outer = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        for scale in (inner, outer):
            if scale not in found:
                found[scale] = distance(scale)
        low, high = (low, outer) if found[inner] < found[outer] else (inner, high)
    best = min(found, key=found.__getitem__)
    return Nearest(best, found[best], tokens)


class _AsWeights(nn.Module):
    """A policy's base with adapters in its weights: all of them in one pass, each as often as said."""

    def __init__(self, policy: QAdapterForCausalLM) -> None:
        super().__init__()
        self._policy = [policy]  # no submodule: modes and parameters are the policy's own affair
        self._off = False

    @contextmanager
    def at(self, shares: Mapping[str, float]) -> Iterator[None]:
        (policy,) = self._policy
        tuner: Any = policy.peft_model.base_model
        active = list(policy.peft_model.active_adapters)
        self._off = not any(shares.values())
        try:
            tuner.set_adapter(list(shares) or active, inference_mode=True)
            with policy.scaled(dict(shares) if len(shares) > 1 else next(iter(shares.values()), 1.0)):
                yield
        finally:
            tuner.set_adapter(active, inference_mode=True)
            self._off = False

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The policy's, which say the device."""
        return self._policy[0].parameters(recurse)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Logits of the base with its adapters."""
        (policy,) = self._policy
        if self._off:
            with policy.disable_adapter():
                return policy(input_ids=input_ids, attention_mask=attention_mask)
        return policy.peft_model(input_ids=input_ids, attention_mask=attention_mask)


def _log_probs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """[N, V] float32 of the N reply tokens."""
    return Predictions(model, batch).logits(slice(None)).log_softmax(dim=-1)


def _vocabulary(policy: QAdapterForCausalLM) -> int:
    embeddings: Any = policy.get_input_embeddings()
    return int(embeddings.weight.shape[0])
