"""Held-out preference pairs as the items of a multiple-choice benchmark: which of two replies is the better one?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import write_json_lines
from qadapter.preferences.pair import PreferencePair


@dataclass(frozen=True)
class PreferenceItemsSummary:
    """Counts of the pairs: written `items`, skipped pairs with `multi_turn` prompts, and `over_long` ones."""

    items: int
    multi_turn: int
    over_long: int


def write_preference_items(
    pairs: Sequence[PreferencePair],
    out_file: Path,
    *,
    seed: int,
    max_items: int | None = None,
    max_chars: int | None = None,
) -> PreferenceItemsSummary:
    """Write pairs as JSON lines `{"prompt": str, "choices": [str, str], "answer": int}`.

    The place of the chosen reply is drawn: lm-eval gives a tie of log-likelihoods to the first choice, and that is the
    right one half of the time. Texts are written as they are, because their tokens have to be those of training. A
    pair whose prompt is not one user turn is left out: lm-eval asks a question as one user turn.

    Args:
        pairs: held-out pairs; several may share a prompt.
        out_file: written as a whole; its folder is made.
        seed: of the places and of the choice of items, if there are more than `max_items`.
        max_items: most items written.
        max_chars: longest prompt and longest reply used; a model cannot score what its context does not hold.

    Raises:
        QAdapterError: not one pair can be asked.
    """
    single = [pair for pair in pairs if len(pair.prompt) == 1 and pair.prompt[0]["role"] == "user"]
    usable = [pair for pair in single if max_chars is None or _longest(pair) <= max_chars]
    multi_turn, over_long = len(pairs) - len(single), len(single) - len(usable)
    if not usable:
        raise QAdapterError(
            f"Of {len(pairs)} preference pairs none can be asked as a benchmark ({multi_turn} of several turns, "
            f"{over_long} too long). Hold out more pairs, or leave this benchmark out."
        )
    draw = random.Random(seed)
    kept = sorted(draw.sample(range(len(usable)), min(len(usable), max_items or len(usable))))
    write_json_lines(out_file, (_item(usable[i], draw.randrange(2)) for i in kept))
    return PreferenceItemsSummary(len(kept), multi_turn, over_long)


def _longest(pair: PreferencePair) -> int:
    return max(len(pair.prompt[0]["content"]), len(pair.chosen), len(pair.rejected))


def _item(pair: PreferencePair, place: int) -> dict[str, object]:
    choices = [pair.rejected, pair.rejected]
    choices[place] = pair.chosen
    return {"prompt": pair.prompt[0]["content"], "choices": choices, "answer": place}
