"""A multiple-choice benchmark out of any conversations: which of these replies answers this prompt?

A model of a few million parameters that was trained from scratch is at chance on GSM8K or BBH, so what it forgets
does not show there. Telling a prompt's own reply from those to other prompts is within its reach, and can be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import write_json_lines
from qadapter.preferences.pair import Message

Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class ReplyMatchingSummary:
    """Counts of the conversations: written `items`, skipped `multi_turn`, `repeated` and `over_long` ones."""

    items: int
    multi_turn: int
    repeated: int
    over_long: int


def write_reply_matching(
    prompts_and_replies: Iterable[tuple[Prompt, str]],
    out_file: Path,
    *,
    choices: int = 4,
    seed: int,
    max_items: int | None = None,
    max_chars: int | None = None,
) -> ReplyMatchingSummary:
    """Write the benchmark as JSON lines `{"prompt": str, "choices": [str], "answer": int}`.

    The wrong choices are the other prompts' replies nearest in length, so that length does not give the answer away.
    Each prompt and each reply is used once as the right one. A conversation of several turns is left out: lm-eval asks
    a question as one user turn.

    Args:
        prompts_and_replies: the conversations; a prompt is a text or messages.
        out_file: written as a whole; its folder is made.
        choices: replies offered for each prompt.
        seed: of the choice of items, if there are more than `max_items`, and of the right reply's place.
        max_items: most items written.
        max_chars: longest prompt and longest reply used; a model cannot score what its context does not hold.

    Raises:
        QAdapterError: fewer usable conversations than choices.
    """
    if choices < 2:
        raise QAdapterError(f"Reply matching was given {choices} choices; give at least 2.")
    usable: dict[str, str] = {}
    replies_seen: set[str] = set()
    multi_turn = repeated = over_long = 0
    for prompt, reply in prompts_and_replies:
        question, answer = _question(prompt), reply.strip()
        if question is None:
            multi_turn += 1
        elif max_chars is not None and max(len(question), len(answer)) > max_chars:
            over_long += 1
        elif not question or not answer or question in usable or answer in replies_seen:
            repeated += 1
        else:
            usable[question] = answer
            replies_seen.add(answer)
    if len(usable) < choices:
        raise QAdapterError(
            f"Reply matching needs at least {choices} different single-turn conversations and found {len(usable)} "
            f"({multi_turn} of several turns, {over_long} too long, {repeated} repeated or empty). Give more data."
        )
    rng = np.random.default_rng(seed)
    questions, answers = list(usable), list(usable.values())
    near = _nearest_in_length([len(answer) for answer in answers], choices - 1)
    chosen = rng.permutation(len(questions))[:max_items]
    items = []
    for i in sorted(chosen.tolist()):
        place = int(rng.integers(choices))
        offered = [answers[j] for j in rng.permutation(near[i])]
        offered.insert(place, answers[i])
        items.append({"prompt": questions[i], "choices": offered, "answer": place})
    write_json_lines(out_file, items)
    return ReplyMatchingSummary(len(items), multi_turn, repeated, over_long)


def _question(prompt: Prompt) -> str | None:
    """The text of a prompt that is one user turn, else None."""
    if isinstance(prompt, str):
        return prompt.strip()
    return prompt[0]["content"].strip() if len(prompt) == 1 and prompt[0]["role"] == "user" else None


def _nearest_in_length(lengths: Sequence[int], k: int) -> list[list[int]]:
    """For each item the k others whose length is nearest, found in a window of the order by length."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    nearest: list[list[int]] = [[] for _ in lengths]
    for rank, i in enumerate(order):
        window = [j for j in order[max(0, rank - k) : rank + k + 1] if j != i]
        nearest[i] = sorted(window, key=lambda j: abs(lengths[j] - lengths[i]))[:k]
    return nearest
