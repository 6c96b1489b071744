"""TRL's fused head, on a CPU: applied to the reply's tokens only, and once instead of twice.

TRL's trainers score tokens with a head that they add to the model's forward (`trl.trainer.utils.add_fused_lm_head`).
Without Triton it scores every position, prompts and padding included, and takes each product with the head's weights
again for the backward. With 262,144 tokens of vocabulary these products are most of a step. What replaces it here gives
the same numbers (tests/qadapter/training/test_reply_log_probs.py) from `qadapter.policy.log_probs`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from qadapter.policy.fused import LARGE_VOCABULARY, VocabularyHead
from qadapter.policy.log_probs import token_terms
from qadapter.policy.pair_passes import decoder_of, equal_but_for_rounding

_TOKENS_CHECKED = 4
_UNDERSTOOD = {"input_ids", "attention_mask", "use_cache"}


def score_replies_only(model: nn.Module) -> bool:
    """Replace the head that a TRL trainer added to a model, where this is quicker and gives the same.

    Args:
        model: the trainer's, wrapped by PEFT or not.

    Returns:
        Whether it was replaced. It is left where the vocabulary is small, the head is trained, quantised or adapted,
        the model is on another device than the CPU, or its logits are not what the head makes of its hidden states.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not hasattr(base, "get_output_embeddings") or "forward" not in vars(base) or base.device.type != "cpu":
        return False
    decoder, head = decoder_of(base), VocabularyHead.of(base)
    if decoder is None or head is None or len(head.weight) < LARGE_VOCABULARY:
        return False
    theirs = base.forward
    training = base.training
    base.eval()  # no dropout, so that the random state of the training is left alone
    agrees = _agrees(theirs, decoder, head)
    base.train(training)
    if not agrees:
        return False

    @functools.wraps(theirs)
    def forward(*args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **options: Any) -> Any:
        given = {name: value for name, value in options.items() if value is not None}  # PEFT passes on what it was not
        if not fused_lm_head or labels is None or args or not given.keys() <= _UNDERSTOOD:
            more = {"fused_lm_head": True} if fused_lm_head else {}
            return theirs(*args, **more, **({} if labels is None else {"labels": labels}), **options)
        hidden = decoder(**{**given, "use_cache": False})[0][:, :-1]
        scored = labels[:, 1:] != -100
        weights = VocabularyHead.of(base)  # as they are now
        assert weights is not None
        terms = token_terms(hidden[scored], weights, labels[:, 1:][scored])
        log_probs, entropy, mean_logits, is_top = (
            values.new_zeros(scored.shape).masked_scatter(scored, values) for values in terms
        )
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / scored.sum().clamp(min=1),
            log_probs=log_probs,
            entropy=entropy,
            mean_logits=mean_logits,
            is_top1=is_top,
            label_mask=scored,
        )

    base.forward = forward
    return True


def _agrees(forward: Any, decoder: nn.Module, head: VocabularyHead) -> bool:
    """Whether the head makes the model's own logits of its hidden states, on a few tokens."""
    inputs = {"input_ids": torch.arange(_TOKENS_CHECKED)[None], "use_cache": False}
    with torch.no_grad():
        ours = head.logits(decoder(**inputs)[0].to(head.weight.dtype)[0])
        theirs = forward(**inputs).logits[0]
    return equal_but_for_rounding(ours, theirs, half=theirs.dtype in (torch.float16, torch.bfloat16))
