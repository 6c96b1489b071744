"""Logits at a batch's scored tokens for a loss: where the vocabulary is large, of hidden states, some at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from qadapter.inference.score import chunks
from qadapter.policy.fused import VocabularyHead
from qadapter.policy.scored_states import scored_states


@dataclass(frozen=True)
class ReplyRows:
    """What gives a model's logits at N scored positions.

    With 262,144 tokens of vocabulary, logits at every position are a step's largest tensors: those of 8 sequences of
    256 tokens are 2.1 GB, for the base, for the adapted model, and for the gradient. Hidden states are 2.6 MB.

    Attributes:
        rows: [N, H] hidden states, or [N, V] logits where `head` is None.
        head: the base's head.
    """

    rows: Tensor
    head: VocabularyHead | None

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Tensor], scored: Tensor) -> ReplyRows:
        """Run one forward pass.

        The first call on a model compares its head with its logits (`scored_states`): make it without gradient and in
        evaluation mode.

        Args:
            model: with or without an adapter. One that several processes wrap gives its logits by its own forward.
            inputs: `input_ids` and `attention_mask`, each [R, T].
            scored: [R, T - 1] bool, N of them true: position t predicts token t + 1.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        states = scored_states(model, ids, mask, F.pad(scored, (0, 1)))
        if states is not None:
            return cls(*states)
        return cls(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][scored], None)

    def logits(self, part: slice) -> Tensor:
        """[n, V] float32 of some of the positions; a gradient passes through."""
        rows = self.rows[part]
        return (rows if self.head is None else self.head.logits(rows)).float()

    def parts(self) -> Iterator[slice]:
        """All positions, so many at a time that their logits stay small."""
        return chunks(len(self.rows), self.rows.shape[-1] if self.head is None else len(self.head.weight))
