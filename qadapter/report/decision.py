"""The report's opening box: what to use, what it gains, loses and costs, and how sure that is. In everyday words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qadapter.evaluation.speech import BROKEN, BROKEN_SHARE
from qadapter.evaluation.statistics import Interval
from qadapter.report.intervals import Measured, Sample
from qadapter.report.items import RULE, SCORE, WIN_RATE, read_lines
from qadapter.report.rows import kind, listed, spread_over
from qadapter.report.speaking import silent_methods
from qadapter.report.summary import adherence_gained
from qadapter.report.tables import number

POWER = ((1.96 + 0.84) / 1.96) ** 2
"""Times the items whose 95 % interval reaches just to zero: with so many, 80 % of the tries find the effect."""
SEEDS = 3
"""Trainings from which the spread between trainings can be told at all."""
MOST_ITEMS = 100_000
_ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Decision:
    """What a reader who decides needs.

    Attributes:
        recommendation: which method to use, or why none and what to measure to tell.
        lines: (what it is about, sentence): gained, lost, how sure, cost.
    """

    recommendation: str
    lines: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Candidate:
    method: str
    gained: float
    gain: Interval | None
    loss: Interval | None
    lost: float
    answers: int
    changed: int
    everywhere: bool

    @property
    def worth(self) -> float:
        """What was gained less what was lost; both are shares of questions answered right."""
        return self.gained - (0.0 if math.isnan(self.lost) else self.lost)

    @property
    def surely_gains(self) -> bool:
        return self.gained > 0 and (self.gain is None or self.gain.low > 0)

    @property
    def writes(self) -> bool:
        """Whether it writes anything but the base's answers; true where no answers are recorded."""
        return self.changed > 0 or not self.answers


def decide_for_reader(measured: Measured) -> Decision:
    """The box of a comparison.

    The recommended method is the one with the highest gain less loss among those that answer in language, gain
    something beyond noise and do not write the base's answers word for word; a second one that cannot be told from it
    is named with what would tell. A method of which a domain was not measured, or what it kept where that of others
    was, is not ranked: its gain less loss is that of easier domains, or of no loss.
    """
    silent = silent_methods(measured.rows)
    trained = [method for method in measured.methods if kind(method) != "base"]
    found = [_candidate(measured, method) for method in trained if method not in silent]
    found = sorted((c for c in found if not math.isnan(c.gained)), key=lambda c: -c.worth)
    if not trained:
        return Decision("Nothing was trained: this report shows the base alone.", ())
    they = "it does" if len(silent) == 1 else "they do"
    broken = f" Do not use {listed(silent)}: {they} not answer in language." if silent else ""
    if not found:
        return Decision(f"Use none of these.{broken or ' Nothing was measured that tells what was learnt.'}", ())
    found, apart = _ranked(found)
    broken += apart
    if not found:
        return Decision(f"No recommendation: no method was measured in every domain.{broken}", ())
    better = [candidate for candidate in found if candidate.surely_gains]
    gaining = [candidate for candidate in better if candidate.writes]
    if better and not gaining:
        return Decision(_not_yet(better) + broken, _lines(measured, better[0]))
    if not gaining:
        closest = next((candidate for candidate in found if candidate.gained > 0), found[0])
        return Decision(_not_enough(measured, closest) + broken, _lines(measured, closest))
    best, second = gaining[0], gaining[1] if len(gaining) > 1 else None
    text = ""
    if second is not None:
        if _ahead(measured, second, best) and not _ahead(measured, best, second):
            best, second = second, best  # its lead is beyond chance, and that of the other is not
        text = _against(measured, best, second)
    return Decision(f"Use {best.method}.{text}{broken}", _lines(measured, best))


def _candidate(measured: Measured, method: str) -> _Candidate:
    gained, gain = adherence_gained(measured, method)
    domains = measured.domains_of(method, measured.base_of(method))
    sample = measured.forgetting(method, domains) if domains else None
    loss = sample.interval if sample else None
    lost = spread_over(measured.rows, "forgetting/mean", domains, method).mean if domains else math.nan
    answers = [one for row in measured.rows if row.method == method for one in read_lines(row.adaptation, _ANSWERS)]
    changed = sum(answer["reply"] != answer["base"] for answer in answers)
    everywhere = domains == measured.domains
    return _Candidate(method, gained, gain, loss, loss.estimate if loss else lost, len(answers), changed, everywhere)


def _ranked(found: Sequence[_Candidate]) -> tuple[list[_Candidate], str]:
    """Those whose worth is of the same measurements, and sentences about the others."""
    known = any(candidate.everywhere and not math.isnan(candidate.lost) for candidate in found)
    apart = {
        "not measured in every domain": [c.method for c in found if not c.everywhere],
        "what was kept is not known": [c.method for c in found if c.everywhere and known and math.isnan(c.lost)],
    }
    lacking = [method for methods in apart.values() for method in methods]
    told = "".join(f" Not ranked: {listed(methods)} ({why})." for why, methods in apart.items() if methods)
    return [candidate for candidate in found if candidate.method not in lacking], told


