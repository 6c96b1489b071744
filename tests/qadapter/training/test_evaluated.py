"""Evaluation while an adapter trains: on pairs set aside, with early stop and best checkpoint, killed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from qadapter.config.experiment import load_experiment
from qadapter.config.training import AdapterTraining, OptimizerSettings
from qadapter.errors import QAdapterError
from qadapter.planning.preflight import check_experiment
from qadapter.preferences.pair import load_pairs
from qadapter.progress.reports import listening
from qadapter.training.evaluated import larger_is_better, set_aside
from tasks.train import keyed
from tests.support.heard import Heard
from tests.support.killed_training import killed_at
from tests.support.tiny_toy import TinyToy, make_tiny_toy, rows

EVALUATED = AdapterTraining(
    learning_rate=5e-2, max_steps=8, batch_size=4, max_length=64, logging_steps=4, eval_steps=2, eval_pairs=3
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("evaluated"))


def curve_of(out: Path) -> list[dict[str, Any]]:
    """The training's curves."""
    return rows(out / "history.jsonl")


def same_weights(first: Path, second: Path) -> bool:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["q-adapter", "dpo", "sft", "orpo"])
def test_evaluation_while_training(world: TinyToy, tmp_path: Path, method: str) -> None:
    """Before the first step and every second one, on pairs that are not trained on; all of it in the curves."""
    heard = Heard()
    with listening(heard):
        world.train(method, tmp_path / "out", training=EVALUATED)
    points = [row for row in curve_of(tmp_path / "out") if "eval/loss" in row]
    assert [row["step"] for row in points] == [0, 2, 4, 6, 8]
    assert points[0]["eval/loss"] != points[-1]["eval/loss"]
    if method not in ("sft",):
        assert all(0 <= row["eval/rewards/accuracies"] <= 1 for row in points)
    assert not [name for row in points for name in row if "second" in name or "runtime" in name]
    assert [told for told in heard.told if isinstance(told, dict)] == curve_of(tmp_path / "out")
    assert set(points[0]) & {"train/loss"} == set()
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (
        metrics["train/final_loss"]
        == [row for row in curve_of(tmp_path / "out") if "train/loss" in row][-1]["train/loss"]
    )


def test_pairs_that_are_set_aside_are_not_trained_on(
    world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = load_pairs(world.pairs)
    order, held = set_aside(pairs, 3)
    assert sorted(order) == list(range(len(pairs)))
    aside = {pairs[i].prompt_digest for i in order[-held:]}
    assert held >= 3
    assert not aside & {pairs[i].prompt_digest for i in order[:-held]}
    trained: list[int] = []
    step = Trainer.training_step

    def watched(trainer: Trainer, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        trained.append(len(inputs["input_ids"]))
        return step(trainer, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", watched)
    out = world.train("sft", tmp_path / "out", training=EVALUATED)
    left = len(pairs) - held
    epoch = [8] * (2 * left // 8) + (
        [2 * left % 8] if 2 * left % 8 else []
    )  # two replies per pair, four pairs per step
    assert trained == (epoch * 8)[:8]
    assert json.loads((out / "metrics.json").read_text())["train/steps"] == 8
    with pytest.raises(QAdapterError, match=r"eval_pairs sets aside 10 of 10 training pairs"):
        set_aside(pairs, 10)


@pytest.mark.slow
def test_the_best_checkpoint_and_an_early_stop_survive_kills(
    world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate that overshoots, a training is best early; killed anywhere it ends the same."""
    settings = EVALUATED.model_copy(update={"learning_rate": 3.0, "max_steps": 60, "early_stopping": 2})

    def train(name: str, scratch: str) -> Path:
        return world.train("sft", tmp_path / name, training=settings, scratch=tmp_path / scratch)

    whole = train("whole", "s1")
    steps = json.loads((whole / "metrics.json").read_text())["train/steps"]
    losses = {row["step"]: row["eval/loss"] for row in curve_of(whole) if row["step"] and "eval/loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert steps == best + 4 < 60, "two evaluations in a row were no better"
    saved = load_file(whole / "adapter/adapter_model.safetensors")
    kept = load_file(tmp_path / f"s1/checkpoint-{best}/adapter_model.safetensors")
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
    killed_at(best + 1, monkeypatch, lambda: train("killed", "s2"))
    resumed = train("resumed", "s2")
    again = train("again", "s1")  # killed behind the last checkpoint: nothing is trained any more
    for other in (resumed, again):
        assert same_weights(whole / "adapter", other / "adapter")
        assert curve_of(other) == curve_of(whole)
        assert json.loads((other / "metrics.json").read_text())["train/steps"] == steps


def test_a_metric_that_is_not_there_is_refused_at_once(world: TinyToy, tmp_path: Path) -> None:
    settings = EVALUATED.model_copy(update={"best_by": "rewards/accuracy"})
    with pytest.raises(QAdapterError, match=r"best_by: the evaluation has no 'rewards/accuracy'; it has .*loss"):
        world.train("q-adapter", tmp_path / "out", training=settings)
    assert not list(tmp_path.glob("out-scratch/checkpoint-*"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"best_by": "loss"}, "best_by has no effect without eval_steps"),
        ({"early_stopping": 2}, "early_stopping has no effect without eval_steps"),
        ({"eval_steps": 5, "best_by": "loss", "save_steps": 10}, "leave save_steps out"),
        ({"report_to": ["tensorboards"]}, "tensorboard"),
    ],
)
def test_evaluation_settings_that_contradict_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterTraining(learning_rate=1.0, batch_size=1, max_length=8, **given)


def test_what_is_better_when_larger() -> None:
    better = {
        "loss": False,
        "rewards/accuracies": True,
        "kl/base": False,
        "rewards/margins": True,
        "loss/preference": False,
    }
    assert {name: larger_is_better(name) for name in better} == better


def test_settings_of_evaluation_change_no_key_unless_given() -> None:
    plain = AdapterTraining(learning_rate=1.0, batch_size=1, max_length=8, report_to=["wandb"])
    assert keyed(plain) == keyed(OptimizerSettings(learning_rate=1.0, batch_size=1, max_length=8))
    assert keyed(EVALUATED)["eval_steps"] == 2


def test_other_trackers_get_the_curves_too(world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own callback of the tracker hears each log, under a name of this training."""
    told: list[Any] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            told.append((args.run_name, state.global_step, "loss" in logs))

    monkeypatch.setattr("qadapter.config.training.check_trackers", lambda _: None)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "trackio", Tracker)
    training = EVALUATED.model_copy(update={"eval_steps": None, "eval_pairs": None, "report_to": ("trackio",)})
    world.train("sft", tmp_path / "out", training=training)
    assert [entry[1:] for entry in told] == [(1, True), (4, True), (8, True), (8, False)]
    assert {entry[0] for entry in told} == {"sft out-scratch"}


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qadapter.config.trackers.find_spec", lambda _: None)
    experiment = load_experiment("smoke", {"helpful_sft.report_to": ["wandb", "trackio"]})
    with pytest.raises(QAdapterError, match=r"report_to names wandb, trackio, which are not installed; install it"):
        check_experiment(experiment, None, fixed={}, rows=1, downloads=tmp_path, remote=False)
