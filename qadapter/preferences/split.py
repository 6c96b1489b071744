"""A training, a held-out and a judge's set without a common prompt, the same for the same pairs on every machine."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qadapter.errors import QAdapterError
from qadapter.preferences.pair import PreferencePair


@dataclass(frozen=True, slots=True)
class Split:
    """Sets of pairs without a common prompt, in an order that depends on the pairs and the seed only.

    Attributes:
        train, heldout: the pairs kept.
        duplicates: pairs removed because an equal pair is kept on the same side.
        cross_split_pairs: training pairs removed because their prompt is held out.
        cross_split_prompts: distinct prompts among them.
        cut_train, cut_heldout: pairs removed by the two limits.
        judge: pairs kept from every policy, to train a judge of their answers on.
    """

    train: list[PreferencePair]
    heldout: list[PreferencePair]
    duplicates: int
    cross_split_pairs: int
    cross_split_prompts: int
    cut_train: int
    cut_heldout: int
    judge: list[PreferencePair] = field(default_factory=list)


def split_pairs(
    pairs: Sequence[PreferencePair],
    *,
    heldout: float | int = 0.1,
    heldout_pairs: Sequence[PreferencePair] | None = None,
    seed: int = 0,
    max_train_pairs: int | None = None,
    max_heldout_pairs: int | None = None,
    judge_pairs: int = 0,
) -> Split:
    """Divides pairs by prompt, so that no prompt is on both sides. The order of `pairs` has no influence.

    If `heldout` is a share, a prompt's side depends on its text, the seed and `heldout` alone: rows that arrive later
    never move a prompt from one side to the other.

    Args:
        pairs: all pairs, or only the training side's if `heldout_pairs` is given.
        heldout: below 1 a share of the prompts (each is drawn on its own, so the count is near the share, and at least
            one on each side), from 1 on a whole number of prompts. 0 holds nothing out.
        heldout_pairs: a held-out side that is given; training pairs with one of its prompts are removed.
        seed: decides the split, the order and what the limits cut.
        max_train_pairs, max_heldout_pairs: keep at most so many pairs a side.
        judge_pairs: set so many pairs apart from training, whole prompts, so it can be a few more; before the limits.

    Raises:
        QAdapterError: `heldout`, a limit or `judge_pairs` is out of range, or a side is left empty.
    """
    _check_limits(max_train_pairs=max_train_pairs, max_heldout_pairs=max_heldout_pairs)
    every = _distinct(pairs, seed)
    duplicates = len(pairs) - len(every)
    crossing: list[PreferencePair] = []
    if heldout_pairs is None:
        prompts_held = _draw_prompts({pair.prompt_digest for pair in every}, heldout, seed)
        held = [pair for pair in every if pair.prompt_digest in prompts_held]
    else:
        held = _distinct(heldout_pairs, seed)
        duplicates += len(heldout_pairs) - len(held)
        prompts_held = {pair.prompt_digest for pair in held}
        crossing = [pair for pair in every if pair.prompt_digest in prompts_held]
    train = [pair for pair in every if pair.prompt_digest not in prompts_held]
    if not train:
        raise QAdapterError(
            f"No training pair is left: all {len(pairs)} usable pairs have prompts that are held out too. "
            "Give training data with other prompts."
        )
    judge = _apart(train, judge_pairs, seed)
    apart = {pair.prompt_digest for pair in judge}
    train = [pair for pair in train if pair.prompt_digest not in apart]
    kept_train, kept_held = train[:max_train_pairs], held[:max_heldout_pairs]
    return Split(
        train=kept_train,
        heldout=kept_held,
        duplicates=duplicates,
        cross_split_pairs=len(crossing),
        cross_split_prompts=len({pair.prompt_digest for pair in crossing}),
        cut_train=len(train) - len(kept_train),
        cut_heldout=len(held) - len(kept_held),
        judge=judge,
    )


def heldout_side(pairs: Sequence[PreferencePair], seed: int, limit: int | None = None) -> list[PreferencePair]:
    """The side that `split_pairs` makes of `heldout_pairs`, which does not depend on the training pairs.

    Args:
        pairs: the held-out pairs, in any order.
        seed, limit: `seed` and `max_heldout_pairs` of the split.

    Raises:
        QAdapterError: the limit is out of range.
    """
    _check_limits(max_heldout_pairs=limit)
    return _distinct(pairs, seed)[:limit]


def _check_limits(**limits: int | None) -> None:
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise QAdapterError(f"{name} is {limit}; a number from 1 on, or none for no limit, was expected.")


def _draw_prompts(prompts: set[str], heldout: float | int, seed: int) -> set[str]:
    """The prompts to hold out: those whose seeded hash is smallest."""
    ranked = sorted(prompts, key=lambda prompt: _draw(seed, prompt))
    if isinstance(heldout, bool) or not 0 <= heldout < 2**53 or (heldout >= 1 and heldout != int(heldout)):
        raise QAdapterError(f"heldout is {heldout}; a share below 1 or a whole number of prompts was expected.")
    if heldout == 0:
        return set()
    if heldout < 1:
        count = sum(int(_draw(seed, prompt), 16) < heldout * 2**256 for prompt in ranked)
        count = max(1, min(count, len(ranked) - 1))
    else:
        count = int(heldout)
    if count >= len(ranked):
        raise QAdapterError(
            f"heldout is {heldout}, but the data has only {len(ranked)} distinct prompts, and training needs at least "
            "one. Hold out less or give more data."
        )
    return set(ranked[:count])


def _apart(train: Sequence[PreferencePair], count: int, seed: int) -> list[PreferencePair]:
    """At least `count` of the training pairs, all those of the prompts whose seeded hash is largest.

    The hash is of the prompt alone, so data sets that share their prompts (DSP's domains) set the same ones apart.
    """
    if count < 0:
        raise QAdapterError(f"judge_pairs is {count}; a number from 0 (no judge) on was expected.")
    of_prompt = Counter(pair.prompt_digest for pair in train)
    ranked = sorted(of_prompt, key=lambda prompt: _draw(seed, prompt), reverse=True)
    apart, pairs = set(), 0
    for prompt in ranked[:-1]:
        if pairs >= count:
            break
        apart.add(prompt)
        pairs += of_prompt[prompt]
    if pairs < count:
        raise QAdapterError(
            f"judge_pairs is {count}, but only {len(train)} pairs on {len(ranked)} prompts are not held out, and "
            "training needs at least one prompt. Set fewer apart or give more data."
        )
    return [pair for pair in train if pair.prompt_digest in apart]


def _draw(seed: int, text: str) -> str:
    """256 bits that look random, the same on every machine, as 64 hex digits."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _distinct(pairs: Iterable[PreferencePair], seed: int) -> list[PreferencePair]:
    """Pairs without exact duplicates, in an order that the seed and the texts decide."""
    by_text = {json.dumps(pair.to_trl(), ensure_ascii=False): pair for pair in pairs}
    return [by_text[text] for text in sorted(by_text, key=lambda text: _draw(seed, text))]
