"""Drift beyond accuracy: traits of replies, paired differences to the base, limits in the gate."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

from qadapter.evaluation.divergence import replies_entropy
from qadapter.evaluation.drift import MOVED, TRAITS, Trait, drift_metrics, drifts, trait_rows, traits
from qadapter.gate.decision import decide
from qadapter.gate.measured import Measured
from qadapter.gate.rules import Gate
from qadapter.report.intervals import Measured as Compared
from qadapter.report.rows import Row
from qadapter.report.tables import drift_table
from tests.support.tiny_chat import byte_tokenizer


def described(replies: list[str], **changes: Any) -> list[dict[str, Any]]:
    count = len(replies)
    options: dict[str, Any] = {"ended": [True] * count, "first": [1] * count, "entropy": [0.5] * count}
    return trait_rows(replies, **{**options, **changes})


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("", {"words": 0}),
        ("It is four.", {"words": 3}),
        ("It might be four, I think.", {"words": 6, "hedges": 200 / 6}),
        ("Take:\n- flour\n- water", {"words": 3, "lists": 1}),
        ("1. One\n2) Two", {"words": 4, "lists": 1}),
        ("3.5 litres - enough", {"words": 4}),
        ("| a | b |\n|---|---|\n| 1 | 2 |", {"words": 4, "tables": 1}),
        ("I'm sorry, but I can't help with that.", {"words": 10, "refusals": 1}),
        ("Could you clarify what you want?", {"words": 6, "hedges": 100 / 6, "evasions": 1}),
        ("Why? And for whom?", {"words": 4, "evasions": 1}),
        ("word " * 60 + "Right? Or not?", {"words": 63}),
    ],
)
def test_traits_of_a_reply(reply: str, expected: dict[str, float]) -> None:
    nothing = dict.fromkeys(("words", "hedges", "lists", "tables", "refusals", "evasions"), 0.0)
    assert traits(reply) == pytest.approx({**nothing, **expected})


def test_the_same_policy_has_no_drift() -> None:
    assert set(TRAITS) == set(get_args(Trait))
    rows = described(["It is four.", "Could you clarify?", ""])
    asked = [{"change": -1.0, "same": 0.0}, {"change": 0.0, "same": 1.0}]
    metrics = drift_metrics(rows, rows, asked, asked)
    assert {name.split("/")[1] for name in metrics} == {*TRAITS, "moved"}
    assert set(metrics.values()) == {0.0}
    assert drift_metrics([], []) == {}
    assert {name.split("/")[1] for name in drift_metrics(rows, rows)} == {*TRAITS, "moved"} - {"rewording", "agreement"}


def test_robustness_to_wording_is_a_paired_difference() -> None:
    """The base loses 4 of 40 points by the rewording, the policy 24 of 40: 20 more of 40, and as many other answers."""
    before = [{"change": -1.0 if place < 4 else 0.0, "same": float(place >= 4)} for place in range(40)]
    after = [{"change": -1.0 if place < 24 else 0.0, "same": float(place >= 24)} for place in range(40)]
    found = drifts([], [], after, before)
    assert found["rewording"].estimate == found["agreement"].estimate == -0.5
    assert found["rewording"].high < 0
    metrics = drift_metrics([], [], after, before)
    assert metrics[MOVED] == 2
    with pytest.raises(ValueError, match="zip"):
        drifts([], [], after, before[:-1])


def test_drift_is_a_paired_difference() -> None:
    """30 prompts: ten words more each, half without an end, nine other first tokens; entropy known for twenty."""
    before = described(["one two three."] * 30, entropy=[1.0] * 20 + [None] * 10)
    after = described(
        ["one two three. " + "more " * 10] * 30,
        ended=[number % 2 == 0 for number in range(30)],
        first=[2] * 9 + [1] * 21,
        entropy=[1.0 + 0.1 * (number % 2) for number in range(30)],
    )
    found = drifts(after, before)
    assert found["words"].estimate == found["words"].low == 10
    assert found["unended"].estimate == 0.5
    assert found["first_token"].estimate == pytest.approx(0.3)
    assert (found["entropy"].estimate, found["entropy"].items) == (pytest.approx(0.05), 20)
    assert not found["lists"].excludes_zero
    metrics = drift_metrics(after, before)
    assert metrics[MOVED] == 4
    assert metrics["drift/unended/low"] > 0
    assert drifts(before, after)["words"].estimate == -10


class Uniform(torch.nn.Module):
    """Every token is as likely as any other."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(1))
        self.vocabulary = vocabulary

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = self.scale * torch.ones(*input_ids.shape, self.vocabulary)
        return type("Output", (), {"logits": logits})()


