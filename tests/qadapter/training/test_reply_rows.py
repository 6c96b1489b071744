"""Trainings whose loss sees logits learn the same from hidden states and the head as from the model's own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qadapter.methods.kl_sft import KLSFTSettings
from qadapter.methods.method import MethodSettings
from qadapter.methods.tmkl import TMKLSettings
from qadapter.policy import scored_states
from qadapter.policy.fused import VocabularyHead
from qadapter.training import reply_rows
from tests.support.tiny_toy import TinyToy, make_tiny_toy, rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("reply-rows"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "choice"),
    [("kl-sft", KLSFTSettings(kl_weight=0.5)), ("tmkl", TMKLSettings(kl_weight=0.5)), ("dpop", None), ("spin", None)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_same_training(
    method: str, choice: MethodSettings | None, world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[bool] = []
    of = reply_rows.ReplyRows.of
    monkeypatch.setattr(
        reply_rows.ReplyRows, "of", lambda *given: heads.append((found := of(*given)).head is not None) or found
    )
    curves, weights = [], []
    for large in (10**9, 1):
        monkeypatch.setattr(scored_states, "LARGE_VOCABULARY", large)
        before = len(heads)
        out = world.train(method, tmp_path / str(large), choice=choice)
        assert set(heads[before:]) == {large == 1}
        curves.append(rows(out / "history.jsonl"))
        weights.append(load_file(next((out / "adapter").glob("*.safetensors"))))
    theirs, ours = curves
    assert len(theirs) == len(ours) > 1
    for expected, found in zip(theirs, ours, strict=True):
        assert found == pytest.approx(expected, abs=2e-4, rel=1e-3)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-4, rtol=1e-3)
        assert value.abs().max() > 0


def test_a_gradient_passes_a_soft_cap_a_scale_and_a_bias() -> None:
    """softcap · tanh(scale · (W h + b) / softcap): its derivative by h, from the formula."""
    torch.manual_seed(0)
    weight, bias, hidden = torch.randn(5, 3), torch.randn(5), torch.randn(2, 3, requires_grad=True)
    logits = VocabularyHead(weight, bias, scale=0.5, softcap=2.0).logits(hidden)
    inner = 0.5 * (hidden.detach() @ weight.T + bias)
    torch.testing.assert_close(logits, 2 * (inner / 2).tanh())
    logits.sum().backward()
    torch.testing.assert_close(hidden.grad, 0.5 * (1 - (inner / 2).tanh() ** 2) @ weight)
