"""Gradient checkpointing, half precision and quantised bases: the same training, within what rounding allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qadapter.policy.model import QAdapterForCausalLM
from tests.qadapter.training.test_qadapter_trainer import TOKENIZER, adapter_state, make_trainer, pairs
from tests.support.tiny_models import lora, tiny_model


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "reentrant", "implementation"),
    [
        ("llama", False, "readable"),
        ("llama", True, "fused"),
        ("gpt2", False, "fused"),
        ("gemma2", True, "readable"),
        ("gemma2", False, "fused"),
    ],
)
def test_gradient_checkpointing_changes_nothing(
    tmp_path: Path, architecture: str, reentrant: bool, implementation: str
):
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path / str(checkpointing),
            model=tiny_model(architecture),
            # What is computed again must draw the same (the fused loss draws otherwise where it shares prompts)
            peft_config=lora(dropout=0.3 if implementation == "readable" else 0.0),
            loss_implementation=implementation,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
        )
        layer = trainer.policy.peft_model.get_base_model().get_decoder()
        calls: list[int] = []
        attention = next(m for n, m in layer.named_modules() if n.endswith(("self_attn", "attn")))
        attention.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        results.append((losses(trainer), adapter_state(trainer), len(calls)))
    (plain, expected, few), (checkpointed, states, many) = results
    if implementation == "readable":
        assert (few, many) == (8, 12)  # 4 steps: base and adapted pass, and the adapted one again in the backward
    else:
        assert many == 14  # the same, plus 2 to check the first batch
    assert checkpointed == pytest.approx(plain, rel=1e-5)
    for name, value in states.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_bf16_autocast_follows_float32(tmp_path: Path):
    exact = make_trainer(tmp_path / "32", objective="residual", learning_rate=1e-3)
    half = make_trainer(tmp_path / "16", objective="residual", learning_rate=1e-3, bf16=True)
    exact.train()
    half.train()
    assert losses(half) == pytest.approx(losses(exact), rel=0.1)
    assert losses(half) != losses(exact)
    assert all(value.dtype == torch.float32 for value in adapter_state(half).values())


@pytest.mark.slow
def test_a_bf16_base_trains_and_generates(tmp_path: Path):
    trainer = make_trainer(tmp_path, model=tiny_model().bfloat16(), objective="residual", max_steps=20)
    before = losses(trainer)
    trainer.train()
    after = losses(trainer)
    assert before == []
    assert after[-1] < 0.7 * after[0]
    policy = trainer.policy.eval()
    ids = torch.tensor([TOKENIZER("hello")["input_ids"]])
    assert policy.dtype == torch.bfloat16
    with torch.no_grad():
        assert policy(input_ids=ids).logits.dtype == torch.float32
    assert policy.generate(input_ids=ids, max_new_tokens=4, eos_token_id=None).shape == (1, 9)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_trains_and_loads(tmp_path: Path, bits: int):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra: pip install qadapter-pipeline[quantized]")
    from transformers import BitsAndBytesConfig

    tiny_model(hidden_size=64, head_dim=16, intermediate_size=64).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": quantization, "device_map": "cpu"}
    trainer = make_trainer(
        tmp_path / "run",
        model=str(tmp_path / "base"),
        objective="residual",
        max_steps=20,
        model_init_kwargs=options,
    )
    frozen = {n: p.detach().clone() for n, p in trainer.policy.named_parameters() if not p.requires_grad}
    assert any(p.dtype in (torch.int8, torch.uint8) for p in frozen.values())
    trainer.train()
    after = losses(trainer)
    assert after[-1] < 0.7 * after[0]
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.policy.named_parameters() if n in frozen)
    for name, value in adapter_state(trainer).items():
        assert "lora_B" not in name or value.abs().max() > 1e-3, name  # the gradient reached every layer
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = QAdapterForCausalLM.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "base", **options)
    ids = torch.tensor([TOKENIZER(pairs()[0].chosen)["input_ids"]])
    with torch.no_grad():
        ours, theirs = loaded(input_ids=ids).logits, trainer.policy.eval()(input_ids=ids).logits
    # a loaded policy runs inference kernels, one that can be trained does not
    torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=0.1, rtol=0.05)
