"""Whether a policy speaks: what its generated replies show, with or without a judge.

A policy can win every preference measure and answer `==========` to every prompt, because pairs are scored and not
generated. Each reply is looked at by itself; a policy whose replies are mostly broken, and more often than its base's,
does not speak.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadapter.files.artifacts import read_json_lines
from qadapter.files.shown import visible
from qadapter.preferences.scripts import main_script

SPEECH = "speech.jsonl"
"""File beside `answers.jsonl`: a row per reply."""
SPEAKS = "adaptation/speaks"
"""Metric: 1, or 0 where the policy does not answer in language."""
BROKEN = "adaptation/broken_replies"
"""Metric: share of broken replies."""

BROKEN_SHARE = 0.5
"""A policy does not speak if at least this share of its replies is broken …"""
BEYOND_BASE = 0.25
"""… and its share is above its base's by more than this: a base that babbles is not held against its adapters."""

_GRAM = 4  # words, or characters where there are few words: what counts as said again
_FEW_WORDS = 8
_SHORTEST = 8  # characters; a shorter reply ("No.", "42") repeats nothing
_REPEATS = 0.5
_TOWARDS_RANDOM = 0.7
_NO_SCRIPT = "none"
_SHOWN = 60  # characters of a broken reply that is shown


@dataclass(frozen=True)
class Speech:
    """What the replies of one policy show.

    Attributes:
        faults: for each reply the reasons why it is broken, empty where it is not.
        base_broken: share of the base's replies that are broken, to the same prompts.
        repetition: mean share of a reply that repeats itself.
        ended: share of replies that ended by themselves; None where that is not known.
        nll: mean negative log-likelihood of a reply's token under the base, nats; None where it was not measured.
        of_each: of each reply, (whether it ended, its likelihood); None where that is not known.
    """

    faults: tuple[tuple[str, ...], ...]
    base_broken: float
    repetition: float
    ended: float | None
    nll: float | None
    of_each: tuple[tuple[bool | None, float | None], ...] = ()

    @property
    def broken(self) -> float:
        """Share of broken replies."""
        return sum(map(bool, self.faults)) / len(self.faults)

    @property
    def speaks(self) -> bool:
        """Whether this policy answers in language."""
        return self.broken < BROKEN_SHARE or self.broken - self.base_broken <= BEYOND_BASE

    def reasons(self) -> str:
        """The faults and how many replies have each: `9 of 12 repeat themselves, 3 of 12 are empty`."""
        return reasons(self.faults)

    def rows(self) -> list[dict[str, Any]]:
        """One row per reply, JSON values."""
        return [
            {"ended": ended, "nll": nll, "faults": list(faults)}
            for faults, (ended, nll) in zip(self.faults, self.of_each, strict=True)
        ]

    def metrics(self) -> dict[str, float]:
        """The measures by their names in MLflow, without the prefix."""
        known = {
            "broken_replies": self.broken,
            "repetition": self.repetition,
            "replies_ended": self.ended,
            "reply_nll": self.nll,
            "speaks": float(self.speaks),
        }
        return {name: value for name, value in known.items() if value is not None}


def listen(
    replies: Sequence[str],
    base_replies: Sequence[str],
    *,
    ended: Sequence[bool] | None = None,
    nll: Sequence[float] | None = None,
    base_nll: Sequence[float] | None = None,
    vocabulary: int | None = None,
    beside: Sequence[Sequence[str]] | None = None,
) -> Speech:
    """Look at a policy's replies beside its base's to the same prompts.

    Args:
        replies, base_replies: to the same prompts, at least one.
        ended: whether each reply ended by itself, before the most tokens that it could have.
        nll, base_nll: mean negative log-likelihood of each reply's tokens under the base, nats per token; NaN for an
            empty reply.
        vocabulary: of the base; with `nll`, replies that are nearer to random tokens than to the base's own are broken.
        beside: for each reply the texts whose script it may be in, besides that of the base's reply: the prompt, and
            what was preferred. None: scripts are not looked at. English and French are one script.

    Raises:
        ValueError: no replies, or not as many as of the base.
    """
    if not replies or len(replies) != len(base_replies):
        raise ValueError(
            f"{len(replies)} replies and {len(base_replies)} of the base; expected the same number, above 0"
        )
    limit = _limit(base_nll if base_nll is not None else nll, vocabulary)
    letters = _mean([_letters(reply) for reply in base_replies if reply.strip()], 1.0)
    own = nll if nll is not None else [math.nan] * len(replies)
    scripts = [_scripts([base, *texts]) for base, texts in zip(base_replies, beside or (), strict=False)]
    allowed: Sequence[frozenset[str]] = scripts or [frozenset()] * len(replies)
    of_base = base_nll if base_nll is not None else [math.nan] * len(replies)
    measured = [value for value in own if not math.isnan(value)]
    return Speech(
        faults=tuple(tuple(_faults(r, n, limit, letters, s)) for r, n, s in zip(replies, own, allowed, strict=True)),
        base_broken=_mean(
            [bool(_faults(r, n, limit, letters, frozenset())) for r, n in zip(base_replies, of_base, strict=True)], 0.0
        ),
        repetition=_mean([repetition(reply) for reply in replies], 0.0),
        ended=None if ended is None else _mean(ended, 0.0),
        nll=_mean(measured, 0.0) if measured else None,
        of_each=tuple(
            (None if ended is None else ended[i], None if math.isnan(value) else value) for i, value in enumerate(own)
        ),
    )


