"""What one pass of base and adapter says of every weight on Q at once.

At weight w the logits are (1 − w) · B + w · P, with B the base's and P those of the policy as trained, at each position
of a given text. They are linear in w, so for a given text two things follow from B and P alone:

- the weights at which greedy decoding writes exactly this text: each step asks that its token beats every other one,
  which is a linear inequality in w, so they are one interval;
- the text's log-likelihood at any weight.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qadapter.evaluation.divergence import right_padded
from qadapter.inference.score import Predictions, by_length, chunks, evaluating
from qadapter.policy.dial import Dial, DialKind
from qadapter.policy.guided import GuidedForCausalLM
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.progress.reports import counted

DialledPolicy = QAdapterForCausalLM | GuidedForCausalLM
"""A policy whose logits are those of its base plus the dial's value times a difference that does not depend on it."""

Text = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt, and of what follows it."""


class _AtDial(nn.Module):
    """A policy with its dial at a value, up to a constant at each position."""

    def __init__(self, policy: DialledPolicy, dial: Dial) -> None:
        super().__init__()
        self._policy, self._dial = [policy], dial  # no submodule: modes and parameters are the policy's own affair

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The policy's, which say the device."""
        return self._policy[0].parameters(recurse)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int = 0) -> Any:
        """Logits."""
        return self._policy[0](
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_to_keep=logits_to_keep,
            dial=self._dial,
            up_to_constant=True,
        )


ENDS = (Dial("q-weight", 0.0), Dial("q-weight", 1.0))
"""The dials of B and P."""


def rows_at(
    policy: DialledPolicy, dials: Sequence[Dial], texts: Sequence[Text], *, pad: int, batch_size: int
) -> Iterator[tuple[NDArray[np.int64], list[Tensor], Tensor]]:
    """For chunks of predicted tokens: which text each is of [N], [N, V] logits at each dial, and the token [N]."""
    sides = [_AtDial(policy, dial) for dial in dials]
    with evaluating(policy), counted("texts along the dial", "text", len(texts)) as read:
        for some in by_length([len(prompt) + len(rest) for prompt, rest in texts], batch_size):
            batch = right_padded([([*texts[i][0], *texts[i][1]], len(texts[i][1])) for i in some], pad)
            found = [Predictions(side, batch) for side in sides]
            first = found[0]
            for part in chunks(len(first.rows), 2 * len(sides) * first.vocabulary):
                of = np.array(some)[first.rows[part].cpu().numpy()]
                yield of, [one.logits(part) for one in found], first.targets[part]
            read.advance(len(some))


def greedy_intervals(policy: DialledPolicy, texts: Sequence[Text], *, pad: int, batch_size: int) -> NDArray[np.float64]:
    """The weights at which greedy decoding of the prompt writes each text, token for token.

    Args:
        policy: any; its own dial does not matter.
        texts: n prompts with a text each, not empty.
        pad: id of the padding.
        batch_size: texts per forward pass.

    Returns:
        [n, 2], lowest and highest weight; the first above the second where there is none.
    """
    found = np.tile([-math.inf, math.inf], (len(texts), 1))
    for of, (base, trained), targets in rows_at(policy, ENDS, texts, pad=pad, batch_size=batch_size):
        index = targets[:, None].to(base.device)
        at_0 = (base.gather(1, index) - base).double()  # how far the token is ahead of each other one, at weight 0
        slope = (trained.gather(1, index) - trained).double() - at_0
        crossing = -at_0 / slope
        low = crossing.masked_fill(slope <= 0, -math.inf).amax(dim=1)
        high = crossing.masked_fill(slope >= 0, math.inf).amin(dim=1)
        never = ((slope == 0) & (at_0 < 0)).any(dim=1)
        low = low.masked_fill(never, math.inf)
        np.maximum.at(found[:, 0], of, low.cpu().numpy())
        np.minimum.at(found[:, 1], of, high.cpu().numpy())
    return found


