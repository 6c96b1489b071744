"""Preference measures, divergence and generation over the three kinds of policy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qadapter.errors import QAdapterError
from qadapter.evaluation.divergence import kl_per_token
from qadapter.evaluation.preference import (
    PairScores,
    calibration_error,
    encode_usable,
    margins,
    preference_metrics,
    score_pairs,
)
from qadapter.inference import score as scoring
from qadapter.inference.generate import generate_replies
from qadapter.preferences.pair import PreferencePair
from tests.support.tiny_chat import KINDS, byte_tokenizer, tiny_llama, tiny_policy

PAIRS = [
    PreferencePair(({"role": "user", "content": "name a tree"},), "oak", "a very long way to say no"),
    PreferencePair(({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}), "hello you", "bye"),
    PreferencePair(
        (
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "and now a question that is longer than the others?"},
        ),
        "4",
        "five",
    ),
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def scored(chosen: list[float], rejected: list[float], tokens: tuple[list[int], list[int]] | None = None) -> PairScores:
    n = len(chosen)
    chosen_tokens, rejected_tokens = tokens or ([1] * n, [1] * n)
    return PairScores(
        np.array(chosen), np.array(rejected), np.array(chosen_tokens), np.array(rejected_tokens), np.arange(n)
    )


def by_hand(model, tokenizer, pair: PreferencePair, reply: str) -> tuple[float, int]:
    """Σ log p of the reply's tokens and <eos>, one pair at a time, without padding."""
    prompt = tokenizer.apply_chat_template(list(pair.prompt), add_generation_prompt=True, tokenize=False)
    before = tokenizer.encode(prompt, add_special_tokens=False)
    after = [*tokenizer.encode(reply, add_special_tokens=False), tokenizer.eos_token_id]
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(log_probs[len(before) + i - 1, token].item() for i, token in enumerate(after)), len(after)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_those_of_one_reply_at_a_time(kind, batch_size, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 262 * 3)  # three positions at a time
    model = tiny_policy(kind, seed=1)
    scores = score_pairs(model, tokenizer, PAIRS, max_length=256, batch_size=batch_size)
    for i, pair in enumerate(PAIRS):
        assert (scores.chosen[i], scores.chosen_tokens[i]) == pytest.approx(
            by_hand(model, tokenizer, pair, pair.chosen)
        )
        assert (scores.rejected[i], scores.rejected_tokens[i]) == pytest.approx(
            by_hand(model, tokenizer, pair, pair.rejected)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_positions_of_replies_are_computed(kind, tokenizer) -> None:
    """Two replies a pass, longest first: logits from the first one's begin on, and none behind the last token."""
    model = tiny_policy(kind)
    shapes: list[int] = []
    model.register_forward_hook(lambda module, args, output: shapes.append(output.logits.shape[1]))
    score_pairs(model, tokenizer, PAIRS, max_length=256, batch_size=1)
    _, encoded = encode_usable(tokenizer, PAIRS, 256)
    replies = [(len(e.prompt_ids), len(ids)) for e in encoded for ids in (e.chosen_ids, e.rejected_ids)]
    replies.sort(key=sum, reverse=True)
    passes = [replies[i : i + 2] for i in range(0, len(replies), 2)]
    assert shapes == [max(map(sum, two)) - min(prompt for prompt, _ in two) for two in passes]


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_that_several_pairs_share_is_scored_once(kind, tokenizer) -> None:
    """DSP's pairs of one prompt share the chosen reply. The same reply to another prompt is another text."""
    model = tiny_policy(kind, seed=1)
    first, other = PAIRS[0].prompt, PAIRS[-1].prompt
    pairs = [
        PreferencePair(first, "red", "green"),
        PreferencePair(first, "red", "blue and more"),
        PreferencePair(other, "red", "green"),
    ]
    rows: list[int] = []
    counting = model.register_forward_hook(lambda module, args, output: rows.append(len(output.logits)))
    scores = score_pairs(model, tokenizer, pairs, max_length=256, batch_size=8)
    counting.remove()
    assert sum(rows) == 5
    for i, pair in enumerate(pairs):
        found = [(scores.chosen[i], scores.chosen_tokens[i]), (scores.rejected[i], scores.rejected_tokens[i])]
        for (log_prob, tokens), reply in zip(found, (pair.chosen, pair.rejected), strict=True):
            assert (log_prob, tokens) == pytest.approx(by_hand(model, tokenizer, pair, reply))
    assert scores.chosen[0] == scores.chosen[1] != scores.chosen[2]


def test_training_mode_is_restored_and_cut_pairs_are_counted(tokenizer) -> None:
    model = tiny_llama().train()
    same_beginning = PreferencePair(PAIRS[0].prompt, "x" * 40 + "a", "x" * 40 + "b")
    scores = score_pairs(model, tokenizer, [same_beginning, *PAIRS], max_length=32, batch_size=4)
    assert model.training
    assert (len(scores), scores.left_out, scores.indices.tolist()) == (3, 1, [1, 2, 3])
    with pytest.raises(QAdapterError, match="None of the 1 held-out pairs"):
        score_pairs(model, tokenizer, [same_beginning], max_length=32, batch_size=4)


def test_metrics_by_hand() -> None:
    """Margins: (-1+2) - (-3+2) = 2; (-4+4) - (-2+2) = 0, a tie; (-5+3) - (-5+5) = -2.

    Summed: -1 > -3, -4 < -2, -5 = -5: (1 + 0 + ½)/3. By length: -1/1 > -3/1, -4/4 > -2/1, -5/5 = -5/5: (1 + 1 + ½)/3.
    Implied: (1 + ½ + 0)/3. Calibration, confidences σ(2), ½, σ(2): in the upper bin the gap is 1 + 0 - 2σ(2), in the
    lowest ½ - ½.
    """
    scores = scored([-1, -4, -5], [-3, -2, -5], ([1, 4, 5], [1, 1, 5]))
    base = scored([-2, -4, -3], [-2, -2, -5])
    assert margins(scores, base).tolist() == [2, 0, -2]
    sigma = 1 / (1 + math.exp(-2))
    expected = {
        "preference_accuracy": 0.5,
        "preference_accuracy_length_normalised": 2.5 / 3,
        "implied_reward_accuracy": 0.5,
        "margin": 0.0,
        "calibration": (2 * sigma - 1) / 3,
        "n": 3,
        "left_out": 0,
    }
    assert preference_metrics(scores, base) == pytest.approx(expected)


def test_the_base_itself_implies_one_half() -> None:
    base = scored([-1, -7, -3], [-2, -2, -5])
    metrics = preference_metrics(base, base)
    assert (metrics["implied_reward_accuracy"], metrics["margin"], metrics["calibration"]) == (0.5, 0, 0)


def test_different_pairs_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different pairs"):
        preference_metrics(scored([-1], [-2]), scored([-1, -1], [-2, -2]))


def test_calibration_error_of_good_and_overconfident_margins() -> None:
    """Of margins ±log 3, σ = ¾, three in four positive is calibrated, all positive leaves ¼; extremes stay finite."""
    margin = np.log(3) * np.array([1.0, 1.0, 1.0, -1.0])
    assert calibration_error(margin) == pytest.approx(0, abs=1e-12)
    assert calibration_error(np.abs(margin)) == pytest.approx(0.25)
    assert calibration_error(np.array([1e6, -1e6])) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["peft", "q-adapter"])