def test_uniform_predictions_have_the_entropy_of_the_vocabulary() -> None:
    """log V nats at every token, in batches of any size; a reply without a token has none."""
    conversations: list[Any] = [([{"role": "user", "content": "Why?"}], reply) for reply in ("Because.", "No", "")]
    for batch_size in (1, 3):
        found = replies_entropy(Uniform(300), byte_tokenizer(), conversations, max_length=64, batch_size=batch_size)
        assert found[:2] == pytest.approx([math.log(300)] * 2, rel=1e-6)
        assert math.isnan(found[2])


def test_the_gate_limits_drift() -> None:
    def measured(**metrics: float) -> Measured:
        return Measured("d", (), {}, {}, metrics)

    def failed(gate: Gate, policy: Measured) -> list[str]:
        found = decide(gate, policy, policy, policy).findings
        return [one.text for one in found if one.rule.startswith(("max_moved", "max_drift")) and not one.passed]

    longer = measured(**{MOVED: 3.0, "drift/words": 12.0, "drift/words/low": 8.0, "drift/words/high": 16.0})
    assert failed(Gate(), longer) == []
    assert failed(Gate(max_moved=3, max_drift={"words": 8.0}), longer) == []
    (first, second) = failed(Gate(max_moved=2, max_drift={"words": 7.5}), longer)
    assert first == "3 traits of the answers moved from the base beyond noise, allowed 2"
    assert second == "words per reply +12.000 [+8.000, +16.000] from the base, allowed ±7.500"
    shorter = measured(**{"drift/words": -12.0, "drift/words/low": -16.0, "drift/words/high": -8.0})
    (text, limit) = failed(Gate(max_moved=0, max_drift={"words": 1.0}), shorter)
    assert "drift was not measured (drift/moved is missing)" in text
    assert limit.endswith("allowed ±1.000")
    with pytest.raises(ValueError, match="max_drift"):
        Gate(max_drift={"wrods": 1.0})  # type: ignore[dict-item]


def test_the_report_shows_drift_per_trait() -> None:
    """Two seeds of one method: ten and twenty words more, the second one beyond noise; the base has no column."""
    base = Row("d", "base", None, drift_metrics(described(["one two"]), described(["one two"])))
    runs = []
    for seed, (words, low, moved) in enumerate(((10.0, -1.0, 0.0), (20.0, 5.0, 1.0))):
        metrics = {"drift/words": words, "drift/words/low": low, "drift/words/high": 30.0, MOVED: moved}
        runs.append(Row("d", "sft", seed, metrics))
    table = drift_table(Compared([base, *runs]))
    assert table is not None
    assert table.columns == ("sft",)
    cells = {label: cell for label, (cell,) in table.rows}
    assert cells["traits that moved beyond noise"].text == "0.5 of 1", "of those that were measured"
    assert (cells["words per reply"].text, cells["words per reply"].interval) == ("+15.000", "[1 of 2]")
    assert not cells["words per reply"].sure
    assert "replies with a list" in cells, "the base has it, with the text of the old distribution"
    assert cells["replies with a list"].text == "–"
    assert "same answer to a re-worded question" not in cells
    assert drift_table(Compared([Row("d", "sft", 0, {})])) is None
