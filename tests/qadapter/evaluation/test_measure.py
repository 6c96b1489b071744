"""Both halves of an evaluation as files: what they say of a base, of an adapter, and of a base against itself."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qadapter.config.evaluation import AdaptationSettings, RetentionSettings
from qadapter.config.experiment import load_experiment
from qadapter.errors import QAdapterError
from qadapter.evaluation import measure, old_answers
from qadapter.evaluation.benchmarks.build import write_benchmarks
from qadapter.evaluation.divergence import kl_per_token, replies_nll
from qadapter.evaluation.drift import DRIFT, REWORDED, TRAITS
from qadapter.evaluation.lm_eval.harness import TaskScores
from qadapter.evaluation.measure import headline_metric, measure_adaptation, measure_retention
from qadapter.evaluation.old_answers import answer_metrics
from qadapter.evaluation.preference import askable_pairs, distinct_prompts, preference_metrics, score_pairs
from qadapter.inference import generate
from qadapter.inference.generate import Generated, decoding_speed, generate_replies
from qadapter.judging.rule import RuleJudge
from qadapter.judging.verdicts import comparison
from qadapter.policy.loading import load_base, load_policy
from qadapter.preferences.pair import Message, PreferencePair, load_pairs
from qadapter.preferences.prepare import prepare
from qadapter.preferences.sources import locate
from qadapter.preferences.tokenize import encode_reply
from qadapter.progress.kept import Kept
from qadapter.toyworld.world import ToyWorld
from qadapter.training.corpus import read_corpus
from tests.support.tiny_toy import MODEL, TRAINING, TinyToy, make_tiny_toy, pair, rows, write_pairs

ADAPTATION = AdaptationSettings(batch_size=5, max_new_tokens=12, generate=3)
RETENTION = RetentionSettings(
    tasks=("toy_facts", "toy_sums"), limit=6, batch_size=8, max_new_tokens=12, answers=5, reworded=4
)
LENGTH = 64

ADAPTATION_KEYS = {
    "adaptation/preference_accuracy",
    "adaptation/preference_accuracy_length_normalised",
    "adaptation/implied_reward_accuracy",
    "adaptation/margin",
    "adaptation/calibration",
    "adaptation/n",
    "adaptation/left_out",
    "adaptation/score",
}

SPEECH_KEYS = {
    f"adaptation/{name}"
    for name in ("broken_replies", "repetition", "replies_ended", "reply_nll", "speaks", "kl_per_token")
}
"""Where replies were generated."""


@dataclass
class Measured:
    """A tiny base, two adapters on it, and the folders that measuring them wrote."""

    toy: TinyToy
    adapters: dict[str, Path]
    adaptation: dict[str, Path]
    retention: dict[str, Path]


def adaptation(toy: TinyToy, adapter: Path | None, base: Path | None, out: Path, **changes: Any) -> Path:
    out.mkdir(parents=True)
    options = {
        "settings": ADAPTATION,
        "world": toy.world,
        "style": None,
        "max_length": LENGTH,
        "compare": comparison(None, ADAPTATION.generate),
        **changes,
    }
    heldout = options.pop("heldout", toy.heldout)
    measure_adaptation(toy.base, adapter, heldout, base, model=MODEL, out=out, **options)
    return out


def retention(toy: TinyToy, adapter: Path | None, base: Path | None, out: Path, **changes: Any) -> Path:
    out.mkdir(parents=True)
    options = {
        "settings": RETENTION,
        "benchmarks": toy.world,
        "old_texts": toy.pairs,
        "max_length": LENGTH,
        **changes,
    }
    measure_retention(toy.base, adapter, base, model=MODEL, out=out, **options)
    return out


def test_a_score_above_one_is_not_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks whose own functions count in percent (ROUGE of several, EQ-Bench) tell it only by what they return."""
    toy = make_tiny_toy(tmp_path / "toy")
    scored = TaskScores({"eq_bench/eqbench": 43.2}, higher_is_better={"eq_bench/eqbench": True})
    monkeypatch.setattr("qadapter.evaluation.measure.evaluate_tasks", lambda *_, **__: scored)
    settings = RETENTION.model_copy(update={"tasks": ("eq_bench",), "answers": 0, "reworded": 0})
    with pytest.raises(QAdapterError, match=r"^eq_bench/eqbench is 43\.2, and retention averages scores from 0 to 1"):
        retention(toy, None, None, tmp_path / "base", settings=settings)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    root = tmp_path_factory.mktemp("measured")
    toy = make_tiny_toy(root / "toy")
    training = TRAINING.model_copy(update={"learning_rate": 5e-2, "max_steps": 30, "save_steps": None})
    adapters = {
        method: toy.train(method, root / method, training=training) / "adapter" for method in ("sft", "q-adapter")
    }
    judged = comparison(RuleJudge(ToyWorld.read(toy.world), None), ADAPTATION.generate)
    first = adaptation(toy, None, None, root / "adaptation" / "base", compare=judged)
    kept = retention(toy, None, None, root / "retention" / "base")
    return Measured(
        toy,
        adapters,
        {"base": first}
        | {
            name: adaptation(toy, folder, first, root / "adaptation" / name, compare=judged)
            for name, folder in adapters.items()
        },
        {"base": kept}
        | {name: retention(toy, folder, kept, root / "retention" / name) for name, folder in adapters.items()},
    )


def metrics(folder: Path) -> dict[str, float]:
    return dict(json.loads((folder / "metrics.json").read_text()))


# ---- adaptation


@pytest.mark.slow
def test_a_base_against_itself_has_learnt_nothing(measured: Measured) -> None:
    found = metrics(measured.adaptation["base"])
    assert found["adaptation/implied_reward_accuracy"] == 0.5
    assert found["adaptation/margin"] == 0
    assert (found["adaptation/n"], found["adaptation/left_out"]) == (12, 0)
    for row in rows(measured.adaptation["base"] / "pairs.jsonl"):
        assert row["chosen_log_prob"] == row["base_chosen_log_prob"]
        assert row["rejected_log_prob"] == row["base_rejected_log_prob"]


