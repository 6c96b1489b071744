"""Pairs of one prompt are one item: their name, their mean, and their weight."""

from __future__ import annotations

import numpy as np
import pytest

from qadapter.evaluation.curve.parts import selects
from qadapter.evaluation.curve.points import content_digest
from qadapter.evaluation.prompts import by_prompt, effective_number, prompt_names
from qadapter.preferences.pair import Message


def asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def test_prompts_of_other_case_and_space_are_on_one_side() -> None:
    """As written they would be divided: of 40 questions, some have their capitals on the other side."""
    texts = [f"What is fact {i} ?" for i in range(40)]
    names = prompt_names([asked(text) for text in (*texts, *(f" {text.upper()}\n" for text in texts))])
    alone = [content_digest("prompt", [["user", text]]) for text in texts]  # ids of curves measured before
    assert names == [*alone, *alone]
    written = [content_digest("prompt", [["user", f" {text.upper()}\n"]]) for text in texts]
    assert any(selects(a) != selects(b) for a, b in zip(alone, written, strict=True))


def test_a_prompts_value_is_the_mean_over_its_pairs() -> None:
    values = np.array([[1.0, 0.0, 1.0, 0.5], [0.0, 0.0, 1.0, 1.0]])
    found = by_prompt(["a", "b", "a", "a"], range(4))
    assert (found.keys, found.of.tolist(), found.pairs.tolist()) == (("a", "b"), [0, 1, 0, 0], [3, 1])
    assert found.means(values) == pytest.approx(np.array([[2.5 / 3, 0], [2 / 3, 0]]))
    assert np.average(found.means(values), axis=1, weights=found.pairs) == pytest.approx(values.mean(axis=1))


@pytest.mark.parametrize("keys", [["a", None, "a"], []], ids=["some without", "none at all"])
def test_pairs_without_a_prompt_are_items_of_their_own(keys: list[str | None]) -> None:
    found = by_prompt(keys, [7, 8, 9])
    assert (found.keys, found.pairs.tolist()) == ((7, 8, 9), [1, 1, 1])
    assert found.means([1.0, 0.0, 0.5]).tolist() == [1.0, 0.0, 0.5]
    nothing = by_prompt([], [])
    assert nothing.means([]).shape == (0,)


def test_equal_weights_count_every_item() -> None:
    """Weights 3, 1, 1, 1 tell as much as 36/12 = 3 equal ones."""
    assert effective_number(np.full(50, 4.0)) == 50
    assert effective_number(np.array([3.0, 1, 1, 1])) == 3
