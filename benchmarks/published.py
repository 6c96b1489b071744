"""What the published code does, written anew from its description: two passes, full float32 logits, always the rewards.

It computes what that code computes and no more: `tests/test_benchmarks.py` holds losses and gradients against the
readable objective. Every call runs the model with its adapter and without, makes full-vocabulary float32 rows of both
for every position (prompts and padding included), combines them and computes the implied rewards of them, also while
generating: there the loss too, where the rows can be pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter.policy.objective import Objective


def published_terms(q_logits: Tensor, base_logits: Tensor, input_ids: Tensor, o: Objective) -> tuple[Tensor, Tensor]:
    """Combined logits [R, T, V] and implied rewards [R, T-1], in float32 over everything."""
    q_logits, base_logits = q_logits.float(), base_logits.float()
    base_logprobs = F.log_softmax(base_logits, dim=-1)
    combined = (q_logits + o.alpha_0 * base_logprobs) / o.alpha_tilde
    values = o.alpha_tilde * torch.logsumexp(combined, dim=-1)
    taken = q_logits[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return combined, taken - o.gamma * values[:, :-1]


def published_loss(rewards: Tensor, mask: Tensor, o: Objective) -> Tensor:
    """Preference loss and penalty of pairs, with the unshifted mask and the padded length."""
    counted = mask[:, :-1].float()
    totals = (rewards * counted).sum(1) / counted.shape[1]
    chosen, rejected = totals.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean() + o.beta * (rewards.square() * counted).sum() / counted.sum()


CONFIGURATIONS = ("plain", "gradients on embeddings", "gradient checkpointing")
"""How that code may be run: as it is; with the gradients on the embeddings' output that its 8-bit preparation asks for;
and with the gradient checkpointing that its training script turns on, which needs them too."""


def published_step(model: PeftModel, batch: dict[str, Tensor], o: Objective, configuration: str = "plain") -> Tensor:
    """One training step's loss and gradients.

    The base's log-probabilities are detached, so no gradient flows through the base's pass. In `plain` that pass keeps
    no graph at all, because nothing in it asks for gradients. With gradients on the embeddings' output it keeps one
    until the log-probabilities are detached: more memory and time, and the same gradients.

    Args:
        model: base with adapter, in training mode.
        batch: `input_ids`, `attention_mask`, `response_mask` [2·pairs, T].
        o: the objective.
        configuration: one of `CONFIGURATIONS`.
    """
    with _configured(model, configuration):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        q_logits = model(**inputs).logits
        with model.disable_adapter():
            base_logits = model(**inputs).logits.detach()
        _, rewards = published_terms(q_logits, base_logits, batch["input_ids"], o)
        loss = published_loss(rewards, batch["response_mask"], o)
        loss.backward()
    return loss.detach()


@contextmanager
def _configured(model: PeftModel, configuration: str) -> Iterator[None]:
    """The model run in one of `CONFIGURATIONS`; as it was before afterwards."""
    if configuration not in CONFIGURATIONS:
        raise ValueError(f"{configuration!r} is none of {CONFIGURATIONS}")
    base: Any = model.get_base_model()
    hooked, checkpointed = configuration != "plain", configuration == "gradient checkpointing"
    handle = base.get_input_embeddings().register_forward_hook(_ask_for_gradients) if hooked else None
    if checkpointed:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        if checkpointed:
            base.activation_checkpointing_disable()


def _ask_for_gradients(_: torch.nn.Module, __: Any, output: Tensor) -> None:
    output.requires_grad_(True)


class PublishedPolicy(PreTrainedModel, GenerationMixin):
    """Generation and scoring the published way: two passes with two caches for each token."""

    _supports_sdpa = True

    def __init__(self, model: PeftModel, objective: Objective) -> None:
        base: Any = model.get_base_model()
        super().__init__(copy.deepcopy(base.config))
        self.model = model
        self.objective = objective
        self.generation_config = copy.deepcopy(base.generation_config)
        self._base_cache: Any = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Combined logits; the loss is computed and thrown away."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {"position_ids": position_ids, "use_cache": bool(use_cache)}
        if use_cache and past_key_values.get_seq_length() == 0:
            self._base_cache = DynamicCache(config=self.config)
        q_output = self.model(**inputs, past_key_values=past_key_values)
        with self.model.disable_adapter():
            base_output = self.model(**inputs, past_key_values=self._base_cache if use_cache else None)
        combined, rewards = published_terms(q_output.logits, base_output.logits, input_ids, self.objective)
        if input_ids.shape[1] > 1 and len(input_ids) % 2 == 0:
            published_loss(rewards, torch.ones_like(input_ids, dtype=torch.bool), self.objective)
        return CausalLMOutputWithPast(logits=combined, past_key_values=q_output.past_key_values)
