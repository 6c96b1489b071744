"""The gate on scores that are written down here: each rule, its noise, its reasons; and how a config is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from qadapter.config.budget import Budget
from qadapter.config.customization import Customization, customizations, load_customization
from qadapter.errors import QAdapterError
from qadapter.evaluation.curve.parts import selects
from qadapter.evaluation.curve.points import content_digest
from qadapter.files.artifacts import Manifest
from qadapter.gate.decision import decide, what_the_dial_changes
from qadapter.gate.measured import Measured
from qadapter.gate.rules import AdaptationRule, Gate, RetentionRule
from qadapter.gate.watch import beyond_budget, fallen

PAIRS, ITEMS = 100, 200


def policy(right: int, facts: int, *, over_refusals: float | None = 0.0, bits: float = 2.0) -> dict[str, Any]:
    return {"right": right, "facts": facts, "over_refusals": over_refusals, "bits": bits}


def measured(folder: Path, right: int, facts: int, over_refusals: float | None, bits: float) -> Measured:
    """`right` of 100 pairs won, `facts` of 200 items right, a text at `bits` a byte; through the files that exist."""
    (folder / "a").mkdir(parents=True)
    (folder / "r").mkdir()
    rows = [
        {
            "pair": i,
            "prompt": f"{i:016x}",  # a digest
            "chosen_log_prob": -1.0 if i < right else -3.0,
            "rejected_log_prob": -2.0,
            "base_chosen_log_prob": -2.0,
            "base_rejected_log_prob": -2.0,
            "chosen_tokens": 1,
            "rejected_tokens": 1,
        }
        for i in range(PAIRS)
    ]
    items: list[dict[str, Any]] = [
        {"task": "facts", "doc_id": i, "score": float(i < facts), "scores": {"exact_match": float(i < facts)}}
        for i in range(ITEMS)
    ]
    for i, size in enumerate((10, 30) * 15):
        score = [-bits * math.log(2) * size, size]
        items.append({"task": "texts", "doc_id": i, "score": score, "scores": {"bits_per_byte": score}})
    (folder / "a" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a" / "metrics.json").write_text(json.dumps({"adaptation/n": PAIRS}))
    (folder / "r" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    numbers = {} if over_refusals is None else {"retention/over_refusals": over_refusals}
    (folder / "r" / "metrics.json").write_text(json.dumps(numbers))
    (folder / "r" / "directions.json").write_text(
        json.dumps({"retention/facts/exact_match": True, "retention/texts/bits_per_byte": False})
    )
    Manifest("adaptation", "k", {}, {"data": "digest of the pairs"}, "c", {}, 1.0).write(folder / "a")
    return Measured.read(folder / "a", folder / "r")


@pytest.fixture
def make(tmp_path: Path) -> Any:
    made: list[Path] = []

    def one(*arguments: int, **options: Any) -> Measured:
        made.append(tmp_path / str(len(made)))
        return measured(made[-1], **policy(*arguments, **options))

    return one


def test_scores_are_read_as_they_were_measured(make: Any) -> None:
    found = make(70, 150, bits=2.5)
    for metric in ("implied_reward_accuracy", "preference_accuracy", "preference_accuracy_length_normalised"):
        assert found.won[metric].mean() == 0.7
    assert found.tasks["facts"].values.mean() == 0.75
    texts = found.tasks["texts"]
    assert texts.values == pytest.approx([2.5] * 30)
    assert texts.weights is not None
    assert texts.weights.tolist() == [10, 30] * 15
    assert not texts.higher_is_better


def test_a_task_is_compared_by_the_metric_that_it_is_known_by(tmp_path: Path) -> None:
    """LAMBADA's file lists perplexity first, of which less is better and whose items are log-likelihoods, more of which
    is better: 40 of 100 words lost are a drop of .4, and no gain of 2 nats."""

    def words(name: str, right: int, nats: float) -> Measured:
        found = measured(tmp_path / name, **policy(60, 150))
        scores = [{"perplexity": nats, "acc": float(i < right)} for i in range(100)]
        items = [{"task": "lambada", "doc_id": i, "score": 0.0, "scores": one} for i, one in enumerate(scores)]
        file = tmp_path / name / "r" / "items.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in items))
        directions = {"retention/lambada/perplexity": False, "retention/lambada/acc": True}
        (tmp_path / name / "r" / "directions.json").write_text(json.dumps(directions))
        return replace(found, tasks=Measured.read(tmp_path / name / "a", tmp_path / name / "r").tasks)

    before, now = words("before", 80, -1.0), words("now", 40, -3.0)
    finding = next(one for one in decide(Gate(), now, before, before).findings if one.rule.endswith("lambada"))
    assert finding.interval is not None
    assert finding.interval.estimate == pytest.approx(0.4)
    assert not finding.passed


def test_beyond_a_budget_means_beyond_noise(make: Any) -> None:
    """20 of 200 facts lost: .1, standard error √(.1 · .9/200) = .021; texts are no accuracy and do not count."""
    base, now = make(50, 150), make(50, 130, bits=9.0, over_refusals=0.3)
    (text,) = beyond_budget(now, base, Budget(max_forgetting=0.03), Gate())
    assert text.startswith("forgetting +0.100 [+0.0")
    assert text.endswith("is beyond the budget of 0.03")
    assert beyond_budget(now, base, Budget(max_forgetting=0.08), Gate()) == [], "noise could explain .1 after .08"
    both = beyond_budget(now, base, Budget(max_forgetting=1.0, per_task=0.03, max_over_refusals=0.2), Gate())
    assert both[0].startswith("facts fell below the base by +0.100 [")
    assert both[1:] == ["over-refusals 0.300 are beyond the budget of 0.2"]
    assert beyond_budget(base, base, Budget(max_forgetting=0.0, per_task=0.0), Gate()) == []


def test_a_group_is_one_task_of_a_budget(make: Any) -> None:
    """40 of 200 facts lost, none of three subtasks of a group: .2 and 0 are .1 in the mean, and not .2/4."""
    base, now = make(50, 150), make(50, 110)
    quiet = {f"blimp_{name}": base.tasks["facts"] for name in ("a", "b", "c")}
    metrics = {"forgetting/facts/exact_match": 0.0, "forgetting/blimp/acc": 0.0}
    base = replace(base, tasks=base.tasks | quiet, metrics=metrics)
    now = replace(now, tasks=now.tasks | quiet)
    (text,) = beyond_budget(now, base, Budget(max_forgetting=0.06), Gate())
    assert text.startswith("forgetting +0.100 [+0.0")


def test_a_better_candidate_passes_with_its_numbers_as_reasons(make: Any) -> None:
    decision = decide(Gate(), make(80, 150), make(60, 150), make(50, 150))
    assert decision.passed
    gain = decision.findings[0].interval
    assert gain is not None
    assert gain.estimate == pytest.approx(0.2)
    # 20 of 100 pairs differ by 1: standard error √(0.2 · 0.8 / 100) = 0.04
    assert gain.stderr == pytest.approx(0.04, abs=0.003)
    assert "0.800 after 0.600 of the champion" in decision.reasons[0]
    assert len(decision.reasons) == 3
    metrics = decision.metrics()
    assert metrics["gate/passed"] == 1.0
    assert metrics["gate/adaptation.min_gain"] == pytest.approx(0.2)
    assert metrics["gate/adaptation.min_gain/low"] == pytest.approx(0.2 - 1.96 * 0.04, abs=0.01)


@pytest.mark.parametrize(
    ("right", "rule", "passed"),
    [
        (63, AdaptationRule(min_gain=0.03, beyond_noise=False), True),
        (62, AdaptationRule(min_gain=0.03, beyond_noise=False), False),
        (63, AdaptationRule(min_gain=0.0, beyond_noise=True), False),  # 3 pairs of 100 are noise: 0.03 ± 0.033
        (70, AdaptationRule(min_gain=0.0, beyond_noise=True), True),  # 0.10 ± 0.059
        (60, AdaptationRule(min_gain=0.0, beyond_noise=False), True),
        (40, AdaptationRule(min_gain=0.0, beyond_noise=False), False),
    ],
)
def test_adaptation_must_rise(make: Any, right: int, rule: AdaptationRule, passed: bool) -> None:
    champion = make(60, 150)
    decision = decide(Gate(adaptation=rule), make(right, 150), champion, champion)
    assert decision.passed is passed
    assert decision.findings[0].passed is passed


@pytest.mark.parametrize(
    ("facts", "max_drop", "passed"),
    [
        (150, 0.0, True),
        (149, 0.0, True),  # one item of 200: the interval of the drop begins at 0
        (140, 0.0, False),  # 10 items: 0.05 ± 0.030
        (140, 0.02, False),  # its low end, 0.020 …, is just above
        (140, 0.03, True),
        (170, 0.0, True),
    ],
)
def test_no_task_may_drop_beyond_noise(make: Any, facts: int, max_drop: float, passed: bool) -> None:
    champion = make(60, 150)
    gate = Gate(retention=RetentionRule(max_drop=max_drop))
    decision = decide(gate, make(90, facts), champion, champion)
    (finding,) = [f for f in decision.findings if f.rule == "retention.max_drop.facts"]
    assert finding.interval is not None
    assert finding.interval.estimate == pytest.approx((150 - facts) / 200)
    if facts == 140 and max_drop == 0.02:
        passed = bool(finding.interval.low <= 0.02)  # at the edge, the rule and the interval agree
    assert decision.passed is passed
    assert (decision.reasons == [finding.text]) is not passed


def test_where_lower_is_better_a_rise_is_the_drop(make: Any) -> None:
    champion = make(60, 150, bits=2.0)
    worse = decide(Gate(), make(90, 150, bits=2.5), champion, champion)
    assert [f.rule for f in worse.findings if not f.passed] == ["retention.max_drop.texts"]
    assert worse.findings[2].interval is not None
    assert worse.findings[2].interval.estimate == pytest.approx(0.5)
    assert decide(Gate(), make(90, 150, bits=1.5), champion, champion).passed


def test_small_steps_down_add_up_against_the_base(make: Any) -> None:
    base, champion, candidate = make(50, 170), make(60, 150), make(90, 149)
    assert decide(Gate(retention=RetentionRule(max_drop=0.0)), candidate, champion, base).passed
    strict = Gate(retention=RetentionRule(max_drop=0.0, max_drop_from_base=0.05))
    decision = decide(strict, candidate, champion, base)
    assert [f.rule for f in decision.findings if not f.passed] == ["retention.max_drop_from_base.facts"]
    assert decision.reasons[0].startswith("facts 0.745 after 0.850 of the base: worse by 0.105 [0.0")


def test_at_the_ceiling_not_worse_is_enough(make: Any) -> None:
    """1.000 after 1.000 can be no gain; a good second delivery passes, and one of flipped labels does not."""
    gate = Gate(adaptation=AdaptationRule(min_gain=0.005))
    champion, base = make(100, 150), make(50, 150)
    same = decide(gate, make(100, 150), champion, base)
    assert same.passed
    assert "wanted not worse beyond noise, because the champion is at the ceiling" in same.reasons[0]
    assert decide(gate, make(99, 150), champion, base).passed  # one pair of 100: the interval reaches 0
    flipped = decide(gate, make(0, 150), champion, base)
    assert not flipped.passed
    assert "0.000 after 1.000 of the champion: -1.000" in flipped.reasons[0]
    assert not decide(gate, make(90, 150), champion, base).passed  # 10 of 100 lost: -0.10 ± 0.059
    below = decide(gate, make(95, 150), make(90, 150), base).findings[0]  # room for a gain: the rule is a gain
    assert "ceiling" not in below.text


def test_a_drop_that_passed_says_why(make: Any) -> None:
    """10 items of 200 are 0.05 ± 0.030: above 0.03, and yet it may be noise."""
    champion = make(60, 150)
    gate = Gate(retention=RetentionRule(max_drop=0.03))
    (finding,) = [
        f for f in decide(gate, make(90, 140), champion, champion).findings if f.rule == "retention.max_drop.facts"
    ]
    assert finding.passed
    assert "allowed 0.030: passed, because the interval reaches down to what is allowed" in finding.text
    gate = Gate(retention=RetentionRule(max_drop=0.001))
    (reason,) = decide(gate, make(90, 140), champion, champion).reasons
    assert reason.startswith("facts 0.700 after 0.750 of the champion: worse by 0.050 [")
    assert reason.endswith("allowed 0.001: all of the interval is above it")
    same, better = (decide(Gate(), make(90, facts), champion, champion).findings[1].text for facts in (150, 154))
    assert same == "facts 0.750 after 0.750 of the champion: the same, 0.000 [0.000, 0.000], allowed 0.020"
    assert better.startswith("facts 0.770 after 0.750 of the champion: better by 0.020 [0.0")
    assert better.endswith("], allowed 0.020")


def test_a_policy_that_does_not_speak_is_rejected_with_an_example(make: Any, tmp_path: Path) -> None:
    champion, candidate = make(60, 150), make(90, 150)
    answers = tmp_path / "1" / "a"
    (answers / "answers.jsonl").write_text(json.dumps({"reply": "=========="}) + "\n")
    (answers / "speech.jsonl").write_text(json.dumps({"faults": ["repeat themselves"]}) + "\n")
    (answers / "metrics.json").write_text(json.dumps({"adaptation/speaks": 0.0, "adaptation/broken_replies": 1.0}))
    silent = Measured.read(answers, tmp_path / "1" / "r")
    (reason,) = decide(Gate(), silent, champion, champion).reasons
    assert reason == 'does not speak: of its replies 1 of 1 repeat themselves, for example "=========="'
    assert reason in fallen(candidate, silent, Gate())
    speaking = replace(candidate, metrics={**candidate.metrics, "adaptation/speaks": 1.0})
    assert decide(Gate(), speaking, champion, champion).passed
    babbling = replace(speaking, metrics={**speaking.metrics, "adaptation/broken_replies": 0.9})
    passed = next(found for found in decide(Gate(), babbling, champion, champion).findings if found.rule == "speech")
    assert passed.text == "answers no worse than its base: 90 % of its replies are broken, as are its base's"
    rows = [{"reply": "a", "base": "a"}, {"reply": "b", "base": "a"}]  # accuracies on pairs do not show that
    (answers / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (answers / "speech.jsonl").write_text('{"faults": []}\n' * 2)
    (answers / "metrics.json").write_text(json.dumps({"adaptation/speaks": 1.0, "adaptation/broken_replies": 0.0}))
    found = decide(Gate(), Measured.read(answers, tmp_path / "1" / "r"), champion, champion).findings[0]
    assert found.text == "answers in language: 0 % of its replies are broken; 1 of 2 differ from its base's"


def test_a_candidate_that_answers_as_its_base_does_is_rejected(make: Any) -> None:
    """It wins 90 of 100 pairs after 60, and all of its 20 answers are the base's."""
    champion, candidate = make(60, 150), make(90, 150)
    same = replace(candidate, changed=(0, 20))
    (reason,) = decide(Gate(), same, champion, champion).reasons
    assert reason.startswith("its 20 answers are all the base's, word for word, so that its users would notice nothing")
    for few in (replace(candidate, changed=(1, 20)), replace(candidate, changed=(0, 9)), candidate):
        assert decide(Gate(), few, champion, champion).passed
    allowed = decide(Gate(adaptation=AdaptationRule(allow_same_answers=True)), same, champion, champion)
    assert allowed.passed
    assert any("allow_same_answers accepts" in reason for reason in allowed.reasons)


