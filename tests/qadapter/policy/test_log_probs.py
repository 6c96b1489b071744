"""Log-probabilities from hidden states: against logits, for each kind of policy, and where they must not be used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qadapter.evaluation.divergence import kl_per_token
from qadapter.inference.score import Predictions, reply_log_probs
from qadapter.policy import fused, log_probs, scored_states
from qadapter.policy.fused import VocabularyHead
from qadapter.policy.log_probs import token_terms
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from tests.qadapter.policy.test_fused import head_logits
from tests.support.tiny_chat import KINDS, byte_tokenizer, tiny_policy
from tests.support.tiny_models import lora, moved, tiny_model


@pytest.mark.parametrize("head", ["linear", "bias and scale", "softcap"])
def test_terms_are_those_of_the_logits(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of 4 positions and 7 tokens of 23, the last block being narrower."""
    monkeypatch.setitem(fused.BLOCK_ELEMENTS, "cpu", 28)
    monkeypatch.setattr(log_probs, "NARROWEST_BLOCK", 7)
    draw = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((23, 6), (23,)))
    layer = {
        "linear": VocabularyHead(weight),
        "bias and scale": VocabularyHead(weight, bias, 0.5),
        "softcap": VocabularyHead(weight, None, 1.0, 2.0),
    }[head]
    targets = torch.randint(23, (9,), generator=draw)
    upstream = torch.randn(9, generator=draw, dtype=torch.float64)
    hidden = torch.randn(9, 6, generator=draw, dtype=torch.float64)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    terms = token_terms(ours, layer, targets)
    logits = head_logits(layer, theirs)
    expected = logits.log_softmax(-1)
    (terms.log_probs * upstream).sum().backward()
    (expected.gather(1, targets[:, None]).squeeze(1) * upstream).sum().backward()
    torch.testing.assert_close(terms.log_probs, expected.gather(1, targets[:, None]).squeeze(1))
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(terms.entropy, -(expected.exp() * expected).sum(1))
    torch.testing.assert_close(terms.mean_logits, logits.mean(1))
    assert terms.is_top.tolist() == (logits.argmax(1) == targets).tolist()


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A vocabulary of any size counts as large."""
    monkeypatch.setattr(scored_states, "LARGE_VOCABULARY", 1)
    scored_states._usable.clear()
    yield
    scored_states._usable.clear()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(6, 262, (4, 11), generator=torch.Generator().manual_seed(1))
    starts, ends = torch.tensor([3, 5, 1, 8])[:, None], torch.tensor([11, 7, 11, 9])[:, None]
    at = torch.arange(11)
    return {"input_ids": ids, "attention_mask": (at < ends).long(), "response_mask": (at >= starts) & (at < ends)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dials", [(1.0, 1.0), (0.3, 2.0)])
def test_replies_score_the_same_from_states(
    kind: str, dials: tuple[float, float], every_size: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(kind, seed=3)  # type: ignore[arg-type]
    if kind == "q-adapter":
        policy.config.alpha_0, policy.config.alpha_tilde = dials  # type: ignore[union-attr]
    tokenizer = byte_tokenizer()
    conversations = [([{"role": "user", "content": "why?"}], "because"), ([{"role": "user", "content": "who"}], "me")]
    found = []
    with torch.no_grad():
        for large in (1, 10**9):
            monkeypatch.setattr(scored_states, "LARGE_VOCABULARY", large)
            scored_states._usable.clear()
            assert (Predictions(policy, batch())._states is not None) == (large == 1)
            scores = reply_log_probs(policy, batch())
            kl = 0.0
            if kind != "plain":
                kl = kl_per_token(None, policy, tokenizer, conversations, max_length=64, batch_size=2).per_token  # type: ignore[arg-type]
                assert kl > 1e-3
            found.append((scores, torch.tensor(kl)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_an_adapter_of_the_head_attached_later_is_scored(every_size: None, tmp_path: Path) -> None:
    preset = Objective.preset("residual")
    head = lora(target_modules=["lm_head"])
    moved(QAdapterForCausalLM.from_base(tiny_model(), head, preset)).save_pretrained(tmp_path)
    policy = QAdapterForCausalLM.from_base(tiny_model(), lora(), preset)
    reply_log_probs(policy, batch())
    assert Predictions(policy, batch())._states is not None
    policy.attach(tmp_path, "head", 1.0)
    found = reply_log_probs(policy, batch())
    scored_states._usable.clear()
    torch.testing.assert_close(found, reply_log_probs(policy, batch()))


def test_what_a_model_does_to_its_logits_is_noticed(every_size: None) -> None:
    """A model that changes its logits after the head is scored by its own forward."""
    model = tiny_model("llama")
    forward = model.forward

    def louder(*args: object, **options: object) -> object:
        output = forward(*args, **options)
        output.logits = output.logits * 1.5
        return output

    model.forward = louder  # type: ignore[method-assign]
    with torch.no_grad():
        assert Predictions(model, batch())._states is None
    capped = tiny_model("gemma2")  # its own soft cap is the head's
    with torch.no_grad():
        assert Predictions(capped, batch())._states is not None
