"""A reward model as judge: the answer with the higher reward wins.

`qadapter.judging.reward_training` trains it, `qadapter.judging.rewards` applies it; this file says when it judges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from qadapter.config.model import ModelSettings
from qadapter.config.training import OptimizerSettings
from qadapter.files.artifacts import read_json
from qadapter.judging.kind import Case, JudgeKind, Material, no_answers
from qadapter.judging.verdicts import Prompts, Verdict, by_score
from qadapter.preferences.pair import Message


@dataclass(frozen=True)
class RewardJudge:
    """The higher reward wins.

    Attributes:
        folder: what `qadapter.judging.reward_training` wrote.
        base: the model that the reward model is an adapter of, a folder or a hub id.
        model: its precision.
        max_length: tokens of a prompt and a reply, as in training.
        batch_size: conversations a forward pass.
    """

    folder: Path
    base: str | Path
    model: ModelSettings
    max_length: int
    batch_size: int
    name: ClassVar[str] = "reward-model"
    free: ClassVar[bool] = False

    def verdicts(self, prompts: Prompts, base: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        """See `AnswerJudge`. A reply without a word is worth less than any other."""
        # a config is read without torch
        from qadapter.judging.rewards import ADAPTER, load_reward_base, rewards
        from qadapter.policy.adapters import load_adapter
        from qadapter.preferences.tokenize import UnusablePair, encode_reply

        network, tokenizer = load_reward_base(self.base, self.model)
        network = load_adapter(network, self.folder / ADAPTER)  # type: ignore[assignment]

        def encoded(prompt: Sequence[Message], reply: str) -> tuple[int, ...]:
            try:
                before, after = encode_reply(prompt, reply, tokenizer, self.max_length)
            except UnusablePair:
                return ()
            return (*before, *after)

        pairs = [(encoded(p, mine), encoded(p, its)) for p, mine, its in zip(prompts, replies, base, strict=True)]
        # Each text once: a batch's padding moves a reward by its rounding, and equal texts have one reward.
        texts = sorted({text for pair in pairs for text in pair if text})
        found = rewards(network, [list(text) for text in texts], self.batch_size)
        worth = {(): -math.inf, **dict(zip(texts, found.tolist(), strict=True))}
        return [by_score(worth[mine], worth[its]) for mine, its in pairs]

    def metrics(self) -> dict[str, float]:
        """`adaptation/judge_accuracy`: how often it prefers the chosen reply of a held-out pair; chance is one half.

        With it `…_low` and `…_high`, its interval, and `…_n`, the number of pairs.
        """
        found = read_json(self.folder / "metrics.json")
        names = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_n")
        return {f"adaptation/judge_{name}": float(found[f"judge/{name}"]) for name in names}


def _contradictions(case: Case) -> Iterable[str]:
    yield from no_answers(case, RewardJudge.name)
    if case.asked and not case.judge_pairs:
        yield (
            f"sources.{case.source}.judge_pairs: 0, but evaluation.adaptation.judge is 'reward-model', which is "
            "trained on these; set a few hundred pairs apart, or choose another judge"
        )
    if case.context and case.settings and case.settings.max_length > case.context:
        yield (
            f"evaluation.adaptation.reward_model.max_length {case.settings.max_length} is longer than the model's "
            f"context {case.context}"
        )


def _cache_key(case: Case) -> dict[str, Any]:
    """The verdicts depend on the trained model, which is an input of the stage, and on how much of a text it reads."""
    return {} if case.settings is None else {"max_length": case.settings.max_length}


def _open(case: Case, material: Material) -> RewardJudge:
    if material.trained is None:
        raise ValueError("A reward model judges after its training, and no trained one was given.")
    settings = case.settings or case.training
    return RewardJudge(material.trained, material.base, material.model, settings.max_length, case.batch_size)


JUDGE = JudgeKind(
    name=RewardJudge.name,
    open=_open,
    section="reward_model",
    settings=OptimizerSettings,
    training="qadapter.judging.reward_training",
    is_default=lambda case: bool(case.judge_pairs and case.generate),
    contradictions=_contradictions,
    cache_key=_cache_key,
)