def items_needed(interval: Interval, effect: float, items: int) -> int | None:
    """How many items tell an effect from nothing in 80 % of the tries, at 95 %.

    An interval's width falls with the root of the number of items.

    Args:
        interval: of the effect, over `items` items.
        effect: its size.
        items: how many were measured.

    Returns:
        The number of items; None where the effect is nearly nothing, so that no reasonable number would do.
    """
    half = (interval.high - interval.low) / 2
    if abs(effect) < 1e-9 or half <= 0:
        return None
    wanted = math.ceil(items * POWER * (half / abs(effect)) ** 2)
    return max(items, _round_up(wanted)) if wanted <= MOST_ITEMS else None


def _round_up(n: int) -> int:
    """Round up to two digits: a plan says 1,100 pairs rather than 1,037."""
    step = 10 ** max(0, len(str(n)) - 2)
    return math.ceil(n / step) * step


def _items(sample: Sample | None) -> int:
    """Pairs, answers or questions: an item of several pairs weighs as many."""
    return round(sum(float(weight.sum()) for weight in sample.weights)) if sample else 0


def _kind_of_items(measured: Measured) -> str:
    return "prompts" if any(RULE in row.metrics for row in measured.rows) else "held-out pairs"


def _seeds(measured: Measured, method: str) -> str:
    count = len(measured.seeds(method))
    return "one training" if count == 1 else f"{count} trainings"


def _not_yet(better: Sequence[_Candidate]) -> str:
    """The methods score the wanted replies higher, and write what the base writes."""
    one = len(better) == 1
    count = sum(candidate.answers for candidate in better)
    return (
        f"Use none of these yet: {listed([candidate.method for candidate in better])} {'scores' if one else 'score'} "
        f"the wanted replies higher, but still {'writes' if one else 'write'} the base's answers, word for word in all "
        f"{count} that were generated. Train longer (training.epochs) or faster (training.learning_rate)."
    )


def _not_enough(measured: Measured, best: _Candidate) -> str:
    """No method gains beyond noise: how many pairs would tell.

    Args:
        measured: what it is of.
        best: of the methods that gained anything; another one where none did.
    """
    domains = measured.domains_of(best.method, measured.base_of(best.method))
    sample = measured.gain(best.method, domains) if domains else None
    items, what = _items(sample), _kind_of_items(measured)
    text = f"Not enough data to recommend a method: {items} {what}, {_seeds(measured, best.method)}."
    if best.gained <= 0:
        return f"{text} None of them gained anything on these {what}; check the data and the training first."
    needed = items_needed(best.gain, best.gained, items) if best.gain else None
    more = f"about {needed:,} {what}" if needed else f"many more {what}"
    return f"{text} Get {more} and {SEEDS} seeds to tell {best.method} from the base."


def _differences(measured: Measured, one: _Candidate, other: _Candidate) -> tuple[Sample | None, Sample | None]:
    """How much more the first learnt, and how much less it forgot, item by item; None without item scores."""
    domains = measured.domains_of(one.method, other.method)
    if not domains:
        return None, None
    gains = [measured.gain(c.method, domains) for c in (one, other)]
    losses = [measured.forgetting(c.method, domains) for c in (other, one)]
    learnt = gains[0].minus(gains[1]) if gains[0] and gains[1] else None
    return learnt, losses[0].minus(losses[1]) if losses[0] and losses[1] else None


def _ahead(measured: Measured, one: _Candidate, other: _Candidate) -> list[str]:
    """In what the first is better than the other, beyond chance."""
    words = ("learnt more", "forgot less")
    samples = _differences(measured, one, other)
    return [word for word, found in zip(words, samples, strict=True) if found is not None and found.interval.low > 0]


def _against(measured: Measured, best: _Candidate, second: _Candidate) -> str:
    """Whether the second best can be told from the best; what would tell, where it cannot."""
    learnt, kept = _differences(measured, best, second)
    found = [sample for sample in (learnt, kept) if sample is not None]
    if not found:
        return f" {second.method} is next; without the scores of single items the difference cannot be judged."
    ahead, behind = _ahead(measured, best, second), _ahead(measured, second, best)
    if ahead:
        text = f" It {listed(ahead)} than {second.method}, the next best, beyond chance"
        return f"{text}; {second.method} {listed(behind)}." if behind else f"{text}."
    sample = max(found, key=lambda s: abs(s.estimate))
    if abs(sample.estimate) < 1e-9:
        return f" It cannot be told from {second.method}: these data show no difference between the two."
    items = _items(sample)
    needed = items_needed(sample.interval, sample.estimate, items)
    what = _kind_of_items(measured) if sample is learnt else "questions about old abilities"
    more = f"about {needed:,} {what} (now {items:,})" if needed else f"more than {MOST_ITEMS:,} {what}"
    return f" It cannot be told from {second.method} with these data: that takes {more} and {SEEDS} seeds."