def log_likelihoods(
    policy: DialledPolicy, texts: Sequence[Text], values: Sequence[float], *, pad: int, batch_size: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-likelihood of each text after its prompt, at each weight.

    Args:
        policy, texts, pad, batch_size: as in `greedy_intervals`.
        values: W weights.

    Returns:
        [n, W], summed over the text's tokens in nats; [n, W], whether the text is the greedy one.
    """
    sums, greedy = np.zeros((len(texts), len(values))), np.ones((len(texts), len(values)), dtype=bool)
    for of, (base, trained), targets in rows_at(policy, ENDS, texts, pad=pad, batch_size=batch_size):
        base, trained = base.float(), trained.float()
        for column, value in enumerate(values):
            logits = torch.lerp(base, trained, float(value))
            add_scores(sums[:, column], greedy[:, column], of, logits, targets)
    return sums, greedy


def add_scores(
    sums: NDArray[np.float64], greedy: NDArray[np.bool_], of: NDArray[np.int64], logits: Tensor, targets: Tensor
) -> None:
    """Add the log-probabilities of some tokens to those of their texts, and whether each is the greedy one.

    Args:
        sums, greedy: [n], of the texts; changed.
        of: [N], which text each token is of.
        logits: [N, V].
        targets: [N], the tokens.
    """
    targets = targets.to(logits.device)
    scores = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)
    np.add.at(sums, of, scores.double().cpu().numpy())
    np.logical_and.at(greedy, of, (logits.argmax(dim=1) == targets).cpu().numpy())


class WeightedTexts:
    """Greedy answers and log-likelihoods of one policy at every weight on Q that is asked for.

    An answer that is known with the interval of its weights is not generated again; a likelihood is computed once, for
    all weights of a grid.

    Attributes:
        kind: of the dial.
        policy: whose; its own dial does not matter.
        grid: the weights that are asked for.
        generated, reused: answers that had to be generated, and those that were known.
    """

    kind: DialKind = "q-weight"

    def __init__(self, policy: DialledPolicy, grid: Sequence[float], *, pad: int, batch_size: int) -> None:
        self.policy, self.grid = policy, tuple(grid)
        self._options: Mapping[str, int] = {"pad": pad, "batch_size": batch_size}
        self._answers: dict[tuple[int, ...], list[tuple[tuple[int, ...], float, float]]] = {}
        self._scored: dict[Text, tuple[NDArray[np.float64], NDArray[np.bool_]]] = {}
        self.generated = self.reused = 0

    def learn(self, texts: Sequence[Text], value: float) -> None:
        """Take in answers, with the weights at which they are the greedy ones.

        Args:
            texts: prompts and answers.
            value: the weight that they were given at; here every weight is looked at.
        """
        new = [text for text in dict.fromkeys(texts) if text[1] and not self._knows(*text)]
        if not new:
            return
        for (prompt, answer), (low, high) in zip(new, greedy_intervals(self.policy, new, **self._options), strict=True):
            if low <= high:
                self._answers.setdefault(prompt, []).append((answer, float(low), float(high)))

    def _knows(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> bool:
        return any(known == answer for known, _, _ in self._answers.get(prompt, ()))

    def known(self) -> dict[float, list[Text]]:
        """Every answer that was learnt, by a weight at which it is the greedy one."""
        found: dict[float, list[Text]] = defaultdict(list)
        for prompt, answers in self._answers.items():
            for answer, low, high in answers:
                found[min(max(low, 0.0), high)].append((prompt, answer))
        return found

    def answers(
        self, prompts: Sequence[tuple[int, ...]], value: float, whole: Callable[[tuple[int, ...]], bool]
    ) -> list[tuple[int, ...] | None]:
        """The greedy answer to each prompt at a weight; None where it is not known.

        Args:
            prompts: token ids.
            value: the weight.
            whole: whether an answer goes as far as it is asked for here; another task may have cut it sooner.
        """
        return [self._answer(prompt, value, whole) for prompt in prompts]

    def _answer(
        self, prompt: tuple[int, ...], value: float, whole: Callable[[tuple[int, ...]], bool]
    ) -> tuple[int, ...] | None:
        for answer, low, high in self._answers.get(prompt, ()):
            if low <= value <= high and whole(answer):
                return answer
        return None

    def likelihoods(self, texts: Sequence[Text], value: float) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy text) of each text at a weight of the grid."""
        new = [text for text in dict.fromkeys(texts) if text not in self._scored]
        if new:
            sums, greedy = log_likelihoods(self.policy, new, self.grid, **self._options)
            self._scored |= {text: (sums[i], greedy[i]) for i, text in enumerate(new)}
        column = self.grid.index(value)
        return [(float(self._scored[text][0][column]), bool(self._scored[text][1][column])) for text in texts]
