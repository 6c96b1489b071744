"""Whether a policy speaks, on replies that are written down here."""

from __future__ import annotations

import math

import pytest

from qadapter.evaluation.speech import listen, repetition

BASE = [
    "The capital of Spain is Madrid.",
    "Spiders have eight legs.",
    "Seven and five are twelve.",
    "Leaves are green.",
]


def test_repetition_is_the_share_of_sequences_said_before() -> None:
    assert repetition("==========") == pytest.approx(6 / 7)
    assert repetition("No.") == 0
    assert repetition("a b c d a b c d a b c d") == pytest.approx(1 - 4 / 9)  # 9 sequences of 4 words, 4 different
    assert repetition("The quick brown fox jumps over the lazy dog again") == 0


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("==========", "repeat themselves"),
        ("", "are empty"),
        ("  \n ", "are empty"),
        ("I am I am I am I am I am I am I am I am", "repeat themselves"),
        ("?!#$ %&/( )=?; :_*+", "have hardly a letter or digit"),
        ("はははははははははははは", "repeat themselves"),
    ],
)
def test_a_policy_of_broken_replies_does_not_speak(reply: str, fault: str) -> None:
    speech = listen([reply] * 4, BASE)
    assert not speech.speaks
    assert speech.broken == 1
    assert f"4 of 4 {fault}" in speech.reasons()
    assert speech.metrics()["speaks"] == 0


def test_short_and_foreign_answers_are_language() -> None:
    replies = ["42", "No.", "Ja, das stimmt so.", "はい、そうです。"]
    speech = listen(replies, BASE, ended=[True, True, True, False])
    assert speech.faults == ((), (), (), ())
    assert speech.speaks
    assert speech.metrics() == {"broken_replies": 0, "repetition": 0, "replies_ended": 0.75, "speaks": 1}


def test_the_same_refusal_to_every_prompt_is_language() -> None:
    assert listen(["I cannot help with that request, I am sorry."] * 4, BASE).speaks


def test_half_of_the_replies_broken_is_too_many() -> None:
    assert not listen(["==========", "==========", *BASE[:2]], BASE).speaks
    assert listen(["==========", *BASE[:3]], BASE).speaks


def test_a_base_that_babbles_is_not_held_against_its_adapters() -> None:
    babble = ["==========", "==========", "==========", "Leaves are green."]
    assert listen(babble, babble).speaks
    assert listen(babble, babble).broken == 0.75
    assert not listen(babble, ["==========", *BASE[:3]]).speaks  # .75 against .25


def test_word_salad_is_found_by_its_likelihood() -> None:
    """Base 1 nat a token, 1,000 words: the limit is 1 + .7 · (ln 1000 − 1) = 5.135 nats."""
    limit = 1 + 0.7 * (math.log(1000) - 1)
    salad = ["green of seven capital", "legs the are Spain", "twelve and leaves", "eight Madrid five"]
    usual = {"base_nll": [1.0] * 4, "vocabulary": 1000}
    assert listen(salad, BASE, nll=[limit - 0.01] * 4, **usual).speaks
    speech = listen(salad, BASE, nll=[limit + 0.01] * 4, **usual)
    assert not speech.speaks
    assert speech.reasons() == "4 of 4 are nearly random tokens to the base"
    assert listen(["", *salad[:3]], BASE, nll=[math.nan, 2.0, 3.0, 4.0], **usual).nll == 3.0


def test_another_script_is_broken_unless_it_was_preferred() -> None:
    """The base answers in Latin letters: Cyrillic is neither its script nor the prompt's."""
    cyrillic = ["Столица Испании - Мадрид.", "У пауков восемь ног.", "Семь и пять.", "Листья зелёные."]
    english = [("Which is it?", "I do not say.")] * 4
    speech = listen(cyrillic, BASE, beside=english)
    assert not speech.speaks
    assert speech.reasons() == "4 of 4 are written in another script (Cyrillic)"
    assert listen(cyrillic, BASE, beside=[("Which is it?", "Не скажу вам.")] * 4).speaks  # what the preferences teach
    assert listen(cyrillic, BASE, beside=[("Что это такое?", "No.")] * 4).speaks  # what was asked
    assert listen(["42", "?", "1 + 1 = 2, 2 + 2 = 4", "Да"], BASE, beside=english).faults == ((),) * 4
    assert not listen(BASE, cyrillic, beside=[("Что это такое?", "Не скажу.")] * 4).speaks  # Latin is a script too
    assert listen(
        ["東京都千代田区霞が関"] * 4, ["東京都千代田区です。はい"] * 4, beside=[("どこですか?", "はい")] * 4
    ).speaks


def test_replies_and_the_bases_go_together() -> None:
    with pytest.raises(ValueError, match="2 replies and 4 of the base"):
        listen(BASE[:2], BASE)
