"""A sequence of preferences: ACC and BWT by hand, weights under a budget, and adapters composed on a tiny base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qadapter.config.budget import Budget
from qadapter.config.evaluation import AdaptationSettings, RetentionSettings
from qadapter.errors import QAdapterError
from qadapter.evaluation.curve.parts import selects
from qadapter.evaluation.curve.points import Measure
from qadapter.evaluation.sequence.matrix import Passage
from qadapter.evaluation.sequence.measure import (
    HeldOut,
    Ruler,
    Tried,
    best_of,
    candidates,
    choose_weights,
    measure_outcome,
)
from qadapter.evaluation.sequence.outcome import Outcome
from qadapter.files.artifacts import read_json, write_json_lines
from qadapter.policy.files import read_policy
from qadapter.policy.loading import load_base, load_policy
from tests.support.tiny_toy import MODEL, NO_DROPOUT, TinyToy, make_tiny_toy

DOMAINS = ("one", "two", "three")
IDS = tuple(f"item-{i}" for i in range(10))


def measure(mean: float) -> Measure:
    """Ten items of which the first so many are right."""
    right = round(10 * mean)
    return Measure(IDS, tuple([1.0] * right + [0.0] * (10 - right)))


def outcome(scores: Sequence[float], retention: float) -> Outcome:
    """Scores of the first domains, and two tasks that are averaged; a third one is in another unit."""
    kept = {"a": measure(retention), "b": measure(retention), "bits": Measure(IDS, (2.0,) * 10, None, higher=False)}
    return Outcome({name: measure(score) for name, score in zip(DOMAINS, scores, strict=False)}, kept)


def passage(matrix: Sequence[Sequence[float]], retention: Sequence[float]) -> Passage:
    """One seed."""
    steps = tuple(outcome(row, kept) for row, kept in zip(matrix, retention, strict=True))
    return Passage(DOMAINS, (steps,), outcome((0, 0, 0), 1.0))


# ---- by hand


def test_average_accuracy_and_backward_transfer_by_hand() -> None:
    """ACC = (.4 + .7 + 1)/3, BWT = ((.4 − .9) + (.7 − .8))/2, the base lost .2."""
    found = passage([[0.9], [0.6, 0.8], [0.4, 0.7, 1.0]], [1.0, 0.9, 0.8])
    assert found.accuracy.estimate == pytest.approx(2.1 / 3)
    assert found.backward_transfer.estimate == pytest.approx(-0.3)
    assert found.learnt == pytest.approx(0.9)
    assert found.forgetting.estimate == pytest.approx(0.2)
    assert found.retention.tolist() == pytest.approx([1.0, 0.9, 0.8])
    assert np.isnan(found.matrix[np.triu_indices(3, 1)]).all()
    assert found.matrix[1, :2].tolist() == pytest.approx([0.6, 0.8])
    assert found.accuracy.low < found.accuracy.estimate < found.accuracy.high


def test_seeds_are_averaged_and_ways_compared_in_pairs() -> None:
    one = passage([[0.9], [0.6, 0.8], [0.4, 0.7, 1.0]], [1, 1, 1])
    other = passage([[0.5], [0.4, 0.6], [0.2, 0.5, 0.8]], [1, 1, 1])
    both = Passage(DOMAINS, (*one.outcomes, *other.outcomes), one.base)
    assert both.accuracy.estimate == pytest.approx(0.6)
    assert both.matrix[0, 0] == pytest.approx(0.7)
    assert (both.accuracy.seeds, both.accuracy.items) == (2, 30)
    assert one.difference(other).estimate == pytest.approx(0.2)
    assert one.difference(one).estimate == 0
    assert not one.difference(one).excludes_zero


def test_a_sequence_is_as_unsure_as_its_number_of_items() -> None:
    """20 answers all right, or none of 20 lost in two tasks: Wilson's half width for none of 20, z²/(20 + z²)."""
    whole = Measure(tuple(f"item-{i}" for i in range(20)), (1.0,) * 20)
    steps = (Outcome({"one": whole}, {"a": whole, "b": whole}),)
    found = Passage(("one",), (steps,), Outcome({}, {"a": whole, "b": whole}))
    none_of_20 = 1.96**2 / (20 + 1.96**2)
    assert (found.accuracy.low, found.accuracy.high) == (pytest.approx(1 - none_of_20, abs=1e-4), 1.0)
    assert found.forgetting.high == pytest.approx(none_of_20 / np.sqrt(2), abs=1e-4)
    assert found.forgetting.low == -found.forgetting.high
    assert found.difference(found).high == pytest.approx(none_of_20, abs=1e-4)