def test_new_rules_change_no_config_that_does_not_set_them() -> None:
    """A recurring customisation runs again when its config changes: a new rule must not look like that."""
    given = Gate().model_dump()
    assert "flipped_labels" not in given
    assert "allow_same_answers" not in given["adaptation"]
    assert Gate.model_validate({"flipped_labels": "report"}).model_dump()["flipped_labels"] == "report"


def test_over_refusals_are_limited_and_must_be_measured(make: Any) -> None:
    champion = make(60, 150)
    gate = Gate(max_over_refusals=0.1)
    assert decide(gate, make(90, 150, over_refusals=0.1), champion, champion).passed
    (reason,) = decide(gate, make(90, 150, over_refusals=0.12), champion, champion).reasons
    assert reason == "over-refusals 0.120, allowed 0.100"
    (reason,) = decide(gate, make(90, 150, over_refusals=None), champion, champion).reasons
    assert "was not measured" in reason
    assert decide(Gate(), make(90, 150, over_refusals=None), champion, champion).passed


def test_what_was_not_measured_alike_is_not_compared(make: Any, tmp_path: Path) -> None:
    champion, candidate = make(60, 150), make(90, 150)
    other = replace(candidate, pairs=(*candidate.pairs[:-1], 999), tasks={}, metrics={})
    decision = decide(Gate(), other, champion, champion)
    assert not decision.passed
    assert "different held-out pairs" in decision.reasons[0]
    assert "facts: candidate and champion were not measured on the same items" in decision.reasons[1]


