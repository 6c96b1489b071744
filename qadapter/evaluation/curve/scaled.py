"""A policy whose adapters are multiplied by a scale: every scale needs passes of its own.

Its logits are not linear in the scale, so no pass says anything about another scale. What is saved is decoding: an
answer that the policy gave at another value is read in one pass, and where each of its tokens is the most likely one it
is the greedy answer here too; only the other prompts are answered token by token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qadapter.evaluation.curve.both_rows import DialledPolicy, Text, WeightedTexts, add_scores, rows_at
from qadapter.policy.dial import Dial, DialKind

_TRIES = 3
"""Known answers that are read for a prompt before it is answered token by token."""


class ScaledTexts:
    """As `WeightedTexts`, at every scale that is asked for.

    Attributes:
        kind: of the dial.
        policy: whose; its own dial does not matter.
        generated, reused: answers that had to be generated, and those that were read.
    """

    kind: DialKind = "scale"

    def __init__(self, policy: DialledPolicy, *, pad: int, batch_size: int) -> None:
        self.policy = policy
        self._options: Mapping[str, int] = {"pad": pad, "batch_size": batch_size}
        self._answers: dict[tuple[int, ...], dict[tuple[int, ...], list[float]]] = {}
        self.generated = self.reused = 0

    def learn(self, texts: Sequence[Text], value: float) -> None:
        """Take in answers.

        Args:
            texts: prompts and answers.
            value: of the dial that they were given at, of either kind: those of the nearest value are read first.
        """
        for prompt, answer in texts:
            if answer:
                self._answers.setdefault(prompt, {}).setdefault(answer, []).append(value)

    def known(self) -> dict[float, list[Text]]:
        """Every answer that was learnt, by a value that it was given at."""
        found: dict[float, list[Text]] = defaultdict(list)
        for prompt, answers in self._answers.items():
            for answer, values in answers.items():
                found[values[0]].append((prompt, answer))
        return found

    def answers(
        self, prompts: Sequence[tuple[int, ...]], value: float, whole: Callable[[tuple[int, ...]], bool]
    ) -> list[tuple[int, ...] | None]:
        """The greedy answer to each prompt at a scale; None where it is none of the known ones.

        Args:
            prompts, whole: as in `WeightedTexts.answers`.
            value: the scale.
        """
        found: dict[tuple[int, ...], tuple[int, ...]] = {}
        candidates = {
            prompt: [answer for answer in self._nearest(prompt, value) if whole(answer)]
            for prompt in dict.fromkeys(prompts)
        }
        for place in range(_TRIES):
            texts = [
                (prompt, answers[place])
                for prompt, answers in candidates.items()
                if prompt not in found and place < len(answers)
            ]
            if not texts:
                break
            _, greedy = self._scored(texts, value)
            found |= {prompt: answer for (prompt, answer), same in zip(texts, greedy, strict=True) if same}
        return [found.get(prompt) for prompt in prompts]

    def _nearest(self, prompt: tuple[int, ...], value: float) -> list[tuple[int, ...]]:
        known = self._answers.get(prompt, {})
        return sorted(known, key=lambda answer: min(abs(given - value) for given in known[answer]))

    def likelihoods(self, texts: Sequence[Text], value: float) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy text) of each text at a scale."""
        distinct = list(dict.fromkeys(texts))
        sums, greedy = self._scored(distinct, value)
        of = {text: (float(sums[i]), bool(greedy[i])) for i, text in enumerate(distinct)}
        return [of[text] for text in texts]

    def _scored(self, texts: Sequence[Text], value: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """[n] log-likelihoods, [n] whether each is the greedy text; one pass of the scaled policy."""
        sums, greedy = np.zeros(len(texts)), np.ones(len(texts), dtype=bool)
        for of, (logits,), targets in rows_at(self.policy, [Dial("scale", value)], texts, **self._options):
            add_scores(sums, greedy, of, logits.float(), targets)
        return sums, greedy


DialledTexts = WeightedTexts | ScaledTexts
"""Answers and likelihoods along either dial."""
