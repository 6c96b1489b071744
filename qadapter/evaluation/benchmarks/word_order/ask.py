"""A multiple-choice benchmark out of any texts: which of four versions has its words in order?

A model of two million parameters cannot tell which reply belongs to a prompt, but it knows which words follow which,
and a customisation can take that away from it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from qadapter.evaluation.benchmarks.items import read_items

if TYPE_CHECKING:
    from datasets import Dataset

CHOICES = 4
MOST_WORDS = 40


def word_order_items(texts: list[str], seed: int = 0) -> list[dict[str, Any]]:
    """One item per text: its first words, and the same with two neighbours swapped, at three different places.

    Args:
        texts: any texts; those with fewer than three different places to swap are left out.
        seed: seed of the swaps and of the right text's position.

    Returns:
        {"choices": [str], "answer": int} each.
    """
    draw = random.Random(seed)
    items = []
    for text in texts:
        words = text.split()[:MOST_WORDS]
        places = [i for i in range(len(words) - 1) if words[i] != words[i + 1]]
        if len(places) < CHOICES - 1:
            continue
        choices = [" ".join(_swapped(words, place)) for place in draw.sample(places, CHOICES - 1)]
        answer = draw.randrange(CHOICES)
        choices.insert(answer, " ".join(words))
        items.append({"choices": choices, "answer": answer})
    return items


def _swapped(words: list[str], place: int) -> list[str]:
    return [*words[:place], words[place + 1], words[place], *words[place + 2 :]]


def lm_eval_dataset(file: str, **_metadata: Any) -> dict[str, Dataset]:
    """What a task's `custom_dataset: !function` gets: items made from a file of texts, as the split `test`."""
    from datasets import Dataset

    return {"test": Dataset.from_list(word_order_items([item["text"] for item in read_items(file, ["text"])]))}
