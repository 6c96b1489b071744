"""The report's opening box: a clear winner, noise, and a policy that does not speak."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from flows.commands.run import link_latest
from qadapter.evaluation.statistics import Interval
from qadapter.files.artifacts import write_json_lines
from qadapter.methods.table import NAMES
from qadapter.report.build import build_report
from qadapter.report.decision import decide_for_reader, items_needed
from qadapter.report.intervals import Measured
from qadapter.report.rows import Row
from qadapter.report.summary import LONGEST_SUMMARY, duels, first_sentences, sentences
from tests.support.report_files import pair_row, rule_row

WORDS = ("Pareto", "nats", "implied reward")


def rows_of(root: Path, follows: dict[str, int], right: dict[str, int], n: int = 200, tasks: int = 200) -> list[Row]:
    """Of n answers how many follow the rule, of as many questions how many are right, of each method and the base."""
    base = [int(i < follows["base"]) for i in range(n)]
    base_kept = {"facts": [int(i < right["base"]) for i in range(tasks)]}
    return [
        rule_row(
            root,
            "academy",
            method,
            None if method == "base" else 0,
            follows=[int(i < follows[method]) for i in range(n)],
            kept={"facts": [int(i < right[method]) for i in range(tasks)]},
            base_follows=base,
            base_kept=base_kept,
        )
        for method in follows
    ]


def silenced(row: Row) -> Row:
    assert row.adaptation is not None
    write_json_lines(row.adaptation / "speech.jsonl", [{"faults": ["repeat themselves"]} for _ in range(200)])
    return replace(row, metrics={**row.metrics, "adaptation/speaks": 0.0, "adaptation/broken_replies": 1.0})


def test_a_clear_winner_is_recommended(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"base": 4, "q-adapter": 180, "dpo": 120}, {"base": 190, "q-adapter": 186, "dpo": 100})
    found = decide_for_reader(Measured(rows))
    assert (
        found.recommendation == "Use q-adapter. It learnt more and forgot less than dpo, the next best, beyond chance."
    )
    lines = dict(found.lines)
    assert lines["Gained"] == "q-adapter follows the new rule in 90 % of its answers; the base in 2 %."
    assert lines["Lost"].startswith(
        "93 % of the questions about old abilities are answered right; the base answers 95 %"
    )
    assert "one training only" in lines["How sure"]
    assert lines["Cost"] == "Training took 2 s per domain."
    assert not any(word in f"{found.recommendation} {lines}" for word in WORDS)


def test_noise_is_no_recommendation(tmp_path: Path) -> None:
    """1 of 12 answers more than the base: 8 %, an interval that reaches below 0."""
    rows = rows_of(tmp_path, {"base": 3, "q-adapter": 4}, {"base": 10, "q-adapter": 10}, n=12, tasks=12)
    found = decide_for_reader(Measured(rows))
    assert found.recommendation.startswith(
        "Not enough data to recommend a method: 12 prompts, one training. Get about "
    )
    assert found.recommendation.endswith("prompts and 3 seeds to tell q-adapter from the base.")
    nothing = decide_for_reader(Measured(rows_of(tmp_path, {"base": 3, "dpo": 3}, {"base": 10, "dpo": 10}, n=12)))
    assert "None of them gained anything" in nothing.recommendation


def test_a_gain_within_noise_is_no_missing_gain(tmp_path: Path) -> None:
    """DPO follows the rule in 6 of 60 answers more and forgets 30 %; SFT follows it in one less and forgets nothing."""
    follows, right = {"base": 30, "sft": 29, "dpo": 36}, {"base": 150, "sft": 150, "dpo": 90}
    found = decide_for_reader(Measured(rows_of(tmp_path, follows, right, n=60)))
    assert "None of them gained anything" not in found.recommendation
    assert found.recommendation.endswith("prompts and 3 seeds to tell dpo from the base.")
    assert dict(found.lines)["Gained"] == "dpo follows the new rule in 60 % of its answers; the base in 50 %."


def test_two_methods_within_noise(tmp_path: Path) -> None:
    same = {"base": 150, "q-adapter": 150, "dpo": 150}
    rows = rows_of(tmp_path, {"base": 4, "q-adapter": 100, "dpo": 99}, same)
    found = decide_for_reader(Measured(rows))
    assert found.recommendation.startswith(
        "Use q-adapter. It cannot be told from dpo with these data: that takes about "
    )
    assert "prompts (now 200) and 3 seeds" in found.recommendation


def test_a_lead_beyond_chance_decides(tmp_path: Path) -> None:
    """Both ahead in one respect: both are said. One answer of 200 ahead is noise."""
    rows = rows_of(tmp_path, {"base": 4, "q-adapter": 150, "sft": 186}, {"base": 190, "q-adapter": 188, "sft": 158})
    assert decide_for_reader(Measured(rows)).recommendation == (
        "Use sft. It learnt more than q-adapter, the next best, beyond chance; q-adapter forgot less."
    )
    same = {"base": 190, "q-adapter": 190, "sft": 190}
    rows = rows_of(tmp_path / "even", {"base": 4, "q-adapter": 150, "sft": 151}, same)
    even = decide_for_reader(Measured(rows)).recommendation
    assert even.startswith("Use sft. It cannot be told from q-adapter with these data")
    # 17 of 200 answers more, 179 of them others: noise. 12 of 200 questions fewer: beyond it. The sure lead decides.
    follows = {"base": 4, "q-adapter": 100, "sft": 108}
    rows = rows_of(tmp_path / "sure", follows, {"base": 190, "q-adapter": 190, "sft": 178})
    assert rows[2].adaptation is not None
    verdicts = ["win" if 85 <= i < 198 else "tie" for i in range(200)]
    write_json_lines(
        rows[2].adaptation / "answers.jsonl",
        [
            {"prompt": [{"role": "user", "content": f"q{i}"}], "base": "b", "reply": "r", "verdict": v, "judge": "rule"}
            for i, v in enumerate(verdicts)
        ],
    )
    score = 113 / 200 + 4 / 200  # 113 more than the base's 4
    rows[2] = replace(rows[2], metrics={**rows[2].metrics, "adaptation/score": score, "adaptation/exact_rule": score})
    sure = decide_for_reader(Measured(rows)).recommendation
    assert sure == "Use q-adapter. It forgot less than sft, the next best, beyond chance."


def test_a_base_that_babbles_is_said(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"base": 4, "dpo": 180}, {"base": 190, "dpo": 186})
    assert "Answers" not in dict(decide_for_reader(Measured(rows)).lines)
    rows = [replace(row, metrics={**row.metrics, "adaptation/broken_replies": 0.9}) for row in rows]
    assert dict(decide_for_reader(Measured(rows)).lines)["Answers"] == (
        "90 % of its generated answers are broken, and 90 % of the base's: read some before you use it, and look for a "
        "better base."
    )


def test_a_method_that_writes_as_its_base_is_not_recommended(tmp_path: Path) -> None:
    """Every pair is preferred more than before, and every answer is the base's: no user would see a difference."""

    def answered(method: str, gains: int, changed: int, **metrics: float) -> Row:
        row = pair_row(tmp_path, "d", method, 0, [1.0] * gains + [-1.0] * (40 - gains), 0.9)
        assert row.adaptation is not None
        answers = [{"prompt": [], "base": f"b{i}", "reply": f"{'p' if i < changed else 'b'}{i}"} for i in range(20)]
        write_json_lines(row.adaptation / "answers.jsonl", answers)
        return replace(row, metrics={**row.metrics, **metrics})

    base = Row("d", "base", None, {"adaptation/score": 0.5, "retention/mean": 0.9})
    same = [answered("q-adapter", 40, 0), answered("dpo", 36, 0)]
    found = decide_for_reader(Measured([base, *same]))
    assert found.recommendation == (
        "Use none of these yet: q-adapter and dpo score the wanted replies higher, but still write the base's answers, "
        "word for word in all 40 that were generated. Train longer (training.epochs) or faster "
        "(training.learning_rate)."
    )
    assert dict(found.lines)["Answers"] == "All 20 generated answers are the base's, word for word."
    found = decide_for_reader(Measured([base, same[0], answered("dpo", 36, 3)]))
    assert found.recommendation == "Use dpo."
    assert dict(found.lines)["Answers"].startswith("3 of 20 generated answers differ from the base's; whether they are")
    judged = answered("dpo", 36, 3, adaptation__win_rate=0.8)
    judged = replace(judged, metrics={name.replace("__", "/"): value for name, value in judged.metrics.items()})
    assert "Answers" not in dict(decide_for_reader(Measured([base, judged])).lines)