def test_a_fallen_champion_is_told_from_noise(make: Any) -> None:
    then = make(80, 150)
    assert fallen(then, make(80, 150), Gate()) == []
    assert fallen(then, make(79, 149), Gate()) == []
    assert fallen(then, make(95, 190), Gate()) == []
    (reason,) = fallen(then, make(60, 150), Gate())
    assert reason.startswith("implied_reward_accuracy fell by +0.200 [+0.1")
    assert [r.split()[0] for r in fallen(then, make(60, 100, bits=3.0), Gate())] == [
        "implied_reward_accuracy",
        "facts",
        "texts",
    ]


def test_other_heldout_pairs_are_compared_as_two_samples(make: Any) -> None:
    then = make(80, 150)

    def on_other_pairs(right: int) -> Measured:
        found = make(right, 150)
        return replace(found, heldout="digest of other pairs")  # as many of them: their places are the same

    assert fallen(then, on_other_pairs(72), Gate()) == [], "0.80 ± 0.08 and 0.72 ± 0.09 overlap"
    (reason,) = fallen(then, on_other_pairs(50), Gate())
    assert reason == "implied_reward_accuracy fell by +0.300 on other items"


def test_other_items_of_a_task_are_not_taken_for_the_same(make: Any) -> None:
    """A benchmark that was written anew has the same places and other questions."""
    then = make(80, 150)
    facts = then.tasks["facts"]
    other = replace(facts, items=tuple((place, "another question", "a") for place, *_ in facts.items))
    now = make(80, 141)
    assert [r.split()[0] for r in fallen(then, now, Gate())] == ["facts"], "paired, 9 of 200 items are a fall"
    moved = replace(now, tasks={**now.tasks, "facts": replace(other, values=now.tasks["facts"].values)})
    assert fallen(then, moved, Gate()) == [], "as two samples, 0.75 and 0.705 of 200 overlap"
    (reason,) = [f.text for f in decide(Gate(), moved, then, then).findings if f.rule == "retention.max_drop.facts"]
    assert reason == "facts: candidate and champion were not measured on the same items"


