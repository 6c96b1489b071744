"""lm-eval's view of a preference set: the tokens it compares are those that training and `preference.py` score.

lm-eval's own multiple choice scores the text of a choice. A reply in training ends with what the chat template writes
behind it (`<|im_end|>`, say), and a template may trim the reply; both can turn a close pair around.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks import items as benchmarks
from qadapter.preferences.pair import Message
from qadapter.preferences.render import plain_prompt, rendered

if TYPE_CHECKING:
    from datasets import Dataset


class PreferenceTask(ConfigurableTask):
    """A multiple-choice task between two replies, each scored as a whole turn."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """As the parent's; lm-eval leaves the key that names this class among the settings."""
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: str, **options: Any) -> list[Instance]:
        """As the parent's, with the context and the continuations that training has."""
        requests: list[Instance] = super().construct_requests(doc, ctx, **options)
        if options.get("apply_chat_template"):
            arguments = _templated(options["chat_template"], doc, ctx)
        else:
            arguments = _plain(doc, ctx)
        for request, own in zip(requests, arguments, strict=True):
            request.arguments = own
        return requests


def lm_eval_dataset(file: str, fields: Sequence[str], **metadata: Any) -> dict[str, Dataset]:
    """What the task's `custom_dataset: !function` gets; see `benchmarks.lm_eval_dataset`.

    Raises:
        QAdapterError: an item does not have two choices and the place of one of them: lm-eval would count it as wrong.
    """
    for item in benchmarks.read_items(file, fields):
        choices, answer = item["choices"], item["answer"]
        texts = isinstance(choices, list) and len(choices) == 2 and all(isinstance(c, str) and c for c in choices)
        if not texts or isinstance(answer, bool) or answer not in (0, 1):
            raise QAdapterError(
                f"Benchmark file {file}: an item has choices and answer other than two texts and 0 or 1. Correct the "
                f"file or leave this task out."
            )
    return benchmarks.lm_eval_dataset(file, fields, **metadata)


def _templated(chat_template: Callable[..., str], doc: Mapping[str, Any], ctx: str) -> list[tuple[str, str]]:
    """Prompt and closed turn of each reply, as training renders them.

    lm-eval hands over the model's `apply_chat_template`, which either opens a turn or leaves the last one open; the
    tokenizer behind it can close one.
    """
    model = getattr(chat_template, "__self__", None)
    tokenizer: Any = getattr(model, "tokenizer", None)
    if not hasattr(tokenizer, "apply_chat_template"):
        raise QAdapterError("A preference task needs the model's own tokenizer. Use the model `hf` or `qadapter`.")
    settings = getattr(model, "chat_template_args", None) or {}
    user: Message = {"role": "user", "content": doc["prompt"]}
    texts = [rendered(tokenizer, [user], reply, **settings) for reply in doc["choices"]]
    # `ctx` ends with the same generation prompt; it can have more in front of the question, such as a system prompt.
    return [(ctx, reply) for _, reply in texts]


def _plain(doc: Mapping[str, Any], ctx: str) -> list[tuple[str, str]]:
    """Without chat template, the transcript of training; lm-eval does not say which token would end it."""
    context = ctx.removesuffix(doc["prompt"]) + plain_prompt([{"role": "user", "content": doc["prompt"]}])
    return [(context, f" {reply}") for reply in doc["choices"]]