def _lines(measured: Measured, chosen: _Candidate) -> tuple[tuple[str, str], ...]:
    method = chosen.method
    domains = measured.domains_of(method, measured.base_of(method))
    base = measured.base_of(method)
    before = spread_over(measured.rows, SCORE, domains, base).mean
    now = spread_over(measured.rows, SCORE, domains, method).mean
    rule = any(RULE in row.metrics for row in measured.rows)
    what = "follows the new rule in" if rule else "prefers the better of two given replies in"
    times = "of its answers" if rule else "of the held-out pairs"
    gained = f"{method} {what} {_percent(now)} {times}; the base in {_percent(before)}."
    lines = (
        ("Gained", gained),
        ("Lost", _lost(measured, chosen, domains)),
        ("Answers", _answers(measured, chosen, domains)),
        ("How sure", _sure(measured, chosen, domains)),
        ("Cost", _cost(measured, method, domains)),
    )
    return tuple(
        (about, text if text.startswith(method) else text[0].upper() + text[1:]) for about, text in lines if text
    )


def _lost(measured: Measured, chosen: _Candidate, domains: Sequence[str]) -> str:
    method, base = chosen.method, measured.base_of(chosen.method)
    before = spread_over(measured.rows, "retention/mean", domains, base).mean
    now = spread_over(measured.rows, "retention/mean", domains, method).mean
    if math.isnan(now) or math.isnan(before):
        return "not known: no test of the base's old abilities was run."
    text = (
        f"{_percent(now)} of the questions about old abilities are answered right; the base answers {_percent(before)}."
    )
    if round(before - now, 3) <= 0:
        return f"{text} These tests show no loss."
    if chosen.loss is not None and not chosen.loss.excludes_zero:
        return f"{text} That difference may be chance."
    worst: tuple[float, str] = (0.0, "")
    for name in measured.accuracies:
        drop = (
            spread_over(measured.rows, name, domains, base).mean
            - spread_over(measured.rows, name, domains, method).mean
        )
        worst = max(worst, (drop, name.split("/")[1])) if not math.isnan(drop) else worst
    if worst[1] and len(measured.accuracies) > 1:
        text += f" Most was lost in {worst[1]}: {100 * worst[0]:.0f} points."
    return text


def _answers(measured: Measured, chosen: _Candidate, domains: Sequence[str]) -> str:
    """What a reader must know of the generated answers: broken ones, and those that were not judged."""
    broken = spread_over(measured.rows, BROKEN, domains, chosen.method).mean
    of_base = spread_over(measured.rows, BROKEN, domains, measured.base_of(chosen.method)).mean
    parts = []
    judged = any(name in row.metrics for row in measured.rows for name in (RULE, WIN_RATE))
    if not chosen.writes:
        parts.append(f"All {chosen.answers} generated answers are the base's, word for word.")
    elif chosen.answers and not judged:
        why = "is not known, for their judge may decide by chance" if measured.judged_by_chance else "was not judged"
        parts.append(
            f"{chosen.changed} of {chosen.answers} generated answers differ from the base's; whether they are better "
            f"{why}: read some below."
        )
    if broken >= BROKEN_SHARE:
        parts.append(
            f"{_percent(broken)} of its generated answers are broken, and {_percent(of_base)} of the base's: read some "
            "before you use it, and look for a better base."
        )
    return " ".join(parts)


def _sure(measured: Measured, chosen: _Candidate, domains: Sequence[str]) -> str:
    parts = []
    items = _items(measured.gain(chosen.method, domains) if domains else None)
    if chosen.gain is not None:
        ends = f"{100 * chosen.gain.low:+.0f} and {100 * chosen.gain.high:+.0f} points"
        parts.append(f"the gain lies between {ends} (95 %, {items:,} {_kind_of_items(measured)})")
    if chosen.loss is not None:
        parts.append(f"the loss between {100 * chosen.loss.low:+.0f} and {100 * chosen.loss.high:+.0f} points")
    seeds = len(measured.seeds(chosen.method))
    parts.append(
        f"{seeds} trainings"
        if seeds > 1
        else f"one training only: another may come out otherwise (set {SEEDS} seeds to see)"
    )
    return f"{'; '.join(parts)}."


def _cost(measured: Measured, method: str, domains: Sequence[str]) -> str:
    def value(name: str, who: str = method) -> float:
        return spread_over(measured.rows, f"cost/{name}", domains, who).mean

    parts = []
    if not math.isnan(seconds := value("train_seconds")):
        parts.append(f"training took {_time(seconds)} per domain")
    if not math.isnan(size := value("adapter_bytes")):
        parts.append(f"the adapter takes {number(size / 1e6, 1)} MB")
    speed, of_base = value("decoding_tokens_per_second"), value("decoding_tokens_per_second", measured.base_of(method))
    if speed > 0 and of_base > 0:
        parts.append(f"it answers at {speed / of_base:.1f} times the base's speed")
    return f"{'; '.join(parts)}." if parts else ""


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f} %"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
