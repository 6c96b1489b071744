"""The readable objective against the published code's own numbers, a brute-force loop, autograd and DPO."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qadapter.policy.objective import BatchTotals, Objective, batch_totals, pairwise_loss, policy_logits

Batch = dict[str, Tensor]


def golden_batch(case: dict[str, Any], phase: float) -> Batch:
    """Inputs by the formula in the golden file's `inputs`."""

    def wave(shape: tuple[int, ...], scale: float, shift: float) -> Tensor:
        i = np.arange(np.prod(shape), dtype=np.float64)
        values = scale * np.sin(0.37 * i + shift + phase) + 0.5 * scale * np.cos(1.13 * i * (1 + 0.01 * shift) + phase)
        return torch.tensor(values.reshape(shape).astype(np.float32))

    rows, length, vocab = 2 * case["pairs"], case["length"], case["vocab"]
    t = torch.arange(length)[None]
    starts, ends = (torch.tensor(case[key])[:, None] for key in ("prompt_lens", "total_lens"))
    return {
        "q_logits": wave((rows, length, vocab), 2.0, 0.3),
        "base_logits": wave((rows, length, vocab), 1.5, 1.7),
        "input_ids": (torch.arange(rows * length).reshape(rows, length) * 7 + int(phase * 10)) % vocab,
        "response_mask": (t >= starts) & (t < ends),
    }


def test_published_code_reproduces_its_own_numbers(shared_golden: Path):
    golden = json.loads((shared_golden / "published_code.json").read_text())
    assert len(golden["cases"]) == 3
    for case in golden["cases"]:
        batch = golden_batch(case, golden["phase"])
        objective = Objective.preset("published-code", **case["hyper"])
        result = pairwise_loss(**batch, objective=objective)
        assert result.loss.item() == pytest.approx(case["loss"], abs=1e-5)
        assert result.preference_loss.item() == pytest.approx(case["pref_loss"], abs=1e-5)
        assert result.regularization.item() == pytest.approx(case["chi2_loss"], abs=1e-5)
        rewards = torch.cat([result.chosen_rewards, result.rejected_rewards]).sum() * (case["length"] - 1)
        mean_reward = rewards / batch_totals(batch["response_mask"], objective).tokens
        assert mean_reward.item() == pytest.approx(case["reward_mean"], abs=1e-5)
        last = case["total_lens"][0] - 1
        base = batch["base_logits"][0, last].log_softmax(-1)
        policy = policy_logits(batch["q_logits"][0, last], base, objective.alpha_0, objective.alpha_tilde)
        torch.testing.assert_close(
            policy.log_softmax(-1)[:4], torch.tensor(case["policy_logprob_last"]), atol=1e-5, rtol=0
        )


def random_batch(seed: int, pairs: int = 3, length: int = 9, vocab: int = 7, gaps: bool = False) -> Batch:
    """float64 batch with rows of different lengths; with `gaps` the mask is arbitrary, position 0 included."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * pairs

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    starts, t = integers(1, length - 2, rows, 1), torch.arange(length)[None]
    ends = starts + 1 + (integers(0, 1000, rows, 1) % (length - starts))
    mask = (t >= starts) & (t < ends)
    if gaps:
        mask = torch.rand(rows, length, generator=generator) < 0.5
        mask[:, 3] = True
    return {
        "q_logits": 2 * torch.randn(rows, length, vocab, generator=generator, dtype=torch.float64),
        "base_logits": 2 * torch.randn(rows, length, vocab, generator=generator, dtype=torch.float64),
        "input_ids": integers(0, vocab, rows, length),
        "response_mask": mask,
    }


def brute_force(batch: Batch, o: Objective) -> dict[str, float]:
    """The equations of the module's text, one number at a time, in Python floats."""
    rows, length, _ = batch["q_logits"].shape
    q_logits, base_logits = batch["q_logits"].tolist(), batch["base_logits"].tolist()
    ids, mask = batch["input_ids"].tolist(), batch["response_mask"].tolist()

    def log_base(row: int, position: int) -> list[float]:
        z = base_logits[row][position]
        normalizer = math.log(sum(math.exp(v) for v in z))
        return [v - normalizer for v in z]

    def q(row: int, position: int) -> list[float]:
        z = q_logits[row][position]
        if o.parametrization == "residual":
            return [a - b for a, b in zip(z, base_logits[row][position], strict=True)]
        return z

    def value(row: int, position: int) -> float:
        terms = zip(q(row, position), log_base(row, position), strict=True)
        return o.alpha_tilde * math.log(sum(math.exp((a + o.alpha_0 * b) / o.alpha_tilde) for a, b in terms))

    def divergence(row: int, position: int) -> float:
        base = log_base(row, position)
        z = [(a + o.alpha_0 * b) / o.alpha_tilde for a, b in zip(q(row, position), base, strict=True)]
        normalizer = math.log(sum(math.exp(v) for v in z))
        return sum(math.exp(v - normalizer) * (v - normalizer - b) for v, b in zip(z, base, strict=True))

    totals, squares, tokens, kl = [], 0.0, 0, 0.0
    for row in range(rows):
        # position j of the model's output predicts token j + 1
        scored = [j for j in range(length - 1) if mask[row][j + 1 if o.shift_mask else j]]
        total = 0.0
        for step, j in enumerate(scored):
            following = value(row, j + 1) if j + 1 in scored else 0.0
            subtracted = value(row, j) if o.value == "current-state" else following
            reward = q(row, j)[ids[row][j + 1]] - o.gamma * subtracted
            total += reward * (o.gamma**step if o.aggregation == "discounted-sum" else 1 / (length - 1))
            squares, tokens, kl = squares + reward**2, tokens + 1, kl + divergence(row, j)
        totals.append(total)
    half = rows // 2
    deltas = [o.preference_scale * (c - r) for c, r in zip(totals[:half], totals[half:], strict=True)]
    preference = sum(math.log1p(math.exp(-d)) for d in deltas) / half
    regularization = o.beta * squares / tokens
    return {
        "loss": preference + regularization,
        "preference_loss": preference,
        "regularization": regularization,
        "kl": kl / tokens,
        "first_chosen": totals[0],
        "last_rejected": totals[-1],
    }


