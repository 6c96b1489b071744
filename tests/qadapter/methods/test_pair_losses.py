"""The pairwise losses that TRL computes: held to their formulas at every step of a training, on our token ids.

The formulas are written down here once more, from log-probabilities that are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import Trainer

from qadapter.config.model import LoraSettings
from qadapter.methods.apo_zero import APOZeroSettings
from qadapter.methods.cpo import CPOSettings
from qadapter.methods.dpo import DPOSettings
from qadapter.methods.ipo import IPOSettings
from qadapter.methods.method import MethodSettings
from qadapter.methods.rpo import RPOSettings
from qadapter.methods.simpo import SimPOSettings, loss_of
from tests.support.tiny_toy import PAIRS, TRAINING, TinyToy, make_tiny_toy, rows

NO_DROPOUT = LoraSettings(rank=2, alpha=4, dropout=0.0)
WHOLE = TRAINING.model_copy(update={"max_steps": 4, "batch_size": PAIRS, "learning_rate": 5e-2, "save_steps": None})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("pairs"), steps=20)


class Replies(NamedTuple):
    """One side of a batch: [B] summed log-probabilities under policy and base, tokens, and the policy's by token."""

    policy: torch.Tensor
    base: torch.Tensor
    tokens: torch.Tensor
    by_token: torch.Tensor

    @property
    def ratio(self) -> torch.Tensor:
        """log π_θ/π1."""
        return self.policy - self.base

    @property
    def mean(self) -> torch.Tensor:
        """Mean log-probability per token."""
        return self.policy / self.tokens


Loss = Callable[[Replies, Replies], torch.Tensor]


def replies(model: Any, sequences: list[tuple[list[int], list[bool]]]) -> Replies:
    """Of sequences of token ids, with true where a token belongs to the reply."""
    sums: dict[str, list[torch.Tensor]] = {"policy": [], "base": []}
    by_token: list[torch.Tensor] = []
    with torch.no_grad():
        for ids, reply in sequences:
            tokens, scored = torch.tensor([ids]), torch.tensor(reply)[1:]
            for name in sums:
                if name == "base":
                    with model.disable_adapter():
                        logits = model(input_ids=tokens).logits
                else:
                    logits = model(input_ids=tokens).logits
                found = logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0][scored]
                sums[name].append(found.sum())
                if name == "policy":
                    by_token.append(found)
    counts = torch.tensor([len(one) for one in by_token])
    return Replies(torch.stack(sums["policy"]), torch.stack(sums["base"]), counts, torch.cat(by_token))


