"""The regularised methods: their divergences by hand, SFT at strength 0, and updates that leave directions alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from qadapter.config.model import LoraSettings
from qadapter.errors import QAdapterError
from qadapter.methods.kl_sft import KLSFTSettings, forward_kl
from qadapter.methods.method import MethodSettings
from qadapter.methods.oplora import OPLoRASettings
from qadapter.methods.tmkl import TMKLSettings, masked_forward_kl
from qadapter.policy.loading import load_base, load_policy
from qadapter.training.adapt import lora_config
from qadapter.training.orthogonal import Projection
from tests.support.tiny_models import lora, tiny_model
from tests.support.tiny_toy import MODEL, TRAINING, TinyToy, make_tiny_toy, rows

LORA = LoraSettings(rank=4, alpha=8, dropout=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("regularised"), steps=20)


@pytest.fixture(scope="module")
def sft(world: TinyToy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(world, "sft", tmp_path_factory.mktemp("sft") / "out", None)


def trained(world: TinyToy, method: str, out: Path, choice: MethodSettings | None) -> Path:
    return world.train(method, out, choice=choice, lora=LORA, training=TRAINING)


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def test_tmkl_by_hand() -> None:
    """KL(p0‖p) = KL of target against rest + (1 − p0(target)) · TMKL, and the numbers of a worked example."""
    p0, p, target = logits(0.5, 0.3, 0.2), logits(0.7, 0.1, 0.2), torch.tensor([0])
    whole = 0.5 * torch.tensor(0.5 / 0.7).log() + 0.3 * torch.tensor(3.0).log()
    binary = 0.5 * torch.tensor(0.5 / 0.7).log() + 0.5 * torch.tensor(0.5 / 0.3).log()
    assert float(forward_kl(p0, p, target)) == pytest.approx(float(whole), abs=1e-6)
    assert float(forward_kl(p0, p, target)) == pytest.approx(0.161348, abs=1e-6)
    assert float(binary) == pytest.approx(0.087177, abs=1e-6)
    masked = float(masked_forward_kl(p0, p, target))
    assert masked == pytest.approx(
        0.6 * float(torch.tensor(0.6 / (1 / 3)).log()) + 0.4 * float(torch.tensor(0.4 / (2 / 3)).log()), abs=1e-6
    )
    assert masked == pytest.approx(0.148342, abs=1e-6)
    assert float(whole) == pytest.approx(float(binary) + 0.5 * masked, abs=1e-6)


def test_tmkl_leaves_the_target_alone() -> None:
    torch.manual_seed(0)
    base, adapted, target = torch.randn(5, 7), torch.randn(5, 7, requires_grad=True), torch.tensor([0, 6, 3, 3, 1])
    masked_forward_kl(base, adapted, target).sum().backward()
    assert adapted.grad is not None
    assert bool(torch.isfinite(adapted.grad).all())
    assert float(adapted.grad.gather(1, target[:, None]).abs().max()) == 0.0
    assert float(adapted.grad.abs().max()) > 0.01
    moved = base.clone()
    moved[torch.arange(5), target] += 3.0
    torch.testing.assert_close(masked_forward_kl(base, moved, target), torch.zeros(5), atol=1e-6, rtol=0)
    two = torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    assert masked_forward_kl(*two).tolist() == [0.0] * 4, "with two tokens there is one besides the target"


def test_the_optimum_of_cross_entropy_and_forward_kl() -> None:
    """(onehot + λ · p0)/(1 + λ): for λ = 1, p0 = (.5, .3, .2) and the first token it is (.75, .15, .10)."""
    p0, target, free = logits(0.5, 0.3, 0.2), torch.tensor([0]), torch.zeros(1, 3, requires_grad=True)
    optimiser = torch.optim.Adam([free], lr=0.05)
    for _ in range(600):
        optimiser.zero_grad()
        (cross_entropy(free, target) + forward_kl(p0, free, target).sum()).backward()
        optimiser.step()
    assert free.softmax(-1)[0].tolist() == pytest.approx([0.75, 0.15, 0.10], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kl-sft", "tmkl"])
def test_weight_0_is_sft_and_a_large_one_is_the_base(method: str, world: TinyToy, sft: Path, tmp_path: Path) -> None:
    settings = KLSFTSettings if method == "kl-sft" else TMKLSettings
    out = {weight: trained(world, method, tmp_path / str(weight), settings(kl_weight=weight)) for weight in (0, 3, 300)}
    curves = {weight: rows(folder / "history.jsonl") for weight, folder in out.items()}
    plain = [row["train/loss"] for row in rows(sft / "history.jsonl")]
    assert [row["train/loss"] for row in curves[0]] == pytest.approx(plain, rel=1e-4)
    assert curves[3][0]["train/loss"] == pytest.approx(plain[0], rel=1e-4), "before the first step there is no distance"
    distance = {weight: curve[-1]["train/kl/base"] for weight, curve in curves.items()}
    assert distance[0] > distance[3] > distance[300]
    assert distance[300] < 0.1 * distance[0]


@pytest.mark.slow
def test_oplora_leaves_the_leading_directions_alone(world: TinyToy, sft: Path, tmp_path: Path) -> None:
    out = trained(world, "oplora", tmp_path / "out", OPLoRASettings(protected=5))
    network, _ = load_base(world.base, MODEL)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    merged = load_policy(network, out / "adapter").merge_and_unload().state_dict()  # type: ignore[operator]
    moved = [name for name in before if not torch.equal(before[name], merged[name])]
    assert len(moved) == 7
    for name in moved:
        left, values, right = torch.linalg.svd(before[name], full_matrices=False)
        u, s, v = left[:, :5], values[:5], right[:5].T
        update = merged[name] - before[name]
        assert float(update.abs().max()) > 1e-4
        torch.testing.assert_close(u.T @ update, torch.zeros(5, update.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(update @ v, torch.zeros(update.shape[0], 5), atol=1e-5, rtol=0)
        torch.testing.assert_close(merged[name] @ v, u * s, atol=1e-4, rtol=0)
    none = trained(world, "oplora", tmp_path / "none", OPLoRASettings(protected=0))
    ours, plain = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (none, sft))
    assert all(torch.equal(ours[name], plain[name]) for name in plain), "without a direction it is SFT"


def test_a_variant_of_lora_is_refused() -> None:
    """DoRA scales each output of W + ΔW: the leading directions would not stay what they are."""
    dora = get_peft_model(tiny_model("llama"), lora(use_dora=True))
    with pytest.raises(QAdapterError, match=r"a variant such as DoRA scales the weight itself .* lora\.use_dora"):
        Projection(dora, 4)
    assert Projection(dora, 0).directions == []


def test_at_full_rank_nothing_is_left_to_move(world: TinyToy) -> None:
    network, _ = load_base(world.base, MODEL)
    model = get_peft_model(network, lora_config(LORA))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    Projection(model, 16).apply()  # the width of this model
    weights = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for name, a in weights.items():
        if "lora_A" in name:
            update = weights[name.replace("lora_A", "lora_B")] @ a
            torch.testing.assert_close(update, torch.zeros_like(update), atol=1e-4, rtol=0)
