"""Training on from an adapter: it starts where that one stopped, learns on, and writes what every training writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qadapter.config.training import AdapterTraining, OptimizerSettings
from qadapter.errors import QAdapterError
from qadapter.methods.q_adapter import continue_adapter
from tests.support.tiny_toy import CHOICES, MODEL, TRAINING, TinyToy, make_tiny_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def start(toy: TinyToy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.train("q-adapter", tmp_path_factory.mktemp("first") / "out") / "adapter"


def go_on(toy: TinyToy, start: Path, out: Path, training: OptimizerSettings = TRAINING, **changes: Any) -> Path:
    out.mkdir()
    continue_adapter(
        CHOICES["q-adapter"],
        toy.base,
        start,
        toy.pairs,
        model=MODEL,
        training=training.model_copy(update=changes),
        seed=5,
        out=out,
        scratch=out.with_name(f"{out.name}-scratch"),
    )
    return out


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(str(adapter / "adapter_model.safetensors"))


@pytest.mark.slow
def test_it_starts_where_the_adapter_stopped(toy: TinyToy, start: Path, tmp_path: Path) -> None:
    """With a learning rate of next to nothing the adapter stays what it was; a fresh one would have B = 0."""
    before, after = weights(start), weights(go_on(toy, start, tmp_path / "out", learning_rate=1e-12) / "adapter")
    assert before.keys() == after.keys()
    assert max(float(value.abs().max()) for name, value in before.items() if "lora_B" in name) > 1e-3
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-9, rtol=0)


def test_it_learns_on_and_writes_its_record(toy: TinyToy, start: Path, tmp_path: Path) -> None:
    out = go_on(toy, start, tmp_path / "out")
    before, after = weights(start), weights(out / "adapter")
    assert max(float((after[name] - value).abs().max()) for name, value in before.items()) > 1e-3
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    first = [json.loads(line) for line in (start.parent / "history.jsonl").read_text().splitlines()]
    assert history[0]["train/loss"] < first[0]["train/loss"], "it begins better than the first training began"
    assert json.loads((out / "params.json").read_text())["objective"]["parametrization"] == "residual"
    assert json.loads((out / "metrics.json").read_text())["train/steps"] == 6


def test_it_evaluates_and_stops_early_as_the_first_training_does(toy: TinyToy, start: Path, tmp_path: Path) -> None:
    """With a learning rate that overshoots, the evaluations after the first one are no better."""
    asked = {
        "eval_steps": 1,
        "eval_pairs": 3,
        "early_stopping": 2,
        "learning_rate": 3.0,
        "max_steps": 40,
        "save_steps": 1,
    }
    training = AdapterTraining(**{**TRAINING.model_dump(), **asked})
    out = go_on(toy, start, tmp_path / "out", training)
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval/loss"] for row in history if row["step"] and "eval/loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert json.loads((out / "metrics.json").read_text())["train/steps"] == best + 2 < 40
    kept = weights(tmp_path / f"out-scratch/checkpoint-{best}")
    assert all(torch.equal(value, kept[name]) for name, value in weights(out / "adapter").items())


def test_an_adapter_of_another_method_is_refused(toy: TinyToy, tmp_path: Path) -> None:
    other = toy.train("sft", tmp_path / "sft") / "adapter"
    with pytest.raises(QAdapterError, match="is no Q-Adapter"):
        go_on(toy, other, tmp_path / "out")
