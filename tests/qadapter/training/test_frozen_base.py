"""The base in every method's training: nothing in it draws at random, and all methods train the same adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qadapter.config.model import LoraSettings, ModelSettings
from qadapter.config.training import OptimizerSettings
from qadapter.methods.method import Method
from qadapter.methods.needs.base_answers import prompt_key
from qadapter.methods.table import METHODS
from qadapter.policy.frozen import silence
from qadapter.preferences.pair import Message, PreferencePair
from qadapter.training.adapt import train_adapter
from tests.support.tiny_architectures import tiny_architecture
from tests.support.tiny_chat import byte_tokenizer

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "max_steps": 2,
    "batch_size": 2,
    "max_length": 64,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OPT, whose layers call dropout as a function, and six pairs of growing length."""
    folder = tmp_path_factory.mktemp("opt")
    base = tiny_architecture("opt")
    for name in ("dropout", "attention_dropout", "layerdrop"):
        setattr(base.config, name, 0.3)
    base.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    asked: Message = {"role": "user", "content": "Why?"}
    pairs = [PreferencePair((asked,), "Yes" + "!" * i, "No" + "?" * i) for i in range(6)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair.to_row()) + "\n" for pair in pairs))
    (folder / "needs").mkdir()
    (folder / "needs" / "answers.json").write_text(json.dumps({prompt_key([asked]): "Perhaps"}))
    return folder


def choice(method: Method[Any]) -> Any:
    """A method's settings, with a 4 for each one that has no default."""
    return method.settings(**{name: 4 for name, field in method.settings.model_fields.items() if field.is_required()})


TRAINED = [method for method in METHODS if method.name in ("q-adapter", "sft", "dpo", "replay", "orpo")]


def trained(place: Path, out: Path, method: Method[Any], lora: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    """The training curve of one method."""
    out.mkdir()
    train_adapter(
        method.train,
        choice(method),
        place / "base",
        place / "pairs.jsonl",
        model=ModelSettings(pretrained=str(place / "base")),
        lora=LoraSettings(**lora),
        training=OptimizerSettings(**{**SETTINGS, **changes}),
        seed=0,
        needs={"answers": place / "needs"},
        out=out,
        scratch=out / "scratch",
    )
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def test_silence_leaves_nothing_to_draw() -> None:
    for name in ("opt", "xglm", "biogpt", "falcon", "gpt2", "mixtral"):
        base = tiny_architecture(name)
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
            for field in ("dropout", "hidden_dropout", "attention_dropout", "layerdrop"):
                if isinstance(getattr(module, field, None), float):
                    setattr(module, field, 0.3)
        ids = torch.arange(6, 18).reshape(2, 6)
        silence(base.train())
        assert torch.equal(base(input_ids=ids).logits, base(input_ids=ids).logits), name


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED, ids=lambda method: method.name)
def test_open_settings_reach_every_method_and_the_base_is_still(
    method: Method[Any], place: Path, tmp_path: Path
) -> None:
    """The first loss is the same with and without the adapter's dropout: an untrained adapter adds nothing.

    Only a base that draws at random would tell the two trainings apart.
    """
    trainer = {"optim": "sgd", "train_sampling_strategy": "group_by_length"}
    first = trained(place, tmp_path / "one", method, {"rank": 2, "dropout": 0.5}, trainer=trainer)[0]["train/loss"]
    if method.name == "dpo":
        assert first == pytest.approx(math.log(2), abs=1e-6)  # the reference is the base, exactly
    trainer["max_grad_norm"] = 1e-9
    still = trained(place, tmp_path / "two", method, {"rank": 2, "dropout": 0.0}, trainer=trainer)
    assert still[0]["train/loss"] == pytest.approx(first, abs=1e-6)
    # SGD with a gradient clipped to 1e-9 does not move; AdamW would by its learning rate
    moved = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    assert 0 < max(float(value.abs().max()) for name, value in moved.items() if "lora_B" in name) < 1e-10