def reasons(faults: Sequence[Sequence[str]]) -> str:
    """How many replies have each fault: `9 of 12 repeat themselves, 3 of 12 are empty`; nothing where none has any."""
    counts = Counter(fault for of_one in faults for fault in of_one)
    return ", ".join(f"{count} of {len(faults)} {fault}" for fault, count in counts.most_common())


def faults_of(adaptation: Path | None) -> str:
    """What is wrong with the replies in an evaluation's folder, and one of them; nothing where it has no such files."""
    if adaptation is None or not (adaptation / SPEECH).is_file():
        return ""
    faults = [entry["faults"] for entry in read_json_lines(adaptation / SPEECH)]
    replies = [answer["reply"] for answer in read_json_lines(adaptation / "answers.jsonl")]
    broken = [reply for reply, found in zip(replies, faults, strict=True) if found]
    if not broken:
        return ""
    example = visible(broken[0])
    example = example if len(example) <= _SHOWN else example[:_SHOWN] + " …"
    return f"of its replies {reasons(faults)}, for example {json.dumps(example, ensure_ascii=False)}"


def repetition(text: str) -> float:
    """Share of a text's sequences of four words (or of four characters, where it has few words) that were said before.

    0 for a text without repeats and for one too short to have any; `==========` has .857: 7 sequences, 1 of them new.
    """
    text = text.strip()
    if len(text) < _SHORTEST:
        return 0.0
    words: Sequence[str] = text.split()
    units = words if len(words) >= _FEW_WORDS else text
    grams = [tuple(units[i : i + _GRAM]) for i in range(len(units) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams)


def _scripts(texts: Sequence[str]) -> frozenset[str]:
    """The scripts of some texts; where one is Japanese, a reply of Han letters alone may be, too."""
    found = {main_script(text) for text in texts} - {_NO_SCRIPT}
    return frozenset(found | {"Han"} if "Japanese" in found else found)


def _faults(reply: str, nll: float, limit: float, letters: float, scripts: frozenset[str]) -> list[str]:
    """Why a reply is broken, in words that go after a number of replies; without `scripts` any script will do."""
    if not reply.strip():
        return ["are empty"]
    found = []
    if repetition(reply) >= _REPEATS:
        found.append("repeat themselves")
    if letters > 0.5 and _letters(reply) < 0.25 and len(reply.strip()) >= _SHORTEST:
        found.append("have hardly a letter or digit")
    script = main_script(reply)
    if scripts and script not in {_NO_SCRIPT, *scripts} and len(reply.strip()) >= _SHORTEST:
        found.append(f"are written in another script ({script})")
    if nll > limit:  # never where it is NaN
        found.append("are nearly random tokens to the base")
    return found


def _letters(text: str) -> float:
    """Share of a text's visible characters that are letters or digits of any script."""
    visible = [c for c in text if not c.isspace()]
    return sum(c.isalnum() for c in visible) / len(visible) if visible else 0.0


def _limit(nll: Sequence[float] | None, vocabulary: int | None) -> float:
    """Nats per token above which a reply is nearer to random tokens than to what the base says itself."""
    known = [value for value in nll or () if not math.isnan(value)]
    if not known or not vocabulary:
        return math.inf
    usual = min(_mean(known, 0.0), math.log(vocabulary))
    return usual + _TOWARDS_RANDOM * (math.log(vocabulary) - usual)


def _mean(values: Sequence[float | bool], empty: float) -> float:
    return sum(values) / len(values) if values else empty