def few(found: Measured, pairs: int, items: int) -> Measured:
    """The first of what was measured."""
    facts = found.tasks["facts"]
    return replace(
        found,
        pairs=found.pairs[:pairs],
        prompts=found.prompts[:pairs],
        won={name: won[:pairs] for name, won in found.won.items()},
        tasks={"facts": replace(facts, items=facts.items[:items], values=facts.values[:items])},
    )


def test_next_to_nothing_passes_no_rule(make: Any) -> None:
    """One pair won gives +1.000 [+1.000, +1.000], and one item kept no drop; neither says anything."""
    champion, candidate = few(make(0, 150), 1, 1), few(make(1, 150), 1, 1)
    decision = decide(Gate(), candidate, champion, champion)
    assert [f.passed for f in decision.findings] == [False, False]
    assert decision.reasons[0].startswith(
        "prompts of held-out pairs: only 1, too few to decide; at least 30 are required"
    )
    assert decision.reasons[1].startswith("facts: only 1, too few")
    loose = Gate(adaptation=AdaptationRule(min_items=1), retention=RetentionRule(min_items=1))
    assert decide(loose, candidate, champion, champion).passed
    assert [r.split(":")[0] for r in fallen(champion, champion, Gate())] == ["prompts of held-out pairs", "facts"]