def test_methods_without_any_difference(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"base": 4, "q-adapter": 100, "dpo": 100}, {"base": 150, "q-adapter": 150, "dpo": 150})
    assert decide_for_reader(Measured(rows)).recommendation == (
        "Use q-adapter. It cannot be told from dpo: these data show no difference between the two."
    )


def test_a_method_that_lacks_a_domain_is_not_ranked(tmp_path: Path) -> None:
    """The Q-Adapter learns more wherever both were measured, and alone has the domain in which little is learnt."""

    def measured(domain: str, method: str, follows: int) -> Row:
        kept = {"facts": [1] * 100}
        return rule_row(
            tmp_path,
            domain,
            method,
            None if method == "base" else 0,
            follows=[int(i < follows) for i in range(200)],
            kept=kept,
            base_follows=[int(i < 4) for i in range(200)],
            base_kept=kept,
        )

    bases = [measured("easy", "base", 4), measured("hard", "base", 4)]
    rows = [*bases, measured("easy", "q-adapter", 190), measured("hard", "q-adapter", 60)]
    partly = [measured("easy", "sft", 150), measured("easy", "dpo", 152)]
    found = decide_for_reader(Measured([*rows, *partly])).recommendation
    assert found == "Use q-adapter. Not ranked: dpo and sft (not measured in every domain)."
    nothing = decide_for_reader(Measured([*bases, partly[0], measured("hard", "dpo", 60)])).recommendation
    assert nothing.startswith("No recommendation: no method was measured in every domain. Not ranked: sft and dpo")