OBJECTIVES = [
    Objective.preset(
        preset,
        gamma=gamma,
        alpha_tilde=0.8,
        alpha_0=0.3,
        beta=0.2,
        preference_scale=1.7,
        parametrization=parametrization,
        shift_mask=shift,
    )
    for preset, gamma, parametrization, shift in product(
        ("paper", "published-code", "residual"), (1.0, 0.9), ("absolute", "residual"), (True, False)
    )
]
PRESETS = [Objective.preset(name) for name in ("paper", "published-code", "residual")]


@pytest.mark.parametrize("objective", [*PRESETS, *OBJECTIVES], ids=str)
@pytest.mark.parametrize("gaps", [False, True])
def test_matches_brute_force_in_float64(objective: Objective, gaps: bool):
    batch = random_batch(seed=4, gaps=gaps)
    result = pairwise_loss(**batch, objective=objective)
    expected = brute_force(batch, objective)
    got = {name: getattr(result, name).item() for name in ("loss", "preference_loss", "regularization", "kl")}
    got |= {"first_chosen": result.chosen_rewards[0].item(), "last_rejected": result.rejected_rewards[-1].item()}
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("objective", [*PRESETS, *OBJECTIVES[::5]], ids=str)
def test_gradcheck(objective: Objective):
    batch = random_batch(seed=1, pairs=2, length=5, vocab=4)
    batch["q_logits"].requires_grad_()

    def loss(q_logits: Tensor) -> Tensor:
        return pairwise_loss(**{**batch, "q_logits": q_logits}, objective=objective).loss

    assert torch.autograd.gradcheck(loss, batch["q_logits"])


@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_residual_without_penalty_is_dpo(scale: float):
    """DPO: −log σ(β·((log π − log π_ref)(chosen) − (log π − log π_ref)(rejected))), summed over response tokens."""
    batch = random_batch(seed=2)
    objective = Objective.preset("residual", beta=0.0, preference_scale=scale)
    result = pairwise_loss(**batch, objective=objective)

    def log_likelihood(logits: Tensor) -> Tensor:
        taken = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (taken * batch["response_mask"][:, 1:]).sum(1)

    ratio = log_likelihood(batch["q_logits"]) - log_likelihood(batch["base_logits"])
    chosen, rejected = ratio.chunk(2)
    dpo = -torch.nn.functional.logsigmoid(scale * (chosen - rejected)).mean()
    assert result.loss.item() == pytest.approx(dpo.item(), rel=1e-6)
    torch.testing.assert_close(result.chosen_rewards, chosen)
    torch.testing.assert_close(result.rejected_rewards, rejected)


@pytest.mark.parametrize("parametrization", ["absolute", "residual"])
def test_paper_and_current_state_agree_on_preferences_at_gamma_1(parametrization):
    """The sums telescope but for V(s_0), which both replies to one prompt share (docs/method.md)."""
    batch = random_batch(seed=3, pairs=2)
    prompt = 4
    for name in ("q_logits", "base_logits"):
        batch[name][2:, :prompt] = batch[name][:2, :prompt]  # the state behind the prompt is the same one
    batch["response_mask"] = torch.zeros_like(batch["response_mask"])
    for row, end in enumerate((6, 9, 8, 7)):
        batch["response_mask"][row, prompt:end] = True
    paper = Objective.preset("paper", parametrization=parametrization)
    current = Objective.preset("paper", parametrization=parametrization, value="current-state")
    a, b = (pairwise_loss(**batch, objective=o) for o in (paper, current))
    assert a.preference_loss.item() == pytest.approx(b.preference_loss.item(), rel=1e-9)
    assert abs(a.regularization.item() - b.regularization.item()) > 0.01
    torch.testing.assert_close(a.chosen_rewards - a.rejected_rewards, b.chosen_rewards - b.rejected_rewards)