def test_retention_that_was_not_measured_is_no_retention(make: Any) -> None:
    champion, candidate = (replace(make(right, 150), tasks={}) for right in (60, 90))
    decision = decide(Gate(retention=RetentionRule(max_drop_from_base=0.1)), candidate, champion, champion)
    assert [f.rule for f in decision.findings if not f.passed] == ["retention.max_drop", "retention.max_drop_from_base"]
    assert "no retention task was measured for the champion" in decision.reasons[0]


def test_a_task_that_is_no_longer_measured_is_reported(make: Any) -> None:
    then, now = make(80, 150), make(80, 150)
    now = replace(now, tasks={"texts": now.tasks["texts"]})
    (reason,) = fallen(then, now, Gate())
    assert reason.startswith("facts was measured at registration but is not measured now")


def test_over_refusals_above_the_limit_are_a_fall(make: Any) -> None:
    then, limited = make(80, 150, over_refusals=0.05), Gate(max_over_refusals=0.05)
    assert fallen(then, make(80, 150, over_refusals=0.05), limited) == []
    (reason,) = fallen(then, make(80, 150, over_refusals=0.3), limited)
    assert reason == "over-refusals 0.300, allowed 0.050"
    (reason,) = fallen(then, make(80, 150, over_refusals=None), limited)
    assert reason.startswith("over-refusal was not measured")
    assert fallen(then, make(80, 150, over_refusals=0.3), Gate()) == [], "where there is no rule"