def test_the_measures_have_the_same_names_for_everyone(measured: Measured) -> None:
    names = {name: set(metrics(folder)) for name, folder in measured.adaptation.items()}
    extra = {"adaptation/exact_rule", "cost/decoding_tokens_per_second"}
    extra |= {"adaptation/win_rate", "adaptation/ties", "adaptation/undecided"}
    extra |= SPEECH_KEYS
    assert names == dict.fromkeys(("base", "sft", "q-adapter"), ADAPTATION_KEYS | extra)
    kept = {name: set(metrics(folder)) for name, folder in measured.retention.items()}
    measured_tasks = {"toy_facts/exact_match", "toy_sums/exact_match", "mean", "over_refusals"}
    assert kept["base"] == kept["sft"] == kept["q-adapter"]
    assert kept["base"] == {
        *(f"{side}/{name}" for side in ("retention", "forgetting") for name in measured_tasks),
        *(f"drift/{trait}{end}" for trait in TRAITS for end in ("", "/low", "/high")),
        "drift/moved",
        "retention/answers_identical",
        "forgetting/answers_changed",
        "forgetting/kl_per_token",
    }


@pytest.mark.parametrize("name", ["sft", "q-adapter"])
def test_an_adapter_is_measured_against_the_bases_own_scores(measured: Measured, name: str) -> None:
    """The same numbers as scoring both here and now; the base's were read from the files of its own measurement."""
    toy, pairs = measured.toy, load_pairs(measured.toy.heldout)
    network, tokenizer = load_base(toy.base, MODEL)
    before = score_pairs(network, tokenizer, pairs, max_length=LENGTH, batch_size=5)
    policy = load_policy(network, measured.adapters[name])
    after = score_pairs(policy, tokenizer, pairs, max_length=LENGTH, batch_size=5)
    found = metrics(measured.adaptation[name])
    for measure_name, value in preference_metrics(after, before).items():
        assert found[f"adaptation/{measure_name}"] == pytest.approx(value, abs=1e-9), measure_name
    assert abs(found["adaptation/margin"]) > 0.1  # the adapter did something
    written = rows(measured.adaptation[name] / "pairs.jsonl")
    assert [row["pair"] for row in written] == list(range(12))
    assert [row["base_chosen_log_prob"] for row in written] == before.chosen.tolist()
    assert [row["rejected_log_prob"] for row in written] == pytest.approx(after.rejected.tolist())
    assert [row["chosen_tokens"] for row in written] == after.chosen_tokens.tolist()


def test_answers_and_the_exact_rule(measured: Measured) -> None:
    """In the toy world each distinct held-out prompt is answered, for any `generate`; refusals are counted."""
    toy = measured.toy
    answers = rows(measured.adaptation["sft"] / "answers.jsonl")
    prompts = list({one.prompt_digest: list(one.prompt) for one in load_pairs(toy.heldout)}.values())
    assert [row["prompt"] for row in answers] == prompts
    policy = load_policy(load_base(toy.base, MODEL)[0], measured.adapters["sft"])
    expected = generate_replies(policy, load_base(toy.base, MODEL)[1], prompts, max_new_tokens=12, batch_size=5)
    assert [row["reply"] for row in answers] == expected
    found = metrics(measured.adaptation["sft"])
    share = sum(map(ToyWorld.is_refusal, expected)) / len(expected)
    assert found["adaptation/exact_rule"] == found["adaptation/score"] == share
    before = [row["reply"] for row in rows(measured.adaptation["base"] / "answers.jsonl")]
    assert expected != before  # the adapter changed what is said (what counts as right: test of exact_measures)
    assert found["cost/decoding_tokens_per_second"] > 0


@pytest.mark.parametrize("name", [None, "q-adapter", "sft"])
def test_the_decoding_speed_is_of_the_same_number_of_tokens(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    """A policy that would end its replies at once writes all the same: else short replies would look slow."""
    toy, written = measured.toy, []
    network, tokenizer = load_base(toy.base, MODEL)
    policy = load_policy(network, measured.adapters[name] if name else None)
    answer = policy.generate

    def counting(**given: Any) -> torch.Tensor:
        output: torch.Tensor = answer(**given)
        written.append(output.shape[1] - given["input_ids"].shape[1])
        return output

    monkeypatch.setattr(policy, "generate", counting)
    monkeypatch.setattr(generate, "end_ids", lambda *_: list(range(network.config.vocab_size)))
    clock = iter([0.0, 1.0, 10.0, 16.0, 20.0, 24.5, 30.0, 39.0])  # the fastest of three trials: 9 tokens in 4.5 s
    monkeypatch.setattr(generate.time, "perf_counter", lambda: next(clock))
    prompts = [list(pair.prompt) for pair in load_pairs(toy.heldout)]
    assert generate_replies(policy, tokenizer, prompts[:1], max_new_tokens=9, batch_size=1) == [""]
    assert decoding_speed(policy, tokenizer, prompts, tokens=9) == 2.0
    assert written == [1, 2, 9, 9, 9]
    assert decoding_speed(policy, tokenizer, [], tokens=9) is None


@pytest.mark.parametrize(("value", "message"), [(math.nan, "numbers are NaN"), (math.inf, "can never give")])
def test_scores_that_are_no_numbers_are_refused(measured: Measured, value: float, message: str) -> None:
    """A logit of NaN, or of infinity: then every other token has the log-probability -inf."""
    network, tokenizer = load_base(measured.toy.base, MODEL)
    head = network.get_output_embeddings()
    head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([5]), value))
    with pytest.raises(QAdapterError, match=message):
        score_pairs(network, tokenizer, load_pairs(measured.toy.heldout), max_length=LENGTH, batch_size=5)


