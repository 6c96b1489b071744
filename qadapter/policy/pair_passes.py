"""Hidden states of a batch of pairs where the objective scores them; the shared prompt of a pair is encoded once.

Two replies to one prompt need its keys and values once: the prompts go through the model as B left-padded rows, and
the 2B replies continue from the cache that this left, gradients included. Padding the prompts on the left puts every
prompt's last token, whose prediction is the first response token, into the last column.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel

from qadapter.policy.fused import VocabularyHead
from qadapter.policy.objective import scored_positions
from qadapter.policy.passes import RowPasses
from qadapter.policy.positions import turns_with_length

# Encoding the prompt once takes a second, smaller pass. It pays if it spares at least this share of the tokens, and at
# least so many tokens × width²: measured on one CPU thread; on a GPU, by what a kernel launch costs there.
_WORTH_SPARING = 0.1
_WORK_TO_SPARE = {"cpu": 1.2e6, "cuda": 1e9}
_TOKENS_CHECKED = 4


@dataclass(frozen=True)
class SharedPrompts:
    """A batch of pairs taken apart into prompts and replies.

    Attributes:
        prompt_ids: [B, P] int64, left-padded with arbitrary ids.
        prompt_mask: [B, P] int64.
        reply_ids: [2B, R] int64, right-padded with arbitrary ids.
        reply_mask: [2B, R] int64.
        lengths: [2B] int64, prompt tokens of each row.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    reply_ids: Tensor
    reply_mask: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, width: int) -> SharedPrompts | None:
        """Take a batch apart; None if its pairs do not share prompts, or if that would spare too little.

        Args:
            input_ids: [2B, T], right-padded, each row a prompt and then its reply to the end.
            attention_mask: [2B, T].
            response_mask: [2B, T] bool.
            width: of the model's hidden states.
        """
        rows, length = input_ids.shape
        pairs = rows // 2
        column = torch.arange(length, device=input_ids.device)
        starts = response_mask.int().argmax(dim=1)
        ends = attention_mask.sum(dim=1)
        in_prompt = column < starts[:, None]
        whole = response_mask == (~in_prompt & (column < ends[:, None]))
        same = (input_ids[:pairs] == input_ids[pairs:]) | ~in_prompt[:pairs]
        fits = whole.all() & same.all() & (starts[:pairs] == starts[pairs:]).all() & (starts > 0).all()
        numbers = torch.stack([fits.long(), starts.max(), (ends - starts).max()])
        shared, longest_prompt, longest_reply = numbers.tolist()  # the one place where the host waits for the device
        spared = rows * length - pairs * longest_prompt - rows * longest_reply
        worth = _WORK_TO_SPARE.get(input_ids.device.type, _WORK_TO_SPARE["cuda"])
        if not shared or spared < _WORTH_SPARING * rows * length or spared * width**2 < worth:
            return None
        from_left = column[:longest_prompt] + starts[:pairs, None] - longest_prompt
        from_reply = column[:longest_reply] + starts[:, None]
        return cls(
            prompt_ids=input_ids[:pairs].gather(1, from_left.clamp(min=0)),
            prompt_mask=(from_left >= 0).long(),
            reply_ids=input_ids.gather(1, from_reply.clamp(max=length - 1)),
            reply_mask=(from_reply < ends[:, None]).long(),
            lengths=starts,
        )

    def where(self, scored: Tensor) -> Tensor:
        """[2B, 1 + R] bool: `scored` [2B, T-1] in terms of a row's last prompt token and its reply tokens."""
        position = torch.arange(1 + self.reply_ids.shape[1], device=scored.device) + self.lengths[:, None] - 1
        return scored.gather(1, position.clamp(max=scored.shape[1] - 1)) & (position < scored.shape[1])


