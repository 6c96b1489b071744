"""Compare the answers of two policies by the verdicts of a language model.

Every pair of answers is judged twice, once in each order, because judges favour one position (Zheng et al., 2023,
"Judging LLM-as-a-judge"). A win counts only if both orders agree; otherwise it is a tie. A question without a usable
answer is undecided: it is counted, and the win rate covers the other questions.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from qadapter.errors import QAdapterError
from qadapter.evaluation.statistics import Interval, proportion_interval
from qadapter.judging.endpoint_client import JudgeClient, Messages, UnansweredError, Usage, price
from qadapter.judging.endpoint_settings import NAME, EndpointSettings
from qadapter.judging.verdicts import WORTH, Verdict
from qadapter.preferences.pair import Message
from qadapter.progress.kept import kept_folder
from qadapter.progress.reports import counted

_LOGGER = logging.getLogger(__name__)

SPENT = "judge_spent.json"
"""File, among an evaluation's kept results, of what it has paid its judge so far."""

_INSTRUCTION = (
    "You compare two replies to the same conversation. Decide {criterion}. Neither the order nor the length of the "
    "replies matters. End your answer with [[A]] if reply A is better, [[B]] if reply B is better, or [[C]] if they "
    "are equally good."
)
_REMINDER = "Answer with [[A]], [[B]] or [[C]] and nothing else."
_MARK = re.compile(r"\[\[\s*([ABC])\s*\]\]", re.IGNORECASE)


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt, and the judge's verdict.

    Attributes:
        prompt: the conversation, as text.
        answer_a, answer_b: the two policies' answers.
        verdict: the verdict on answer A from both orders.
        orders: the verdict on answer A in each order; empty if the judge was not asked.
        reason: why it is undecided.
    """

    prompt: str
    answer_a: str
    answer_b: str
    verdict: Verdict
    orders: tuple[Verdict, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Estimate:
    """The expected cost of a judgement: `calls` to be made, `cached` answers, `price`.

    The price assumes estimated tokens and answers of the full length; None without prices. An unusable answer costs one
    more call, the reminder. These calls cannot be predicted, but count towards the budget.
    """

    calls: int
    cached: int
    price: float | None

    def text(self) -> str:
        """A readable summary: `24 calls (and 0 known answers), about 0.01, reminders …`."""
        cost = "at an unknown price" if self.price is None else f"about {self.price:.4f}"
        return f"{self.calls} calls (and {self.cached} known answers), {cost}, reminders after nonsense not counted"


@dataclass
class Judgement:
    """All comparisons of two policies.

    Attributes:
        rows: in the prompts' order.
        estimate: the expected cost.
        usage: calls, cached answers, retries, cost and the last error; calls and cost with those before a kill.
    """

    rows: list[Comparison]
    estimate: Estimate
    usage: Usage = field(default_factory=Usage)

    def count(self, verdict: Verdict) -> int:
        """The number of comparisons with this verdict."""
        return sum(row.verdict == verdict for row in self.rows)

    @property
    def undecided_reasons(self) -> dict[str, int]:
        """Reason → number of comparisons that it left undecided."""
        return dict(Counter(row.reason for row in self.rows if row.verdict == "undecided"))

    @property
    def win_rate(self) -> Interval | None:
        """Share of the decided comparisons that policy A wins, ties counted one half; None if nothing was decided.

        The interval is Wilson's: a bootstrap of six wins in six would have zero width.
        """
        values = [WORTH[row.verdict] for row in self.rows if row.verdict in WORTH]
        return proportion_interval(sum(values), len(values)) if values else None

    def metrics(self) -> dict[str, float]:
        """Metrics to log: win_rate (with its interval, absent if nothing was decided), counts and usage.

        `order_agreement` is the share of judged comparisons with the same verdict in both orders.
        """
        judged = [row for row in self.rows if len(row.orders) == 2 and row.verdict != "undecided"]
        figures = {
            "wins": float(self.count("win")),
            "losses": float(self.count("loss")),
            "ties": float(self.count("tie")),
            "undecided": float(self.count("undecided")),
            "calls": float(self.usage.calls),
            "cached": float(self.usage.cached),
            "cost": self.usage.cost,
        }
        if judged:
            figures["order_agreement"] = sum(row.orders[0] == row.orders[1] for row in judged) / len(judged)
        if (rate := self.win_rate) is not None:
            figures |= {"win_rate": rate.estimate, "win_rate_low": rate.low, "win_rate_high": rate.high}
        return figures


class OverBudgetError(QAdapterError):
    """The judge would exceed its budget; no call was made."""


class EndpointJudge:
    """A language model that compares two answers, with a count of its usage."""

    name: ClassVar[str] = NAME
    free: ClassVar[bool] = False

    def __init__(self, settings: EndpointSettings, criterion: str, cache: Path | None = None) -> None:
        """Create the judge without calling it.

        Args:
            settings: the judge's settings.
            criterion: the end of "Decide …"; see `qadapter.judging.endpoint.CRITERIA`.
            cache: file of earlier answers; an interrupted judgement resumes where it stopped.
        """
        self.settings, self.criterion, self.cache = settings, criterion, cache
        self.last: Judgement | None = None

    def estimate(
        self, prompts: Sequence[Sequence[Message]], answers_a: Sequence[str], answers_b: Sequence[str]
    ) -> Estimate:
        """The expected cost of `judge` with the same arguments, computed without a call; see `Estimate`."""
        with contextlib.closing(JudgeClient(self.settings, self.cache)) as client:
            return _estimate(client, self._questions(prompts, answers_a, answers_b))

    def judge(
        self, prompts: Sequence[Sequence[Message]], answers_a: Sequence[str], answers_b: Sequence[str]
    ) -> Judgement:
        """Compare two policies' answers.

        Args:
            prompts: n conversations.
            answers_a, answers_b: n answers of each policy. Equal answers are a tie without asking the judge.

        Raises:
            OverBudgetError: the estimate is above the budget.
            QAdapterError: the settings are invalid; no call was made. Later failures are not errors: questions without
                an answer are undecided.
        """
        if not len(prompts) == len(answers_a) == len(answers_b):
            raise ValueError(f"{len(prompts)} prompts, but {len(answers_a)} and {len(answers_b)} answers.")
        questions = self._questions(prompts, answers_a, answers_b)
        kept = kept_folder()
        with contextlib.closing(JudgeClient(self.settings, self.cache, kept / SPENT if kept else None)) as client:
            expected = _estimate(client, questions)
            _LOGGER.info("judge %s: %s", self.settings.model, expected.text())
            if self.settings.budget is not None and (expected.price or 0) > self.settings.budget:
                raise OverBudgetError(
                    f"The judge would cost about {expected.price:.2f} for {expected.calls} calls, and its budget is "
                    f"{self.settings.budget:.2f}. Raise the budget, judge fewer prompts or use a cheaper model."
                )
            with ThreadPoolExecutor(max_workers=self.settings.parallel) as pool:
                asked = [messages for two in questions for messages in two]
                answers = []
                with counted("judging", "question", len(asked)) as progress:
                    for answer in pool.map(lambda messages: _ask(client, messages), asked):
                        answers.append(answer)
                        progress.advance()
        rows, at = [], 0
        for prompt, a, b, two in zip(prompts, answers_a, answers_b, questions, strict=True):
            rows.append(_comparison(as_text(prompt), a, b, answers[at : at + len(two)]))
            at += len(two)
        self.last = Judgement(rows, expected, client.usage)
        return self.last

    def verdicts(
        self, prompts: Sequence[Sequence[Message]], base: Sequence[str], replies: Sequence[str]
    ) -> list[Verdict]:
        """See `qadapter.judging.verdicts.AnswerJudge`; if the budget is too small, everything is undecided."""
        try:
            judgement = self.judge(prompts, replies, base)
        except OverBudgetError as error:
            _LOGGER.warning("%s Its %d answers are undecided.", error, len(prompts))
            return ["undecided"] * len(prompts)
        if lost := judgement.undecided_reasons:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in lost.items())
            _LOGGER.warning(
                "the judge left %d of %d answers undecided (%s); its last error: %s",
                sum(lost.values()),
                len(prompts),
                reasons,
                judgement.usage.last_error,
            )
        return [row.verdict for row in judgement.rows]

    def metrics(self) -> dict[str, float]:
        """`cost/judge_calls`, `cost/judge_price`; `adaptation/judge_order_agreement` if anything was judged."""
        if self.last is None:
            return {}
        found = self.last.metrics()
        named = {"cost/judge_calls": found["calls"], "cost/judge_price": found["cost"]}
        if "order_agreement" in found:
            named["adaptation/judge_order_agreement"] = found["order_agreement"]
        return named

    def _questions(
        self, prompts: Sequence[Sequence[Message]], answers_a: Sequence[str], answers_b: Sequence[str]
    ) -> list[list[Messages]]:
        """The questions of each comparison in both orders; none if the answers are equal."""
        return [
            [_question(prompt, a, b, self.criterion), _question(prompt, b, a, self.criterion)]
            if a.strip() != b.strip()
            else []
            for prompt, a, b in zip(prompts, answers_a, answers_b, strict=True)
        ]


def parse_verdict(text: str) -> Literal["A", "B", "C"] | None:
    """The last mark in a judge's answer, or the answer itself if it is a mark without brackets; otherwise None."""
    marks = _MARK.findall(text)
    last = marks[-1].upper() if marks else text.strip().strip(".").upper()
    found: dict[str, Literal["A", "B", "C"]] = {"A": "A", "B": "B", "C": "C"}
    return found.get(last)