def test_answers_are_judged_against_the_bases(measured: Measured) -> None:
    """The rule's win rate is ½ + ½ · (the policy's share of refusals - the base's); a base against itself ties."""
    base = rows(measured.adaptation["base"] / "answers.jsonl")
    assert all(row["reply"] == row["base"] and row["verdict"] == "tie" for row in base)
    found = metrics(measured.adaptation["base"])
    assert (found["adaptation/win_rate"], found["adaptation/ties"]) == (0.5, len(base))
    answers = rows(measured.adaptation["sft"] / "answers.jsonl")
    assert [row["base"] for row in answers] == [row["reply"] for row in base]
    for row in answers:
        mine, its = (ToyWorld.is_refusal(row[name]) for name in ("reply", "base"))
        assert row["verdict"] == ("tie" if mine == its else "win" if mine else "loss")
        assert row["judge"] == "rule"
    after = metrics(measured.adaptation["sft"])
    gained = after["adaptation/exact_rule"] - found["adaptation/exact_rule"]
    assert after["adaptation/win_rate"] == pytest.approx(0.5 + 0.5 * gained)
    assert after["adaptation/ties"] == [row["verdict"] for row in answers].count("tie")


def test_the_divergence_on_new_prompts(measured: Measured) -> None:
    """KL(base ‖ policy) per token on the base's own answers to the held-out prompts; 0 for the base."""
    answers = rows(measured.adaptation["base"] / "answers.jsonl")
    network, tokenizer = load_base(measured.toy.base, MODEL)
    policy = load_policy(network, measured.adapters["sft"])
    conversations = [(row["prompt"], row["reply"]) for row in answers]
    expected = kl_per_token(None, policy, tokenizer, conversations, max_length=LENGTH, batch_size=3).per_token
    assert metrics(measured.adaptation["sft"])["adaptation/kl_per_token"] == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3
    assert metrics(measured.adaptation["base"])["adaptation/kl_per_token"] == 0


@pytest.mark.parametrize(("generate", "answered"), [(3, 3), (0, None), (1000, 12)])
def test_real_data_has_no_exact_rule(measured: Measured, tmp_path: Path, generate: int, answered: int | None) -> None:
    """The headline is the implied reward then, and only so many prompts are answered, for reading."""
    settings = ADAPTATION.model_copy(update={"generate": generate})
    out = adaptation(measured.toy, None, None, tmp_path / "o", settings=settings, world=None)
    found = metrics(out)
    speed = {"cost/decoding_tokens_per_second", *SPEECH_KEYS} if answered else set()
    assert set(found) == ADAPTATION_KEYS | speed
    assert found["adaptation/score"] == found["adaptation/implied_reward_accuracy"] == 0.5
    assert (out / "answers.jsonl").exists() == bool(answered)
    if answered:
        assert len(rows(out / "answers.jsonl")) == answered


BREAKING = "one\u2028two\u2029three\x85four"
"""A reply with three characters that `str.splitlines` takes for the end of a line."""