def test_an_unknown_loss_is_not_ranked_as_no_loss(tmp_path: Path) -> None:
    """As of a run that was stopped before its retention was measured."""
    same = {"base": 190, "q-adapter": 185, "sft": 20}
    rows = rows_of(tmp_path, {"base": 4, "q-adapter": 150, "sft": 150}, same)
    learnt = {name: rows[2].metrics[name] for name in ("adaptation/score", "adaptation/exact_rule")}
    rows[2] = replace(rows[2], metrics=learnt, retention=None)
    found = decide_for_reader(Measured(rows)).recommendation
    assert found == "Use q-adapter. Not ranked: sft (what was kept is not known)."


@pytest.mark.slow
def test_a_policy_that_does_not_speak_wins_nothing(tmp_path: Path) -> None:
    """DPO has the highest score of all and answers `==========`."""
    follows = {"base": 4, "q-adapter": 100, "sft": 90, "dpo": 200}
    rows = rows_of(tmp_path, follows, dict.fromkeys(follows, 190))
    rows = [silenced(row) if row.method == "dpo" else row for row in rows]
    measured = Measured(rows)
    found = decide_for_reader(measured)
    assert found.recommendation == (
        "Use q-adapter. It learnt more than sft, the next best, beyond chance. "
        "Do not use dpo: it does not answer in language."
    )
    first, further = first_sentences(measured)
    assert first[0] == (
        'dpo does not speak: of its replies 200 of 200 repeat themselves, for example "a reply". It has no place on '
        "the front, in the rankings or in the comparisons below."
    )
    assert len(first) <= LONGEST_SUMMARY
    assert sorted([*first, *further]) == sorted(sentences(measured))
    assert not any("dpo" in line for line in [*first[1:], *further] if "One" not in line and "setting" not in line)
    out = tmp_path / "out"
    out.mkdir()
    build_report(rows, title="t", data={}, config={}, out=out)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "Without a place in the comparison, because they do not speak: dpo. Bold: the best method" in text
    assert text.startswith("# t\n\n> **Recommendation.** Use q-adapter. It learnt more than sft")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.index("Do not use dpo: it does not") < page.index("dpo does not speak") < page.index('id="comparison"')
    alone = decide_for_reader(Measured([row for row in rows if row.method in ("base", "dpo")]))
    assert alone.recommendation == "Use none of these. Do not use dpo: it does not answer in language."


def test_a_silent_method_takes_no_interval_of_a_told_duel(tmp_path: Path) -> None:
    """14 methods beside the Q-Adapter, the first one silent: of 13 duels 12 are told, each with its noise."""
    others = [name for name in NAMES if name != "q-adapter"][:14]
    counts = {"base": 4, "q-adapter": 150, **dict.fromkeys(others, 100)}
    rows = rows_of(tmp_path, counts, dict.fromkeys(counts, 19), tasks=20)
    measured = Measured([silenced(row) if row.method == others[0] else row for row in rows])
    fought = duels(measured)
    assert len(fought) == 14
    assert sum(one.adaptation_interval is not None for one in fought) == 12
    told = [line for line in sentences(measured) if line.startswith("q-adapter against ")]
    assert len(told) == 12
    assert not any("noise unknown" in line for line in told)


@pytest.mark.parametrize("effect", [0.1, 0.05])
def test_the_items_that_tell_an_effect_tell_it(effect: float) -> None:
    """Simulated: coins of that many items, of which about 80 % have an interval above zero."""
    p, n = 0.5 + effect, 100
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    needed = items_needed(Interval(effect, effect - half, effect + half, half / 1.96, n), effect, n)
    assert needed is not None
    rng, found, tries = random.Random(0), 0, 600
    for _ in range(tries):
        share = sum(rng.random() < p for _ in range(needed)) / needed
        found += share - 0.5 > 1.96 * math.sqrt(share * (1 - share) / needed)
    assert found / tries == pytest.approx(0.8, abs=0.06)


def test_no_number_of_items_tells_nothing() -> None:
    assert items_needed(Interval(0.0, -0.1, 0.1, 0.05, 100), 0.0, 100) is None
    assert items_needed(Interval(1e-4, -0.1, 0.1, 0.05, 100), 1e-4, 100) is None


def test_the_latest_report_has_a_stable_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = tmp_path / "stages" / name
        folder.mkdir(parents=True)
        (folder / "report.html").write_text(name)
        link = link_latest(folder, tmp_path)
        assert link == tmp_path / "reports" / "latest"
        assert (link / "report.html").read_text() == name
    other = tmp_path / "other"
    (other / "reports" / "latest").mkdir(parents=True)
    assert link_latest(folder, other) == folder, "a folder of the user's is left alone"
