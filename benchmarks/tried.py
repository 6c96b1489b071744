"""Techniques that were measured and not taken, so that the next reader can measure them again.

Both are sides of `benchmarks.training_step --tried`, each beside the side that it would replace.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qadapter.policy.adapter_rows import BASE
from qadapter.policy.fused import VocabularyHead, loss_from_scored
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective, PairwiseLoss, pairwise_loss, scored_positions


def one_pass_loss(ours: QAdapterForCausalLM, data: dict[str, Tensor], objective: Objective) -> Tensor:
    """The fused loss with base and adapted rows in one batched pass; replaces two passes, one without autograd.

    The base's rows then keep their activations and go through the backward, with gradients that are zero.

    Args:
        ours: the policy; its adapter layers must be able to tell rows apart.
        data: `input_ids`, `attention_mask`, `response_mask` [2B, T].
        objective: the objective.
    """
    scored = torch.nn.functional.pad(scored_positions(data["response_mask"], objective.shift_mask), (0, 1))
    base: Any = ours.peft_model.get_base_model()
    rows = len(scored)
    inputs = {name: data[name].repeat(2, 1) for name in ("input_ids", "attention_mask")}
    with ours._passes.rows.use(["default"] * rows + [BASE] * rows):
        hidden, base_hidden = base.get_decoder()(**inputs, use_cache=False)[0].chunk(2)
    head = VocabularyHead.of(base)
    assert head is not None
    base_scored = base_hidden[scored].detach()
    return loss_from_scored(hidden[scored], base_scored, head, data["input_ids"], data["response_mask"], objective).loss


@cache
def compiled_pairwise_loss() -> Callable[..., PairwiseLoss]:
    """The readable objective through `torch.compile`; replaces it on the response positions' logits."""
    return torch.compile(pairwise_loss, dynamic=False)
