"""Replay: SFT on the chosen replies and on the base's own answers to the same prompts, one to one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadapter.config.base import Count, NonNegative
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings, Need
from qadapter.methods.needs.base_answers import NAME, base_answers, prompt_key, read_answers

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.training.adapt import Job


class ReplaySettings(MethodSettings):
    """How the base answers the training prompts; `temperature` 0: greedily."""

    max_new_tokens: Count
    temperature: NonNegative = 0.0


def needs(choice: ReplaySettings) -> tuple[Need, ...]:
    """The base's answers."""
    return (base_answers(choice.max_new_tokens, choice.temperature),)


def train(job: Job, choice: ReplaySettings) -> Trainer:  # noqa: ARG001 - the base's answers are made by then
    """Train on each pair's chosen reply and on the base's answer to its prompt.

    Where the base's answer is empty, or has no form to train on, the chosen reply stays in its place.
    """
    from contextlib import suppress

    from qadapter.preferences.tokenize import UnusablePair, encode_reply
    from qadapter.training.supervised import train_sft

    answers, second = read_answers(job.needs[NAME]), job.chosen()
    for place, pair in enumerate(job.pairs):
        answer = answers[prompt_key(pair.prompt)]
        if answer.strip():
            with suppress(UnusablePair):  # the template has no form for it: a thought that was never closed, say
                second[place] = encode_reply(pair.prompt, answer, job.tokenizer, job.max_length)
    examples, arguments = job.on_conversations(job.chosen() + second)
    return train_sft(job.network, job.tokenizer, examples, arguments, job.lora, METHOD.name)


METHOD = Method(
    name="replay",
    settings=ReplaySettings,
    train=train,
    passes=2.0,
    knobs=(LEARNING_RATE, Knob("temperature", "T", "temperature")),
    look=Look("#CC79A7", "D"),
    group="baselines",
    needs=needs,
    by_default=True,
)
