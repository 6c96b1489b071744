"""New pairs under champion and candidate, and labels that the champion is sure are the other way round."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qadapter.evaluation import new_rows
from qadapter.evaluation.new_rows import measure_new_rows
from qadapter.evaluation.new_rows_text import new_rows_sentence, reversed_sentence
from qadapter.evaluation.preference import score_pairs
from qadapter.evaluation.reversed_labels import View, look_reversed
from qadapter.policy.loading import load_base, load_policy
from qadapter.preferences.pair import load_pairs
from tests.support.tiny_toy import MODEL, TRAINING, make_tiny_toy, pair, rows, write_pairs


def heldout_margins(folder: Path, margins: list[float]) -> Path:
    """A champion's `pairs.jsonl` with these margins."""
    folder.mkdir()
    columns = {"rejected_log_prob": 0.0, "base_chosen_log_prob": 0.0, "base_rejected_log_prob": 0.0}
    lines = [json.dumps({"chosen_log_prob": margin, **columns}) for margin in margins]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_flipped_labels_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters trained for a moment; every margin is scored here too, and the threshold is set between two of them."""
    toy = make_tiny_toy(tmp_path / "toy")
    training = TRAINING.model_copy(update={"learning_rate": 5e-2, "max_steps": 8, "save_steps": None})
    champion = toy.train("q-adapter", tmp_path / "champion", training=training) / "adapter"
    candidate = toy.train("sft", tmp_path / "candidate", training=training) / "adapter"
    good = load_pairs(toy.heldout)[:6]
    flipped = [pair(str(p.prompt[-1]["content"]), p.rejected, p.chosen) for p in good]
    fresh = write_pairs(tmp_path / "fresh.jsonl", [*good, *flipped])
    expected = {}
    for name, adapter in {"base": None, "champion": champion, "candidate": candidate}.items():
        network, tokenizer = load_base(toy.base, MODEL)
        policy = load_policy(network, adapter)
        found = score_pairs(policy, tokenizer, load_pairs(fresh), max_length=64, batch_size=4)
        expected[name] = found.chosen - found.rejected
    of_champion = expected["champion"] - expected["base"]
    # A pair and its reverse have opposite margins: exactly the surest half is suspected at their median.
    adaptation = heldout_margins(tmp_path / "adaptation", np.abs(of_champion[:6]).tolist())
    threshold = float(np.median(np.abs(of_champion[:6])))
    out = tmp_path / "out"
    out.mkdir()
    measure_new_rows(
        toy.base, champion, candidate, fresh, adaptation, model=MODEL, max_length=64, batch_size=4, out=out
    )
    written = rows(out / "new_rows.jsonl")
    assert [row["champion_margin"] for row in written] == pytest.approx(of_champion.tolist(), abs=1e-4)
    of_candidate = expected["candidate"] - expected["base"]
    assert [row["candidate_margin"] for row in written] == pytest.approx(of_candidate.tolist(), abs=1e-4)
    assert [row["suspected"] for row in written] == [margin < -threshold for margin in of_champion]
    assert sum(row["suspected"] for row in written) == 3
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["new_rows/champion_accuracy"] == 0.5
    assert metrics["new_rows/suspected_flips"] == 3
    text = new_rows_sentence(out)
    assert "of 12 new pairs the candidate prefers the chosen reply in 0." in text
    assert "the champion in 0.500; 3 labels may be flipped" in text

    monkeypatch.setattr(new_rows, "MOST", 4)
    first = tmp_path / "first"
    first.mkdir()
    measure_new_rows(toy.base, None, candidate, fresh, None, model=MODEL, max_length=64, batch_size=4, out=first)
    assert [row["champion_margin"] for row in rows(first / "new_rows.jsonl")] == [None] * 4
    assert "champion" not in new_rows_sentence(first)


@pytest.mark.slow
def test_new_pairs_of_which_none_can_be_scored_are_a_note(tmp_path: Path) -> None:
    """Their replies differ behind `max_length` only. The candidate was trained on earlier pairs, and is judged."""
    toy = make_tiny_toy(tmp_path / "toy")
    training = TRAINING.model_copy(update={"max_steps": 1, "save_steps": None})
    adapter = toy.train("q-adapter", tmp_path / "adapter", training=training) / "adapter"
    same = "sorry , i can not help with that . " * 40
    new = [pair("how ?", f"{same}yes", f"{same}no"), pair("why ?", f"{same}yes", f"{same}no")]
    fresh = write_pairs(tmp_path / "fresh.jsonl", new)
    trained = write_pairs(tmp_path / "train.jsonl", [*new, *load_pairs(toy.pairs)])
    adaptation = heldout_margins(tmp_path / "adaptation", [1.0])
    for champion, of_champion in ((adapter, adaptation), (None, None)):
        out = tmp_path / ("first" if champion is None else "later")
        out.mkdir()
        options = {"model": MODEL, "max_length": 64, "batch_size": 4, "out": out}
        measure_new_rows(toy.base, champion, adapter, fresh, of_champion, trained=trained, **options)
        assert rows(out / "new_rows.jsonl") == []
        assert new_rows_sentence(out).startswith("none of 2 new pairs can be scored, so the candidate learnt nothing")
        assert reversed_sentence(out) == ""


def share(right: int, of: int) -> np.ndarray:
    return np.array([1.0] * right + [0.0] * (of - right))


def test_both_views_decide_whether_a_delivery_looks_reversed() -> None:
    """Of 40 pairs 27 are .675 [.509, .814] and 13 the mirror; 24 of 40 are .600 [.433, .751], which may be chance."""
    base = View(share(13, 40), share(27, 40))  # against the preference before, for it now
    assert (base.direction, base.reading) == (-1, "reversed")
    sure, barely = View(share(38, 40), share(2, 40)), View(share(24, 40), share(16, 40))
    assert (sure.reading, barely.direction, barely.reading) == ("reversed", 0, "unknown")
    assert look_reversed(base, sure)
    assert look_reversed(base, barely)  # a champion that has learnt next to nothing does not speak against it
    assert not look_reversed(base, View(share(38, 40), share(37, 40)))
    assert not look_reversed(base, View(share(38, 40), share(20, 40)))  # another kind of pairs: it sees nothing in them
    assert not look_reversed(View(share(24, 40), share(2, 40)), sure)  # a base without a view
    assert not look_reversed(View(share(13, 40), share(13, 40)), sure)
    assert View(share(0, 19), share(19, 19)).reading == "unknown"  # too few


def test_a_view_counts_prompts() -> None:
    """24 of 40 prompts may be chance, and so may 96 of their 160 pairs; 190 pairs of 19 prompts are too few."""
    once, four = share(24, 40), np.tile(share(24, 40), 4)
    prompts = tuple(str(i % 40) for i in range(160))
    assert (View(once, once).direction, View(four, four).direction) == (0, 1)
    assert View(four, four, prompts, prompts).direction == 0
    sure = np.tile(share(27, 40), 4)
    assert View(sure, sure, prompts, prompts).reading == "usual"
    few = tuple(str(i % 19) for i in range(190))
    assert View(np.ones(190), np.ones(190), few, few).reading == "unknown"


@pytest.mark.slow
def test_a_reversed_delivery_is_seen_beside_earlier_pairs(tmp_path: Path) -> None:
    """The base's and the champion's shares of the reversed pairs are one minus those of the pairs themselves."""
    toy = make_tiny_toy(tmp_path / "toy")
    training = TRAINING.model_copy(update={"learning_rate": 5e-2, "max_steps": 8, "save_steps": None})
    champion = toy.train("q-adapter", tmp_path / "champion", training=training) / "adapter"
    good = [
        pair(" ".join([str(p.prompt[-1]["content"])] * times), p.chosen, p.rejected)
        for p in load_pairs(toy.pairs)
        for times in (1, 2, 3)
    ]
    reversed_ones = [pair(str(p.prompt[-1]["content"]), p.rejected, p.chosen) for p in good]
    fresh = write_pairs(tmp_path / "fresh.jsonl", reversed_ones)
    trained = write_pairs(tmp_path / "train.jsonl", [*reversed_ones, *good])
    adaptation = heldout_margins(tmp_path / "adaptation", [1.0])
    out = tmp_path / "out"
    out.mkdir()
    options = {"model": MODEL, "max_length": 64, "batch_size": 4, "out": out}
    measure_new_rows(toy.base, champion, champion, fresh, adaptation, trained=trained, **options)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["new_rows/n"] == metrics["new_rows/earlier/n"] == len(good) == 30
    for who in ("base", "champion"):
        assert metrics[f"new_rows/{who}_accuracy"] == pytest.approx(1 - metrics[f"new_rows/earlier/{who}_accuracy"])
    sentence = reversed_sentence(out)
    assert bool(sentence) is bool(metrics["new_rows/look_reversed"])
    (out / "metrics.json").write_text(json.dumps({**metrics, "new_rows/look_reversed": 1.0}))
    assert reversed_sentence(out).startswith(
        f"the labels of the delivery look reversed: the base prefers the chosen reply in "
        f"{metrics['new_rows/base_accuracy']:.3f} of the {len(good)} new pairs after "
    )
