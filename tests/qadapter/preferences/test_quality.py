"""The quality report: each figure against a count made by hand, and what it warns of."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qadapter.evaluation.refusals import is_refusal
from qadapter.preferences import near_duplicates
from qadapter.preferences.languages import main_language
from qadapter.preferences.near_duplicates import NearDuplicates, signature
from qadapter.preferences.overlap import Overlap
from qadapter.preferences.pair import Message, PreferencePair
from qadapter.preferences.prepare import prepare
from qadapter.preferences.quality import Quality, measure, metrics, sentences
from qadapter.preferences.records import Reason
from qadapter.preferences.scripts import main_script
from qadapter.report.quality import quality_table, quality_warnings


def pair(prompt: str, chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair((Message(role="user", content=prompt),), chosen, rejected)


def report(pairs: list[PreferencePair], held: list[PreferencePair] | None = None, **options: Any) -> dict[str, Any]:
    quality = Quality(is_refusal, options.pop("benchmarks", None))
    for one in pairs:
        quality.add(one)
    for one in held or []:
        quality.add(one, held_out=True)
    return quality.report(**options)


def words(count: int, seed: int) -> str:
    return " ".join("".join(random.Random(f"{seed} {i}").choices("abcdefgh", k=6)) for i in range(count))


def test_lengths_repetitions_and_refusals_are_counted() -> None:
    """Chosen 4, 4, 2 and 17 characters; longer than the rejected one in two of four pairs, equal in one."""
    found = report(
        [
            pair("abc", "long", "no"),
            pair("ABC ", "good", "well"),
            pair("other", "ok", "better"),
            pair("third", "I'm sorry, but no", "As an AI, no"),
        ],
        summary={"read": 10, "quarantined": {Reason.EMPTY_REPLY: 2, Reason.NO_PREFERENCE: 3, Reason.TOO_LONG: 1}},
    )
    assert found["length"]["chosen"] == {"p5": 2, "median": 4, "p95": 15, "max": 17}
    assert (found["longer_chosen"], found["equal_length"]) == (0.5, 0.25)
    assert (found["prompts"], found["repeated_prompts"], found["most_pairs_of_a_prompt"]) == (3, 0.5, 2)
    assert found["refused"] == {"chosen": 0.25, "rejected": 0.25}
    assert (found["empty_replies"], found["ties"], found["quarantined"]) == (2, 3, 0.6)
    assert found["contamination"] is None
    assert "there are only 4 pairs" in found["warnings"]
    assert "60% of what was read is quarantined" in found["warnings"]
    assert "50% of the pairs share their prompt with another pair" in found["warnings"]
    assert metrics(found)["length/chosen/median"] == 4


def test_length_as_the_only_difference_is_warned_of() -> None:
    longer = [pair(words(9, i), "x" * 9, "x" * 3) for i in range(100)]
    assert any("the chosen reply is the longer one" in line for line in report(longer)["warnings"])
    shorter = [pair(one.prompt[0]["content"], one.rejected, one.chosen) for one in longer]
    assert any("the chosen reply is the shorter one" in line for line in report(shorter)["warnings"])
    even = [pair(words(9, i), *("x" * n for n in ((9, 3), (3, 9))[i % 2])) for i in range(100)]
    assert report(even)["warnings"] == []


def test_items_of_a_benchmark_in_training_prompts_are_named() -> None:
    """Item 2 is quoted within a prompt (13 words in a row), item 3 is a whole prompt, item 4 has one word too few in
    common, item 5 is too short to count; the held-out prompt is in no training."""
    items = [[words(20, i)] for i in range(1, 3)] + [["How many legs has a Spider?"], [words(20, 4)], ["Why?"]]
    quoted, nearly = items[1][0].split(), items[3][0].split()
    train = [
        pair(f"Please: {' '.join(quoted[3:16]).upper()}, and so on", "a", "b"),
        pair("how many legs -- has a spider", "a", "b"),
        pair(" ".join(nearly[:12]), "a", "b"),
        pair("Why?", "a", "b"),
    ]
    found = report(train, [pair(items[0][0], "a", "b")], benchmarks={"quiz": items, "other": [["nothing of this"]]})
    assert found["contamination"] == {
        "quiz": {"items": 5, "shared": 2, "numbers": [2, 3]},
        "other": {"items": 1, "shared": 0, "numbers": []},
    }
    assert sum("2 of 5 items of quiz (items 2, 3)" in line for line in found["warnings"]) == 1
    assert Overlap({}).counts() == {}


def test_near_duplicates_are_those_of_high_similarity() -> None:
    """One word of 40 changed: the texts share about 233 of 250 runs (0.93); half of the words changed: a third."""
    original = words(40, 1).split()
    near = " ".join([*original[:20], "zzzzzz", *original[21:]])
    far = " ".join([*original[:20], *words(20, 2).split()])
    prompts = [
        (" ".join(original), False),
        (near, True),
        (far, True),
        (words(40, 3), False),
        (" ".join(original), False),
    ]
    found = NearDuplicates()
    for number, (text, held) in enumerate(prompts[:4]):
        found.add(bytes([number]) * 16, text, held)
    found.add(bytes([0]) * 16, *prompts[4])
    assert found.counts() == {"compared": 4, "near_duplicates": 2, "across": 1}
    assert NearDuplicates().counts()["compared"] == 0


def test_the_estimate_of_similarity_is_close() -> None:
    """Sets of known overlap: the mean error over 30 pairs stays within four standard errors (0.06 / √30)."""
    errors = []
    for seed in range(30):
        first, second = words(60, seed), words(30, seed) + " " + words(30, 1000 + seed)
        runs = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (first, second)]
        jaccard = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        errors.append(float((signature(first) == signature(second)).mean()) - jaccard)
    assert abs(sum(errors) / len(errors)) < 4 * 0.07 / 30**0.5


def test_a_sample_is_compared_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MOST_PROMPTS", 10)
    found = NearDuplicates()
    for number in range(50):
        found.add(bytes([255 - number]) * 16, f"{words(10, number)}" if number < 48 else "the same", False)
    assert found.counts() == {"compared": 10, "near_duplicates": 2, "across": 0}


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Good day", "Latin"),
        ("Größe, é", "Latin"),
        ("Добрый день, ok", "Cyrillic"),
        ("你好,世界", "Han"),
        ("これは日本語です", "Japanese"),
        ("안녕하세요", "Hangul"),
        ("مرحبا", "Arabic"),
        ("नमस्ते", "Devanagari"),
        ("12 + 3 🙂", "none"),
    ],
)
def test_scripts(text: str, script: str) -> None:
    assert main_script(text) == script


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The answer to your question is that it is not clear.", "English"),
        ("Das ist nicht die Antwort auf die Frage, die du gestellt hast.", "German"),
        ("Ce n'est pas la réponse que vous avez demandée dans la question.", "French"),
        ("La respuesta no es muy clara para los niños del barrio.", "Spanish"),
        ("Questo non è il modo di fare una domanda come questa.", "Italian"),
        ("Isso não é uma resposta para você, mas também está bem.", "Portuguese"),
        ("Dat is niet het antwoord op de vraag van het kind.", "Dutch"),
        ("To nie jest odpowiedź na pytanie, które się pojawia.", "Polish"),
        ("Bu soru için çok güzel bir cevap daha var.", "Turkish"),
        ("Это не ответ на вопрос, который мне задали.", "Russian"),
        ("Це не відповідь на питання, або вона була іншою.", "Ukrainian"),
        ("答案并不清楚。", "Chinese"),
        ("答えは明らかではありません。", "Japanese"),
        ("Paris.", "unclear"),
        ("12 + 3", "unclear"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert main_language(text) == language


def test_labels_ties_and_languages_are_reported(tmp_path: Path) -> None:
    """90 of 100 judgements name the first reply; 30 decisions of 40 have equal scores; a tenth is in German."""
    german, english = "Das ist nicht die Antwort auf die Frage.", "That is not the answer to the question."
    ask = [{"role": "user", "content": "q"}]
    rows = []
    for number in range(100):
        replies = [f"{german if number % 10 == 0 else english} {number} {n}" for n in range(2)]
        named = dict(zip(("human_ref_A", "human_ref_B"), replies, strict=True))
        rows.append({"history": f"q {number}", **named, "labels": number >= 10})
    file = tmp_path / "shp.jsonl"
    file.write_text("".join(json.dumps({**row, "labels": int(row["labels"])}) + "\n" for row in rows))
    prepare([file], tmp_path / "a", heldout=10)
    found = measure(tmp_path / "a", None, is_refusal, json.loads((tmp_path / "a" / "summary.json").read_text()))
    assert found["label"] == {"human_ref_A": 0.9, "human_ref_B": 0.1}
    assert found["language"] == {"English": 0.9, "German": 0.1}
    assert any("one label is far more frequent than the others: human_ref_A 90%" in line for line in found["warnings"])
    assert any("several languages: English 90%, German 10%" in line for line in found["warnings"])
    assert metrics(found)["label/human_ref_A"] == 0.9
    rows = [
        {
            "chosen": [*ask, {"role": "assistant", "content": f"a {n}"}],
            "rejected": [*ask, {"role": "assistant", "content": "b"}],
            "margin": float(n >= 30),
        }
        for n in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([file], tmp_path / "b", heldout=0)
    found = measure(tmp_path / "b", None, is_refusal, json.loads((tmp_path / "b" / "summary.json").read_text()))
    assert (found["ties_kept"], found["against_the_scores"]) == (30, 0)
    assert "30 pairs have equal scores; `ties: drop` leaves them out" in found["warnings"]


def test_a_prepared_folder_is_measured_and_shown(tmp_path: Path) -> None:
    rows = [pair(f"{words(8, i)}?", "yes, of course" if i % 3 else "да, конечно", "no") for i in range(30)]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(one.to_trl()) + "\n" for one in [*rows, pair("q", "", "x")]))
    prepare([file], tmp_path, heldout=10)
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = measure(tmp_path, {"quiz": [[rows[0].prompt[0]["content"]]]}, is_refusal, summary)
    assert (found["pairs"], found["train_pairs"], found["heldout_pairs"], found["empty_replies"]) == (30, 20, 10, 1)
    assert found["script"] == {"Latin": 0.666667, "Cyrillic": 0.333333}
    table = quality_table({"mine": found})
    assert table is not None
    assert table.loc[0, "pairs"] == "30"
    assert table.loc[0, "scripts"] == "Latin 67%, Cyrillic 33%"
    assert "mine: there are only 30 pairs" in quality_warnings({"mine": found})
    assert quality_table({}) is None
    assert len(sentences(found)) == 4
