from __future__ import annotations

from qadapter.evaluation.benchmarks.word_order.ask import CHOICES, MOST_WORDS, word_order_items


def test_wrong_choices_have_one_swap_each() -> None:
    text = " ".join(f"w{i}" for i in range(60))
    (item,) = word_order_items([text])
    words = text.split()[:MOST_WORDS]
    assert item["choices"][item["answer"]] == " ".join(words)
    wrong = [choice.split() for i, choice in enumerate(item["choices"]) if i != item["answer"]]
    assert len({tuple(choice) for choice in wrong}) == CHOICES - 1
    for choice in wrong:
        (first, second) = [i for i in range(MOST_WORDS) if choice[i] != words[i]]
        assert second == first + 1
        assert (choice[first], choice[second]) == (words[second], words[first])


def test_equal_neighbours_and_short_texts_are_skipped() -> None:
    assert word_order_items(["a a a b"]) == []  # one place only
    (item,) = word_order_items(["a a b c d"])
    assert item["choices"].count("a a b c d") == 1


def test_same_seed_same_items_and_the_answers_are_spread() -> None:
    texts = [" ".join(f"{chr(97 + i % 26)}{j}" for j in range(10)) for i in range(200)]
    items = word_order_items(texts, seed=3)
    assert items == word_order_items(texts, seed=3)
    assert items != word_order_items(texts, seed=4)
    counts = [sum(item["answer"] == i for item in items) for i in range(CHOICES)]
    assert min(counts) > 30
