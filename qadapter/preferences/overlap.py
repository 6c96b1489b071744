"""Training prompts that contain items of a benchmark.

An item is shared if its text and a training prompt (all turns together) have 13 consecutive words in common, the rule
of Brown et al., Language Models are Few-Shot Learners, 2020, appendix C. An item of fewer words (but at least five, or
20 characters) is shared if it is, word for word, the whole last turn of a training prompt. Words are runs of letters
and digits in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

WORDS = 13
LEAST_WORDS, LEAST_CHARACTERS = 5, 20
_WORD = re.compile(r"\w+")

Items = Mapping[str, Sequence[Sequence[str]]]
"""Benchmark → for each item its texts."""


class Overlap:
    """Looks for the items of some benchmarks in training prompts."""

    def __init__(self, benchmarks: Items) -> None:
        self._sizes = {name: len(items) for name, items in benchmarks.items()}
        self._runs: dict[int, set[tuple[str, int]]] = {}
        self._whole: dict[str, set[tuple[str, int]]] = {}
        self._found: dict[str, set[int]] = {name: set() for name in benchmarks}
        for name, items in benchmarks.items():
            for number, texts in enumerate(items, start=1):
                for text in texts:
                    self._index(text, (name, number))

    def _index(self, text: str, item: tuple[str, int]) -> None:
        words = _WORD.findall(text.lower())
        if len(words) >= WORDS:
            for run in _runs_of(words):
                self._runs.setdefault(run, set()).add(item)
        elif len(words) >= LEAST_WORDS or len("".join(words)) >= LEAST_CHARACTERS:
            self._whole.setdefault(" ".join(words), set()).add(item)

    def add(self, turns: Sequence[str]) -> None:
        """Look at a training prompt, given as its turns."""
        last = " ".join(_WORD.findall(turns[-1].lower())) if self._whole else ""
        hits = set(self._whole.get(last, ()))
        if self._runs:
            words = _WORD.findall("\n".join(turns).lower())
            for run in _runs_of(words):
                hits |= self._runs.get(run, set())
        for name, number in hits:
            self._found[name].add(number)

    def counts(self) -> dict[str, dict[str, object]]:
        """For each benchmark its `items`, how many are `shared`, and the `numbers` of the first ten of them."""
        return {
            name: {"items": self._sizes[name], "shared": len(found), "numbers": sorted(found)[:10]}
            for name, found in self._found.items()
        }


def _runs_of(words: Sequence[str]) -> set[int]:
    return {hash(tuple(words[start : start + WORDS])) for start in range(len(words) - WORDS + 1)}