def test_a_sequences_accuracy_is_a_share() -> None:
    """.9 and 1 of two seeds: Student's interval, .95 ± 12.7 · .05, is cut at 1."""
    one, other = passage([[0.9], [0.9, 0.9], [0.9, 0.9, 0.9]], [1, 1, 1]), passage([[1], [1, 1], [1, 1, 1]], [1, 1, 1])
    found = Passage(DOMAINS, (*one.outcomes, *other.outcomes), one.base).accuracy
    assert (found.low, found.high) == (pytest.approx(0.95 - 12.706 * 0.05, abs=1e-3), 1.0)


def test_an_outcome_survives_its_file_and_splits_by_item(tmp_path: Path) -> None:
    found = outcome((0.5, 0.3), 0.9)
    found.write(tmp_path)
    assert Outcome.read(tmp_path) == found
    chosen, reported = found.part(selection=True), found.part(selection=False)
    ids = [*chosen.learnt["one"].ids, *reported.learnt["one"].ids]
    assert sorted(ids) == sorted(IDS)
    assert all(selects(item) for item in chosen.kept["a"].ids)
    assert not any(selects(item) for item in reported.kept["a"].ids)
    assert found.averaged == ["a", "b"]
    assert found.adaptation == pytest.approx(0.4)


def test_pairs_of_a_prompt_that_agree_make_a_sequence_no_surer() -> None:
    """ACC of 200 prompts in each of two domains, 60 and 90 % won: ± 1.96 · √(.6 · .4/200 + .9 · .1/200)/2.

    BWT: of the first domain 40 % more than before. With one pair for each prompt or with four, in any order.
    """

    def pairs(share: float, times: int) -> Measure:
        names, values = [f"prompt {i}" for i in range(200)], [float(i < share * 200) for i in range(200)]
        return Measure(tuple(names * times), tuple(values * times))

    found = []
    for times in (1, 4):
        steps = [
            Outcome({"one": pairs(0.2, times)}, {}),
            Outcome({"one": pairs(0.6, times), "two": pairs(0.9, times)}, {}),
        ]
        way = Passage(("one", "two"), (tuple(steps),), Outcome({}, {}))
        start = [
            Outcome({"one": pairs(0.2, times)}, {}),
            Outcome({"one": pairs(0, times), "two": pairs(0.9, times)}, {}),
        ]
        other = Passage(("one", "two"), (tuple(start),), Outcome({}, {}))
        found.append((way.accuracy, way.backward_transfer, way.difference(other)))
    for one, four in zip(*found, strict=True):
        assert (four.estimate, four.low, four.high) == (one.estimate, pytest.approx(one.low), pytest.approx(one.high))
    accuracy, transfer, difference = found[1]
    width = 2 * 1.96
    assert accuracy.high - accuracy.low == pytest.approx(width * np.sqrt((0.6 * 0.4 + 0.9 * 0.1) / 200) / 2, rel=0.1)
    assert transfer.high - transfer.low == pytest.approx(width * np.sqrt(0.4 * 0.6 / 200), rel=0.1)
    assert difference.high - difference.low == pytest.approx(width * np.sqrt(0.6 * 0.4 / 200) / 2, rel=0.1)


def test_outcomes_without_prompts_count_each_pair() -> None:
    """400 pairs that do not say their prompts, half of them won: ± 1.96 · √(.25/400)."""
    pairs = Measure((), tuple(float(i < 200) for i in range(400)))
    found = Passage(("one",), ((Outcome({"one": pairs}, {}),),), Outcome({}, {})).accuracy
    assert found.items == 400
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 400), rel=0.1)


@pytest.mark.slow
def test_pairs_of_one_prompt_are_on_one_side(world: TinyToy, tmp_path: Path) -> None:
    """Measured on pairs, four of a prompt, every second with capitals: both halves have whole prompts."""
    pairs = [
        {"prompt": turns(text.upper() if each % 2 else text), "chosen": reply("some"), "rejected": reply("none at all")}
        for text in (f"how many is {i} ?" for i in range(12))
        for each in range(4)
    ]
    write_json_lines(tmp_path / "heldout.jsonl", pairs)
    real = replace(ruler(world), heldout={"one": HeldOut(tmp_path / "heldout.jsonl")}, world=None)
    measure_outcome(world.base, None, model=MODEL, ruler=real, out=tmp_path)
    found = Outcome.read(tmp_path)
    assert len(found.learnt["one"].ids) == 48
    for selection in (True, False):
        here = Counter(found.part(selection=selection).learnt["one"].ids)
        assert set(here.values()) == {4}


def turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_candidates_keep_what_was_there_first() -> None:
    """The policy as it was, then every new weight with every factor on the earlier ones, each combination once."""
    assert candidates((), (0.5, 1.0), (1.0, 0.5)) == [(0.0,), (0.5,), (1.0,)]
    assert candidates((1.0,), (0.5, 1.0), (1.0, 0.5)) == [
        (1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (0.5, 0.5), (0.5, 1.0)
    ]  # fmt: skip
    assert candidates((0.0,), (1.0,), (1.0, 0.5)) == [(0.0, 0.0), (0.0, 1.0)]


def test_the_best_weights_within_a_budget() -> None:
    """Most learnt within the budget; among equals less forgotten, then smaller; nothing within: as it was."""
    tried = [
        Tried((1.0, 0.0), 0.5, 0.0, 0.0),
        Tried((1.0, 0.5), 0.8, 0.01, 0.03),
        Tried((1.0, 0.75), 0.8, 0.02, 0.02),
        Tried((1.0, 1.0), 0.9, 0.05, 0.2),
    ]
    assert best_of(tried, Budget(max_forgetting=0.02)).weights == (1.0, 0.5)
    assert best_of(tried, Budget(max_forgetting=0.02, per_task=0.025)).weights == (1.0, 0.75)
    assert best_of(tried, Budget(max_forgetting=0.1)).weights == (1.0, 1.0)
    assert best_of(tried, Budget(max_forgetting=0)).weights == (1.0, 0.0)
    assert best_of([Tried((0.0,), 0.1, 0.5, 0.5), tried[3]], Budget(max_forgetting=0)).weights == (0.0,)
    equal = [Tried((1.0,), 0.5, 0.0, 0.0), Tried((0.5,), 0.5, 0.0, 0.0)]
    assert best_of(equal, Budget()).weights == (0.5,)


# ---- on a tiny base


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("sequence"), heldout=24)


def ruler(world: TinyToy) -> Ruler:
    retention = RetentionSettings(tasks=("toy_facts",), limit=24, max_new_tokens=6)
    adaptation = AdaptationSettings(batch_size=16, max_new_tokens=12)
    heldout = {"harmless": HeldOut(world.heldout), "again": HeldOut(world.heldout, "academy")}
    return Ruler(heldout, adaptation, retention, 64, world.world, world.world)


@pytest.mark.slow
def test_composed_adapters_are_the_sum_that_was_chosen(world: TinyToy, tmp_path: Path) -> None:
    """Whatever the budget, the policy is its adapters at the chosen weights; at a budget of 1 the best-learning one."""
    folders = [world.train("q-adapter", tmp_path / str(seed), seed=seed, lora=NO_DROPOUT) for seed in (0, 1)]
    (tmp_path / "base").mkdir()
    measure_outcome(world.base, None, model=MODEL, ruler=ruler(world), out=tmp_path / "base")
    of_base = Outcome.read(tmp_path / "base")
    assert set(of_base.learnt) == {"harmless", "again"}
    assert len(of_base.learnt["harmless"].ids) == 24
    assert len(of_base.kept["retention/toy_facts/exact_match"].ids) == 24
    options = {"model": MODEL, "ruler": ruler(world), "weights": (0.5, 1.0), "factors": (1.0,), "of_base": of_base}
    out = tmp_path / "composed"
    out.mkdir()
    adapters = [folder / "adapter" for folder in folders]
    choose_weights(world.base, adapters, before=(1.0,), budget=Budget(max_forgetting=1), out=out, **options)  # type: ignore[arg-type]
    choice = read_json(out / "choice.json")
    assert [tuple(one["weights"]) for one in choice["tried"]] == [(1.0, 0.0), (1.0, 0.5), (1.0, 1.0)]
    best = max(one["adaptation"] for one in choice["tried"])
    assert next(one for one in choice["tried"] if one["weights"] == choice["weights"])["adaptation"] == best
    assert list(read_policy(out / "adapter").adapter_weights.values()) == choice["weights"]
    ids = torch.tensor([[1, 5, 7, 9]])
    rows = []
    with torch.no_grad():
        base_logits = load_base(world.base, MODEL)[0](ids).logits
        for folder in (*adapters, out / "adapter"):
            policy = load_policy(load_base(world.base, MODEL)[0], folder)
            rows.append(policy(ids).logits.log_softmax(-1))
    start = base_logits.log_softmax(-1)
    summed = start + sum(w * (row - start) for w, row in zip(choice["weights"], rows[:2], strict=True))
    torch.testing.assert_close(rows[2], summed.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_too_few_items_to_choose_on_are_refused(world: TinyToy, tmp_path: Path) -> None:
    few = outcome((0.5,), 0.5)
    small = Outcome({name: Measure(one.ids[:2], one.values[:2]) for name, one in few.learnt.items()}, few.kept)
    folder = world.train("q-adapter", tmp_path / "few", lora=NO_DROPOUT)
    with pytest.raises(QAdapterError, match=r"items of one are in the half .* at least 4"):
        choose_weights(
            world.base, [folder / "adapter"], model=MODEL, ruler=ruler(world), before=(), budget=Budget(),
            weights=(1.0,), factors=(1.0,), of_base=small, out=tmp_path,
        )  # fmt: skip