def sides(batch: dict[str, torch.Tensor]) -> tuple[list[Any], list[Any]]:
    """The chosen and the rejected sequences of a batch of DPO's or CPO's."""
    if "completion_mask" in batch:
        found = [
            (ids[mask == 1].tolist(), (reply[mask == 1] == 1).tolist())
            for ids, mask, reply in zip(
                batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
            )
        ]
        return found[: len(found) // 2], found[len(found) // 2 :]
    halves = []
    for side in ("chosen", "rejected"):
        parts = (batch[f"{side}_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        halves.append(
            [(ids[m == 1].tolist(), (labels[m == 1] != -100).tolist()) for ids, m, labels in zip(*parts, strict=True)]
        )
    return halves[0], halves[1]


def ipo(w: Replies, r: Replies, tau: float) -> torch.Tensor:
    return ((w.ratio / w.tokens - r.ratio / r.tokens) - 1 / (2 * tau)) ** 2


def dpo(w: Replies, r: Replies, beta: float) -> torch.Tensor:
    return -logsigmoid(beta * (w.ratio - r.ratio))


def apo_zero(w: Replies, r: Replies, beta: float) -> torch.Tensor:
    return 1 - (beta * w.ratio).sigmoid() + (beta * r.ratio).sigmoid()


def simpo(w: Replies, r: Replies, beta: float, gamma: float) -> torch.Tensor:
    return -logsigmoid(beta * (w.mean - r.mean) - gamma)


def cpo(w: Replies, r: Replies, beta: float) -> torch.Tensor:
    return -logsigmoid(beta * (w.policy - r.policy))


def nll(w: Replies) -> torch.Tensor:
    return -w.by_token.mean()


CASES: dict[str, tuple[MethodSettings, Loss, float | None]] = {
    # the settings; the loss of a batch; its value before the first step, where every log-ratio is 0
    "dpo": (DPOSettings(beta=0.3), lambda w, r: dpo(w, r, 0.3).mean(), math.log(2)),
    "ipo": (IPOSettings(beta=0.1), lambda w, r: ipo(w, r, 0.1).mean(), 25.0),
    "rpo": (RPOSettings(beta=0.3, alpha=0.5), lambda w, r: dpo(w, r, 0.3).mean() + 0.5 * nll(w), None),
    "apo-zero": (APOZeroSettings(beta=0.4), lambda w, r: apo_zero(w, r, 0.4).mean(), 1.0),
    "simpo": (SimPOSettings(beta=2.0, gamma_ratio=0.3), lambda w, r: simpo(w, r, 2.0, 0.6).mean(), None),
    "cpo": (CPOSettings(beta=0.2, alpha=0.7), lambda w, r: cpo(w, r, 0.2).mean() + 0.7 * nll(w), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_each_steps_loss_is_the_formula(
    method: str, world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On four steps that move the adapter: all pairs per step, in steps large enough to change every term."""
    choice, loss, first = CASES[method]
    expected: list[float] = []
    step = Trainer.training_step

    def watched(trainer: Trainer, model: Any, batch: dict[str, Any], *rest: Any) -> Any:
        chosen, rejected = sides(batch)
        expected.append(float(loss(replies(model, chosen), replies(model, rejected))))
        return step(trainer, model, batch, *rest)

    monkeypatch.setattr(Trainer, "training_step", watched)
    out = world.train(method, tmp_path / "out", choice=choice, training=WHOLE, lora=NO_DROPOUT)
    history = rows(out / "history.jsonl")
    assert [row["train/loss"] for row in history] == pytest.approx(expected, rel=2e-4)
    if first is not None:
        assert expected[0] == pytest.approx(first, abs=1e-4)
    assert abs(expected[-1] - expected[0]) > 0.02
    assert history[0]["train/rewards/margins"] < history[-1]["train/rewards/margins"]


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_the_adapters_dropout_acts(
    method: str, world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in SFT and the Q-Adapter, where TRL's `disable_dropout` would switch it off; the base's own is off."""
    found: set[tuple[bool, float]] = set()
    step = Trainer.training_step

    def watched(trainer: Trainer, model: Any, *rest: Any) -> Any:
        found.update(
            ("lora_dropout" in name, module.p)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Dropout)
        )
        return step(trainer, model, *rest)

    monkeypatch.setattr(Trainer, "training_step", watched)
    lora = NO_DROPOUT.model_copy(update={"dropout": 0.1})
    world.train(method, tmp_path / "out", training=TRAINING.model_copy(update={"max_steps": 1}), lora=lora)
    assert found == {(True, 0.1)}


def test_ipo_divides_each_log_ratio_by_its_length() -> None:
    """Lengths 2 and 4, log-ratios 1 and 1: the difference is 1/2 - 1/4, and at τ = 1 the margin is 1/2."""
    one, zero, none = torch.ones(1), torch.zeros(1), torch.zeros(0)
    w, r = (Replies(one, zero, torch.tensor([length]), none) for length in (2, 4))
    assert float(ipo(w, r, 1.0)) == pytest.approx((0.25 - 0.5) ** 2)


def test_simpos_margin_is_gamma() -> None:
    """−log σ(−γ) for equal means: 0.974077 at γ = 0.5. TRL's `simpo_gamma` is γ, ours is γ/β."""
    equal = Replies(torch.tensor([-3.0]), torch.zeros(1), torch.tensor([3]), torch.zeros(0))
    assert float(simpo(equal, equal, 2.0, 0.5)) == pytest.approx(0.974077, abs=1e-6)
    given = loss_of(SimPOSettings(beta=2.5, gamma_ratio=0.2))
    assert (given["simpo_gamma"], given["cpo_alpha"], given["loss_type"]) == (0.5, 0.0, "simpo")