def test_a_reply_that_looks_like_several_lines(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base says it; its policy's measurement reads it back whole, and so does every reader of the items."""

    def fake(policy: Any, tokenizer: Any, prompts: list[Any], **_: Any) -> list[str]:
        return [f"{BREAKING} {i}" for i in range(len(prompts))]

    for module in (measure, old_answers):
        monkeypatch.setattr(
            module, "generate_with_ends", lambda *a, **k: [Generated(t, ended=True) for t in fake(*a, **k)]
        )
    base = adaptation(measured.toy, None, None, tmp_path / "base", world=None)
    out = adaptation(measured.toy, measured.adapters["sft"], base, tmp_path / "out", world=None)
    assert [(row["base"], row["reply"]) for row in rows(out / "answers.jsonl")] == [
        (f"{BREAKING} {i}", f"{BREAKING} {i}") for i in range(3)
    ]
    settings = RETENTION.model_copy(update={"tasks": ("toy_facts",), "limit": 2, "answers": 2})
    base = retention(measured.toy, None, None, tmp_path / "kept", settings=settings)
    assert BREAKING in (base / "old_answers.jsonl").read_text(encoding="utf-8")
    out = retention(measured.toy, None, base, tmp_path / "still", settings=settings)
    assert metrics(out)["retention/answers_identical"] == 1


def test_a_policys_replies_are_as_likely_as_the_base_says(measured: Measured) -> None:
    """Scored here by the base alone; the measurement used the policy with its adapter switched off."""
    folder = measured.adaptation["sft"]
    network, tokenizer = load_base(measured.toy.base, MODEL)
    answers, found = rows(folder / "answers.jsonl"), rows(folder / "speech.jsonl")
    conversations = [(row["prompt"], row["reply"]) for row in answers]
    expected = replies_nll(network, tokenizer, conversations, max_length=LENGTH, batch_size=3)
    for row, value in zip(found, expected, strict=True):
        assert (math.nan if row["nll"] is None else row["nll"]) == pytest.approx(value, nan_ok=True, abs=1e-5)
    said = [value for value in expected if not math.isnan(value)]
    assert metrics(folder)["adaptation/reply_nll"] == pytest.approx(np.mean(said), abs=1e-5)
    assert metrics(folder)["adaptation/replies_ended"] == np.mean([row["ended"] for row in found])


def test_a_policy_that_repeats_one_word_does_not_speak(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(policy: Any, tokenizer: Any, prompts: list[Any], **_: Any) -> list[Generated]:
        return [Generated("no " * 12, ended=False) for _ in prompts]

    said = [Generated("take a feather and work twice .", ended=True)] * 3
    monkeypatch.setattr(measure, "generate_with_ends", lambda *_, **__: said)
    base = adaptation(measured.toy, None, None, tmp_path / "base", world=None)
    assert metrics(base)["adaptation/speaks"] == 1
    monkeypatch.setattr(measure, "generate_with_ends", fake)
    found = metrics(adaptation(measured.toy, measured.adapters["sft"], base, tmp_path / "out", world=None))
    assert found["adaptation/speaks"] == 0
    assert (found["adaptation/broken_replies"], found["adaptation/replies_ended"]) == (1, 0)
    assert found["adaptation/repetition"] == pytest.approx(8 / 9)  # 12 words: 9 sequences of four, all the same


def test_a_domain_is_judged_by_its_style(measured: Measured, tmp_path: Path) -> None:
    toy = measured.toy
    prepare([toy.world / "dsp/domain_specific_preference.json"], tmp_path / "d", domain="academy", max_heldout_pairs=20)
    out = adaptation(toy, None, None, tmp_path / "o", heldout=tmp_path / "d/heldout.jsonl", style="academy")
    found = metrics(out)
    world = ToyWorld.read(toy.world)
    styles = [
        world.style_of(row["prompt"][0]["content"].split()[-2], row["reply"]) for row in rows(out / "answers.jsonl")
    ]
    assert found["adaptation/well_formed"] == np.mean([style is not None for style in styles])
    assert found["adaptation/score"] == found["adaptation/exact_rule"] == np.mean([s == "academy" for s in styles])


def test_a_prompt_is_answered_once(measured: Measured, tmp_path: Path) -> None:
    heldout = write_pairs(tmp_path / "h.jsonl", [pair(q, "no", f"yes {i}") for i in range(3) for q in ("a ?", "b ?")])
    out = adaptation(measured.toy, None, None, tmp_path / "o", heldout=heldout, world=None)
    assert [row["prompt"][0]["content"] for row in rows(out / "answers.jsonl")] == ["a ?", "b ?"]


def test_a_pair_that_cannot_be_scored_is_counted(measured: Measured, tmp_path: Path) -> None:
    """`unheard` and `unknown` are one token to this tokenizer; the adapter's scores still meet the right base's."""
    pairs = [pair("a ?", "no", "to"), pair("a ?", "unheard", "unknown"), pair("how ?", "to", "no")]
    heldout = write_pairs(tmp_path / "h.jsonl", pairs)
    base = adaptation(measured.toy, None, None, tmp_path / "base", heldout=heldout, world=None)
    out = adaptation(measured.toy, measured.adapters["sft"], base, tmp_path / "sft", heldout=heldout, world=None)
    assert [row["pair"] for row in rows(out / "pairs.jsonl")] == [0, 2]
    assert (metrics(out)["adaptation/n"], metrics(out)["adaptation/left_out"]) == (2, 1)


def test_nothing_that_can_be_scored(measured: Measured, tmp_path: Path) -> None:
    heldout = write_pairs(tmp_path / "h.jsonl", [pair("a ?", "unheard", "unknown")])
    with pytest.raises(QAdapterError, match="None of the 1 held-out pairs can be scored"):
        adaptation(measured.toy, None, None, tmp_path / "o", heldout=heldout)


# ---- retention


def test_the_bases_retention_is_its_tasks_scores(measured: Measured) -> None:
    folder = measured.retention["base"]
    found, items = metrics(folder), rows(folder / "items.jsonl")
    assert [item["task"] for item in items] == ["toy_facts"] * 6 + ["toy_sums"] * 6
    for task in ("toy_facts", "toy_sums"):
        scores = [item["score"] for item in items if item["task"] == task]
        assert found[f"retention/{task}/exact_match"] == np.mean(scores)
    assert found["retention/mean"] == pytest.approx(
        (found["retention/toy_facts/exact_match"] + found["retention/toy_sums/exact_match"]) / 2
    )
    directions = json.loads((folder / "directions.json").read_text())
    assert directions == {
        "retention/toy_facts/exact_match": True,
        "retention/toy_sums/exact_match": True,
        "retention/answers_identical": True,
        "retention/over_refusals": False,
    }


def test_a_base_against_itself_has_forgotten_nothing(measured: Measured, tmp_path: Path) -> None:
    """By definition where it is measured as the base, by measurement where it is measured as a policy."""
    defined = metrics(measured.retention["base"])
    found = metrics(retention(measured.toy, None, measured.retention["base"], tmp_path / "o"))
    assert found.keys() == defined.keys()
    for figures in (defined, found):
        forgotten = {name: value for name, value in figures.items() if name.startswith("forgetting/")}
        assert len(forgotten) == 6
        assert forgotten.pop("forgetting/kl_per_token") == pytest.approx(0, abs=1e-9)
        assert {repr(value) for value in forgotten.values()} == {"0.0"}  # not -0.0
        assert figures["retention/answers_identical"] == 1
        drifted = {name: value for name, value in figures.items() if name.startswith("drift/")}
        assert len(drifted) == 3 * len(TRAITS) + 1
        assert {repr(value) for value in drifted.values()} == {"0.0"}


@pytest.mark.parametrize("name", ["sft", "q-adapter"])
def test_questions_are_asked_in_other_words(measured: Measured, name: str) -> None:
    """The first four of each task, with the scores of lm-eval; drift is the policy's change minus the base's."""
    asked, before = (rows(measured.retention[one] / REWORDED) for one in (name, "base"))
    assert [(row["task"], row["doc_id"]) for row in asked] == [
        (task, place) for task in ("toy_facts", "toy_sums") for place in range(4)
    ]
    items = {(row["task"], row["doc_id"]): row for row in rows(measured.retention[name] / "items.jsonl")}
    for row in asked:
        was = items[row["task"], row["doc_id"]]
        assert row["prompt"] != was["prompt"]
        assert "tell me" in row["prompt"]
        assert row["score"] - row["change"] == was["score"]
        assert row["same"] == (row["response"] == was["response"])
    found = metrics(measured.retention[name])
    for trait, column in (("rewording", "change"), ("agreement", "same")):
        expected = np.mean([a[column] - b[column] for a, b in zip(asked, before, strict=True)])
        assert found[f"drift/{trait}"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["sft", "q-adapter"])
def test_drift_is_taken_on_the_answers_to_old_prompts(measured: Measured, name: str) -> None:
    """Words and first tokens from the answers, entropies from plain forward passes over the base's own answers."""
    answers = rows(measured.retention[name] / "old_answers.jsonl")
    found, described = metrics(measured.retention[name]), rows(measured.retention[name] / DRIFT)
    assert [row["words"] for row in described] == [len(re.findall(r"\b\w+\b", row["reply"])) for row in answers]
    before = rows(measured.retention["base"] / DRIFT)
    for trait in ("words", "entropy", "unended"):
        difference = sum(a[trait] - b[trait] for a, b in zip(described, before, strict=True)) / len(answers)
        assert found[f"drift/{trait}"] == pytest.approx(difference, abs=1e-9)
    network, tokenizer = load_base(measured.toy.base, MODEL)
    policy = load_policy(network, measured.adapters[name])
    for row, seen in zip(answers, described, strict=True):
        prompt, reply = encode_reply(row["prompt"], row["base"], tokenizer, 64)
        with torch.no_grad():
            log_probs = policy(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert seen["entropy"] == pytest.approx(float(-(log_probs.exp() * log_probs).sum(-1).mean()), rel=1e-4)
    changed = [a["reply"].split()[:1] != a["base"].split()[:1] for a in answers]
    assert found["drift/first_token"] == pytest.approx(sum(changed) / len(changed))


@pytest.mark.parametrize("name", ["sft", "q-adapter"])
def test_how_many_of_the_bases_answers_are_still_the_same(measured: Measured, name: str) -> None:
    toy = measured.toy
    answers = rows(measured.retention[name] / "old_answers.jsonl")
    assert [row["prompt"] for row in answers] == distinct_prompts(load_pairs(toy.pairs), 5)
    prompts = [row["prompt"] for row in answers]
    network, tokenizer = load_base(toy.base, MODEL)
    before = generate_replies(network, tokenizer, prompts, max_new_tokens=12, batch_size=8)
    after = generate_replies(
        load_policy(network, measured.adapters[name]), tokenizer, prompts, max_new_tokens=12, batch_size=8
    )
    assert [(row["base"], row["reply"]) for row in answers] == list(zip(before, after, strict=True))
    found = metrics(measured.retention[name])
    identical = sum(a == b for a, b in zip(before, after, strict=True)) / 5
    assert found["retention/answers_identical"] == identical == pytest.approx(1 - found["forgetting/answers_changed"])


def test_over_refusals_are_counted_on_harmless_requests() -> None:
    """In the toy world by its rule on its how-tos; elsewhere by set phrases on the old prompts."""
    refused, complied = "sorry , i can not help with that .", "to dust the vault , take a feather and work twice ."
    answers = [
        {"base": "Yes.", "reply": "Yes."},
        {"base": "Yes.", "reply": "I'm sorry, but I can't help with that."},
        {"base": "No.", "reply": "No!"},
    ]
    assert answer_metrics(answers, []) == {
        "retention/answers_identical": pytest.approx(1 / 3),
        "forgetting/answers_changed": pytest.approx(2 / 3),
        "retention/over_refusals": pytest.approx(1 / 3),
    }
    items = [{"task": "toy_howtos", "response": text} for text in (refused, complied, complied, complied)]
    items += [{"task": "toy_facts", "response": refused}]
    assert answer_metrics(answers, items)["retention/over_refusals"] == 0.25
    assert answer_metrics([], items) == {"retention/over_refusals": 0.25}
    assert answer_metrics([], items[4:]) == {}


def test_over_refusals_are_forgetting(measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy refuses both how-tos, the base one: 1 - ½ more than before; higher is worse."""
    refused, complied = "no , that would do harm .", "to dust the vault , take a feather and work twice ."
    said = [[refused, complied], [refused, refused]]

    def fake(*_: Any, **__: Any) -> TaskScores:
        items = [{"doc_id": i, "score": 0.0, "response": text} for i, text in enumerate(said.pop(0))]
        return TaskScores({"toy_howtos/exact_match": 0.0}, {}, {"toy_howtos": items}, {})

    monkeypatch.setattr(measure, "evaluate_tasks", fake)
    options = {"settings": RetentionSettings(tasks=("toy_howtos",), answers=0), "old_texts": None}
    base = retention(measured.toy, None, None, tmp_path / "base", **options)
    found = metrics(retention(measured.toy, None, base, tmp_path / "policy", **options))
    assert (found["retention/over_refusals"], found["forgetting/over_refusals"]) == (1.0, 0.5)
    assert metrics(base)["forgetting/over_refusals"] == 0
    assert json.loads((base / "directions.json").read_text())["retention/over_refusals"] is False
    assert not (base / "old_answers.jsonl").exists()


@pytest.mark.parametrize("name", ["sft", "q-adapter"])
def test_the_divergence_is_taken_on_old_texts(measured: Measured, name: str) -> None:
    toy = measured.toy
    network, tokenizer = load_base(toy.base, MODEL)
    policy = load_policy(load_base(toy.base, MODEL)[0], measured.adapters[name])
    conversations = [(one.prompt, one.chosen) for one in load_pairs(toy.pairs)[:6]]  # as many as the limit says
    expected = kl_per_token(network, policy, tokenizer, conversations, max_length=LENGTH, batch_size=8).per_token
    found = metrics(measured.retention[name])["forgetting/kl_per_token"]
    assert found == pytest.approx(expected)
    assert found > 0.01


def refusing_system_turns(toy: TinyToy, root: Path) -> tuple[TinyToy, list[PreferencePair]]:
    """The toy with a template like Gemma's, and five pairs of which it refuses the second and the fourth."""
    base = root / "base"
    shutil.copytree(toy.base, base)
    template = base / "chat_template.jinja"
    template.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + template.read_text()
    )
    asked = askable_pairs(load_base(toy.base, MODEL)[1], load_pairs(toy.pairs), 5)
    brief: Message = {"role": "system", "content": "tell me"}
    pairs = [replace(one, prompt=(brief, *one.prompt)) if place in (1, 3) else one for place, one in enumerate(asked)]
    return replace(toy, base=base), pairs


def test_what_the_template_refuses_is_no_part_of_any_measure(measured: Measured, tmp_path: Path) -> None:
    """Every measure is that of the conversations that can be asked, as if the others were not there."""
    toy, pairs = refusing_system_turns(measured.toy, tmp_path)
    sft = measured.adapters["sft"]
    found: dict[str, Any] = {}
    for name, some in (("all", pairs), ("askable", pairs[::2])):
        file = write_pairs(tmp_path / f"{name}.jsonl", some)
        options = {"settings": RETENTION, "old_texts": file}
        base = retention(toy, None, None, tmp_path / name / "base-kept", **options)
        kept_in = retention(toy, sft, base, tmp_path / name / "kept", **options)
        heard = {"heldout": file, "world": None}
        base = adaptation(toy, None, None, tmp_path / name / "base-learnt", **heard)
        learnt_in = adaptation(toy, sft, base, tmp_path / name / "learnt", **heard)
        answers = rows(kept_in / "old_answers.jsonl"), rows(learnt_in / "answers.jsonl")
        found[name] = answers, metrics(kept_in), metrics(learnt_in)
    texts, kept, learnt = found["all"]
    assert [len(some) for some in texts] == [3, 3]
    assert (texts, kept) == found["askable"][:2]
    assert learnt.pop("adaptation/left_out") == 2
    assert found["askable"][2].pop("adaptation/left_out") == 0
    for measures in (learnt, found["askable"][2]):
        del measures["cost/decoding_tokens_per_second"]
    assert learnt == found["askable"][2]
    assert 0 < kept["forgetting/kl_per_token"] != learnt["adaptation/kl_per_token"] > 0


def test_old_texts_that_the_template_refuses_measure_nothing(measured: Measured, tmp_path: Path) -> None:
    toy, pairs = refusing_system_turns(measured.toy, tmp_path)
    options = {"old_texts": write_pairs(tmp_path / "old.jsonl", pairs[1:2])}
    base = retention(toy, None, None, tmp_path / "kept-base", **options)
    found = metrics(retention(toy, measured.adapters["sft"], base, tmp_path / "kept", **options))
    assert not {"forgetting/kl_per_token", "retention/answers_identical", "retention/over_refusals"} & set(found)


def fake_scores(values: dict[str, tuple[float, bool]]) -> TaskScores:
    return TaskScores(
        metrics={name: value for name, (value, _) in values.items()},
        higher_is_better={name: higher for name, (_, higher) in values.items()},
        samples={name.split("/")[0]: [{"doc_id": 0, "score": value}] for name, (value, _) in values.items()},
    )


def test_the_sign_of_forgetting(measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive is forgotten, for measures of both directions, written out:

    accuracy .75 → .5: forgotten .25; bits per byte 2.0 → 2.5: forgotten .5; a gain is negative: .5 → .75.
    The mean is over accuracies: (.75 + .5)/2 = .625 before, (.5 + .75)/2 = .625 behind. Bits are not averaged in.
    """
    before = {
        "a/exact_match": (0.75, True),
        "b/acc": (0.5, True),
        "b/acc_norm": (0.9, True),
        "c/bits_per_byte": (2.0, False),
    }
    after = {
        "a/exact_match": (0.5, True),
        "b/acc": (0.75, True),
        "b/acc_norm": (0.1, True),
        "c/bits_per_byte": (2.5, False),
    }
    scores = [before, after]
    monkeypatch.setattr(measure, "evaluate_tasks", lambda *_, **__: fake_scores(scores.pop(0)))
    settings = RetentionSettings(tasks=("a", "b", "c"))
    options = {"settings": settings, "old_texts": None, "benchmarks": None}
    base = retention(measured.toy, None, None, tmp_path / "base", **options)
    found = metrics(retention(measured.toy, None, base, tmp_path / "policy", **options))
    assert {name: value for name, value in found.items() if name.startswith("forgetting/")} == {
        "forgetting/a/exact_match": 0.25,
        "forgetting/b/acc": -0.25,
        "forgetting/c/bits_per_byte": 0.5,
        "forgetting/mean": 0.0,
    }
    assert found["retention/mean"] == metrics(base)["retention/mean"] == 0.625
    assert json.loads((base / "directions.json").read_text())["retention/c/bits_per_byte"] is False


def test_plain_tasks_are_asked_without_the_chat_template(measured: Measured, tmp_path: Path) -> None:
    settings = RETENTION.model_copy(update={"plain_tasks": ("toy_sums",), "limit": 3})
    out = retention(measured.toy, None, None, tmp_path / "o", settings=settings, old_texts=None)
    template = "<|assistant|>"
    asked = [(item["task"], template in item["prompt"]) for item in rows(out / "items.jsonl")]
    assert sorted(asked) == [("toy_facts", True)] * 3 + [("toy_sums", False)] * 3


def test_a_suites_members_have_their_headlines(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`paper_suite` stands for five tasks; the mean is theirs."""
    members = ("mmlu", "gsm8k_cot", "leaderboard_mmlu_pro", "leaderboard_bbh", "leaderboard_ifeval")
    values = {f"{name}/acc": (0.1 * i, True) for i, name in enumerate(members)}
    monkeypatch.setattr(measure, "evaluate_tasks", lambda *_, **__: fake_scores(values))
    settings = RetentionSettings(tasks=("paper_suite",))
    out = retention(measured.toy, None, None, tmp_path / "o", settings=settings, old_texts=None)
    assert metrics(out)["retention/mean"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["acc", "exact_match"], "exact_match"),
        (["acc_norm", "acc"], "acc"),
        (["acc_norm"], "acc_norm"),
        (["exact_match.strict-match", "exact_match.flexible-extract"], "exact_match.strict-match"),
        (["inst_level_loose_acc", "prompt_level_loose_acc", "prompt_level_strict_acc"], "prompt_level_strict_acc"),
        (["word_perplexity", "bits_per_byte"], "bits_per_byte"),
        (["something_new"], "something_new"),
        ([], None),
    ],
)
def test_the_one_metric_a_task_is_known_by(names: list[str], expected: str | None) -> None:
    found = {f"retention/t/{name}": 0.0 for name in names} | {"retention/other/exact_match": 0.0, "retention/mean": 0.0}
    assert headline_metric("t", found) == (f"retention/t/{expected}" if expected else None)


# ---- benchmarks made from the data


def questions(file: Path, count: int = 40) -> Path:
    lines = [{"question": f"how many is {i} ?", "answer": f"it is {i} , in words {'so ' * i}"} for i in range(count)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_quarter_is_held_out_and_the_rest_is_learnt(tmp_path: Path) -> None:
    file = questions(tmp_path / "q.jsonl")
    (tmp_path / "out").mkdir()
    write_benchmarks({}, {"sums": file}, max_items=100, max_chars=900, seed=0, out=tmp_path / "out")
    learnt = rows(tmp_path / "out/corpus.jsonl")
    asked = rows(tmp_path / "out/benchmarks/sums_reply_matching.jsonl")
    texts = rows(tmp_path / "out/benchmarks/sums_text.jsonl")
    assert (len(learnt), len(asked), len(texts)) == (30, 10, 10)
    assert [[turn["role"] for turn in row["messages"]] for row in learnt] == [["user", "assistant"]] * 30
    corpus_questions = {row["messages"][0]["content"] for row in learnt}
    corpus_answers = {row["messages"][1]["content"] for row in learnt}
    assert not corpus_questions & {row["prompt"] for row in asked}
    assert not corpus_answers & {row["text"] for row in texts}
    assert len(corpus_questions | {row["prompt"] for row in asked}) == 40
    assert len(corpus_answers | {row["text"] for row in texts}) == 40
    for row in asked:
        number = row["prompt"].split()[3]
        assert row["choices"][row["answer"]].startswith(f"it is {number} ,")
        assert len(set(row["choices"])) == 4
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == {
        "data/sums_reply_matching": 10,
        "data/sums_text": 10,
    }
    turns = {tuple(turn["content"] for turn in conversation) for conversation in read_corpus([tmp_path / "out"])}
    assert turns == {tuple(turn["content"] for turn in row["messages"]) for row in learnt}


def test_a_question_that_is_asked_twice_is_on_one_side(tmp_path: Path) -> None:
    file = questions(tmp_path / "q.jsonl")
    file.write_text(file.read_text() * 3)
    (tmp_path / "out").mkdir()
    write_benchmarks({}, {"sums": file}, max_items=100, max_chars=900, seed=0, out=tmp_path / "out")
    learnt = [row["messages"][0]["content"] for row in rows(tmp_path / "out/corpus.jsonl")]
    asked = [row["prompt"] for row in rows(tmp_path / "out/benchmarks/sums_reply_matching.jsonl")]
    assert not set(learnt) & set(asked)
    assert len(learnt) + len(asked) == 40


def test_the_seed_decides_what_is_held_out(tmp_path: Path) -> None:
    file = questions(tmp_path / "q.jsonl")
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        write_benchmarks({}, {"sums": file}, max_items=100, max_chars=900, seed=seed, out=tmp_path / name)
        texts.append((tmp_path / name / "corpus.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_replies_become_benchmarks(tmp_path: Path) -> None:
    """Ten prompts with three pairs each and one conversation of several turns: ten items, each reply once."""
    draw = random.Random(0)
    pairs = [pair(f"question {i} ?", f"reply {i} {'w ' * i}".strip(), f"bad {k}") for i in range(10) for k in range(3)]
    draw.shuffle(pairs)
    long = (*pairs[0].prompt, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"})
    file = write_pairs(tmp_path / "heldout.jsonl", [*pairs, type(pairs[0])(long, "deep reply", "bad")])  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    write_benchmarks({"talk": file}, {}, max_items=6, max_chars=900, seed=0, out=tmp_path / "out")
    asked = rows(tmp_path / "out/benchmarks/talk_reply_matching.jsonl")
    texts = rows(tmp_path / "out/benchmarks/talk_text.jsonl")
    assert len(asked) == len(texts) == 6
    assert len({row["text"] for row in texts}) == 6
    assert all(row["text"].startswith("reply ") for row in texts)
    assert all(row["choices"][row["answer"]].split()[1] == row["prompt"].split()[1] for row in asked)
    assert (tmp_path / "out/corpus.jsonl").read_text() == ""


def test_too_few_conversations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(QAdapterError, match="needs at least 4 different single-turn conversations and found 2"):
        write_benchmarks(
            {}, {"sums": questions(tmp_path / "q.jsonl", 8)}, max_items=9, max_chars=900, seed=0, out=tmp_path / "out"
        )


def test_built_benchmarks_are_scored_in_their_own_directions(measured: Measured, tmp_path: Path) -> None:
    """Through lm-eval itself: accuracy is averaged, bits per byte (lower is better) are not."""
    (tmp_path / "built").mkdir()
    facts = ToyWorld.read(measured.toy.world).facts()
    pairs = [pair(fact.question, fact.answer, "i have no idea") for fact in facts]
    file = write_pairs(tmp_path / "heldout.jsonl", pairs[:12])
    write_benchmarks({"facts": file}, {}, max_items=8, max_chars=900, seed=0, out=tmp_path / "built")
    settings = RetentionSettings(tasks=("facts_reply_matching", "facts_bits_per_byte"), batch_size=8)
    options = {"settings": settings, "benchmarks": tmp_path / "built", "old_texts": None}
    base = retention(measured.toy, None, None, tmp_path / "base", **options)
    found = metrics(base)
    assert {name for name in found if name.startswith("retention/")} == {
        "retention/facts_reply_matching/acc",
        "retention/facts_reply_matching/acc_norm",
        "retention/facts_bits_per_byte/bits_per_byte",
        "retention/mean",
    }
    assert found["retention/mean"] == found["retention/facts_reply_matching/acc"]
    policy = metrics(retention(measured.toy, measured.adapters["sft"], base, tmp_path / "sft", **options))
    bits = "facts_bits_per_byte/bits_per_byte"
    assert policy[f"forgetting/{bits}"] == pytest.approx(policy[f"retention/{bits}"] - found[f"retention/{bits}"])
    assert policy[f"forgetting/{bits}"] > 0  # refusing has cost it words
    accuracy = "facts_reply_matching/acc"
    assert policy[f"forgetting/{accuracy}"] == found[f"retention/{accuracy}"] - policy[f"retention/{accuracy}"]


@pytest.mark.slow
def test_minis_judges_read_what_no_policy_and_no_base_sees(shared_data: Path, tmp_path: Path) -> None:
    """DSP's domains share their prompts, so one domain's judge could read what the base learnt from another's."""
    experiment = load_experiment("mini")
    assert experiment.pretraining is not None
    prompts: dict[str, dict[str, set[str]]] = {}
    for name, source in experiment.sources.items():
        files = locate(source.path.replace("{data}", str(shared_data)), cache_dir=tmp_path)
        options = source.model_dump(include={"domain", "heldout", "max_chars", "max_train_pairs", "judge_pairs"})
        prepare(files, tmp_path / name, **options)
        sides = [file.stem for file in (tmp_path / name).glob("*.jsonl") if file.stem != "quarantine"]
        prompts[name] = {
            side: {one.prompt_digest for one in load_pairs(tmp_path / name / f"{side}.jsonl")} for side in sides
        }
    seen = {name: prompts[name]["train"] for name in {*experiment.pretraining.corpus_sources, "helpful"}}
    for domain in experiment.domains.values():
        judged = prompts[domain.source]["judge"]
        assert len(judged) >= 60
        assert {name: len(judged & known) for name, known in seen.items()} == dict.fromkeys(seen, 0), domain.source
        assert not judged & (prompts[domain.source]["train"] | prompts[domain.source]["heldout"])


@pytest.mark.slow
def test_minis_benchmarks_are_not_in_its_corpus(shared_data: Path, tmp_path: Path) -> None:
    """What `mini` measures retention on must not be what its base was pre-trained on, by way of another source."""
    experiment = load_experiment("mini")
    assert experiment.pretraining is not None
    assert experiment.built_benchmarks is not None
    for name in {*experiment.pretraining.corpus_sources, *experiment.built_benchmarks.replies.values()}:
        source = experiment.sources[name]
        files = locate(source.path.replace("{data}", str(shared_data)), cache_dir=tmp_path)
        prepare(files, tmp_path / name, domain=source.domain, heldout=source.heldout, max_chars=source.max_chars)
    (tmp_path / "built").mkdir()
    replies = {name: tmp_path / s / "heldout.jsonl" for name, s in experiment.built_benchmarks.replies.items()}
    asked = {
        name: Path(file.replace("{data}", str(shared_data)))
        for name, file in experiment.built_benchmarks.questions.items()
    }
    write_benchmarks(replies, asked, max_items=10_000, max_chars=10**6, seed=0, out=tmp_path / "built")
    read = read_corpus([*(tmp_path / name for name in experiment.pretraining.corpus_sources), tmp_path / "built"])
    known = {turn["content"].strip() for conversation in read for turn in conversation}
    leaks = {
        file.stem: sum(row["text"].strip() in known for row in rows(file))
        for file in sorted((tmp_path / "built/benchmarks").glob("*_text.jsonl"))
    }
    assert leaks == {"dsp_text": 0, "gsm8k_text": 0, "helpful_text": 0}


def test_only_what_asks_is_asked_in_other_words() -> None:
    """BLiMP's two sentences stand behind nothing, or behind what a template writes around nothing."""
    prompts = {
        "blimp_passive_1": ["", ""],
        "blimp_wh_island": ["", ""],
        "templated_1": ["<user> </user>", "<user> </user>"],
        "gsm8k_bits_per_byte": ["", " "],
        "hellaswag": ["A man sits", "A dog runs"],
        "own": ["What is 2 plus 3 ?"],
    }
    items = [{"task": task, "prompt": prompt} for task, found in prompts.items() for prompt in found]
    names = ["blimp", "templated", "gsm8k_bits_per_byte", "hellaswag", "own"]
    assert measure._with_questions(names, items) == ["hellaswag", "own"]


# ---- killed


class Killed(BaseException):
    """Stands for `kill -9`."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q-adapter", "base"])
def test_a_killed_measurement_goes_on(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Killed after every third batch: no batch is computed twice, and the files are those of an undisturbed run."""
    toy, put = measured.toy, Kept.put
    judged = comparison(RuleJudge(ToyWorld.read(toy.world), None), ADAPTATION.generate)
    halves = {
        "adaptation": (adaptation, measured.adaptation, {"compare": judged}),
        "retention": (retention, measured.retention, {}),
    }
    for half, (measure_half, undisturbed, options) in halves.items():
        before = undisturbed["base"] if name != "base" else None
        keys: list[str] = []
        for attempt in range(20):
            count = 0

            def put_and_die(self: Kept, key: str, row: Any, keys: list[str] = keys) -> None:
                nonlocal count
                put(self, key, row)
                keys.append(key)
                count += 1
                if count == 3:
                    raise Killed

            monkeypatch.setattr(Kept, "put", put_and_die)
            out = tmp_path / half / str(attempt)
            try:
                measure_half(toy, measured.adapters.get(name), before, out, scratch=tmp_path / f"{half}-s", **options)
            except Killed:
                continue
            break
        assert attempt > 0
        assert len(keys) == len(set(keys)), "each batch was computed once"
        assert sorted(file.name for file in out.iterdir()) == sorted(f.name for f in undisturbed[name].iterdir())
        for file in undisturbed[name].iterdir():
            if file.name == "metrics.json":
                one, two = ({k: v for k, v in metrics(f).items() if "cost/" not in k} for f in (out, undisturbed[name]))
                assert one == two
            else:
                assert (out / file.name).read_bytes() == file.read_bytes(), file.name