def test_rules_are_strict() -> None:
    for wrong in (
        {"max_over_refusals": "0.1"},
        {"max_over_refusals": 2},
        {"retention": {"max_drop": -0.1}},
        {"adaptation": {"min_items": 0}},
        {"x": 1},
    ):
        with pytest.raises(ValidationError):
            Gate.model_validate(wrong)


# ---- the config


def test_every_shipped_customisation_loads() -> None:
    assert customizations() == ["example", "smoke"]
    for name in customizations():
        customization = load_customization(name)
        assert customization.name == name
        experiment = customization.experiment()
        assert experiment.methods.run == ("q-adapter",)
        assert experiment.domains[customization.domain].source == "preferences"
        assert experiment.sources["preferences"] == customization.source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\n", "model_name: is required"),
        ("{}", "problems in"),
        ("a: [", "is not YAML"),
        ("gate: {max_drop: 1}", "gate.max_drop: unknown key"),
        ("mix: {rows: some}", r"mix.rows: Input should be 'all' or 'new' \(given: 'some'\)"),
    ],
)
def test_a_wrong_config_is_refused_with_the_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(QAdapterError, match=message):
        load_customization(str(file))


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(QAdapterError, match="did you mean 'smoke'"):
        load_customization("smok")
    fields = load_customization("smoke").model_dump()
    with pytest.raises(QAdapterError, match="domain is 'poetry', but the profile 'smoke' has harmless"):
        Customization.model_validate({**fields, "domain": "poetry"}).experiment()


def test_the_bootstrap_is_the_projects_own(make: Any) -> None:
    """The gate draws nothing by itself: the same scores give the same interval."""
    first, second = (decide(Gate(), make(80, 150), make(60, 150), make(50, 150)) for _ in range(2))
    assert first.metrics() == second.metrics()
    assert np.isfinite(list(first.metrics().values())).all()


# ---- several pairs of one prompt


def repeated(found: Measured, times: int, *, prompts: bool = True) -> Measured:
    """The same with each pair so many times, as pairs of one prompt; older files do not say which prompt it is."""
    return replace(
        found,
        pairs=tuple(range(PAIRS * times)),
        prompts=found.prompts * times if prompts else (),
        won={name: np.tile(won, times) for name, won in found.won.items()},
    )


def learnt(candidate: Measured, champion: Measured, gate: Gate | None = None) -> Any:
    return decide(gate or Gate(), candidate, champion, champion).findings[0]


def test_pairs_of_a_prompt_that_agree_make_the_gate_no_surer(make: Any) -> None:
    """10 of 100 prompts more are won: .1 ± 1.96 · √(.1 · .9/100), with one pair each or four; .2 ± … is half of it."""
    once, four = ((repeated(make(70, 150), n), repeated(make(60, 150), n)) for n in (1, 4))
    for candidate, champion in (once, four):
        interval = learnt(candidate, champion).interval
        assert interval.estimate == pytest.approx(0.1)
        assert interval.high - interval.low == pytest.approx(2 * 1.96 * math.sqrt(0.1 * 0.9 / 100), rel=0.1)
    assert learnt(*four).interval.low == pytest.approx(learnt(*once).interval.low)
    # A gain of 3 of 100 is noise. As 12 of 400 independent pairs it would not be.
    assert not learnt(repeated(make(63, 150), 4), repeated(make(60, 150), 4)).passed
    assert learnt(repeated(make(63, 150), 4, prompts=False), repeated(make(60, 150), 4, prompts=False)).passed, (
        "each pair of older files is an item of its own"
    )


