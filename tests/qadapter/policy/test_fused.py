"""The fused objective against the readable one: loss, its parts and gradients, over awkward shapes and types."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from qadapter.policy import fused
from qadapter.policy.fused import VocabularyHead, fused_pairwise_loss
from qadapter.policy.objective import Objective, PairwiseLoss, batch_totals, pairwise_loss
from tests.qadapter.policy.test_objective import OBJECTIVES, PRESETS, random_batch

HIDDEN = 6


def hidden_batch(seed: int, dtype: torch.dtype, vocab: int = 23, **shape: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = random_batch(seed, vocab=vocab, **shape)
    rows, length, _ = batch["q_logits"].shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    base = draw(rows, length, HIDDEN)
    return {
        "hidden": base + 0.5 * draw(rows, length, HIDDEN),
        "base_hidden": base,
        "weight": draw(vocab, HIDDEN),
        "bias": draw(vocab),
        "input_ids": batch["input_ids"],
        "response_mask": batch["response_mask"],
    }


def head_logits(head: VocabularyHead, hidden: Tensor) -> Tensor:
    """The head, written for autograd."""
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def both(batch: dict[str, Tensor], objective: Objective, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and its parts and the gradient by the adapted hidden states, readable and fused."""
    bias = batch["bias"] if options.pop("with_bias", False) else None
    head = VocabularyHead(batch["weight"], bias, options.pop("scale", 1.0), options.pop("softcap", None))
    results = []
    for implementation in ("readable", "fused"):
        hidden = batch["hidden"].clone().requires_grad_()
        if implementation == "readable":
            loss = pairwise_loss(
                head_logits(head, hidden),
                head_logits(head, batch["base_hidden"]),
                batch["input_ids"],
                batch["response_mask"],
                objective,
                **options,
            )
        else:
            tokens = (batch["input_ids"], batch["response_mask"])
            loss = fused_pairwise_loss(hidden, batch["base_hidden"], head, *tokens, objective, **options)
        (3.0 * loss.loss).backward()
        assert hidden.grad is not None
        results.append([*loss, hidden.grad])
    return results[0], results[1]


def assert_same(readable: list[Tensor], fast: list[Tensor], atol: float, rtol: float) -> None:
    for name, a, b in zip([*PairwiseLoss._fields, "gradient"], readable, fast, strict=True):
        torch.testing.assert_close(b, a, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")
    assert fast[-1].abs().max() > 0


def in_blocks_of(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take so many rows at once, and so many tokens of the vocabulary (more, where there are fewer rows)."""
    monkeypatch.setitem(fused.BLOCK_ELEMENTS, "cpu", rows * width)
    monkeypatch.setattr(fused, "NARROWEST_BLOCK", width)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [*PRESETS, *OBJECTIVES], ids=str)
@pytest.mark.parametrize("gaps", [False, True])
def test_equals_the_readable_one_in_float64(objective: Objective, gaps: bool):
    assert_same(*both(hidden_batch(1, torch.float64, gaps=gaps), objective), atol=1e-10, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [*PRESETS, OBJECTIVES[0], OBJECTIVES[-1]], ids=str)
@pytest.mark.parametrize(("pairs", "length", "vocab"), [(1, 4, 2), (1, 5, 257), (5, 33, 61), (2, 128, 8)])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 3), (10_000, 10_000)])
def test_equals_the_readable_one_in_float32(
    objective: Objective, pairs: int, length: int, vocab: int, rows: int, width: int, monkeypatch: pytest.MonkeyPatch
):
    in_blocks_of(rows, width, monkeypatch)
    batch = hidden_batch(pairs, torch.float32, vocab=vocab, pairs=pairs, length=length, gaps=pairs == 5)
    assert_same(*both(batch, objective), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", [*PRESETS, OBJECTIVES[0], OBJECTIVES[-1]], ids=str)
def test_bf16_within_two_percent_of_the_largest(objective: Objective):
    """bf16 keeps 8 bits (0.4 %) and both versions round the same products in different order: 2 % of the scale."""
    readable, fast = both(hidden_batch(2, torch.bfloat16, pairs=4, length=20), objective)
    for name, a, b in zip([*PairwiseLoss._fields, "gradient"], readable, fast, strict=True):
        assert b.dtype == a.dtype, name
        assert (b - a).abs().max() <= 0.02 * a.abs().max() + 1e-3, name


@pytest.mark.parametrize(("with_bias", "scale", "softcap"), list(product((False, True), (1.0, 0.25), (None, 3.0)))[1:])
@pytest.mark.parametrize("objective", PRESETS, ids=str)
def test_every_kind_of_head(objective: Objective, with_bias: bool, scale: float, softcap: float | None):
    batch = hidden_batch(3, torch.float64)
    options = {"with_bias": with_bias, "scale": scale, "softcap": softcap}
    assert_same(*both(batch, objective, **options), atol=1e-10, rtol=1e-8)


def test_totals_reach_the_loss():
    batch = hidden_batch(4, torch.float64)
    objective = Objective.preset("published-code")
    own = batch_totals(batch["response_mask"], objective)
    totals = own._replace(pairs=own.pairs * 3, tokens=own.tokens * 5, shifted_length=own.shifted_length + 2)
    assert_same(*both(batch, objective, totals=totals), atol=1e-10, rtol=1e-8)


def test_gradcheck():
    batch = hidden_batch(5, torch.float64, pairs=2, length=5)
    head = VocabularyHead(batch["weight"], softcap=4.0)
    hidden = batch["hidden"].requires_grad_()
    tokens = (batch["input_ids"], batch["response_mask"])

    def loss(h: Tensor) -> Tensor:
        return fused_pairwise_loss(h, batch["base_hidden"], head, *tokens, Objective.preset("paper")).loss

    assert torch.autograd.gradcheck(loss, hidden)


def test_large_logits_do_not_overflow():
    batch = hidden_batch(6, torch.float32)
    batch["weight"] = batch["weight"] * 1e3
    assert_same(*both(batch, Objective.preset("residual", beta=1e-6)), atol=1e-2, rtol=1e-4)


def test_nothing_of_vocabulary_size_is_kept_for_the_backward(monkeypatch: pytest.MonkeyPatch):
    vocab = 5000
    batch = hidden_batch(7, torch.float32, vocab=vocab, pairs=4, length=40)
    in_blocks_of(16, 1000, monkeypatch)
    kept: list[int] = []
    head = VocabularyHead(batch["weight"])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        fused_pairwise_loss(
            batch["hidden"].requires_grad_(),
            batch["base_hidden"],
            head,
            batch["input_ids"],
            batch["response_mask"],
            Objective.preset("paper"),
        )
    weight = vocab * HIDDEN
    assert max(size for size in kept if size != weight) <= 8 * 40 * HIDDEN


def test_without_gradient_the_loss_is_the_same():
    batch = hidden_batch(8, torch.float64)
    tokens = (batch["input_ids"], batch["response_mask"], Objective.preset("paper"))
    head = VocabularyHead(batch["weight"])
    fast = fused_pairwise_loss(batch["hidden"], batch["base_hidden"], head, *tokens)
    slow = pairwise_loss(head_logits(head, batch["hidden"]), head_logits(head, batch["base_hidden"]), *tokens)
    torch.testing.assert_close(fast, slow)
