"""lm-eval's model class for a policy whose dial moves: known answers and likelihoods are not computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qadapter.evaluation.curve.scaled import DialledTexts
from qadapter.evaluation.lm_eval.model import PolicyLM
from qadapter.policy.dial import Dial


class DialledLM(PolicyLM):
    """`PolicyLM` at one value of a dial; what `DialledTexts` knows stands in for the model's passes.

    Attributes:
        texts: shared by the values of one policy and kind.
        value: of the dial.
    """

    def __init__(self, texts: DialledTexts, value: float, **settings: Any) -> None:
        """Wrap the policy of `texts`; `settings` are `PolicyLM`'s."""
        super().__init__(texts.policy, **settings)
        self.texts, self.value = texts, value

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """A prompt's tokens, as `generate_until` takes them."""
        ids, mask = self.tok_batch_encode([prompt])
        return tuple(ids[0][mask[0].bool()].tolist())

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        mask: Tensor = settings["attention_mask"]
        if settings.get("do_sample") or settings.get("temperature"):
            self.model.dial = Dial(self.texts.kind, self.value)
            return super()._model_generate(context, max_length, stop, **settings)
        prompts = [tuple(row[keep.bool()].tolist()) for row, keep in zip(context, mask, strict=True)]
        longest_answer, ends = max_length - context.shape[1], self.ends()

        def whole(answer: tuple[int, ...]) -> bool:
            """Whether it ended, or was cut where this task cuts: one that asks the same may cut sooner."""
            if answer[-1] in ends or len(answer) >= longest_answer:
                return True
            text = self.tok_decode(list(answer), skip_special_tokens=False)
            return any(one in text for one in stop)

        answers = self.texts.answers(prompts, self.value, whole)
        open_ = [place for place, answer in enumerate(answers) if answer is None]
        self.texts.reused += len(prompts) - len(open_)
        if open_:
            self.model.dial = Dial(self.texts.kind, self.value)
            output = super()._model_generate(
                context[open_], max_length, stop, **{**settings, "attention_mask": mask[open_]}
            )
            found = [self._trimmed(row) for row in output[:, context.shape[1] :].tolist()]
            self.texts.learn([(prompts[place], answer) for place, answer in zip(open_, found, strict=True)], self.value)
            self.texts.generated += len(open_)
            for place, answer in zip(open_, found, strict=True):
                answers[place] = answer
        longest = max(1, *(len(answer or ()) for answer in answers)) if answers else 1
        pad = int(self.tokenizer.pad_token_id)
        rows = [[*(answer or ())[:longest_answer]] for answer in answers]
        padded = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=context.device)
        return torch.cat([context, padded], dim=1)

    def _trimmed(self, ids: Sequence[int]) -> tuple[int, ...]:
        """What was generated, without the padding behind its end."""
        ends = self.ends()
        stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
        found = list(ids[:stop])
        while found and found[-1] == self.tokenizer.pad_token_id and found[-1] not in ends:
            found.pop()
        return tuple(found)

    def ends(self) -> set[int]:
        """Tokens that end an answer."""
        own = self.model.generation_config.eos_token_id
        listed = own if isinstance(own, list) else [own]
        return {int(one) for one in (*listed, self.tokenizer.eos_token_id) if one is not None}

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            whole = [*context, *continuation][-(self.max_length + 1) :]  # as the parent's: the last one is not read
            start = len(whole) - len(continuation)
            texts.append((tuple(whole[:start]), tuple(whole[start:])))
        return self.texts.likelihoods(texts, self.value)