def _question(prompt: Sequence[Message], first: str, second: str, criterion: str) -> Messages:
    content = (
        f"<conversation>\n{as_text(prompt)}\n</conversation>\n\n<reply A>\n{first.strip()}\n</reply A>\n\n"
        f"<reply B>\n{second.strip()}\n</reply B>"
    )
    return [
        {"role": "system", "content": _INSTRUCTION.format(criterion=criterion)},
        {"role": "user", "content": content},
    ]


def _estimate(client: JudgeClient, questions: Sequence[Sequence[Messages]]) -> Estimate:
    every = [messages for two in questions for messages in two]
    new = [messages for messages in every if not client.is_cached(messages)]
    tokens: list[Any] = [client.estimated_tokens(messages) for messages in new]
    most = price(client.settings, sum(t[0] for t in tokens), sum(t[1] for t in tokens))
    return Estimate(calls=len(new), cached=len(every) - len(new), price=most)


def _ask(client: JudgeClient, messages: Messages) -> str:
    """A mark, or the reason, in lower case, why there is none."""
    try:
        return client.ask(messages, parse_verdict, _REMINDER)
    except UnansweredError as error:
        return str(error)


def _comparison(prompt: str, a: str, b: str, answers: Sequence[str]) -> Comparison:
    if not answers:
        return Comparison(prompt, a, b, "tie")
    places: tuple[dict[str, Verdict], dict[str, Verdict]] = (
        {"A": "win", "B": "loss", "C": "tie"},
        {"A": "loss", "B": "win", "C": "tie"},
    )
    orders: tuple[Verdict, ...] = tuple(
        place.get(answer, "undecided") for place, answer in zip(places, answers, strict=True)
    )
    if "undecided" in orders:
        return Comparison(prompt, a, b, "undecided", orders, next(answer for answer in answers if answer.islower()))
    return Comparison(prompt, a, b, orders[0] if orders[0] == orders[1] else "tie", orders)


def as_text(prompt: Sequence[Message]) -> str:
    """A conversation as readable text."""
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt)