def test_kl_is_that_of_the_full_distributions(kind, tokenizer) -> None:
    base, policy = tiny_llama(), tiny_policy(kind, 2)
    conversations = [(pair.prompt, pair.chosen) for pair in PAIRS]
    result = kl_per_token(base, policy, tokenizer, conversations, max_length=256, batch_size=2)
    for i, (prompt, reply) in enumerate(conversations):
        before = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
        after = [*tokenizer.encode(reply, add_special_tokens=False), tokenizer.eos_token_id]
        ids = torch.tensor([before + after])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, len(before) - 1 : -1].log_softmax(-1) for model in (base, policy))
        expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
        assert result.sums[i] == pytest.approx(expected, rel=1e-4)
        assert result.tokens[i] == len(after)
    assert result.per_token == pytest.approx(result.sums.sum() / result.tokens.sum())
    assert result.per_token > 0
    same = kl_per_token(base, tiny_llama(), tokenizer, conversations, max_length=256, batch_size=2)
    assert same.per_token == pytest.approx(0, abs=1e-6)


def test_kl_within_a_short_length_keeps_the_reply(tokenizer) -> None:
    result = kl_per_token(
        tiny_llama(), tiny_policy("peft", 2), tokenizer, [(PAIRS[2].prompt, "abcdefgh")], max_length=8, batch_size=1
    )
    assert result.tokens.tolist() == [7]


def test_kl_refuses_a_base_that_carries_the_adapter(tokenizer) -> None:
    policy = tiny_policy("peft", 1)
    with pytest.raises(ValueError, match="carries the adapter"):
        kl_per_token(policy.get_base_model(), policy, tokenizer, [], max_length=8, batch_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_batched_replies_equal_single_ones_in_order(kind, tokenizer) -> None:
    model = tiny_policy(kind, seed=5)
    prompts = [pair.prompt for pair in PAIRS] + [({"role": "user", "content": "z"},)]
    together = generate_replies(model, tokenizer, prompts, max_new_tokens=12, batch_size=3)
    for prompt, reply in zip(prompts, together, strict=True):
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        output = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert reply == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert len(set(together)) > 1, "all replies are alike, so a wrong order would not show"


def test_sampling_is_seeded_and_leaves_the_random_state(tokenizer) -> None:
    model = tiny_llama()
    prompts = [pair.prompt for pair in PAIRS]

    def sample(seed: int) -> list[str]:
        return generate_replies(model, tokenizer, prompts, max_new_tokens=10, batch_size=2, temperature=1.0, seed=seed)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert sample(0) == sample(0)
    assert torch.equal(before, torch.get_rng_state())
    assert sample(0) != sample(1)
    assert sample(0) != generate_replies(model, tokenizer, prompts, max_new_tokens=10, batch_size=2)


def test_sampling_follows_the_temperature(tokenizer) -> None:
    """The share of the first token's most likely value equals softmax(logits / T) within four standard errors."""
    model = tiny_llama()
    prompt = [{"role": "user", "content": "q"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        logits = model(input_ids=ids["input_ids"]).logits[0, -1]
    for temperature in (0.3, 1.0):
        probability, token = (logits / temperature).softmax(-1).max(0)
        expected = tokenizer.decode([token]).strip()
        replies = generate_replies(
            model, tokenizer, [prompt] * 400, max_new_tokens=1, batch_size=400, temperature=temperature
        )
        share = replies.count(expected) / 400
        p = probability.item()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 400)


def test_too_long_replies_are_refused_and_prompts_cut(tokenizer) -> None:
    model = tiny_llama(context=32)
    prompt = [{"role": "user", "content": "x" * 100}]
    assert len(generate_replies(model, tokenizer, [prompt], max_new_tokens=8, batch_size=1)) == 1
    with pytest.raises(QAdapterError, match="32 tokens do not fit into the model's context of 32"):
        generate_replies(model, tokenizer, [prompt], max_new_tokens=32, batch_size=1)
    assert generate_replies(model, tokenizer, [], max_new_tokens=8, batch_size=1) == []