def test_nothing_outside_the_scored_positions_matters():
    batch = random_batch(seed=5)
    objective = Objective.preset("paper")
    expected = pairwise_loss(**batch, objective=objective)
    mask = batch["response_mask"]
    unscored = torch.ones_like(mask)
    unscored[:, :-1] = ~mask[:, 1:]
    noise = {**batch, "q_logits": batch["q_logits"].clone(), "base_logits": batch["base_logits"].clone()}
    noise["q_logits"][unscored] = 100.0
    noise["base_logits"][unscored] = -50.0
    noise["input_ids"] = torch.where(mask, batch["input_ids"], 0)
    torch.testing.assert_close(pairwise_loss(**noise, objective=objective), expected, rtol=0, atol=0)


@pytest.mark.parametrize("objective", [*PRESETS, OBJECTIVES[0]], ids=str)
def test_parts_add_up_to_the_whole(objective: Objective):
    batch = random_batch(seed=6, pairs=4)
    whole = pairwise_loss(**batch, objective=objective)
    totals = batch_totals(batch["response_mask"], objective)
    parts = []
    for pair in range(4):
        rows = torch.tensor([pair, 4 + pair])
        parts.append(pairwise_loss(**{k: v[rows] for k, v in batch.items()}, objective=objective, totals=totals))
    for name in ("loss", "preference_loss", "regularization", "kl"):
        assert sum(getattr(p, name).item() for p in parts) == pytest.approx(getattr(whole, name).item(), rel=1e-9)


def test_half_precision_is_computed_in_float32():
    batch = random_batch(seed=7)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    rounded = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    objective = Objective.preset("residual", preference_scale=5.0)
    result = pairwise_loss(**half, objective=objective)
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pairwise_loss(**rounded, objective=objective).loss.item()


def test_untrained_residual_has_reward_zero_and_no_divergence():
    batch = random_batch(seed=8)
    batch["q_logits"] = batch["base_logits"].clone()
    result = pairwise_loss(**batch, objective=Objective.preset("residual"))
    assert result.preference_loss.item() == pytest.approx(math.log(2))
    assert result.regularization.item() == pytest.approx(0, abs=1e-20)
    assert result.kl.item() == pytest.approx(0, abs=1e-12)


def test_presets_and_their_overrides():
    paper = Objective.preset("paper")
    assert (paper.alpha_tilde, paper.alpha_0, paper.beta, paper.gamma) == (1.0, 0.01, 0.1, 1.0)
    assert (paper.value, paper.aggregation, paper.shift_mask) == ("next-state", "discounted-sum", True)
    published = Objective.preset("published-code", shift_mask=True, beta=1.0)
    assert (published.value, published.aggregation) == ("current-state", "padded-mean")
    assert (published.shift_mask, published.beta) == (True, 1.0)
    residual = Objective.preset("residual")
    assert (residual.parametrization, residual.alpha_0, residual.alpha_tilde) == ("residual", 1.0, 1.0)
    with pytest.raises(FrozenInstanceError):
        paper.beta = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"alpha_tilde": 0.0}, "alpha_tilde is 0.0; expected a finite number above 0"),
        ({"alpha_0": -0.1}, "alpha_0 is -0.1"),
        ({"beta": math.nan}, "beta is nan"),
        ({"gamma": 1.5}, "gamma is 1.5; .* at most 1"),
        ({"preference_scale": math.inf}, "preference_scale is inf"),
        ({"parametrization": "relative"}, "'absolute' or 'residual'"),
        ({"value": "V"}, "'next-state' or 'current-state'"),
        ({"alpha_1": 1.0}, "alpha_1 is no part of it; its fields are aggregation"),
    ],
)
def test_refuses_senseless_objectives(overrides: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Objective.preset("paper", **overrides)
    with pytest.raises(ValueError, match="no preset 'papr'; there are paper, published-code, residual"):
        Objective.preset("papr")  # type: ignore[arg-type]


def test_refuses_batches_that_do_not_fit():
    batch = random_batch(seed=9)
    objective = Objective.preset("paper")
    with pytest.raises(ValueError, match="5 rows; expected chosen rows followed by as many"):
        pairwise_loss(**{k: v[:5] for k, v in batch.items()}, objective=objective)
    with pytest.raises(ValueError, match=r"logits of shapes"):
        pairwise_loss(**{**batch, "base_logits": batch["base_logits"][:, 1:]}, objective=objective)
    with pytest.raises(ValueError, match=r"response_mask is torch.int64"):
        pairwise_loss(**{**batch, "response_mask": batch["response_mask"].long()}, objective=objective)


def test_totals_divide():
    batch = random_batch(seed=10, pairs=2)
    objective = Objective.preset("published-code")
    own = batch_totals(batch["response_mask"], objective)
    assert (own.pairs, own.shifted_length) == (2, 8)
    assert own.tokens == batch["response_mask"][:, :-1].sum()
    doubled = BatchTotals(own.pairs * 2, own.tokens * 2, own.shifted_length)
    a, b = (pairwise_loss(**batch, objective=objective, totals=t) for t in (own, doubled))
    assert b.loss.item() == pytest.approx(a.loss.item() / 2)
