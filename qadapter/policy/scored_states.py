"""A policy's predictions at a few positions as hidden states, so that the head is applied to those positions only.

With 262,144 tokens of vocabulary the logits of one position are a megabyte: those of a batch fill the memory, and the
head takes longer than all layers together. Log-probabilities of replies need it at the replies' tokens alone.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from qadapter.policy.adapter_rows import AdapterRows
from qadapter.policy.fused import LARGE_VOCABULARY, VocabularyHead
from qadapter.policy.guided import GuidedForCausalLM
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.pair_passes import decoder_of, equal_but_for_rounding

_TOKENS_CHECKED = 4
_usable: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def scored_states(
    policy: nn.Module, input_ids: Tensor, attention_mask: Tensor, scored: Tensor
) -> tuple[Tensor, VocabularyHead] | None:
    """Hidden states [N, H] whose product with the head is the policy's logits, up to a constant for each position.

    Args:
        policy: any policy, in evaluation mode.
        input_ids: [R, T] int64.
        attention_mask: [R, T].
        scored: [R, T] bool, N of them true: the positions, row by row.

    Returns:
        The states and the head; None where only the model's own forward gives its logits (a small vocabulary, a head
        that is quantised or adapted, adapters of another kind than LoRA, an architecture that does more to logits).
    """
    if policy not in _usable:
        _usable[policy] = _may_be(policy) and _agrees(policy, input_ids, attention_mask)
    if not _usable[policy] or not _plain_head(policy):  # an adapter of the head may have been attached since
        return None
    hidden, head = _states(policy, input_ids, attention_mask)
    return hidden[scored.to(hidden.device)].to(head.weight.device, head.weight.dtype), head


def _plain_head(policy: nn.Module) -> bool:
    return type(_base_of(policy).get_output_embeddings()) is nn.Linear


def _may_be(policy: nn.Module) -> bool:
    base = _base_of(policy)
    if isinstance(policy, GuidedForCausalLM):  # its logits are no product of a hidden state and the head
        return False
    if isinstance(policy, FSDPModule):  # only its own forward gathers the weights
        return False
    if not isinstance(base, PreTrainedModel) or decoder_of(base) is None:
        return False
    layer = base.get_output_embeddings()
    if type(layer) is not nn.Linear or len(layer.weight) < LARGE_VOCABULARY or layer.weight.is_meta:
        return False
    if isinstance(policy, QAdapterForCausalLM):  # the combination of logits is one of hidden states only without these
        head = VocabularyHead.linear(layer, base.config)
        return head.softcap is None and head.bias is None and AdapterRows(policy.peft_model).supported
    return not isinstance(policy, PeftModel) or AdapterRows(policy).supported


def _base_of(policy: nn.Module) -> Any:
    if isinstance(policy, QAdapterForCausalLM):
        return policy.peft_model.get_base_model()
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def _states(policy: Any, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, VocabularyHead]:
    base = _base_of(policy)
    head = VocabularyHead.linear(base.get_output_embeddings(), base.config)
    if isinstance(policy, QAdapterForCausalLM):
        return policy.combined_hidden(input_ids, attention_mask, decoder_of(base)), head
    hidden = decoder_of(base)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
    return hidden, head


def _agrees(policy: Any, input_ids: Tensor, attention_mask: Tensor) -> bool:
    """Compare with the model's own logits on a few tokens, up to a constant for each position."""
    ids, mask = input_ids[:2, :_TOKENS_CHECKED], attention_mask[:2, :_TOKENS_CHECKED]
    hidden, head = _states(policy, ids, mask)
    ours = head.logits(hidden[:, -1].to(head.weight.device, head.weight.dtype)).float().log_softmax(dim=-1)
    theirs = policy(input_ids=ids, attention_mask=mask).logits[:, -1].float().log_softmax(dim=-1).to(ours.device)
    return equal_but_for_rounding(ours, theirs, half=head.weight.dtype in (torch.float16, torch.bfloat16))
