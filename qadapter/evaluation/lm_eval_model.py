"""The model that lm-eval sees: a policy in memory, or a Q-Adapter's folder, behind lm-eval's own Hugging Face class."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.policy import QAdapterForCausalLM


@register_model("qadapter")
class PolicyLM(HFLM):
    """lm-eval's `hf` model over a ready module, silent, with clear errors and a count of shortened prompts.

    A Q-Adapter policy needs nothing more: its one `forward` returns the combined logits, which is what `hf` scores
    and generates from. Scores are those of `hf` to the last digit, so every method of a comparison goes through here.

    Attributes:
        shortened: requests whose prompt did not fit into the model's context and lost its beginning.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        base: str | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        apply_chat_template: bool = False,
        **settings: Any,
    ) -> None:
        """Wrap a policy.

        Args:
            pretrained: the policy; or, from a command line, the folder of a Q-Adapter.
            base: folder or hub id of the Q-Adapter's base; the one its folder names by default.
            tokenizer: the policy's; the base's by default.
            dtype: precision of a base that is loaded.
            device: where a policy that is loaded goes; the processor where there is no GPU, whatever is asked for.
            apply_chat_template: whether prompts will come out of a chat template.
            settings: of `hf`.
        """
        if isinstance(pretrained, str):
            # lm-eval's command line asks for a GPU unless told otherwise, and so does `hf` fall back.
            place = torch.device(device or "cuda") if torch.cuda.is_available() else torch.device("cpu")
            pretrained = QAdapterForCausalLM.from_pretrained(pretrained, base, dtype=dtype, device_map={"": place})
            tokenizer = tokenizer or str(pretrained.config.name_or_path)
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if apply_chat_template:
            # A template writes its own special tokens, and training tokenises its text without adding any.
            settings.setdefault("add_bos_token", False)
        super().__init__(pretrained, tokenizer=tokenizer, **settings)
        self.shortened = 0

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        """As the parent's, counting the prompts that are longer than `left_truncate_len` tokens."""
        ids, mask = super().tok_batch_encode(strings, padding_side, left_truncate_len=None, truncation=truncation)
        if left_truncate_len is not None and ids.shape[1] > left_truncate_len:
            self.shortened += int((mask.sum(dim=1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """As the parent's, without a progress bar; refuses answers longer than the model's context."""
        for longest in {request.args[1].get("max_gen_toks") or self.max_gen_toks for request in requests}:
            if longest >= self.max_length:
                raise QAdapterError(
                    f"Task {requests[0].task_name} lets the model write {longest} tokens, but its context holds "
                    f"{self.max_length} with the prompt. Set a smaller max_gen_toks."
                )
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As the parent's, without a progress bar."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """As the parent's, without a progress bar."""
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise QAdapterError(
                    f"An answer of {len(continuation)} tokens is longer than the model's context of "
                    f"{self.max_length}. Leave such items out of the benchmark, or use a model with a longer context."
                )
            self.shortened += len(context) + len(continuation) > self.max_length + 1
        # The parent's rolling likelihood asks for a bar with every batch, whatever it was told itself.
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
