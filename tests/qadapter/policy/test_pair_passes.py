"""The fused training pass of a policy against its readable one: every architecture, with and without shared prompts."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qadapter.policy import pair_passes
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective, scored_positions
from qadapter.policy.pair_passes import SharedPrompts
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.tokenize import collate_pairs, encode_pair
from tests.qadapter.policy.test_policy import make_policy
from tests.qadapter.training.test_qadapter_trainer import TOKENIZER, pairs
from tests.support.tiny_models import ARCHITECTURES, lora, moved, tiny_model

OBJECTIVES = [
    Objective.preset("paper", gamma=0.9, alpha_0=0.3),
    Objective.preset("published-code"),
    Objective.preset("residual", alpha_0=0.8, preference_scale=2.0),
]


@pytest.fixture(autouse=True)
def sharing_always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_passes, "_WORK_TO_SPARE", {"cuda": 0.0})


def batch_of(count: int = 5, prompt: int = 20) -> dict[str, Tensor]:
    """Prompts of `prompt` to `prompt` + 2·count bytes, replies of different lengths."""
    some = [
        PreferencePair(({"role": "user", "content": "q" * (prompt + 2 * i)},), p.chosen, p.rejected)
        for i, p in enumerate(pairs(count))
    ]
    return collate_pairs([encode_pair(pair, TOKENIZER, 128) for pair in some], 0)


def step(policy: QAdapterForCausalLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, its parts and all gradients of one backward pass."""
    policy.zero_grad()
    output = policy(**batch)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return {**output.pairwise._asdict(), **gradients}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 2e-5, rtol: float = 1e-4) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        scale = value.abs().max().item() if "lora" in name else 1.0
        torch.testing.assert_close(
            ours[name].detach(), value.detach(), atol=atol * max(scale, 1), rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["paper", "published-code", "residual"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_is_readable(architecture: str, objective: Objective):
    policy = make_policy(architecture, objective).train()
    batch = batch_of()
    policy.loss_implementation = "readable"
    readable = step(policy, batch)
    policy.loss_implementation = "fused"
    shared = step(policy, batch)
    assert policy.loss_implementation == "fused"
    passes = policy._pair_passes
    assert passes is not None
    assert passes.usable
    assert passes.share_prompts
    passes.share_prompts = False
    unshared = step(policy, batch)
    assert len(readable) == 6 + sum("lora_" in n for n, _ in policy.named_parameters())
    assert_same(unshared, readable)
    assert_same(shared, readable)


def test_the_prompt_is_computed_once():
    policy, batch = make_policy(objective=OBJECTIVES[2]).train(), batch_of()
    seen: list[tuple[int, int]] = []
    policy(**batch)  # the first batch is checked in further passes
    policy.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    policy(**batch)
    prompts = batch["response_mask"].int().argmax(1).max().item()
    replies = batch["response_mask"].sum(1).max().item()
    assert seen == [(5, prompts), (10, replies)] * 2
    seen.clear()
    short = batch_of(prompt=0)  # nothing worth sharing: plain rows
    assert SharedPrompts.of(**short, width=10_000) is None
    policy(**short)
    assert seen == [tuple(short["input_ids"].shape)] * 2


def test_a_small_model_does_not_bother(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    batch = batch_of()
    assert SharedPrompts.of(**batch, width=32) is None
    assert SharedPrompts.of(**batch, width=512) is not None


def test_taken_apart_and_put_together():
    long = batch_of(3)
    parts = SharedPrompts.of(**long, width=10_000)
    assert parts is not None
    for row in range(6):
        ids, start = long["input_ids"][row], int(long["response_mask"][row].int().argmax())
        end = int(long["attention_mask"][row].sum())
        pair = row % 3
        assert parts.prompt_ids[pair][parts.prompt_mask[pair].bool()].tolist() == ids[:start].tolist()
        assert parts.prompt_mask[pair].tolist() == sorted(parts.prompt_mask[pair].tolist())
        assert parts.reply_ids[row][parts.reply_mask[row].bool()].tolist() == ids[start:end].tolist()
        assert parts.lengths[row] == start
    # put together again: the scored positions' own tokens, read from prompt and reply, are those of the whole rows
    scored = scored_positions(long["response_mask"], True)
    ends = torch.cat([parts.prompt_ids[torch.arange(3).repeat(2), -1:], parts.reply_ids], dim=1)
    assert ends[parts.where(scored)].tolist() == long["input_ids"][:, :-1][scored].tolist()


@pytest.mark.parametrize("change", ["prompt", "mask", "start"])
def test_pairs_that_share_no_prompt_take_whole_rows(change: str):
    batch = batch_of()
    assert SharedPrompts.of(**batch, width=10_000) is not None
    if change == "prompt":
        batch["input_ids"][1, 3] += 1
    elif change == "mask":
        batch["response_mask"][1, 2] = True
    else:
        batch["response_mask"][1] &= batch["response_mask"][1].cumsum(0) > 1
    assert SharedPrompts.of(**batch, width=10_000) is None
    policy = make_policy(objective=OBJECTIVES[0]).train()
    fused = step(policy, batch)
    policy.loss_implementation = "readable"
    assert_same(fused, step(policy, batch))


def test_evaluation_is_the_same_loss():
    policy, batch = make_policy(objective=OBJECTIVES[0]), batch_of()
    with torch.no_grad():
        fused = policy(**batch).pairwise
        policy.loss_implementation = "readable"
        readable = policy(**batch).pairwise
    assert_same(fused._asdict(), readable._asdict())


class OddHead(nn.Linear):
    """Not a plain linear layer."""


def odd_head() -> Any:
    model = tiny_model()
    head = OddHead(32, 262, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def unforeseen_scale() -> Any:
    """A head that looks plain, of a model that does something undeclared to its logits."""
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda _module, _args, output: output * 1.5)
    return model


@pytest.mark.parametrize("model", [odd_head, unforeseen_scale])
def test_a_head_that_does_not_fit_is_noticed(model: Any, caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    policy = moved(QAdapterForCausalLM.from_base(model(), lora(), OBJECTIVES[0])).train()
    batch = batch_of()
    with caplog.at_level(logging.WARNING):
        fused = step(policy, batch)
    assert "the readable one is used" in caplog.text
    assert policy.loss_implementation == "readable"
    assert_same(fused, step(policy, batch), atol=1e-7)


def test_a_cache_that_does_not_fit_is_noticed(monkeypatch: pytest.MonkeyPatch):
    policy, batch = make_policy(objective=OBJECTIVES[0]).train(), batch_of()
    parts = SharedPrompts.of(**batch, width=10_000)
    assert parts is not None
    wrong = replace(parts, prompt_ids=parts.prompt_ids.roll(1, 1))
    monkeypatch.setattr(SharedPrompts, "of", lambda *_: wrong)
    fused = step(policy, batch)
    assert policy._pair_passes is not None
    assert policy._pair_passes.usable
    assert not policy._pair_passes.share_prompts
    policy.loss_implementation = "readable"
    assert_same(fused, step(policy, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_trains_on_the_fused_loss(dtype: torch.dtype):
    torch.manual_seed(0)
    policy = moved(QAdapterForCausalLM.from_base(tiny_model().to(dtype), lora(), OBJECTIVES[2])).train()
    batch = batch_of()
    fused = step(policy, batch)
    assert policy.loss_implementation == "fused"
    policy.loss_implementation = "readable"
    readable = step(policy, batch)
    assert fused["loss"].item() == pytest.approx(readable["loss"].item(), rel=0.05)
    ours = torch.cat([v.flatten() for n, v in fused.items() if "lora_" in n])
    theirs = torch.cat([v.flatten() for n, v in readable.items() if "lora_" in n])
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99