def test_prompts_of_one_policy_serve_for_an_older_one(make: Any) -> None:
    """A champion that was measured before prompts were written down, on the same pairs as its candidate."""
    candidate, champion = repeated(make(70, 150), 4), repeated(make(60, 150), 4)
    older = replace(champion, prompts=())
    assert learnt(candidate, older) == learnt(candidate, champion) == learnt(replace(candidate, prompts=()), champion)
    assert fallen(older, repeated(make(57, 150), 4), Gate()) == []
    (reason,) = fallen(older, replace(repeated(make(57, 150), 4), prompts=()), Gate())
    assert reason.startswith("implied_reward_accuracy fell by +0.030 [+0.0")


def test_a_fall_on_other_pairs_counts_prompts(make: Any) -> None:
    """.80 ± .08 and .70 ± .09 of 100 prompts each overlap; of 400 pairs they would not."""
    then, now = repeated(make(80, 150), 4), replace(repeated(make(70, 150), 4), heldout="digest of other pairs")
    assert fallen(then, now, Gate()) == []
    assert len(fallen(replace(then, prompts=()), replace(now, prompts=()), Gate())) == 1


def test_the_least_number_of_pairs_is_one_of_prompts(make: Any) -> None:
    """100 pairs of 20 prompts are 20 items."""
    found = make(60, 150)
    few_prompts = replace(found, prompts=tuple(str(i % 20) for i in range(PAIRS)))
    text = "prompts of held-out pairs: only 20, too few to decide; at least 30 are required"
    assert learnt(few_prompts, few_prompts).text.startswith(text)
    assert fallen(few_prompts, few_prompts, Gate())[0].startswith(text)
    assert found.prompts == tuple(f"{i:016x}" for i in range(PAIRS))


def test_pairs_that_do_not_say_their_prompt_are_read(make: Any, tmp_path: Path) -> None:
    make(60, 150)
    file = tmp_path / "0" / "a" / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "prompt"}) + "\n" for row in rows))
    found = Measured.read(tmp_path / "0" / "a", tmp_path / "0" / "r")
    assert found.prompts == ()
    assert len(found.by_prompt("preference_accuracy").items) == PAIRS
    assert len(found.reported([f"{i}" for i in range(PAIRS)]).pairs) < PAIRS


# ---- a candidate whose dial was chosen on half of the items


def test_only_the_items_that_the_dial_was_not_chosen_on(make: Any) -> None:
    prompts = [f"digest {i // 2}" for i in range(PAIRS)]  # two pairs a prompt: both are on one side
    whole = make(80, 150)
    found = whole.reported(prompts)
    assert set(map(selects, found.prompts)) == {False}
    assert found.pairs == tuple(i for i in range(PAIRS) if not selects(prompts[i]))
    assert len(found.pairs) % 2 == 0
    assert found.by_prompt("preference_accuracy").weights.tolist() == [2.0] * (len(found.pairs) // 2)
    assert 20 < len(found.pairs) < 80
    assert found.won["preference_accuracy"].tolist() == [float(i < 80) for i in found.pairs]
    kept = [not selects(content_digest("facts", *item)) for item in whole.tasks["facts"].items]
    assert found.tasks["facts"].values.tolist() == [float(i < 150) for i in range(ITEMS) if kept[i]]
    weights = found.tasks["texts"].weights
    assert weights is not None
    assert len(weights) == len(found.tasks["texts"].items) < 30
    assert found.on_the_pairs_of(make(60, 100).reported(prompts))


def test_a_dial_that_saves_a_candidate_says_so(make: Any) -> None:
    champion, base = make(60, 150), make(50, 150)
    saved, lost = decide(Gate(), make(80, 150), champion, base), decide(Gate(), make(80, 100), champion, base)
    (sentence,) = what_the_dial_changes(lost, saved)
    assert sentence.startswith("the dial saves it: as trained (dial 1) it would have been rejected: facts 0.")
    (sentence,) = what_the_dial_changes(saved, lost)
    assert sentence.startswith("the dial costs it: as trained (dial 1) it would have been promoted:")
    assert what_the_dial_changes(saved, saved) == what_the_dial_changes(lost, lost) == []
