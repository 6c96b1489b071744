"""The base's own answers to the training prompts: what replay mixes in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qadapter.config.base import Count, NonNegative, Settings
from qadapter.config.model import ModelSettings
from qadapter.methods.method import Need, PairsPlan, Work
from qadapter.preferences.pair import Message

NAME = "answers"
FILE = "answers.json"


class AnswerSettings(Settings):
    """How the base answers: at most so many tokens, greedily at temperature 0."""

    max_new_tokens: Count
    temperature: NonNegative


def base_answers(max_new_tokens: int, temperature: float) -> Need:
    """The need for the base's answers."""
    settings = AnswerSettings(max_new_tokens=max_new_tokens, temperature=temperature)
    return Need(NAME, settings, "prompts", answer_prompts, _work, shared=True)


def _work(settings: AnswerSettings, plan: PairsPlan) -> Work:
    return Work(0, plan.pairs * (plan.tokens_per_sequence / 2 + settings.max_new_tokens), 1)


def prompt_key(prompt: Sequence[Message]) -> str:
    """A prompt as the key of a JSON object."""
    return json.dumps(list(prompt), sort_keys=True)


def answer_prompts(
    base: str | Path,
    pairs_file: Path,
    *,
    model: ModelSettings,
    settings: AnswerSettings,
    batch_size: int,
    seed: int,
    out: Path,
    scratch: Path | None = None,
) -> None:
    """Write the base's own answer to every distinct prompt of a file of pairs, as `answers.json`.

    The answers are kept in `scratch` while they are made: a killed run goes on, and processes share the prompts.
    """
    from qadapter.files.artifacts import write_json
    from qadapter.inference.generate import generate_replies
    from qadapter.policy.loading import load_base
    from qadapter.preferences.pair import load_pairs
    from qadapter.progress.kept import keeping, leads

    network, tokenizer = load_base(base, model)
    prompts = {prompt_key(pair.prompt): pair.prompt for pair in load_pairs(pairs_file)}
    with keeping(scratch):
        replies = generate_replies(
            network,
            tokenizer,
            list(prompts.values()),
            max_new_tokens=settings.max_new_tokens,
            batch_size=batch_size,
            temperature=settings.temperature,
            seed=seed,
        )
        if leads():
            write_json(out / FILE, dict(zip(prompts, replies, strict=True)))


def read_answers(folder: Path) -> dict[str, str]:
    """`prompt_key(prompt)` → answer, as `answer_prompts` wrote them into a folder."""
    answers: dict[str, str] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return answers