class PairPasses:
    """Hidden states at the scored positions, of the adapted model with autograd and of the base without.

    Attributes:
        usable: whether base and adapted model share a frozen vocabulary head, and their logits are what it makes of
            their hidden states. Otherwise there is nothing to be had here.
        share_prompts: whether the prompt of a pair is encoded once.
    """

    def __init__(self, model: PeftModel, passes: RowPasses, share_prompts: bool = True) -> None:
        self._model, self._passes = model, passes
        base: Any = model.get_base_model()
        self._decoder = decoder_of(base)
        self._config = base.config.get_text_config(decoder=True)
        # Other PEFT methods and LoRA's variants may need what PeftModel.forward does around the model
        self.usable = passes.rows.supported and self._decoder is not None and VocabularyHead.of(base) is not None
        self._tolerance = 5e-2 if getattr(base, "quantization_method", None) is not None else 1e-3
        takes = inspect.signature(self._decoder.forward).parameters if self._decoder is not None else {}
        cached = {"position_ids", "past_key_values"} <= set(takes) and not turns_with_length(self._config)
        self.share_prompts = share_prompts and cached
        self._head_checked = self._cache_checked = False
        self._sharded = dist.is_initialized() and any(
            isinstance(parameter, DTensor) for parameter in model.parameters()
        )

    def head(self) -> VocabularyHead:
        """The base's head as it is now: sharded training puts its weights in place for one pass only."""
        head = VocabularyHead.of(self._model.get_base_model())
        assert head is not None
        return head

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, shift_mask: bool
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [N, H] of the adapted model and of the base at the N scored positions, row by row.

        Args:
            input_ids: [2B, T] int64, right-padded.
            attention_mask: [2B, T].
            response_mask: [2B, T] bool.
            shift_mask: see `Objective`.
        """
        scored = scored_positions(response_mask, shift_mask)
        shared = self._shared(input_ids, attention_mask, response_mask)
        base = self._pass(input_ids, attention_mask, scored, shared, bare=True)
        if shared is not None and not self._cache_checked:
            self._cache_checked = True
            plain = self._pass(input_ids, attention_mask, scored, None, bare=True)
            self.share_prompts = self._everywhere(self._same(base, plain))
            if not self.share_prompts:
                shared, base = None, plain
        return self._pass(input_ids, attention_mask, scored, shared, bare=False), base

    def check(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Compare the head with the model's own logits, once, on the first pair of the first batch.

        Architectures do unforeseen things to logits (and to caches, see `hidden`), and training on something else than
        the model's own logits would be silent.
        """
        if self._head_checked or not self.usable:
            return
        self._head_checked = True
        pair = torch.tensor([0, len(input_ids) // 2], device=input_ids.device)
        # The head sees each token alone: a few of them show it, and the logits of more would be a step's largest tensor
        few = (pair, slice(_TOKENS_CHECKED))
        inputs = {"input_ids": input_ids[few], "attention_mask": attention_mask[few], "use_cache": False}
        with self._passes.bare(2):
            expected = self._model(**inputs).logits[:, -1]
            hidden = self._decoder(**inputs)[0][:, -1]
        head = self.head()
        self.usable = self._everywhere(self._same(head.logits(hidden.to(head.weight.dtype)), expected))

    def _same(self, ours: Tensor, expected: Tensor) -> bool:
        """Whether these are equal but for rounding, in units of their spread."""
        half = bool({ours.dtype, expected.dtype} & {torch.float16, torch.bfloat16})
        return equal_but_for_rounding(ours, expected, half, self._tolerance)

    def _shared(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> SharedPrompts | None:
        recomputes = getattr(self._model.get_base_model(), "is_activation_checkpointing", False)
        if not self.share_prompts or recomputes:  # layers that are computed again do not write into a cache
            return None
        shared = SharedPrompts.of(input_ids, attention_mask, response_mask, self._config.hidden_size)
        return shared if self._everywhere(shared is not None) else None

    def _everywhere(self, flag: bool) -> bool:
        """Whether it holds in every process, where they have to take the same passes to gather the same layers."""
        if not self._sharded:
            return flag
        agreed = torch.tensor(int(flag), device=next(self._model.parameters()).device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return bool(agreed.item())

    def _pass(
        self, input_ids: Tensor, attention_mask: Tensor, scored: Tensor, shared: SharedPrompts | None, bare: bool
    ) -> Tensor:
        def through(rows: int) -> Any:
            return self._passes.bare(rows) if bare else nullcontext()

        if shared is None:
            with through(len(input_ids)):
                hidden = self._decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
            return hidden[:, :-1][scored]

        pairs = len(shared.prompt_ids)
        cache = DynamicCache(config=self._config)
        with through(pairs):
            prompts = self._decoder(
                input_ids=shared.prompt_ids,
                attention_mask=shared.prompt_mask,
                position_ids=(shared.prompt_mask.cumsum(1) - 1).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
            )[0]
        twice = torch.arange(pairs, device=input_ids.device).repeat(2)
        cache.batch_select_indices(twice)
        with through(2 * pairs):
            replies = self._decoder(
                input_ids=shared.reply_ids,
                attention_mask=torch.cat([shared.prompt_mask[twice], shared.reply_mask], dim=1),
                position_ids=shared.lengths[:, None] + torch.arange(shared.reply_ids.shape[1], device=input_ids.device),
                past_key_values=cache,
                use_cache=True,
            )[0]
        return torch.cat([prompts[twice, -1:], replies], dim=1)[shared.where(scored)]


def equal_but_for_rounding(ours: Tensor, expected: Tensor, half: bool, tolerance: float = 1e-3) -> bool:
    """Whether two tensors of logits are equal in units of their spread; `half`: of 16 bits, which is 5 %."""
    ours, expected = ours.float(), expected.float()
    return bool((ours - expected).abs().max() <= (5e-2 if half else tolerance) * (1 + expected.std()))


def decoder_of(base: Any) -> Any:
    """The body of a causal language model, from token ids to hidden states; None if it cannot be identified.

    `get_decoder` finds a module by its name, which for ModernBERT's decoder is the vocabulary head.
    """
    for body in (base.get_decoder(), getattr(base, base.base_model_prefix, None)):
        if isinstance(body, PreTrainedModel) and body is not base:
            return body
    return None
